"""Checkpoints on disk: written whole or not at all, verified, with their history; operations on their files.

May import errors, models, growth, data and cost.
"""
