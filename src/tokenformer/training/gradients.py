"""Steps whose gradients are no numbers, or far too large, are found before they reach the weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..units import counted
from .placement import mesh_of, whole

# What to do with a step: told its gradients by parameter, their norm, and what is wrong with them.
OnBadStep = Callable[[dict[str, Tensor], str], None]


class GuardedTrainer(Trainer):
    """Looks at the gradients of every step before they are clipped, after which all of them can be no numbers.

    Whoever makes one sets `before_clipping`.
    """

    before_clipping: Callable[[], None] | None = None

    def _clip_grad_norm(self, model: nn.Module) -> Tensor | float:
        if self.before_clipping is not None:
            self.before_clipping()
        return super()._clip_grad_norm(model)


def check_gradients(model: nn.Module, largest: float | None, on_bad: OnBadStep) -> None:
    """Call `on_bad` where the gradients of a model are not finite, or their norm is above `largest`."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = _norm(list(gradients.values()))
    if largest is not None and norm > largest:
        on_bad(gradients, f"the norm of its gradients is {norm:.3g}, and bad_grad_norm is {largest:g}")
    elif not norm < float("inf"):
        odd = [name for name, gradient in gradients.items() if not whole(torch.isfinite(gradient).all())]
        named = ", ".join(odd[:3]) + (", …" if len(odd) > 3 else "")
        on_bad(gradients, f"its gradients are not finite in {len(odd)} of {counted(len(gradients), 'tensor')}: {named}")


def _norm(gradients: list[Tensor]) -> float:
    """Return the norm of all gradients together, of which several processes may hold parts."""
    if any(mesh_of(gradient) for gradient in gradients):
        gradients = [whole(torch.linalg.vector_norm(gradient)) for gradient in gradients]
    return float(torch.nn.utils.get_total_norm(gradients))
