"""Muon: momentum, orthogonalised, for matrices (Keller Jordan 2024, https://kellerjordan.github.io/posts/muon).

torch.optim.Muon multiplies in bfloat16, one matrix after the other: 10 to 40 times slower on a CPU without units for
bfloat16. This one multiplies in float32 there, and all matrices of one shape at once everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .placement import mesh_of, placed_like, whole

# torch.optim.Muon's: the quintic iteration whose slope at zero is largest, and how often it runs.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPS = 1e-7


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, as torch.optim.Muon with its defaults.

    The step of a matrix [A, B] is `lr · √max(1, A / B)` times one whose singular values are about 1: its spectral norm,
    which is what should stay the same from width to width, is then that of the learning rate.

    Args:
        params: matrices, or groups of them, each with its "lr" and "weight_decay".
        lr: learning rate; about 0.02.
        weight_decay: share of a weight that a step of learning rate 1 would take away.
        momentum: how much of the last steps goes on.

    Raises:
        ValueError: a parameter that is no matrix.
    """

    def __init__(self, params: Any, lr: float = 0.02, weight_decay: float = 0.0, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.dim() != 2]
        if shapes:
            raise ValueError(f"Muon is for matrices, and a parameter has the shape {shapes[0]}; give it to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Tensor]] = {}
            for i, p in enumerate(group["params"]):
                if p.grad is not None:  # of matrices in parts, no more than one is whole at a time
                    alike.setdefault((p.shape, p.dtype, p.device, mesh_of(p) and i), []).append(p)
            for (shape, *_), matrices in alike.items():
                size = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                wanted = orthogonalise(torch.stack([whole(self._direction(p, group["momentum"])) for p in matrices]))
                for p, direction in zip(matrices, wanted, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(placed_like(direction.to(p.dtype), p), alpha=-size)
        return loss

    def _direction(self, p: Tensor, momentum: float) -> Tensor:
        """Bring the momentum up to date and return the gradient that looks ahead along it."""
        assert p.grad is not None
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p.grad)
        state["momentum_buffer"].lerp_(p.grad, 1 - momentum)
        return p.grad.lerp(state["momentum_buffer"], momentum)


def orthogonalise(matrices: Tensor) -> Tensor:
    """Return matrices `[N, A, B]` with the same singular vectors, and singular values between about 0.7 and 1.2.

    Five steps of Newton and Schulz; in bfloat16 on accelerators, in float32 on CPUs. A zero matrix stays zero.
    """
    a, b, c = _COEFFICIENTS
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    x = x if wide else x.transpose(1, 2)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPS)
    for _ in range(_ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.transpose(1, 2)
