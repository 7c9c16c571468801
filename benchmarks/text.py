"""Speed and memory of preparing text, beside the tokenizer alone on as many cores.

Run from the repository root (about ten minutes on two idle cores):

    python benchmarks/text.py                        # 30 MB thrice over, and once 200 MB
    python benchmarks/text.py --megabytes 60 --rounds 5

The text is Python's own library again and again, every copy of a file with another first line. An arm is a process of
its own on so many cores: "tokenizer" encodes texts that lie in memory, in one process a core; "prepare" is all that
`tokenformer train` does with a source before the first step (read, hold out, tokenise, cut into text blocks, write
them), with nothing cached. A round runs every arm once, in random order, and a figure is the median of the rounds'
ratios, with quartiles. Wall times suffer from other work on the machine, both arms alike; of CPU time the ratio is that
of what the tokenizer alone takes to what all processes of prepare take. The peak of memory is of what no file
backs, which alone cannot be dropped, of all processes together. Appends to benchmarks/results/text.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import psutil
import tokenizers
from layer import RESULTS, goal, machine, ratio, write
from transformers import AutoTokenizer

from tokenformer.data.section import DataSection
from tokenformer.data.sources import load_documents, text_batches
from tokenformer.data.text import prepare
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.data.tokens import _cores

TOKENIZER, SEQUENCE_LENGTH = "bpe:4096", 512
ASKED = 0.9
MEMORY_ASKED = 1000  # MB for 2 GB of text; what is reached must not depend on how much there is


def write_corpus(folder: Path, megabytes: int) -> None:
    """Write so much text as JSONL, a file for every copy of the library."""
    folder.mkdir()
    texts = [text for text in load_documents("python-stdlib")["text"] if text]
    left, copy = megabytes * 10**6, 0
    while left > 0:
        with (folder / f"{copy:04}.jsonl").open("w", encoding="utf-8") as file:
            for text in texts:
                if left > 0:
                    file.write(json.dumps({"text": f"# copy {copy}\n{text}"}) + "\n")
                    left -= len(text)
        copy += 1


def tokenizer_alone(corpus: str, tokenizer: Any) -> dict[str, float]:
    """Encode the texts, already in memory, in a process for every core."""
    batches = [batch for batch in text_batches(load_documents(corpus)) if batch]
    cores = _cores()
    began, cpu = time.perf_counter(), _cpu_seconds()
    context = get_context("fork")
    parts = [context.Process(target=_encode, args=(tokenizer, batches[i::cores])) for i in range(cores)]
    for part in parts:
        part.start()
    for part in parts:
        part.join()
    assert not any(part.exitcode for part in parts)
    return {"seconds": time.perf_counter() - began, "cpu_seconds": _cpu_seconds() - cpu}


def _encode(tokenizer: Any, batches: list[list[str]]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for batch in batches:
        tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)


def prepared(corpus: str, tokenizer: Any, *, watched: bool = False) -> dict[str, float]:
    """Prepare a text of which nothing is cached; watching the memory takes time of its own."""
    peak = [0]
    if watched:
        threading.Thread(target=_watch_memory, args=[peak], daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        datasets.config.HF_DATASETS_CACHE = Path(folder)
        imports, began, cpu = _anonymous(os.getpid()), time.perf_counter(), _cpu_seconds()
        data = prepare(
            DataSection(source=corpus),
            sequence_length=SEQUENCE_LENGTH,
            tokenizer_folder=Path(folder) / "tokenizer",
            tokenizer=tokenizer,
        )
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": _cpu_seconds() - cpu}
        blocks = sum(file.stat().st_size for file in Path(folder).rglob("*.arrow"))
    return {**took, "peak": peak[0], "imports": imports, "cache": blocks, "tokens": data.facts["training_text_tokens"]}


def trained(corpus: str, tokenizer: Any) -> dict[str, float]:
    """Train a tokenizer on the text."""
    documents = load_documents(corpus)
    began, cpu = time.perf_counter(), _cpu_seconds()
    make_tokenizer(TOKENIZER, documents)
    return {"seconds": time.perf_counter() - began, "cpu_seconds": _cpu_seconds() - cpu}


ARMS: dict[str, Callable[..., dict[str, float]]] = {
    "tokenizer": tokenizer_alone,
    "prepare": prepared,
    "memory": functools.partial(prepared, watched=True),
    "train": trained,
}


def _cpu_seconds() -> float:
    return sum(os.times()[:4])  # of the processes that have ended, too


def _anonymous(pid: int) -> int:
    """Return the bytes of a process that no file backs; those that it shares with n - 1 others count an nth."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8")
    return 1024 * int(re.findall(r"Pss_Anon:\s*(\d+) kB", rollup)[0])


