"""What spreading one model over processes saves in memory, and what it costs or gains in speed.

    python benchmarks/parallel.py                     # about twenty minutes of two idle cores
    python benchmarks/parallel.py --sequences 8 --rounds 1

The model is preset 8m, a step reads 8 or 32 sequences of 256 text tokens in float32, whoever shares them, and every
process computes with one thread. A round trains all layouts in random order, and each runs a step that is not timed,
then three that are. The rules stood before the first result, but for one: steps of 32 sequences were added when those
of 8 had shown that sending weights takes a fifth of them.

    memory   bytes of weights, gradients and AdamW's moments on the process that has most, over those of one process
             that has all: asked 0.6 on two processes, 0.35 on four
    speed    text tokens a second of two processes over those of one, the median of the rounds: asked 1.8 for FSDP
             where steps are long

Four processes on two cores are timed as well, and asked nothing. Every run adds a line per layout to
benchmarks/results/parallel.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from layer import RESULTS, goal, machine, write
from torch.distributed.tensor import DTensor

from tokenformer import TokenformerConfig, TokenformerForCausalLM
from tokenformer.checkpoints.checkpoint import read_config
from tokenformer.training.optimization import make_optimizer
from tokenformer.training.processes import processes
from tokenformer.training.recipe import ParallelSection, TrainingSection
from tokenformer.training.sharded import load_parts

LAYOUTS = [{"fsdp": 1}, {"fsdp": 2}, {"tensor": 2}, {"fsdp": 4}, {"fsdp": 2, "tensor": 2}]
SEQUENCES, LENGTH, STEPS = (8, 32), 256, 3
MEMORY, SPEED = {2: 0.6, 4: 0.35}, 1.8


def count(layout: dict[str, int]) -> int:
    """Return how many processes a layout takes."""
    return layout.get("fsdp", 1) * layout.get("tensor", 1)


def worker(checkpoint: Path, layout: dict[str, int], sequences: int) -> None:
    """Train some steps as one of a layout's processes; the first prints what all of them found."""
    torch.set_num_threads(1)
    mine = processes()
    model = load_parts(checkpoint, read_config(checkpoint), ParallelSection(**layout)).train()
    optimizer = make_optimizer(model, TrainingSection(), {})
    readers = layout.get("fsdp", 1)
    rows = torch.randint(0, 4096, (sequences, LENGTH), generator=torch.Generator().manual_seed(0))
    ids = rows.chunk(readers)[mine.process_index // layout.get("tensor", 1)]
    seconds = []
    for _ in range(1 + STEPS):
        mine.wait_for_everyone()
        start = time.perf_counter()
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        held = [t for p in model.parameters() for t in (p, p.grad) if t is not None]
        optimizer.step()
        mine.wait_for_everyone()
        seconds.append(time.perf_counter() - start)
    held += [moment for state in optimizer.state.values() for moment in state.values()]
    numbers = sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in held)
    found: list[Any] = [numbers]
    if mine.num_processes > 1:
        found = [None] * mine.num_processes
        torch.distributed.all_gather_object(found, numbers)
    if mine.is_main_process:
        print("found", json.dumps({"bytes": max(found), "seconds": statistics.median(seconds[1:])}), flush=True)


def run(checkpoint: Path, layout: dict[str, int], sequences: int) -> dict[str, Any]:
    """Start a layout's processes and return what they found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count(layout))]
    options = ["--checkpoint", str(checkpoint), "--layout", json.dumps(layout), "--sequences", str(sequences)]
    done = subprocess.run([*command, __file__, *options], check=True, text=True, stdout=subprocess.PIPE)
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("found")).removeprefix("found"))


def measure(checkpoint: Path, sequences: int, rounds: int) -> list[dict[str, Any]]:
    """Train by all layouts, and return a line for each."""
    found: list[list[dict[str, Any]]] = [[] for _ in LAYOUTS]
    for _ in range(rounds):
        for i in random.sample(range(len(LAYOUTS)), len(LAYOUTS)):
            found[i].append(run(checkpoint, LAYOUTS[i], sequences))
    results = []
    for layout, mine in zip(LAYOUTS, found, strict=True):
        speeds = [one["seconds"] / many["seconds"] for one, many in zip(found[0], mine, strict=True)]
        result: dict[str, Any] = {
            "case": {"what": "parallel", **{"fsdp": 1, "tensor": 1, **layout}, "sequences": sequences},
            "bytes": mine[0]["bytes"],
            "text_tokens_a_second": sequences * LENGTH / statistics.median(one["seconds"] for one in mine),
            "speeds": [round(speed, 3) for speed in speeds],
            "rounds": rounds,
            "machine": machine(),
        }
        if count(layout) > 1:
            result["memory"] = goal(MEMORY[count(layout)], mine[0]["bytes"] / found[0][0]["bytes"])
        if layout == {"fsdp": 2} and sequences == max(SEQUENCES):
            result["speed"] = goal(SPEED, statistics.median(speeds), at_least=True)
        results.append(result)
    return results


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description="Memory and speed of one model on several processes.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, nargs="+", default=SEQUENCES)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--layout", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.layout:
        worker(args.checkpoint, args.layout, *args.sequences)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        TokenformerForCausalLM(TokenformerConfig.from_preset("8m")).save_pretrained(folder)
        results = [line for sequences in args.sequences for line in measure(Path(folder), sequences, args.rounds)]
    write(results, RESULTS / "parallel.jsonl", ["memory", "speed"])


if __name__ == "__main__":
    main()
