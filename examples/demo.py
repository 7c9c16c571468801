"""The main job in a few minutes: train a small TokenFormer on Shakespeare, grow it twice, and doubt it.

Trains recipes/demo.yaml, then, for the same cumulative FLOPs each, the small size it began with and the final size from
scratch. Shows the three: a table, samples, a picture. An interrupted demo continues where it stopped.

    python examples/demo.py                                  everything under runs/demo
    python examples/demo.py --results benchmarks/results     also write demo.jsonl and demo.png there, for the README
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
import yaml
from rich.console import Console

from tokenformer import cost
from tokenformer.checkpoints.checkpoint import load_checkpoint, read_config
from tokenformer.checkpoints.verify import verify_checkpoint
from tokenformer.cli.displays import TrainingDisplay, growth_line
from tokenformer.cli.tables import stage_row, stage_table
from tokenformer.errors import TokenformerError
from tokenformer.quiet import quiet_libraries
from tokenformer.training.log import read_log
from tokenformer.training.recipe import Recipe, load_recipe, parse_recipe
from tokenformer.training.train import train

RECIPE = Path(__file__).parent.parent / "recipes" / "demo.yaml"
PROMPT = "ROMEO"


def rival_recipe(grown: Recipe, size: Path, final: Path) -> Recipe:
    """Return the recipe that spends the FLOPs of `final` on a model of the size of `size` that never grows."""
    config, spent = read_config(size), verify_checkpoint(final).last.training_flops
    content = grown.model_dump(exclude_unset=True)
    sizes = ("qkv_param_tokens", "output_param_tokens", "ffn_param_tokens", "num_hidden_layers")
    content["model"] |= {field: getattr(config, field) for field in sizes}
    per_token = cost.training_flops(config, grown.training.sequence_length)
    evaluations = grown.training.evaluations_per_stage * len(grown.stages)
    content["training"] |= {"evaluations_per_stage": evaluations}
    content["stages"] = [{"text_tokens": round(spent / per_token)}]
    return parse_recipe(content)


def run(recipe: Recipe, folder: Path, console: Console) -> list[Path]:
    """Train, or continue, or find finished, showing progress."""
    with TrainingDisplay(console) as display:
        return train(recipe, folder, resume=(folder / "recipe.yaml").exists(), on_event=display)


def picture(runs: dict[str, Path], target: Path) -> None:
    """Draw validation loss against cumulative training FLOPs, growth marked, as a PNG."""
    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    for label, folder in runs.items():
        events = read_log(folder)
        points = [(e["training_flops"], e["loss"]) for e in events if e["event"] == "evaluation"]
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=label)
        for e in events:
            if e["event"] == "growth":
                axes.axvline(e["training_flops"], color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="cumulative training FLOPs", ylabel="validation loss (nats per text token)")
    axes.set_title("Shakespeare; dotted: grown, losing nothing")
    axes.legend()
    figure.savefig(target)
    plt.close(figure)


def rows(runs: dict[str, list[Path]]) -> list[tuple[str, Path]]:
    """Label each checkpoint for the table."""
    return [
        (f"{name} {i + 1}" if len(checkpoints) > 1 else name, checkpoint)
        for name, checkpoints in runs.items()
        for i, checkpoint in enumerate(checkpoints)
    ]


def write_results(runs: dict[str, list[Path]], target: Path) -> None:
    """Write one JSON line per row of the table, and one per growth."""
    lines: list[dict[str, Any]] = []
    for label, checkpoint in rows(runs):
        config, last = read_config(checkpoint), verify_checkpoint(checkpoint).last
        facts = last.model_dump(
            include={"text_tokens_seen", "training_flops", "training_seconds", "loss", "bits_per_byte"}
        )
        sizes = {"parameters": cost.parameters(config), "parameter_tokens": cost.group_tokens(config)}
        lines.append({"row": label, **sizes, **facts, "date": last.date, "versions": last.versions})
    for checkpoints in runs.values():
        growths = [e for e in read_log(checkpoints[0].parent) if e["event"] == "growth"]
        keys = ("event", "stage", "loss_before", "loss_after", "logits_equal")
        lines += [{key: e[key] for key in keys} for e in growths]
    target.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def sample(checkpoint: Path) -> str:
    """Let a checkpoint continue the prompt."""
    model, tokenizer, _ = load_checkpoint(checkpoint)
    assert tokenizer is not None  # training saved it
    torch.manual_seed(0)
    prompt = tokenizer(f"{tokenizer.eos_token}{PROMPT}", return_tensors="pt")
    sampling = {"do_sample": True, "temperature": 0.8, "top_k": 50, "pad_token_id": tokenizer.eos_token_id}
    written = model.generate(**prompt, max_new_tokens=60, **sampling)
    return str(tokenizer.decode(written[0], skip_special_tokens=True)).strip()


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder for everything")
    parser.add_argument("--results", type=Path, help="folder for demo.jsonl and demo.png as well")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="another recipe that grows")
    arguments = parser.parse_args()
    quiet_libraries()
    console = Console()
    recipe = load_recipe(arguments.recipe)
    folders = {name: arguments.output / name for name in ("grown", "small", "scratch")}

    console.rule("grown: train, grow, train on, grow, train on")
    grown = run(recipe, folders["grown"], console)
    console.rule("small: the first size, never grown, for the same cumulative FLOPs")
    small = run(rival_recipe(recipe, grown[0], grown[-1]), folders["small"], console)
    console.rule("scratch: the final size from the first step on, for the same cumulative FLOPs")
    scratch = run(rival_recipe(recipe, grown[-1], grown[-1]), folders["scratch"], console)
    runs = {"grown": grown, "small": small, "scratch": scratch}

    console.rule("samples")
    for label, checkpoint in (("before it grew", grown[0]), ("grown", grown[-1])):
        console.print(f"[bold]{label}[/bold]")
        console.print(sample(checkpoint), markup=False, highlight=False)
    console.rule("result")
    for event in read_log(folders["grown"]):
        if event["event"] == "growth":
            console.print(growth_line(event))
    console.print(stage_table(stage_row(*row) for row in rows(runs)))
    losses = {name: verify_checkpoint(checkpoints[-1]).last.loss or math.nan for name, checkpoints in runs.items()}
    for rival, meaning in (("small", "the small model trained on"), ("scratch", "the model trained from scratch")):
        difference = losses["grown"] - losses[rival]
        console.print(
            f"For the same cumulative FLOPs the grown model's validation loss is {abs(difference):.4f} "
            f"{'lower' if difference < 0 else 'higher'} than that of {meaning} (one seed)."
        )

    image = arguments.output / "loss.png"
    picture(folders, image)
    if arguments.results:
        arguments.results.mkdir(parents=True, exist_ok=True)
        write_results(runs, arguments.results / "demo.jsonl")
        shutil.copyfile(image, arguments.results / "demo.png")
    more = arguments.output / "continue.yaml"
    content = recipe.model_dump(exclude_unset=True)
    content |= {
        "model": {"checkpoint": str(grown[-1])},
        "stages": [{"ffn_param_tokens": "+50%", "text_tokens": 40_000}],
    }
    more.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    console.print(f"Picture:          {image}", soft_wrap=True)
    console.print(f"Final checkpoint: {grown[-1]}", soft_wrap=True)
    console.print(f"Grow it further:  tokenformer train {more}", soft_wrap=True)


if __name__ == "__main__":
    try:
        main()
    except TokenformerError as error:
        Console(stderr=True).print(f"error: {error}", markup=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted; the same command continues.")
        sys.exit(130)
