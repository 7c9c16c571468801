"""Kill commands at random moments, fill their disks, run them again, and see whether anything is lost, mixed or left.

    python benchmarks/torture.py [--kills 200] [--disks 60] [--seed 0]

Rules, stated before the first kill. A command is killed with -9 by the clock, at a moment drawn evenly from the time
that it takes undisturbed, or as it is about to make its n-th change to the disk, drawn evenly from all of them; or two
of the same command begin at once in one folder, and one of the two is killed. Or the disk is full from its n-th change
on, or takes no file larger than one of those that the command writes, or is read-only; then it must end with one of our
errors and exit code 2. What the folder then holds is the old or the new, whole: each checkpoint is verified, and its
tensors, and those of the optimizer, equal the old ones or those of a run that nobody disturbed, bit for bit. The
command is then given again, as a user would (`--resume` or `--force` where something is there). It must go well and
leave the same files as the undisturbed run: the same names, no more, and the same bits.

A line a command and way is appended to results/torture.jsonl; exit code 1 if any of them is not kept.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from faults import begin, full_from, killed_at, read_only, wait
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from tokenformer import save
from tokenformer.checkpoints.files import files_digest, recover
from tokenformer.checkpoints.optimizer import load_states
from tokenformer.checkpoints.verify import LINEAGE_FILE, exported_for, verify_checkpoint
from tokenformer.compare.results import read_results
from tokenformer.growth.state import tensors_digest
from tokenformer.training.log import read_log

RESULTS = Path(__file__).parent / "results" / "torture.jsonl"
WAYS = ("clock", "change", "two")
DISKS = ("full", "small", "read-only")
# Of 200 kills, about how many each command gets: more to those that write most often.
WEIGHTS = {
    "train": 40,
    "train --force": 20,
    "grow": 24,
    "grow --force": 24,
    "merge --force": 20,
    "split --force": 12,
    "convert transformer": 16,
    "convert official --force": 16,
    "convert to-official --force": 12,
    "prepare text": 10,
    "compare": 6,
    "export --force": 6,
}
PASSING = (".partial", ".shards", ".tmp", ".lock", ".jsonl")
ERRORS = 4096  # bytes: what a command may say on a disk that takes only small files
SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = {"qkv_param_tokens": 8, "output_param_tokens": 8, "ffn_param_tokens": 16}
TRAINING = {"batch_size": 2, "sequence_length": 16, "threads": 1, "precision": "float32"}


@dataclass(frozen=True)
class Command:
    """A command that is killed.

    Attributes:
        arguments: of the command line, in a folder that holds what the command reads.
        again: those with which it is given after a kill, from the folder.
        outputs: what it writes: names of checkpoints, files and folders of either.
        parts: whether the new may be there in part: a run's stages appear one after the other.
    """

    arguments: list[str]
    again: Callable[[Path], list[str]]
    outputs: tuple[str, ...]
    parts: bool = False


def with_force(*arguments: str, output: str) -> Command:
    """Return a command whose second time needs --force where there is something."""

    def again(folder: Path) -> list[str]:
        return [*arguments, "-o", output, *(["--force"] if (folder / output).exists() else [])]

    return Command([*arguments, "-o", output], again, (output,))


def forced(command: Command, *, outputs: tuple[str, ...] = ()) -> Command:
    """Return a command that replaces."""
    arguments = [*command.arguments, "--force"]
    return Command(arguments, lambda folder: arguments, outputs or command.outputs, parts=bool(outputs))


def resumed(folder: Path, *, recipe: str) -> list[str]:
    """Return how a run is trained on, or begun where it did not begin."""
    began = folder / "run" / "recipe.yaml"
    ours = began.exists() and yaml.safe_load(began.read_text()) == yaml.safe_load((folder / recipe).read_text())
    return ["train", recipe, "-o", "run", *(["--resume"] if ours else ["--force"] if began.exists() else [])]


COMMANDS: dict[str, Command] = {
    "train": Command(["train", "new.yaml", "-o", "run"], lambda f: resumed(f, recipe="new.yaml"), ("run",), parts=True),
    "train --force": Command(
        ["train", "new.yaml", "-o", "run", "--force"], lambda f: resumed(f, recipe="new.yaml"), ("run",), parts=True
    ),
    "grow": with_force("grow", "model", "--ffn", "+8", output="out"),
    "grow --force": forced(with_force("grow", "model", "--ffn", "+8", output="out")),
    "merge --force": forced(with_force("merge", "child", "other", output="out")),
    "split --force": forced(with_force("split", "child", "a", output="out.safetensors")),
    "convert transformer": with_force("convert", "transformer", "neox", output="out"),
    "convert official --force": forced(
        with_force("convert", "official", "official.bin", "--config", "official.yml", output="out")
    ),
    "convert to-official --force": forced(
        with_force("convert", "to-official", "child", output="out.bin"), outputs=("out.bin", "out.yml")
    ),
    "export --force": forced(with_force("export", "child", "--to", "onnx", "--text", "text", output="out")),
    "prepare text": Command(
        ["train", "long.yaml", "-o", "run"], lambda f: resumed(f, recipe="long.yaml"), ("run", "cache"), parts=True
    ),
    "compare": Command(
        ["compare", "compare.yaml", "-o", "run", "--workers", "2"],
        lambda folder: COMMANDS["compare"].arguments,
        ("run",),
        parts=True,
    ),
}


def recipe(text: str, seed: int, **training: int) -> dict[str, Any]:
    """Return a recipe of two stages, of which the second grows."""
    return {
        "model": {**SIZES, **TOKENS},
        "data": {"source": text, "tokenizer": "bytes", "validation_fraction": 0.1},
        "training": {**TRAINING, "save_every": 2, "log_every": 1, "evaluations_per_stage": 1, **training},
        "stages": [{"text_tokens": 128}, {"text_tokens": 128, "ffn_param_tokens": "+8"}],
        "seed": seed,
    }


def lay_out(folder: Path) -> None:
    """Write what commands read, and the old that some of them replace, into `folder`/old."""
    dice = random.Random(0)
    words = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "in", "ort", "us")]
    for name, documents, length in (("text", 12, 60), ("long", 60, 700)):
        (folder / name).mkdir()
        for i in range(documents):
            (folder / name / f"{i:02}.txt").write_text(" ".join(dice.choice(words) for _ in range(length)))
    long = {**recipe("long", 0), "stages": [{"text_tokens": 64}]}
    arms = {
        "small": {"model": {**SIZES, **TOKENS}},
        "grown": {"model": {**SIZES, **TOKENS}, "stages": [{"at": 256, "ffn_param_tokens": 24}]},
    }
    compare = {
        "question": "Does it survive?",
        "data": {"source": "text", "tokenizer": "bytes", "validation_fraction": 0.3},
        "training": {**TRAINING, "save_every": 4, "evaluations_per_stage": 1},
        "equal": "text_tokens",
        "budgets": [512],
        "tuning_budget": 512,
        "seeds": [0],
        "learning_rates": [1e-2],
        "rules": {"reference": "small"},
        "arms": arms,
    }
    recipes = {"new": recipe("text", 0), "before": recipe("text", 1), "long": long, "compare": compare}
    for name, content in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content))
    torch.manual_seed(0)
    neox = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    save(folder / "neox", GPTNeoXForCausalLM(neox))
    shell = [
        "train before.yaml -o old/run",
        "grow old/run/stage2 -o grown --ffn +8 --name more",
        "consolidate grown -o model",
        "grow model -o child --ffn +8 --name a --seed 1",
        "grow model -o other --ffn +8 --name b --seed 2",
        "convert to-official model -o official.bin",
        "convert transformer neox -o old/out",
        "split other b -o old/out.safetensors",
        "convert to-official other -o old/out.bin",
    ]
    for line in shell:
        assert wait(begin(folder, line.split())) == 0, line


def contents(folder: Path, outputs: tuple[str, ...]) -> dict[str, str]:
    """Return a digest of everything that a command has written: of each checkpoint, which must be whole, and file.

    Dates and times go into none of them.
    """
    found = {}
    for output in outputs:
        recover(folder / output)
        root = folder / output
        lineages = [file.parent for file in sorted(root.rglob(LINEAGE_FILE)) if not passing(file, folder)]
        for checkpoint in lineages:
            if exported_for(checkpoint) is not None:
                found[str(checkpoint.relative_to(folder))] = files_digest(sorted(checkpoint.glob("model.*")))
                continue
            states = {f"{n} {k}": t for n, state in load_states(checkpoint).items() for k, t in state.items()}
            weights = verify_checkpoint(checkpoint).weights_sha256
            found[str(checkpoint.relative_to(folder))] = f"{weights} {tensors_digest(states)}"
        for file in [root] if root.is_file() else sorted(root.rglob("*")):
            inside = any(checkpoint in file.parents for checkpoint in lineages)
            if file.is_file() and not (inside or passing(file, folder)):
                found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def passing(file: Path, folder: Path) -> bool:
    """Whether a file is of what is unfinished, or has times in it."""
    return any(part.startswith((".", "report")) or part.endswith(PASSING) for part in file.relative_to(folder).parts)


def logged(folder: Path) -> list[Any]:
    """Return what the logs of a run say, without times; of a comparison in no order."""
    events: list[Any] = []
    if (folder / "run" / "log.jsonl").exists():
        told = [event for event in read_log(folder / "run") if event["event"] != "stage"]  # of which resuming adds one
        events += [(event["event"], event.get("stage"), event.get("step"), event.get("loss")) for event in told]
    if (folder / "run" / "results.jsonl").exists():
        lines = read_results(folder / "run" / "results.jsonl")
        events += sorted((e["event"], e.get("id", ""), e.get("bits_per_byte", 0.0)) for e in lines)
    return events


def names(folder: Path) -> set[str]:
    """Return the names of all files and folders, temporary ones too; those of reports and logs of errors aside."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != "stderr"}


