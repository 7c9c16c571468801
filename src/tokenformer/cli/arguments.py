"""What several commands take. That a file or folder is there is asked before anything slow is imported."""

import difflib
from pathlib import Path
from typing import Annotated

import typer

from ..checkpoints.files import find_checkpoint
from ..checkpoints.verify import exported_for, is_addon_folder
from ..errors import CheckpointError, RecipeError


def _nearest(path: Path) -> str:
    """Return a hint at the file or folder beside a missing one whose name is nearest, or nothing."""
    folder = path.parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {folder / near[0]}?" if near else ""


def _within(folder: Path) -> str:
    """Return a hint at the last checkpoint in a folder of several, such as a run's, or nothing."""
    inner = sorted(entry.parent for entry in folder.glob("[!.]*/config.json"))
    return f"; did you mean {inner[-1]}?" if inner else ""


def check_recipe(path: Path) -> Path:
    """Return a recipe's file; RecipeError if there is none."""
    if path.is_dir():
        inside = sorted(path.glob("*.yaml"))
        hint = f"did you mean {inside[0]}?" if inside else "give the YAML file that says what to do"
        raise RecipeError(f"cannot read recipe {path}: it is a folder; {hint}")
    if not path.exists():
        raise RecipeError(f"cannot read recipe {path}: there is no such file{_nearest(path)}")
    return path


def _results(paths: list[Path]) -> list[Path]:
    for path in paths:
        if not path.exists():
            raise RecipeError(f"cannot read results {path}: there is no such file{_nearest(path)}")
    return paths


def check_checkpoint(path: Path) -> Path:
    """Return a checkpoint's folder; CheckpointError if it is none."""
    if is_addon_folder(path):
        raise CheckpointError(
            f"{path} is an add-on, tokens beside the linear maps of its parent: generate, evaluate, inspect take it; "
            "all else is done to whole checkpoints"
        )
    if engine := exported_for(path):
        raise CheckpointError(
            f"{path} is an export for {engine}: generate and evaluate take it; all else is done to the checkpoint that "
            "it was made from"
        )
    find_checkpoint(path, hint=_within(path) if path.is_dir() else _nearest(path))
    return path


def check_model(path: Path) -> Path:
    """Return the folder of a checkpoint or of an add-on; CheckpointError if it is neither."""
    return path if is_addon_folder(path) else check_checkpoint(path)


def check_runnable(path: Path) -> Path:
    """Return the folder of an export, a checkpoint or an add-on; CheckpointError if it is none of them."""
    return path if exported_for(path) else check_model(path)


Runnable = Annotated[
    Path,
    typer.Argument(help="Folder of a checkpoint, add-on or export.", metavar="CHECKPOINT", callback=check_runnable),
]
Model = Annotated[
    Path, typer.Argument(help="Folder of a checkpoint or add-on.", metavar="CHECKPOINT", callback=check_model)
]
Checkpoint = Annotated[
    Path, typer.Argument(help="Folder of a checkpoint.", metavar="CHECKPOINT", callback=check_checkpoint)
]
Force = Annotated[bool, typer.Option("--force", help="Replace what stands at the output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Keep = Annotated[float, typer.Option(help="Share of each token group to load, of a sorted checkpoint.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder of the new checkpoint.")]
Parts = Annotated[
    list[str], typer.Argument(help='Token groups, "embedding", "final_norm" or "linear_maps".', metavar="NAME…")
]
Text = Annotated[str, typer.Option(help="Text to judge by: file, folder, glob or dataset.", metavar="SOURCE")]


Recipe = Annotated[Path, typer.Argument(help="YAML file.", metavar="RECIPE", callback=check_recipe)]
Results = Annotated[
    list[Path], typer.Argument(help="results.jsonl of one comparison.", metavar="RESULTS", callback=_results)
]
