"""Run a comparison: segments in parallel processes, each trained once, results in one append-only file.

A comparison's folder holds `results.jsonl`, the tokenizer, and `segments/ID` with the checkpoint and the log of each
segment. Workers need no master: each takes the first segment whose parent is there and whose lock nobody holds. Locks
are the operating system's, so that a killed worker lets go, and the next one resumes where its checkpoints end.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import multiprocessing

from .. import cost
from ..checkpoints.disk import disk_errors
from ..data.text import HeldOut, TextData, prepare
from ..errors import DataError, GrowthError, RecipeError, TokenformerError
from ..growth.beside import grow_beside
from ..growth.freeze import freeze_only
from ..growth.tokenise import build
from ..quiet import quietly
from ..training.difficulty import difficulty
from ..training.partial import unfinished
from ..training.text import first_config
from .arms import Run, Segment, final_runs, segments
from .methods import grow_by
from .recipe import CompareRecipe
from .results import Line, Results
from .segment import Text, initial_line, train_segment
from .tuning import known_runs

_PAUSE = 0.5  # seconds between looks for work, where others hold all there is
_PATIENCE = 30.0  # seconds for a worker to save its state

OnEvent = Callable[[dict[str, Any]], None]


def compare(
    recipe: CompareRecipe,
    folder: str | Path,
    *,
    name: str = "comparison",
    workers: int | None = None,
    on_event: OnEvent = lambda event: None,
) -> list[Line]:
    """Run what `folder` does not hold yet of a comparison, and return all lines of its results.

    Under torchrun, and in a Slurm array, every process or job takes its share of the arms.

    Args:
        recipe: what to compare.
        folder: where everything goes; one that holds a part of this comparison is continued.
        name: of the comparison, for its report.
        workers: processes. Default: one for every GPU, or for every `training.threads` cores.
        on_event: called with every new line of results, and then with {"event": "progress", "done", "total"}; first
            with {"event": "shared"} where another process runs the same comparison there.

    Raises:
        RecipeError: the recipe makes no sense, or the folder holds another comparison.
        DataError: the folder holds a comparison on another text.
        DataError, TokenizerError, GrowthError, CheckpointError: from text, growing, files.
        TokenformerError: a worker failed, or was interrupted.
        KeyboardInterrupt: after Ctrl-C, once the workers have saved their state.
    """
    run = Path(folder)
    with disk_errors(run):
        run.mkdir(parents=True, exist_ok=True)
    results, (index, count) = Results(run), _share()
    with disk_errors(run), FileLock(run / ".beginning.lock"):  # two that begin at once could mix rules, or tokenizers
        text = load_text(recipe, run, fresh=not results.lines())
        rehearse(recipe, text)
        results.begin(recipe, name, text.report.facts)
    presence = FileLock(run / ".presence.lock")
    try:
        presence.acquire(timeout=0)
    except Timeout:
        if count == 1:
            on_event({"event": "shared"})
    try:
        return _run(recipe, run, results, list(recipe.arms)[index::count], workers=workers, on_event=on_event)
    finally:
        presence.release()


def _run(
    recipe: CompareRecipe, run: Path, results: Results, arms: list[str], *, workers: int | None, on_event: OnEvent
) -> list[Line]:
    """Start workers, and report what they do until all is there; errors as `compare`."""
    devices = _devices()
    content = recipe.model_dump_json(exclude_unset=True)
    context = multiprocessing.start_processes(
        quietly,
        (__name__, _worker.__name__, devices, content, str(run), arms),
        workers or _default_workers(recipe, devices),
        join=False,
        start_method="spawn",
    )
    seen, ended = 0, False
    while not ended:
        try:
            ended = context.join(timeout=1.0)
        except multiprocessing.ProcessRaisedException as error:
            raise TokenformerError(f"a worker failed: {str(error).strip().splitlines()[-1]}") from error
        except multiprocessing.ProcessExitedException as error:
            raise TokenformerError(
                f"a worker was killed, perhaps because memory ran out ({error}); the same command continues"
            ) from error
        except KeyboardInterrupt:
            for process in context.processes:  # the terminal's Ctrl-C reached them too
                process.join(_PATIENCE)
            raise
        lines = results.lines()
        for line in lines[seen:]:
            on_event(line)
        if len(lines) > seen:
            done, total = _progress(recipe, arms, lines)
            on_event({"event": "progress", "done": done, "total": total})
        seen = len(lines)
    if _unfinished(recipe, arms, lines, run / "segments"):
        raise TokenformerError(
            "a worker was interrupted by a signal of its own, before all runs were there; it has saved its state, and "
            "the same command continues"
        )
    return lines


def load_text(recipe: CompareRecipe, folder: Path, *, fresh: bool = False) -> Text:
    """Read the text and its held-out documents; one process at a time, the others find it cached.

    A `fresh` comparison, one without results, makes its tokenizer anew: one that is there is of an attempt that failed,
    perhaps on another text.
    """
    length = recipe.training.sequence_length
    with FileLock(folder / ".text.lock"):
        if fresh:
            shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        data = prepare(
            recipe.data,
            sequence_length=length,
            tokenizer_folder=folder / "tokenizer",
            others=recipe.other_texts,
            difficulty=difficulty,
        )
        return Text(*_halve_validation(data, sequence_length=length))


def rehearse(recipe: CompareRecipe, text: Text) -> None:
    """Build and grow every arm without weights: no mistake should wait behind hours of training.

    Raises:
        RecipeError: a model that cannot be made, or final parameters less equal than `rules.parameters_within` asks.
        GrowthError: a growth that is impossible, or frozen parts that are not there.
    """
    sizes = {}
    for name, arm in recipe.arms.items():
        context = recipe.training.sequence_length
        config = first_config(arm.model, text.report, context=context, where=f"arms.{name}.model")
        with torch.device("meta"):
            model = build(config)
            for i, stage in enumerate(arm.stages):
                try:
                    if stage.grow is not None and stage.method == "exact":
                        grow_beside(model, stage.grow.at, stage.grow.tokens, name=None, seed=0)
                    elif stage.grows:
                        model, _ = grow_by(model, {}, stage.method, seed=0, **stage.amounts)
                    freeze_only(model, stage.frozen)
                except GrowthError as error:
                    raise GrowthError(f"arms.{name}.stages.{i}: {error}") from error
        sizes[name] = cost.parameters(model.config)
    within, reference = recipe.rules.parameters_within, sizes[recipe.rules.reference]
    odd = [f"{n} {p:,}" for n, p in sizes.items() if within is not None and abs(p - reference) > within * reference]
    if odd:
        raise RecipeError(
            f"rules.parameters_within asks for final parameters within {within:.1%} of those of "
            f"{recipe.rules.reference!r}, {reference:,}; found {', '.join(odd)}: change them, or drop the rule"
        )


def work(recipe: CompareRecipe, folder: Path, arms: Sequence[str]) -> None:
    """Be one worker: train segments until all runs of `arms` are there; others may work in the same folder.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once the state is saved.
    """
    results, text = Results(folder), load_text(recipe, folder)
    measured = {line["arm"] for line in results.lines() if line["event"] == "initial"}
    results.add(*(initial_line(recipe, arm, text) for arm in arms if arm not in measured))
    while needed := _unfinished(recipe, arms, _with_runs(recipe, arms, results), folder / "segments"):
        if not any(_train_unless_held(segment, results, text, folder / "segments") for segment in needed):
            time.sleep(_PAUSE)


def _worker(rank: int, devices: list[str], content: str, folder: str, arms: list[str]) -> None:
    """Be worker `rank` in a process of its own."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # a worker trains alone, whoever started it
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[rank % len(devices)]
    gc.freeze()  # Trainer collects garbage after every segment: that takes a second if it looks at all imports
    recipe = CompareRecipe.model_validate_json(content)
    if recipe.training.threads is not None:
        torch.set_num_threads(recipe.training.threads)
    try:
        work(recipe, Path(folder), arms)
    except KeyboardInterrupt:
        return