@dataclass(frozen=True)
class Usual:
    """What a command does that nobody disturbs.

    Attributes:
        before, after: digests of what there is before and after it, as `contents` gives them.
        names, log: what `names` and `logged` give after it.
        seconds: how long it takes.
        changes: how many it makes to the disk.
    """

    before: dict[str, str]
    after: dict[str, str]
    names: set[str]
    log: list[Any]
    seconds: float
    changes: int


class Torture:
    """All commands, undisturbed once and then killed.

    Args:
        place: an empty folder.
        seed: of the moments.
    """

    def __init__(self, place: Path, seed: int) -> None:
        self.place, self.dice, self.numbers = place, random.Random(seed), iter(range(10**9))
        self.start = place / "start"
        self.start.mkdir()
        (self.start / "old").mkdir()
        lay_out(self.start)
        self.sizes: dict[str, list[int]] = {}
        self.known: dict[str, Usual] = {}

    def fresh(self, name: str) -> Path:
        """Return a new folder in which a command can be given."""
        folder = self.place / f"trial{next(self.numbers)}"  # another each time: what a kill left alive may write on
        shutil.copytree(self.start, folder, ignore=shutil.ignore_patterns("old", "stderr"))
        if "--force" in name:
            for output in COMMANDS[name].outputs:
                old = self.start / "old" / output
                (shutil.copytree if old.is_dir() else shutil.copyfile)(old, folder / output)
        if name == "prepare text":
            shutil.rmtree(folder / "cache")
        return folder

    def undisturbed(self, name: str) -> Usual:
        """Return what a command does that nobody disturbs."""
        if name not in self.known:
            folder, command = self.fresh(name), COMMANDS[name]
            before = contents(folder, command.outputs)
            receive, send = multiprocessing.Pipe(duplex=False)
            began = time.monotonic()
            assert wait(begin(folder, command.arguments, count=send)) == 0, (folder / "stderr").read_text()
            took = time.monotonic() - began
            after = contents(folder, command.outputs)
            assert after != before
            written = [path for output in command.outputs for path in (folder / output, *(folder / output).rglob("*"))]
            sizes = {path.stat().st_size for path in written if path.is_file()}
            self.sizes[name] = sorted(size for size in sizes if size > ERRORS)
            self.known[name] = Usual(before, after, names(folder), logged(folder), took, receive.recv())
        return self.known[name]

    def try_once(self, name: str, way: str) -> tuple[str, str]:
        """Disturb a command once and give it again; return what was there in between, and what is wrong, or ""."""
        self.undisturbed(name)
        folder = self.fresh(name)
        state, problem = self._try_once(name, way, folder)
        if not problem:
            shutil.rmtree(folder)
        return state, problem and f"{folder}: {problem}"

    def _fault(self, way: str, changes: int) -> Callable[[int, str], None] | None:
        if way == "change":
            return killed_at(self.dice.randrange(changes))
        if way == "full":
            return full_from(self.dice.randrange(1 + changes // 2))
        return read_only if way == "read-only" else None

    def _try_once(self, name: str, way: str, folder: Path) -> tuple[str, str]:
        usual, command = self.undisturbed(name), COMMANDS[name]
        before, after = usual.before, usual.after
        fault = self._fault(way, usual.changes)
        largest = self.dice.choice(self.sizes[name] or [ERRORS]) - 1 if way == "small" else -1
        processes = [begin(folder, command.arguments, fault, largest=largest)]
        if way == "two":
            processes.append(begin(folder, command.arguments))
        if way in ("clock", "two"):
            time.sleep(self.dice.uniform(0, usual.seconds))
            with contextlib.suppress(ProcessLookupError):  # with what it has started, or what it has started lives on
                (os.killpg if self.dice.random() < 0.5 else os.kill)(processes[0], signal.SIGKILL)
        codes = [wait(process) for process in processes]
        said = (folder / "stderr").read_text()
        if [code for code in codes if code not in (0, 2, -9)] or "Traceback" in said:
            return "", f"exit codes {codes}: {said}"
        if way in DISKS and codes == [0] and contents(folder, command.outputs) != after:
            return "", "it said that all went well"
        try:
            found = contents(folder, command.outputs)
        except Exception as error:
            return "", f"after the kill: {error}"
        is_new = found == after or (command.parts and found.items() <= after.items() and bool(found or not before))
        between = name == "convert to-official --force" and found.items() < before.items()  # one of two files alone
        if not (is_new or found == before or between):
            return "", f"neither old nor new after the kill: {sorted(found)}"
        state = "new" if found == after else "old" if found == before else "in part"
        if code := wait(begin(folder, command.again(folder))):
            return state, f"exit code {code} when given again: {(folder / 'stderr').read_text()}"
        if contents(folder, command.outputs) != after:
            return state, "given again, it came to other bits"
        if logged(folder) != usual.log:
            return state, "given again, the log is another"
        if odd := names(folder) ^ usual.names:
            return state, f"left lying, or missing: {sorted(odd)}"
        return state, ""


def shares(faults: int, ways: tuple[str, ...], commands: list[str]) -> Iterator[tuple[str, str, int]]:
    """Hand out faults, of as many for all commands: yield command, way and how many."""
    total = sum(WEIGHTS.values())
    for name, weight in ((name, WEIGHTS[name]) for name in commands):
        # A comparison's changes are its workers', which start anew.
        possible = [way for way in ways if name != "compare" or way in ("clock", "two", "small")]
        mine = max(1, round(faults * weight / total)) if faults else 0
        for i, way in enumerate(possible):
            if count := len(range(i, mine, len(possible))):
                yield name, way, count


def torture(
    kills: int,
    disks: int,
    seed: int,
    place: Path,
    on_line: Callable[[dict[str, Any]], None],
    commands: list[str] | None = None,
) -> list[str]:
    """Kill so many times, and have so many disks refuse; returns what went wrong."""
    driver, wrong = Torture(place, seed), []
    commands = list(WEIGHTS) if commands is None else commands
    for name, way, count in (*shares(kills, WAYS, commands), *shares(disks, DISKS, commands)):
        began, states = time.monotonic(), Counter[str]()
        problems = []
        for _ in range(count):
            state, problem = driver.try_once(name, way)
            states[state] += 1
            problems += [problem] if problem else []
        wrong += [f"{name}, by {way}: {problem}" for problem in problems]
        on_line(
            {
                "fault": "disk" if way in DISKS else "kill -9",
                "command": name,
                "way": way,
                "times": count,
                "found": {state: states[state] for state in ("old", "in part", "new")},
                "wrong": len(problems),
                "seconds": round(time.monotonic() - began, 1),
            }
        )
    return wrong


def main() -> None:
    """Kill, and append what came of it to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--disks", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="*", choices=WEIGHTS, default=list(WEIGHTS))
    given = parser.parse_args()
    facts = {
        "seed": given.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }

    def keep(line: dict[str, Any]) -> None:
        print(line, flush=True)
        with RESULTS.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**line, **facts}) + "\n")

    torch.set_num_threads(1)
    place = Path(tempfile.mkdtemp(prefix="torture"))
    wrong = torture(given.kills, given.disks, given.seed, place, keep, given.commands)
    print(*wrong, sep="\n")
    if wrong:
        sys.exit(f"{len(wrong)} of {given.kills + given.disks} faults were not survived; see what is left in {place}")
    shutil.rmtree(place)


if __name__ == "__main__":
    main()
