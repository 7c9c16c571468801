"""The commands that weigh costs and gains: parse, call one function, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from .arguments import Results, check_recipe

comparisons = typer.Typer()


@comparisons.command()
def compare(
    recipe: Annotated[
        Path, typer.Argument(help="YAML file; recipes/compare holds examples.", metavar="RECIPE", callback=check_recipe)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Its folder.  [default: runs/compare/NAME of the recipe]")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes.  [default: one a GPU, or one for every training.threads cores]", min=1),
    ] = None,
) -> None:
    """Compare ways to train and grow at equal cost, by rules stated before; the same command continues."""
    from ..compare.recipe import load_compare_recipe
    from ..compare.report import write_report
    from ..compare.run import compare as run
    from .displays import ComparisonDisplay

    console = Console()
    folder = output or Path("runs") / "compare" / recipe.stem
    content = load_compare_recipe(recipe)
    try:
        with ComparisonDisplay(console) as display:
            lines = run(content, folder, name=recipe.stem, workers=workers, on_event=display)
    except KeyboardInterrupt:
        Console(stderr=True).print("Interrupted; the same command continues.")
        raise typer.Exit(130) from None
    console.print(f"Report: {write_report(lines, folder)}", markup=False, soft_wrap=True)


@comparisons.command()
def report(
    results: Results,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.html, report.md and pictures.")],
) -> None:
    """Make the report of a comparison from its results alone, those of several machines together."""
    from ..compare.report import write_report
    from ..compare.results import read_results

    lines = [line for path in results for line in read_results(path)]
    Console().print(f"Report: {write_report(lines, output)}", markup=False, soft_wrap=True)


@comparisons.command("plan")
def show_plan(
    plan: Annotated[
        Path, typer.Argument(help="YAML file; recipes/plan/paper.yaml is one.", metavar="PLAN", callback=check_recipe)
    ],
) -> None:
    """Say what growing will cost beside training from scratch: FLOPs, memory, hours, money."""
    from ..plan import conclusions, cost_table, published_table, read_plan

    content, console = read_plan(plan), Console()
    hardware = content.hardware
    device = hardware.device or f"device of {hardware.peak_tflops:g} TFLOP/s"
    memory = f" ({hardware.memory_bytes / 1e9:,.1f} GB)" if hardware.memory_bytes else ""
    console.print(
        f"{hardware.count} × {device}{memory} at {hardware.utilisation:.0%} of the peak; context {content.context:,}",
        f"GB/device: weights, gradients, AdamW's moments{', sharded' if hardware.sharded else ''}; activations on top",
        sep="\n",
        markup=False,
    )
    console.print(cost_table(content))
    if any(run.published_hours is not None for run in (*content.grown, *content.scratch)):
        console.print(published_table(content))
    for sentence in conclusions(content):
        console.print(sentence, markup=False)
