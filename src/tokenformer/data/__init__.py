"""Text and images: where they come from, tokenizers, text blocks, what is held out. Nothing of models.

May import errors and sections.
"""
