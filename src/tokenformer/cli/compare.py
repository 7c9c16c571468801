"""The commands that weigh costs and gains: parse, call one function, print."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import RecipeError
from .arguments import Json, Results, check_recipe
from .console import make_console

if TYPE_CHECKING:
    from ..plan import Cost, Plan

comparisons = typer.Typer()


def _given_recipe(path: Path | None) -> Path | None:
    return None if path is None else check_recipe(path)


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
    as_json: Json = False,
) -> None:
    """Compare ways to train and grow at equal cost. Rules are stated before; the same command continues."""
    from ..compare.recipe import load_compare_recipe
    from ..compare.report import write_report
    from ..compare.run import compare as run
    from .displays import ComparisonDisplay

    console = make_console(stderr=as_json)
    folder = output or Path("runs") / "compare" / recipe.stem
    content = load_compare_recipe(recipe)
    try:
        with ComparisonDisplay(console) as display:
            lines = run(content, folder, name=recipe.stem, workers=workers, on_event=display)
    except KeyboardInterrupt:
        make_console(stderr=True).print("Interrupted; the same command continues.")
        raise typer.Exit(130) from None
    _report(lines, write_report(lines, folder), as_json)


@comparisons.command()
def report(
    results: Results,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for report.html, report.md and pictures.")],
    as_json: Json = False,
) -> None:
    """Make the report of a comparison from its results. Those of several machines go together."""
    from ..compare.report import write_report
    from ..compare.results import read_results

    lines = [line for path in results for line in read_results(path)]
    _report(lines, write_report(lines, output), as_json)


@comparisons.command("plan")
def show_plan(
    plan: Annotated[
        Path | None,
        typer.Argument(help="YAML file; recipes/plan/paper.yaml is one.", metavar="PLAN", callback=_given_recipe),
    ] = None,
    run: Annotated[
        Path | None, typer.Option(help="Instead of a plan: folder of a training run, or of a checkpoint.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Training FLOPs to spend on it from now on.")] = None,
    as_json: Json = False,
) -> None:
    """Say what growing costs beside training from scratch. Or whether to train a run on, grow it or start over."""
    if (plan is None) == (run is None) or (run is None) != (budget is None):
        raise RecipeError(
            "give either a plan, as in `tokenformer plan recipes/plan/paper.yaml`, or a trained model and what to "
            "spend on it, as in `tokenformer plan --run runs/small --budget 1e15`"
        )
    if run is not None and budget is not None:
        _advise(run, budget, as_json)
        return
    from ..plan import conclusions, read_plan
    from .tables import cost_table, published_table, total_table

    assert plan is not None
    content, console = read_plan(plan), make_console()
    if as_json:
        typer.echo(json.dumps(_plan_facts(content), ensure_ascii=False))
        return
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
    if len(content.grown) > 1:
        console.print(total_table(content))
    if any(run.published_hours is not None for run in (*content.grown, *content.scratch)):
        console.print(published_table(content))
    for sentence in conclusions(content):
        console.print(sentence, markup=False)


def _advise(run: Path, budget: float, as_json: bool) -> None:
    """Say what to do with a trained model."""
    from ..advise import Trained, advise, sentences
    from ..law import Knowledge
    from .tables import advice_table

    knowledge, model = Knowledge.read(), Trained.read(run)
    advice = advise(model, budget, knowledge)
    said = list(sentences(model, advice, knowledge))
    if as_json:
        facts = ("what", "grown", "rate", "after", "parameters", "text_tokens", "bits_per_byte", "interval", "beyond")
        options = [{fact: getattr(option, fact) for fact in facts} for option in advice.options]
        best = next((i for i, option in enumerate(advice.options) if option is advice.best), None)
        typer.echo(json.dumps({"options": options, "best": best, "conclusions": said}, ensure_ascii=False))
        return
    console = make_console()
    console.print(advice_table(advice))
    for sentence in said:
        console.print(sentence, markup=False, highlight=False)


def _report(lines: list[dict[str, Any]], page: Path, as_json: bool) -> None:
    """Say where the report is; for machines, with what each final run found."""
    if as_json:
        long = ("event", "purpose", "config", "curve", "growths")
        final = [line for line in lines if line.get("purpose") == "final"]
        runs = [{key: value for key, value in line.items() if key not in long} for line in final]
        typer.echo(json.dumps({"report": str(page), "runs": runs}, ensure_ascii=False))
    else:
        make_console().print(f"Report: {page}", markup=False, soft_wrap=True)


def _plan_facts(plan: "Plan") -> dict[str, Any]:
    from ..plan import conclusions

    def facts(cost: "Cost") -> dict[str, Any]:
        device_hours = plan.hardware.device_hours
        hours = {
            "device_hours": device_hours(cost.training_flops),
            "total_device_hours": device_hours(cost.total_flops),
        }
        return {**asdict(cost), **hours}

    return {
        "grown": [facts(cost) for cost in plan.grown_costs],
        "scratch": [facts(cost) for cost in plan.scratch_costs],
        "conclusions": conclusions(plan),
    }
