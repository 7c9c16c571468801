"""What smollm2.py and continual.py share: one training loop for all arms, and results that a rerun continues.

An arm is a *case*, a flat dictionary of what makes it differ. Each case runs in a process of its own, so that its peak
memory is its own, and leaves one line in a JSONL file, which is only ever appended to.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import torch
from layer import machine
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tokenformer.data.blocks import pack, utf8_bytes
from tokenformer.data.order import training_order
from tokenformer.evaluation import evaluate
from tokenformer.quiet import quiet_libraries

Line = dict[str, Any]
# Text blocks as `tokenformer.data.blocks.pack` makes them, and the UTF-8 bytes of their text.
Packed = tuple[Any, int]
WARMUP, BETAS, MAX_GRAD_NORM = 0.1, (0.9, 0.95), 1.0


def teach(
    model: nn.Module, blocks: Any, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> dict[str, Any]:
    """Train what has `requires_grad`, in place, and say what it took.

    AdamW without weight decay; the learning rate rises over the first tenth of the steps and falls to 0 by the last.
    Which blocks come when depends on `seed` alone.

    Args:
        model: any causal language model that returns a loss.
        blocks: a dataset of `{"input_ids": [T]}`, as `tokenformer.data.blocks.pack` makes it.
        steps: optimizer steps.
        batch_size: blocks in each.
        learning_rate: the highest.
        seed: of the order of the blocks.

    Returns:
        `seconds` of all steps, the median `seconds_per_step`, `flops_per_step` (matrix products, forward and
        backward), `trained_parameters`, `optimizer_bytes`, `peak_bytes` of this process so far, and the mean
        `training_loss` of the last tenth.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=BETAS, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rise_and_fall(step, steps))
    order = training_order(len(blocks), 0, steps * batch_size, seed=seed).reshape(steps, batch_size)
    was_training = model.training
    model.train()
    flops = step_flops(model, torch.tensor(blocks[order[0].tolist()]["input_ids"]))
    seconds, losses = [], []
    for rows in order.tolist():
        ids = torch.tensor(blocks[rows]["input_ids"])
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - began)
    model.train(was_training)
    moments = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
    return {
        "seconds": sum(seconds),
        "seconds_per_step": statistics.median(seconds),
        "flops_per_step": flops,
        "trained_parameters": sum(p.numel() for p in trained),
        "optimizer_bytes": sum(t.numel() * t.element_size() for t in moments),
        "peak_bytes": peak_bytes(),
        "training_loss": statistics.mean(losses[-max(1, steps // 10) :]),
    }


def rise_and_fall(step: int, steps: int) -> float:
    """Return the share of the learning rate at `step` (from 0) of `steps`."""
    warmup = max(1.0, WARMUP * steps)
    return min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))


def step_flops(model: nn.Module, ids: torch.Tensor) -> int:
    """Count the FLOPs of the matrix products of one forward and backward pass over `ids` `[B, T]`."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()
    return counter.get_total_flops()


def excerpt(text: str, num_bytes: int, *, at: float) -> str:
    """Return about `num_bytes` of UTF-8 around the share `at` of `text`: away from licences and lists of persons."""
    data = text.encode()
    start = max(0, min(round(at * len(data)), len(data) - num_bytes))
    return data[start : start + num_bytes].decode(errors="ignore")


def packed(texts: dict[str, str], tokenizer: Any, *, block_length: int) -> dict[str, Packed]:
    """Cut each text into blocks to evaluate on."""
    documents = {name: datasets.Dataset.from_dict({"text": [text]}) for name, text in texts.items()}
    return {
        name: (pack(rows, tokenizer, block_length=block_length, keep_tail=True), utf8_bytes(rows))
        for name, rows in documents.items()
    }


def bits_per_byte(model: nn.Module, texts: dict[str, Packed], *, batch_size: int) -> dict[str, float]:
    """Evaluate on each text."""
    return {
        name: evaluate(model, blocks, num_bytes=num_bytes, batch_size=batch_size).bits_per_byte
        for name, (blocks, num_bytes) in texts.items()
    }


def peak_bytes() -> int:
    """Return the most memory this process ever had, which getrusage would mix with that of its parent."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text(encoding="utf-8"))[1])  # type: ignore[index]


def lines(results: Path) -> list[Line]:
    """Read a results file; none where it is not there yet."""
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()] if results.exists() else []


