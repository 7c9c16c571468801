"""The states of an unfinished stage: where they are, and which of them are whole.

A state is a folder `checkpoint-STEP` that the Trainer writes, with one file of ours that is written last: the sizes and
digests of all others. A kill, a full disk or a copy can cut a state short; none is continued from unless it is whole.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from ..checkpoints.files import files_digest, replacing_file

_COMPLETE = "complete"


def unfinished(target: Path) -> Path:
    """Return where a stage that will be written to `target` keeps its states until then."""
    return target.with_name(f"{target.name}.partial")


def step_of(state: Path) -> int:
    """Return after which optimizer step a state was written."""
    return int(state.name.removeprefix("checkpoint-"))


def mark_complete(state: Path) -> None:
    """Write down what a whole state consists of."""
    contents = json.dumps(_contents(state), indent=2)
    with replacing_file(state / _COMPLETE, force=True) as file:
        file.write_text(contents, encoding="utf-8")


def states_in(folder: Path) -> list[Path]:
    """Return the states in a folder, whole or not."""
    return [state for state in folder.glob("checkpoint-*") if state.name.removeprefix("checkpoint-").isdecimal()]


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest whole state in `folder`, and what is wrong with each that is newer; those are then deleted.

    A state without a marker was still being written when the run ended, and nothing is wrong with that.
    """
    problems: list[str] = []
    for state in sorted(states_in(folder), key=step_of, reverse=True):
        problem = _problem(state) if (state / _COMPLETE).exists() else ""
        if problem is None:
            return state, problems
        problems += [f"{state.name}: {problem}"] if problem else []
        shutil.rmtree(state)
    return None, problems


def _problem(state: Path) -> str | None:
    """Say what is wrong with a state, or None where it is whole."""
    try:
        expected = json.loads((state / _COMPLETE).read_text(encoding="utf-8"))
    except ValueError:
        return f"{_COMPLETE} does not say what belongs to it"
    found = _contents(state)
    for name, facts in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != facts:
            return f"{name} is not what was written ({found[name][0]:,} bytes, written were {facts[0]:,})"
    return None


def _contents(state: Path) -> dict[str, list[int | str]]:
    """Return size and sha256 of every file of a state but the marker."""
    files = [file for file in sorted(state.rglob("*")) if file.is_file() and _COMPLETE not in file.name]
    return {file.relative_to(state).as_posix(): [file.stat().st_size, files_digest([file])] for file in files}
