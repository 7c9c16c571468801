"""Training: recipes, what is prepared before the first step, stages, and a run of them.

May import errors, sections, models, growth, data, cost, evaluation and checkpoints.
"""
