"""Text: where it comes from, tokenizers, text blocks, what is held out. Nothing of models.

May import errors and sections.
"""
