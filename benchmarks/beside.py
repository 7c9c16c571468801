"""Time tokens beside a linear map, and weigh their FLOPs, beside LoRA with as many parameters.

Run from the repository root (about a minute):

    python benchmarks/beside.py

A frozen linear map alone, with n parameter tokens beside it, and with LoRA of rank n: forward and backward, gradients
of the input and of what trains. A round runs each once, in random order; a figure is the median of the rounds' ratios,
with quartiles, in the thread's own CPU time. Every run adds a line per case to benchmarks/results/beside.jsonl.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from layer import RESULTS, arguments, goal, how, interleaved, machine, ratio, write
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tokenformer import freeze, grow

TEXT_TOKENS, WIDTH, OUT, PARAM_TOKENS = 2048, 576, 1536, (16, 64, 256)
GOALS = {"flops tokens/two products": 1.1, "flops tokens/lora": 1.1, "time tokens/lora": 1.1}


class Map(nn.Module):
    """A linear map with a name, as models have them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.map = nn.Linear(WIDTH, OUT, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, D]` to `[B, E]`."""
        return self.map(x)


def measure(n: int, dtype: torch.dtype, seconds: float) -> dict[str, Any]:
    """Measure one case: `n` parameter tokens, and LoRA of rank `n`, in `dtype`."""
    torch.manual_seed(0)
    tokens = Map(dtype)
    grow(tokens, at="map", tokens=n, name="new")
    freeze(tokens, all_but=["new"])
    lora = get_peft_model(Map(dtype), LoraConfig(target_modules=["map"], r=n), autocast_adapter_dtype=False)
    arms: dict[str, nn.Module] = {"alone": Map(dtype).requires_grad_(False), "tokens": tokens, "lora": lora}
    x = torch.randn(TEXT_TOKENS, WIDTH, dtype=dtype, requires_grad=True)
    grad = torch.randn(TEXT_TOKENS, OUT, dtype=dtype)

    def step(module: nn.Module) -> Callable[[], object]:
        def run() -> None:
            module.zero_grad()
            x.grad = None
            module(x).backward(grad)

        return run

    flops = {}
    for name, module in arms.items():
        with FlopCounterMode(display=False) as counted:
            step(module)()
        flops[name] = counted.get_total_flops()
    products = 3 * 2 * TEXT_TOKENS * n * (WIDTH + OUT)  # forward, and backward to input and weights
    times = interleaved({name: step(m) for name, m in arms.items()}, seconds=seconds, max_rounds=100)
    figures: dict[str, Any] = {
        "flops tokens/two products": goal(1.1, (flops["tokens"] - flops["alone"]) / products),
        "flops tokens/lora": goal(1.1, (flops["tokens"] - flops["alone"]) / (flops["lora"] - flops["alone"])),
    }
    for name, under in (("time tokens/lora", "lora"), ("time tokens/alone", "alone")):
        reached, quartiles = ratio(times, "tokens", under)
        figures[name] = goal(GOALS.get(name, float("inf")), reached) | {"quartiles": quartiles}
    del figures["time tokens/alone"]["asked"], figures["time tokens/alone"]["met"]
    case = {"text_tokens": TEXT_TOKENS, "width": WIDTH, "out": OUT, "param_tokens": n, **how(dtype)}
    return {"case": case, "rounds": len(times["tokens"]), **figures, "machine": machine()}


def main() -> None:
    """Measure the cases asked for."""
    parser = arguments("Time tokens beside a linear map.", dtypes=["float32"], seconds=8)
    args = parser.parse_args()
    results = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        results += [measure(n, getattr(torch, dtype), args.seconds) for dtype in args.dtype for n in PARAM_TOKENS]
    write(results, RESULTS / "beside.jsonl", list(GOALS))


if __name__ == "__main__":
    main()
