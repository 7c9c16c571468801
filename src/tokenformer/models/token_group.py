"""A token group and its gate: what they are made of, and how new ones begin.

Shape legend: as in pattention.py.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .ternary import make_linear

# What a model has beside token groups, in the words in which a recipe freezes it.
_OTHER_PARTS = ("embedding", "final_norm", "linear_maps")


def zero_of_new_group(has_tokens: bool, token_group_norm: str) -> Literal["keys", "values"]:
    """Say what of a new group must be zero so that it changes no output: the other half is random and lets it learn.

    Beside tokens under one joint norm the keys: zero scores add exact zeros to the norm and to the output. Otherwise
    the group is normalised alone and zero scores would have no direction, so the values.
    """
    return "keys" if has_tokens and token_group_norm == "joint" else "values"


def draw_tokens(
    in_features: int,
    out_features: int,
    num_tokens: int,
    *,
    zero: Literal["keys", "values"],
    std: float,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Make the keys `[n, D]` and values `[E, n]` of a new group: one half zero, the other N(0, std²).

    Random numbers are drawn on the CPU in `dtype`, so that a seed means the same on every device; on the meta device
    none are drawn.
    """
    device = torch.device(torch.get_default_device() if device is None else device)
    tokens = {
        "keys": torch.zeros(num_tokens, in_features, device=device, dtype=dtype),
        "values": torch.zeros(out_features, num_tokens, device=device, dtype=dtype),
    }
    random = "values" if zero == "keys" else "keys"
    if device.type != "meta":
        drawn = torch.empty(tokens[random].shape, device="cpu", dtype=dtype).normal_(std=std, generator=generator)
        tokens[random] = drawn.to(device)
    return tokens["keys"], tokens["values"]


class TokenGroup(nn.Module):
    """n parameter tokens: `keys` (weight `[n, D]`, a row a key) and `values` (weight `[E, n]`, a column a value).

    `weights`, one of `ternary.WEIGHTS`, says how both are kept. `tau` is its own constant τ where each group has a norm
    of its own; None: the layer's.
    """

    tau: float | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tokens: int,
        *,
        key_std: float,
        value_std: float,
        bias: bool = False,
        weights: str = "float",
        **factory: Any,
    ) -> None:
        super().__init__()
        self.keys = linear_map(in_features, num_tokens, key_std, factory, bias=bias, weights=weights)
        self.values = linear_map(num_tokens, out_features, value_std, factory, weights=weights)


class Gate(nn.Module):
    """Decides for each text token whether a routed group takes part: where `weight · x + bias` is positive.

    Both are buffers, `[1, D]` and `[1]`, for a hard decision has no gradient.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, in_features: int, **factory: Any) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(1, in_features, **factory))
        self.register_buffer("bias", torch.empty(1, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Open for every text token."""
        nn.init.zeros_(self.weight)
        nn.init.ones_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Score `x` `[*, D]`: `[*, 1]`."""
        return F.linear(x.detach(), self.weight.to(x.dtype), self.bias.to(x.dtype))


class LoopScale(nn.Module):
    """What a map's outputs `[*, E]` are multiplied with in the loops that came with a token group: `weight` `[E]`.

    Zero as the loops are grown, so that they add nothing; LayerScale (arXiv 2103.17239) over loops instead of depth.
    """

    def __init__(self, out_features: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Multiply with one, as a model that begins with its loops does."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Scale `x` `[*, E]`, keeping its dtype."""
        return x * self.weight.to(x.dtype)


def default_tau(num_tokens: int, norm_activation_type: str) -> float:
    """Return τ of a layer created with `num_tokens`: √n for L2 norms, n for L1 norms (as `softmax`), 1 for `gelu`."""
    if norm_activation_type == "gelu":
        return 1.0
    return float(num_tokens) if norm_activation_type in ("softmax", "gelu_l1_norm") else math.sqrt(num_tokens)


def check_group(name: str, num_tokens: int) -> None:
    """Raise ValueError unless `name` can name a token group and `num_tokens` is a count."""
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name) or name in _OTHER_PARTS:
        raise ValueError(
            f"token group name {name!r} cannot be used: it becomes part of tensor names, so it must be letters, digits "
            "and underscores, not start with a digit, and not be a word such as 'keys', 'values' or 'embedding'"
        )
    if num_tokens < 0:
        raise ValueError(f"token group {name!r} cannot have {num_tokens} parameter tokens")


def reset_linear(linear: nn.Linear) -> None:
    """Draw the weight of a Pattention's map from N(0, init_std²) and set its bias, where it has one, to zero."""
    nn.init.normal_(linear.weight, std=float(linear.init_std))  # type: ignore[arg-type]
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def linear_map(
    in_features: int,
    out_features: int,
    std: float,
    factory: dict[str, Any],
    *,
    bias: bool = False,
    weights: str = "float",
) -> Any:
    linear = make_linear(in_features, out_features, bias=bias, weights=weights, **factory)
    linear.init_std = std
    return linear
