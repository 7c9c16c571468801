"""A small comparison for the tests of comparisons."""

import random

from tokenformer.compare.recipe import CompareRecipe
from tokenformer.sections import parse_sections

SMALL = {
    "architecture": "gpt_neox",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
TOKENS = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "qkv_param_tokens": 16,
    "output_param_tokens": 16,
    "ffn_param_tokens": 32,
}


def comparison(folder):
    """A comparison of two arms that begin alike, its text written to `folder`; it takes half a minute."""
    words = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler", "slings", "and", "arrows"]
    dice = random.Random(0)
    for i in range(20):
        (folder / f"{i:02}.txt").write_text(f"{i} " + " ".join(dice.choice(words) for _ in range(100)))
    return {
        "question": "Does it pay?",
        "data": {"source": str(folder), "tokenizer": "bytes", "validation_fraction": 0.3},
        "training": {
            "batch_size": 4,
            "sequence_length": 32,
            "threads": 1,
            "precision": "float32",
            "evaluations_per_stage": 1,
            "save_every": 4,
        },
        "equal": "text_tokens",
        "budgets": [1280, 2560],
        "seeds": [0, 1],
        "learning_rates": [1e-3, 1e-2],
        "tuning_budget": 1280,
        "rules": {"reference": "small"},
        "arms": {
            "small": {"model": SMALL},
            "widened": {"model": SMALL, "stages": [{"at": 640, "ffn_param_tokens": 64}]},
        },
    }


def parsed(content, **changes) -> CompareRecipe:
    return parse_sections(CompareRecipe, {**content, **changes}, where="recipe")
