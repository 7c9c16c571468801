"""The results of a comparison: one JSONL file that lines are only ever added to, by any number of processes."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..checkpoints.files import disk_errors
from ..checkpoints.lineage import Event
from ..errors import RecipeError
from .recipe import CompareRecipe

Line = dict[str, Any]
# What may be added to a comparison that has begun: everything else is a rule, or changes what is there.
MAY_GAIN = ("arms", "seeds", "budgets")


class Results:
    """The file `results.jsonl` of a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"
        self.lock = FileLock(folder / ".results.lock")

    def lines(self) -> list[Line]:
        """Read all lines; what a kill cut short is left out."""
        return read_results(self.path) if self.path.exists() else []

    def add(self, *lines: Line) -> bool:
        """Add the lines that are not there yet; return whether there were any."""
        with self.lock:
            there = {_key(line) for line in self.lines()}
            new = [json.dumps(line) for line in lines if _key(line) not in there]
            if not new:
                return False
            with disk_errors(self.path), self.path.open("a+b") as stream:
                size = stream.tell()
                if size:
                    stream.seek(size - 1)
                    new[:0] = [] if stream.read(1) == b"\n" else [""]
                stream.write("".join(f"{line}\n" for line in new).encode())
            return True

    def begin(self, recipe: CompareRecipe, name: str) -> None:
        """Write down the rules before anything runs.

        Raises:
            RecipeError: the comparison began with others; arms, seeds and budgets may be added, nothing else.
        """
        content = recipe.model_dump(exclude_unset=True)
        began = next((line["recipe"] for line in reversed(self.lines()) if line["event"] == "recipe"), content)
        changed = [f for f in {**began, **content} if not _extends(began.get(f), content.get(f), may=f in MAY_GAIN)]
        if changed:
            raise RecipeError(
                f"the recipe differs from the one that {self.path} began with in {', '.join(changed)}. Rules are fixed "
                f"before the first run: only {', '.join(MAY_GAIN)} may be added, after those that are there. Give "
                "another folder with --output"
            )
        self.add({"event": "recipe", "name": name, "recipe": content, **_circumstances(recipe)})


def read_results(path: Path) -> list[Line]:
    """Read a results file, leaving out what is not a whole line.

    Raises:
        RecipeError: there is no such file, or it is not text.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise RecipeError(
            f"cannot read results {path}: {reason}; `tokenformer compare` writes results.jsonl into its folder"
        ) from error
    found = []
    for line in content.splitlines():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def _circumstances(recipe: CompareRecipe) -> Line:
    """When, with which versions and on what machine: nothing that names the host."""
    now = Event(operation="compare")
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpus = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    machine = {"cpu": cpus[0] if cpus else platform.processor(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    return {"date": now.date, "versions": now.versions, "machine": machine, "threads": recipe.training.threads}


def _key(line: Line) -> Any:
    """Return what makes a line another than those there."""
    if line["event"] == "segment":
        return "segment", line["id"]
    if line["event"] == "run":
        return "run", *(line[field] for field in ("arm", "seed", "learning_rate", "budget", "purpose"))
    return "recipe", json.dumps(line["recipe"], sort_keys=True)


def _extends(old: Any, new: Any, *, may: bool) -> bool:
    if may and isinstance(old, dict) and isinstance(new, dict):
        return all(new.get(name) == content for name, content in old.items())
    if may and isinstance(old, list) and isinstance(new, list):
        return set(old) <= set(new) and new[0] == old[0]  # the warm-up and the tuning hang on the first
    return old == new
