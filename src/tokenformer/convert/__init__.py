"""Checkpoints of other code into ours and back: name tables and small functions of tensors."""
