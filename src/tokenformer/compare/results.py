"""The results of a comparison: one JSONL file that lines are only ever added to, by any number of processes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from ..checkpoints.files import disk_errors, replacing_file
from ..checkpoints.lineage import Event
from ..errors import DataError, RecipeError
from .recipe import CompareRecipe

Line = dict[str, Any]
# What may be added to a comparison that has begun: everything else is a rule, or changes what is there.
MAY_GAIN = ("arms", "seeds", "budgets")


class Results:
    """The file `results.jsonl` of a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "results.jsonl"
        self.lock = FileLock(folder / ".results.lock")
        self._read: tuple[int, list[Line]] = 0, []

    def lines(self) -> list[Line]:
        """Read all lines; what a kill cut short is left out. A file that has not become longer is not read again."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._read[0]:
            self._read = size, read_results(self.path)
        return list(self._read[1])

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

    def begin(self, recipe: CompareRecipe, name: str, text: dict[str, Any]) -> None:
        """Write down the rules, and what the text is, before anything runs.

        Args:
            recipe: the rules.
            name: of the comparison.
            text: facts of the text, `text_sha256` among them.

        Raises:
            RecipeError: the comparison began with other rules; arms, seeds and budgets may be added, nothing else.
            DataError: it began with another text, or its segments did.
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
        line = {"event": "recipe", "name": name, "recipe": content, "text": text, **_circumstances(recipe)}
        check_same_text([*(there for there in self.lines() if there["event"] == "recipe"), line])
        self._claim_segments(text["text_sha256"])
        self.add(line)

    def _claim_segments(self, text_sha256: str) -> None:
        """Write beside the segments which text they are of: their ids do not tell, and files can be moved apart."""
        file = self.path.parent / "segments" / "text_sha256"
        with self.lock, disk_errors(file):
            if not file.exists():
                with replacing_file(file) as new:
                    new.write_text(text_sha256, encoding="utf-8")
            found = file.read_text(encoding="utf-8")
        if found != text_sha256:
            raise DataError(
                f"the segments in {file.parent} were trained on another text: its sha256 is {found[:12]}…, that of "
                f"this one {text_sha256[:12]}…. Delete that folder to train them again, bring the first text back, or "
                "use another folder with --output"
            )


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


def check_same_text(begun: Sequence[Line]) -> None:
    """Check that recipe lines are of the same text; what older versions wrote does not say.

    Raises:
        DataError: says which facts differ.
    """
    known = [line for line in begun if "text" in line]
    for first, other in pairwise(known):
        old, new = first["text"], other["text"]
        if old["text_sha256"] != new["text_sha256"]:
            facts = [f"{fact} {old.get(fact)} then {new[fact]}" for fact in new if old.get(fact) != new[fact]]
            raise DataError(
                f"the text of {first['date']} (Python {first['versions'].get('python')}) and that of {other['date']} "
                f"(Python {other['versions'].get('python')}) differ: {', '.join(facts)}. Results on different texts "
                "cannot be compared. Bring the first text back, or use another folder with --output; python-stdlib is "
                "the library of the Python that runs, so that all machines need the same version"
            )


def _circumstances(recipe: CompareRecipe) -> Line:
    """When, with which versions and on what machine: nothing that names the host."""
    now = Event(operation="compare")
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    cpus = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    machine = {"cpu": cpus[0] if cpus else platform.processor(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        machine["accelerator"] = torch.cuda.get_device_name()
    return {"date": now.date, "versions": now.versions, "machine": machine, "threads": recipe.training.threads}


def _key(line: Line) -> Any:
    """Return what makes a line another than those there."""
    if line["event"] == "segment":
        return "segment", line["id"]
    if line["event"] == "initial":
        return "initial", line["arm"]
    if line["event"] == "run":
        return "run", *(line[field] for field in ("arm", "seed", "learning_rate", "budget", "purpose"))
    return "recipe", json.dumps([line["recipe"], line.get("text", {}).get("text_sha256")], sort_keys=True)


def _extends(old: Any, new: Any, *, may: bool) -> bool:
    if may and isinstance(old, dict) and isinstance(new, dict):
        return all(new.get(name) == content for name, content in old.items())
    if may and isinstance(old, list) and isinstance(new, list):
        return set(old) <= set(new) and new[0] == old[0]  # the warm-up and the tuning hang on the first
    return old == new
