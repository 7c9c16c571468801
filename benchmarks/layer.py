"""Time and weigh one Pattention layer against its equations written out and against an MLP of the same shapes.

Run from the repository root (about three minutes):

    python benchmarks/layer.py                     # float32 and bfloat16, both shapes, one thread and all
    python benchmarks/layer.py --dtype float32 --threads 1 --seconds 60

A round runs each arm (Pattention; the equations with every temporary; two bias-free nn.Linear with GELU between) once,
forward and backward with all gradients, in random order; a figure is the median of the rounds' ratios, with quartiles.
One thread is timed by its own CPU time, which other work on the machine hardly disturbs; several by the wall clock,
which it does. Every run adds a line per case to benchmarks/results/layer.jsonl, each goal with asked, reached and met.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tokenformer import Pattention

RESULTS = Path(__file__).parent / "results"
TEXT_TOKENS, WIDTH, PARAM_TOKENS = 2048, 768, (3072, 768)
GOALS = {"time fused/mlp": 1.06, "time fused/transcription": 0.90, "memory fused/transcription": 0.40}


class Transcription(nn.Module):
    """Keys `[N, D]` and values `[N, E]` as the paper has them, `[B, D]` to `[B, E]`."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys = nn.Parameter(keys.detach().clone())
        self.values = nn.Parameter(values.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        """Follow equations 5 and 6 of the paper."""
        scores = x @ self.keys.T
        scores = scores / scores.norm(p=2, dim=-1, keepdim=True) * math.sqrt(self.keys.shape[0])
        return F.gelu(scores) @ self.values


def machine() -> dict[str, Any]:
    """Say what was measured on: nothing that names the host."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": torch.multiprocessing.cpu_count(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def how(dtype: torch.dtype) -> dict[str, Any]:
    """Say how a case is run."""
    threads = torch.get_num_threads()
    clock = "cpu time" if threads == 1 else "wall time"
    return {"dtype": str(dtype).removeprefix("torch."), "threads": threads, "clock": clock}


def arguments(description: str, *, dtypes: list[str], seconds: float) -> argparse.ArgumentParser:
    """Options of both benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", default=dtypes)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}))
    parser.add_argument("--seconds", type=float, default=seconds, help="time cap of each measurement")
    return parser


def goal(asked: float, reached: float, *, at_least: bool = False) -> dict[str, Any]:
    """State a goal beside what was measured."""
    reached = round(reached, 4)
    return {"asked": asked, "reached": reached, "met": reached >= asked if at_least else reached <= asked}


def interleaved(arms: dict[str, Callable[[], object]], *, seconds: float, max_rounds: int) -> dict[str, list[float]]:
    """Time every arm once a round, in random order, until `seconds` are over (but two rounds at least)."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in arms}
    for arm in arms.values():
        arm()  # warm-up
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= 2 and time.perf_counter() - start > seconds:
            break
        for name in random.sample(list(arms), len(arms)):
            begin = clock()
            arms[name]()
            times[name].append(clock() - begin)
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> tuple[float, list[float]]:
    """Return the median of the rounds' ratios `over / under`, and its quartiles."""
    ratios = [a / b for a, b in zip(times[over], times[under], strict=True)]
    first, median, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return median, [round(first, 4), round(third, 4)]


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages autograd keeps for backward, not counting `x` and the weights."""
    known = {t.untyped_storage().data_ptr() for t in [x, *module.parameters()]}
    storages: dict[int, torch.UntypedStorage] = {}  # holding them keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in known:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(storage.nbytes() for storage in storages.values())


def measure(n: int, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Measure one case: `n` parameter tokens in `dtype`."""
    torch.manual_seed(0)
    fused = Pattention(WIDTH, WIDTH, n, dtype=dtype)
    group: Any = fused.groups["base"]
    modules: dict[str, nn.Module] = {
        "fused": fused,
        "transcription": Transcription(group.keys.weight, group.values.weight.T),
        "mlp": nn.Sequential(
            nn.Linear(WIDTH, n, bias=False, dtype=dtype), nn.GELU(), nn.Linear(n, WIDTH, bias=False, dtype=dtype)
        ),
    }
    x = torch.randn(TEXT_TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    grad = torch.randn(TEXT_TOKENS, WIDTH, dtype=dtype)
    torch.testing.assert_close(fused(x), modules["transcription"](x), rtol=0.1, atol=0.05)

    def step(module: nn.Module) -> Callable[[], object]:
        def run() -> None:
            torch.autograd.grad(module(x), [x, *module.parameters()], grad)

        return run

    times = interleaved({name: step(m) for name, m in modules.items()}, seconds=seconds, max_rounds=200)
    memory = {name: saved_bytes(m, x) for name, m in modules.items()}
    figures: dict[str, Any] = {}
    for name in ("time fused/mlp", "time fused/transcription"):
        reached, quartiles = ratio(times, "fused", name.split("/")[1])
        figures[name] = goal(GOALS[name], reached) | {"quartiles": quartiles}
    share = memory["fused"] / memory["transcription"]
    figures["memory fused/transcription"] = goal(GOALS["memory fused/transcription"], share)
    return {
        "case": {"text_tokens": TEXT_TOKENS, "width": WIDTH, "param_tokens": n, **how(dtype)},
        "rounds": len(times["fused"]),
        **figures,
        "saved_bytes": memory,
        "machine": machine(),
    }


def write(results: list[dict[str, Any]], path: Path, goals: list[str]) -> None:
    """Append a line per case and print a table of the goals."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(result) + "\n" for result in results)
    table = Table("case", *goals, title=f"reached (asked) quartiles; also in results/{path.name}")
    for result in results:
        table.add_row(" ".join(str(v) for v in result["case"].values()), *(_cell(result.get(name)) for name in goals))
    Console(width=150).print(table)


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    quartiles = "…".join(f"{q:.3f}" for q in figure.get("quartiles", []))
    return f"[{'green' if figure['met'] else 'red'}]{figure['reached']:.3f}[/] ({figure['asked']}) {quartiles}"


def main() -> None:
    """Measure the cases asked for."""
    args = arguments("Time and weigh one Pattention layer.", dtypes=["float32", "bfloat16"], seconds=20).parse_args()
    results = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        results += [measure(n, getattr(torch, dtype), args.seconds) for dtype in args.dtype for n in PARAM_TOKENS]
    write(results, RESULTS / "layer.jsonl", list(GOALS))


if __name__ == "__main__":
    main()