def _train_unless_held(segment: Segment, results: Results, text: Text, folder: Path) -> bool:
    """Train a segment whose parent is there, unless another worker does; return whether it was trained."""
    parent = segment.parent
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / f"{segment.id}.lock", timeout=0):
            done = _segment_lines(results.lines())
            if _is_there(segment, done, folder) or (parent is not None and not _is_there(parent, done, folder)):
                return False
            results.add(train_segment(segment, done[parent.id] if parent else None, text, folder))
            shutil.rmtree(unfinished(folder / segment.id / "checkpoint"), ignore_errors=True)
            return True
    except Timeout:
        return False


def _unfinished(recipe: CompareRecipe, arms: Sequence[str], lines: list[Line], folder: Path) -> list[Segment]:
    """Return the segments to train, parents first; one that is there is trained again where its checkpoint is gone.

    A run whose line is there needs none: results can be added to without the segments that led to them.
    """
    done, found = _segment_lines(lines), dict[str, Segment]()
    ended = {_run_key(line) for line in lines if line["event"] == "run"}
    for run, purpose in (known for arm in arms for known in known_runs(recipe, arm, lines)):
        if (run, purpose) in ended:
            continue
        needed: list[Segment] = []
        for segment in reversed(segments(recipe, run)):
            if segment.id in done and (not needed or _is_there(segment, done, folder)):
                break
            needed.insert(0, segment)
        found |= {segment.id: segment for segment in needed}
    return list(found.values())


