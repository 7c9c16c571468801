"""Train a recipe: stage after stage, growing in between; resumable to the same bits.

A run folder holds `recipe.yaml`, `log.jsonl`, one checkpoint per finished stage (`stage1`, `stage2`, …, each with
`optimizer.pt`) and, while a stage trains, `stageN.partial` with the Trainer's own checkpoints. Every stage starts from
files alone, so an interrupted run and an uninterrupted one go through the same states.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..checkpoints.checkpoint import load_checkpoint
from ..checkpoints.lineage import Lineage
from ..checkpoints.lock import locked
from ..checkpoints.optimizer import OptimizerState, load_states
from ..errors import CheckpointError, DataError, TokenformerError
from ..growth.tokenise import build
from ..quiet import without_bars
from . import sharded, whole
from .log import Log, OnEvent, read_log
from .material import Material
from .partial import unfinished
from .preparation import begin_run, check_resumable, prepare_run
from .processes import from_main, processes, started_again
from .recipe import Recipe, load_recipe, parse_recipe
from .settings import stage_settings
from .stage import Begin, run_stage


@without_bars()
def train(
    recipe: Recipe | str | Path | dict[str, Any],
    folder: str | Path,
    *,
    resume: bool = False,
    force: bool = False,
    on_event: OnEvent = lambda event: None,
) -> list[Path]:
    """Train `recipe` in `folder` and return the checkpoints of its stages, the final one last.

    Args:
        recipe: what to do; as a path, the YAML file that says it, and as a dictionary, what such a file holds.
        folder: the run folder.
        resume: continue what an earlier call began, from its newest whole checkpoint; with the same machine and
            threads the final weights equal those of an uninterrupted run bit for bit. Where torchrun starts processes
            again because one was lost, they do so unasked.
        force: replace an existing run folder, once what comes before the first step has gone well.
        on_event: called with every event of the run, in order: "data", "stage", "growth", "train", "evaluation",
            "damaged", "skipped", "diverged", "end"; all are lines of log.jsonl. "progress", one a step, is not.

    Raises:
        RecipeError: the recipe makes no sense, or on resuming is not the one the run began with.
        DataError, TokenizerError: from the data. GrowthError: from growing.
        TokenformerError: gradients that are not finite, before they reach the weights.
        CheckpointError: the folder exists, or another process trains in it, or it cannot be written.
        KeyboardInterrupt: after Ctrl-C, once the state is saved (a second Ctrl-C leaves at once).
    """
    if isinstance(recipe, dict):
        recipe = parse_recipe(recipe)
    elif not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    run = Path(folder)
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)
    if started_again() and (run / "recipe.yaml").exists():
        resume, force = True, False
    if resume and force:
        raise CheckpointError("--resume continues a run and --force starts it over: give one of them")
    main_process = processes().is_main_process
    with ExitStack() as held:
        data, problem = None, None
        if main_process:
            try:
                held.enter_context(locked(run))
                data = _prepared(recipe, run, resume=resume, force=force)
            except TokenformerError as error:
                problem = error
        if problem := from_main(problem):  # what stops one stops all
            problem.said = not main_process
            raise problem
        if data is None:
            data = prepare_run(recipe, run)
        log = Log(run / "log.jsonl", on_event if main_process else lambda event: None, enabled=main_process)
        _check_data(log, data)
        return _train_stages(recipe, run, data, log)


def _prepared(recipe: Recipe, run: Path, *, resume: bool, force: bool) -> Material:
    if not resume:
        return begin_run(recipe, run, force=force)
    check_resumable(recipe, run)
    return prepare_run(recipe, run)


def _check_data(log: Log, data: Material) -> None:
    """Log what the data is; DataError where the run began with another."""
    logged = read_log(log.path.parent) if log.path.exists() else []
    began = next((event for event in logged if event["event"] == "data"), None)
    if began is None:
        log.write({"event": "data", **data.facts})
        return
    # An earlier version of this package told fewer facts.
    changed = [f"{k} {began[k]} → {v}" for k, v in data.facts.items() if began.get(k, v) != v]
    if changed:
        raise DataError(f"the data is not what this run began with ({', '.join(changed)}); put it back, or start anew")


def _train_stages(recipe: Recipe, run: Path, data: Material, log: Log) -> list[Path]:
    """Train what is not there yet, and return the checkpoints of all stages."""
    checkpoints: list[Path] = []
    for index in range(len(recipe.stages)):
        checkpoint = run / f"stage{index + 1}"
        if not checkpoint.exists():
            previous = checkpoints[-1] if checkpoints else recipe.model.checkpoint
            settings = stage_settings(recipe, index)
            if recipe.training.parallel is None:
                start = partial(_start, recipe, settings.weights_seed, data, previous)
                begin: Begin = partial(whole.begin, start)
            else:
                begin = partial(sharded.begin, recipe, previous)
            run_stage(settings, begin, data, log, checkpoint, parent=previous)
        if log.enabled:
            shutil.rmtree(unfinished(checkpoint), ignore_errors=True)
        checkpoints.append(checkpoint)
    return checkpoints


def _start(
    recipe: Recipe, seed: int, data: Material, previous: str | Path | None
) -> tuple[PreTrainedModel, OptimizerState, Lineage]:
    """Build what a stage starts from, out of files and seeds alone."""
    torch.manual_seed(seed)
    if previous is None:
        config = data.config(recipe)
        return build(config, dtype=torch.float32), {}, Lineage()
    model, _, lineage = load_checkpoint(previous, dtype=torch.float32)
    data.adapt(model.config, recipe)
    return model, load_states(previous), lineage