def _watch_memory(peak: list[int]) -> None:
    own = psutil.Process()
    while True:
        with contextlib.suppress(OSError):  # of a process that has just ended
            peak[0] = max(peak[0], sum(_anonymous(p.pid) for p in [own, *own.children(recursive=True)]))
        time.sleep(0.5)


def run(arm: str, cores: int, corpus: Path, tokenizer: Path) -> dict[str, float]:
    """Run an arm in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--arm", arm, str(cores), str(corpus), str(tokenizer)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure_speed(corpus: Path, tokenizer: Path, *, megabytes: int, rounds: int) -> list[dict[str, Any]]:
    """Return a line for one core, and one for all."""
    most = _cores()
    arms = [(arm, cores) for cores in sorted({1, most}) for arm in ("tokenizer", "prepare")]
    took: dict[tuple[str, int], list[dict[str, float]]] = {arm: [] for arm in arms}
    for _ in range(rounds):
        for arm in random.sample(arms, len(arms)):
            took[arm].append(run(*arm, corpus, tokenizer))
            print(*arm, took[arm][-1], flush=True)
    training = run("train", most, corpus, tokenizer)
    lines = []
    for cores in sorted({1, most}):
        both = {arm: took[arm, cores] for arm in ("tokenizer", "prepare")}
        figures = {}
        for clock, name in (("seconds", "prepare speed/tokenizers"), ("cpu_seconds", "cpu prepare speed/tokenizers")):
            reached, quartiles = ratio({arm: [t[clock] for t in both[arm]] for arm in both}, "tokenizer", "prepare")
            figures[name] = goal(ASKED, reached, at_least=True) | {"quartiles": quartiles}
        speed = {
            f"{arm} per {unit}": round(statistics.median(megabytes / t[clock] for t in both[arm]), 3)
            for arm in both
            for clock, unit in (("seconds", "second"), ("cpu_seconds", "cpu second"))
        }
        speed["training the tokenizer per cpu second"] = round(megabytes / training["cpu_seconds"], 3)
        lines.append(
            {
                "case": {"what": "speed", "cores": cores, "megabytes": megabytes, "tokenizer": TOKENIZER},
                "rounds": rounds,
                **figures,
                "megabytes": speed,
                "machine": machine_and_libraries(),
            }
        )
    return lines


def measure_memory(corpus: Path, tokenizer: Path, *, megabytes: int) -> dict[str, Any]:
    """Return a line of what preparing takes in memory and on the disk on all cores."""
    took = run("memory", _cores(), corpus, tokenizer)
    return {
        "case": {"what": "memory", "cores": _cores(), "megabytes": megabytes, "tokenizer": TOKENIZER},
        "peak megabytes": goal(MEMORY_ASKED, took["peak"] / 1e6),
        "of it imports": round(took["imports"] / 1e6),
        "bytes in the cache a byte of text": round(took["cache"] / 1e6 / megabytes, 3),
        "text_tokens": took["tokens"],
        "megabytes per second": round(megabytes / took["seconds"], 3),
        "machine": machine_and_libraries(),
    }


def machine_and_libraries() -> dict[str, Any]:
    """Say what was measured on and with."""
    found = machine()
    del found["torch"], found["capability"]
    return {
        **found,
        "load": round(os.getloadavg()[0], 1),
        "tokenizers": tokenizers.__version__,
        "datasets": datasets.__version__,
    }


def main() -> None:
    """Measure, or be an arm."""
    parser = argparse.ArgumentParser(description="Speed and memory of preparing text.")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[30, 200], help="of text; speed is of the first")
    parser.add_argument("--rounds", type=int, default=3, help="two at least")
    parser.add_argument("--arm", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    datasets.disable_progress_bars()
    if args.arm:
        arm, cores, corpus, tokenizer = args.arm
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
        print(json.dumps(ARMS[arm](corpus, AutoTokenizer.from_pretrained(tokenizer))))
        return
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tokenizer(TOKENIZER, load_documents("python-stdlib")).save_pretrained(folder / "tokenizer")
        for megabytes in args.megabytes:
            write_corpus(folder / str(megabytes), megabytes)
        first = args.megabytes[0]
        results += measure_speed(folder / str(first), folder / "tokenizer", megabytes=first, rounds=args.rounds)
        for megabytes in args.megabytes:
            results.append(measure_memory(folder / str(megabytes), folder / "tokenizer", megabytes=megabytes))
    write(
        results, RESULTS / "text.jsonl", ["prepare speed/tokenizers", "cpu prepare speed/tokenizers", "peak megabytes"]
    )


if __name__ == "__main__":
    main()
