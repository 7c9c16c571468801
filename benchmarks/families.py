"""Which family the demo uses: the paper's (all projections Pattention) or -ffn, at the demo's final size.

Same text, tokenizer, parameters, text tokens and schedule; two learning rates; three seeds. Every run is a recipe under
runs/families, so an interrupted trial continues. Writes benchmarks/results/families.jsonl, a line per run, and prints
mean and spread. About ten minutes on 2 cores:

    python benchmarks/families.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from layer import RESULTS, machine
from rich.console import Console

from tokenformer import cost
from tokenformer.checkpoints.checkpoint import read_config
from tokenformer.checkpoints.verify import verify_checkpoint
from tokenformer.cli.displays import TrainingDisplay
from tokenformer.quiet import quiet_libraries
from tokenformer.training.recipe import load_recipe, parse_recipe
from tokenformer.training.train import train

RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"
# 2·128·(4·160 + 640) parameters in a block are 4·128² + 2·128·1024.
FAMILIES = {
    "paper": {"qkv_param_tokens": 160, "output_param_tokens": 160, "ffn_param_tokens": 640},
    "ffn": {"qkv_param_tokens": 0, "output_param_tokens": 0, "ffn_param_tokens": 1024},
}
LEARNING_RATES = (1e-3, 3e-3)
SEEDS = (0, 1, 2)
TEXT_TOKENS = 400_000


def main() -> None:
    """Train what is not trained yet and write everything."""
    quiet_libraries()
    console = Console()
    base = load_recipe(RECIPE).model_dump(exclude_unset=True)
    lines: list[dict[str, Any]] = []
    for family, sizes in FAMILIES.items():
        for learning_rate in LEARNING_RATES:
            losses = []
            for seed in SEEDS:
                content = {
                    **base,
                    "model": base["model"] | sizes,
                    "training": base["training"] | {"learning_rate": learning_rate, "evaluations_per_stage": 1},
                    "stages": [{"text_tokens": TEXT_TOKENS}],
                    "seed": seed,
                }
                folder = Path("runs/families") / f"{family}-{learning_rate}-{seed}"
                with TrainingDisplay(console) as display:
                    resume = (folder / "recipe.yaml").exists()
                    (checkpoint,) = train(parse_recipe(content), folder, resume=resume, on_event=display)
                last = verify_checkpoint(checkpoint).last
                losses.append(last.loss or 0.0)
                facts = {"family": family, "learning_rate": learning_rate, "seed": seed}
                costs = last.model_dump(include={"text_tokens_seen", "training_flops", "loss", "bits_per_byte"})
                lines.append({**facts, "parameters": cost.parameters(read_config(checkpoint)), **costs})
            mean, spread = statistics.mean(losses), statistics.stdev(losses)
            console.print(f"[bold]{family}, learning rate {learning_rate}: {mean:.4f} ± {spread:.4f}[/bold]")
    with (RESULTS / "families.jsonl").open("w") as stream:
        stream.writelines(json.dumps(line | {"machine": machine()}) + "\n" for line in lines)


if __name__ == "__main__":
    main()