def matching(rows: Iterable[Line], **case: Any) -> list[Line]:
    """Return the rows in which every field of `case` has that value."""
    return [row for row in rows if all(row.get(field) == value for field, value in case.items())]


def append(results: Path, rows: list[Line], *, packages: list[str]) -> None:
    """Add lines in one go, with what they were measured on."""
    versions = {package: metadata.version(package) for package in packages}
    facts = {"threads": torch.get_num_threads(), "versions": versions, "machine": machine()}
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as stream:
        stream.write("".join(json.dumps(row | facts, ensure_ascii=False) + "\n" for row in rows))


def arguments(description: str, results: Path, *, tokens: int | None = None) -> argparse.Namespace:
    """Read the command line of an experiment whose results belong into `results`, and prepare this process.

    `tokens`: the text tokens to learn each text with by default, where there may be others, and first looks.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help=f"JSONL file to append to; default {results}")
    parser.add_argument("--quick", action="store_true", help="tiny steps, one seed, no tuning; needs --results")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--case", type=json.loads, help="one case as JSON: what the script starts itself with")
    if tokens is not None:
        parser.add_argument("--tokens", type=int, default=tokens, help=f"to learn each text with; default {tokens}")
        parser.add_argument("--first-look", action="store_true", help="one seed, the middle learning rates")
    given = parser.parse_args()
    if given.quick and given.results is None:
        parser.error("--quick needs --results: its figures do not belong among the others")
    given.results = given.results or results
    torch.set_num_threads(given.threads)
    quiet_libraries()
    return given


def run_case(given: argparse.Namespace, **case: Any) -> list[Line]:
    """Run this script on `case` in a process of its own unless the results have it; return its lines."""
    if not matching(lines(given.results), **case):
        print(json.dumps(case), flush=True)
        command = [sys.executable, "-W", "ignore", sys.argv[0], "--case", json.dumps(case)]
        command += ["--results", str(given.results), "--threads", str(given.threads)]
        kinds = [f"--{kind.replace('_', '-')}" for kind in ("quick", "first_look") if getattr(given, kind, False)]
        subprocess.run([*command, *kinds], check=True)
    return matching(lines(given.results), **case)


def tuned(
    given: argparse.Namespace, arm: str, rates: Sequence[float], text: str, *, field: str = "arm", **case: Any
) -> float:
    """Try each of an arm's learning rates, and return the best on `text`; the middle one if all is quick.

    `field`: under which a case names its arm.
    """
    if given.quick or getattr(given, "first_look", False):
        return rates[len(rates) // 2]
    runs = [run_case(given, **{field: arm}, purpose="tuning", learning_rate=rate, **case)[0] for rate in rates]
    return min(runs, key=lambda run: run["bits_per_byte"][text])["learning_rate"]


def mean_and_deviation(values: list[float], digits: int = 3, scale: float = 1.0, *, signed: bool = False) -> str:
    """Write "mean ± standard deviation", or the mean alone of a single value."""
    mean = f"{statistics.mean(values) * scale:{'+' if signed else ''},.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) * scale:.{digits}f}"


def table(head: list[str], rows: list[list[str]], *, texts: int = 1) -> str:
    """Lay out Markdown: the first `texts` columns to the left, numbers to the right."""
    rule = ["---"] * texts + ["--:"] * (len(head) - texts)
    cells = [f"| {' | '.join(row)} |" for row in [head, *rows]]
    return "\n".join([cells[0], f"|{'|'.join(rule)}|", *cells[1:]])
