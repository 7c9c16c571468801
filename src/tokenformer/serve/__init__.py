"""Fast inference on other engines: export a checkpoint to one, with fewer bits a weight, check it, and run it there.

transformers' own exporters and quantizers do the work; an engine is imported when it is used. May import
`checkpoints` and what stands above it.
"""
