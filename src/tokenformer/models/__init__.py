"""What a checkpoint needs in order to run: torch and transformers, nothing else of ours."""