def _progress(recipe: CompareRecipe, arms: Sequence[str], lines: list[Line]) -> tuple[float, float]:
    """Return how much of the work is done, and how much there is, in the unit of the budgets."""
    every = dict[str, float]()
    for arm in arms:
        known = known_runs(recipe, arm, lines)
        tuned = any(purpose == "final" for _, purpose in known)
        expected = [] if tuned else final_runs(recipe, arm, recipe.learning_rates[0])
        for segment in (s for run in (*(run for run, _ in known), *expected) for s in segments(recipe, run)):
            every[segment.id] = segment.end - segment.start
    done = _segment_lines(lines)
    return sum(size for name, size in every.items() if name in done), sum(every.values())


def _with_runs(recipe: CompareRecipe, arms: Sequence[str], results: Results) -> list[Line]:
    """Add the lines of runs whose segments are there, until tuning shows no more of them, and return all lines."""
    lines = results.lines()
    while results.add(*_run_lines(recipe, arms, lines)):
        lines = results.lines()
    return lines


def _run_lines(recipe: CompareRecipe, arms: Sequence[str], lines: list[Line]) -> list[Line]:
    """Return the lines of all runs whose segments are there."""
    done, found = _segment_lines(lines), []
    for arm in arms:
        for run, purpose in known_runs(recipe, arm, lines):
            chain = [done.get(segment.id) for segment in segments(recipe, run)]
            if None in chain:
                continue
            whole = [line for line in chain if line is not None]
            facts = ("training_flops", "text_tokens", "seconds", "parameters", "loss", "bits_per_byte", "config")
            found.append(
                {
                    "event": "run",
                    "purpose": purpose,
                    **dataclasses.asdict(run),
                    **{field: whole[-1][field] for field in (*facts, "tuning_bits_per_byte")},
                    **{field: whole[-1][field] for field in ("bits_per_byte_of",) if field in whole[-1]},
                    "growths": [line["growth"] for line in whole if line["growth"]],
                    "curve": [point for line in whole for point in line["curve"]],
                    "segments": [line["id"] for line in whole],
                }
            )
    return found


def _run_key(line: Line) -> tuple[Run, str]:
    run = Run(*(line[field.name] for field in dataclasses.fields(Run)))
    return run, line["purpose"]


def _is_there(segment: Segment, done: dict[str, Line], folder: Path) -> bool:
    return segment.id in done and (folder / segment.id / "checkpoint").exists()


def _segment_lines(lines: list[Line]) -> dict[str, Line]:
    return {line["id"]: line for line in lines if line["event"] == "segment"}


def _share() -> tuple[int, int]:
    """Return which share of the arms is this process's, of how many: of a Slurm array or of torchrun, else all."""
    found = os.environ
    if "SLURM_ARRAY_TASK_ID" in found:
        first, count = int(found.get("SLURM_ARRAY_TASK_MIN", "0")), int(found["SLURM_ARRAY_TASK_COUNT"])
        return (int(found["SLURM_ARRAY_TASK_ID"]) - first) // int(found.get("SLURM_ARRAY_TASK_STEP", "1")), count
    return int(found.get("RANK", "0")), int(found.get("WORLD_SIZE", "1"))


def _devices() -> list[str]:
    """Return the GPUs of this process's workers, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = named.split(",") if named else [str(i) for i in range(torch.cuda.device_count())]
    rank = os.environ.get("LOCAL_RANK")
    return every if rank is None or not every else [every[int(rank) % len(every)]]


def _default_workers(recipe: CompareRecipe, devices: list[str]) -> int:
    if devices or "LOCAL_RANK" in os.environ:
        return max(1, len(devices))
    cores = os.cpu_count() or 1
    return max(1, cores // (recipe.training.threads or cores))


def _halve_validation(data: TextData, *, sequence_length: int) -> tuple[TextData, TextData]:
    """Return `data` twice, each with about half of what every text holds out: one to choose by, one to report.

    Raises:
        DataError: a text holds out one document only.
    """
    halves = {name: _halves(held.documents) for name, held in data.validation.items()}
    first, second = (
        replace(
            data,
            validation={
                name: HeldOut.of(both[side], data.tokenizer, block_length=sequence_length)
                for name, both in halves.items()
            },
        )
        for side in (0, 1)
    )
    return first, second


def _halves(documents: datasets.Dataset) -> tuple[datasets.Dataset, datasets.Dataset]:
    sizes: Counter[str] = Counter()
    for text in documents["text"]:
        sizes[text] += len(text.encode())
    if len(sizes) < 2:
        raise DataError(
            f"{len(sizes)} document is held out of a text, but tuning and reporting need one each: raise "
            "data.validation_bytes or data.validation_fraction, or give text of more documents"
        )
    ends = np.cumsum(list(sizes.values()))
    middle = int(np.clip(np.searchsorted(ends, ends[-1] / 2) + 1, 1, len(ends) - 1))
    chosen = set(list(sizes)[:middle])
    sides = [[i for i, text in enumerate(documents["text"]) if (text in chosen) is side] for side in (True, False)]
    return documents.select(sides[0]), documents.select(sides[1])
