"""Linear maps whose weights are ternary, {-1, 0, 1} · scale, and whose inputs are 8-bit integers (BitNet b1.58).

Shape legend: `*` any leading dimensions, D `in_features`, E `out_features`.

Weights have one scale, the mean of their sizes; every row of inputs has its own. The numbers are those of transformers'
`AutoBitLinear(online_quant=True)`, to the bit where that is not compiled. It compiles itself when it runs, for which it
wants a C++ compiler, and then adds up in another order. As there, products are of floating-point numbers that happen to
be whole multiples of a scale.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = ("float", "ternary", "packed")
# A scale's least mean or largest size: all-zero keys, with which growth begins, and all-zero rows stay zeros.
_LEAST = 1e-5
_PER_BYTE = 4


def ternary(weight: Tensor) -> Tensor:
    """Round a weight to {-1, 0, 1} · its mean size; all zeros stay zeros. The gradient is that of the identity."""
    return _Ternary.apply(weight)


def rounded_to_int8(x: Tensor) -> Tensor:
    """Round each row `[D]` of inputs `[*, D]` to 255 steps of its largest size / 127; gradient as of the identity."""
    return _Int8.apply(x)


class TernaryLinear(nn.Linear):
    """A linear map that learns a float weight `[E, D]` and computes with what `ternary` makes of it."""

    def forward(self, x: Tensor) -> Tensor:
        """Map `[*, D]` to `[*, E]`."""
        return F.linear(rounded_to_int8(x), ternary(self.weight), self.bias)


class PackedLinear(nn.Module):
    """A ternary linear map that keeps 2 bits a weight and no longer trains.

    `weight`, uint8 `[⌈E/4⌉, D]`, and `weight_scale`, float32 `[1]`, what a weight was multiplied with before it was
    rounded, are laid out as in transformers' `BitLinear`; `bias` is `[E]`.
    """

    weight: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, **factory: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        device, rows = factory.get("device"), -(-out_features // _PER_BYTE)
        self.register_buffer("weight", torch.zeros(rows, in_features, dtype=torch.uint8, device=device))
        self.register_buffer("weight_scale", torch.ones(1, dtype=torch.float32, device=device))
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, **factory)) if bias else None)

    @classmethod
    @torch.no_grad()
    def of(cls, linear: TernaryLinear) -> PackedLinear:
        """Return the map that computes what `linear` does, to the bit."""
        with torch.device("meta"):
            packed = cls(linear.in_features, linear.out_features)
        scale = _scale(linear.weight)
        packed.weight = pack_numbers(_rounded(linear.weight, scale).to(torch.int8))
        packed.weight_scale = scale.to(torch.float32).reshape(1)
        packed.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
        return packed.train(linear.training)

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the weight `[E, D]` in floating point."""
        return (unpack_numbers(self.weight, self.out_features).to(_wide(dtype)) / self.weight_scale).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[*, D]` to `[*, E]`."""
        return F.linear(rounded_to_int8(x), self.unpacked(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Show sizes as nn.Linear does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def pack_numbers(weight: Tensor) -> Tensor:
    """Pack numbers in {-1, 0, 1}, int8 `[E, D]`, four rows a byte: uint8 `[⌈E/4⌉, D]`.

    With R rows of bytes, the numbers of rows i, R + i, 2R + i and 3R + i, plus 1, are in row i from the lowest bits up.
    """
    rows = -(-len(weight) // _PER_BYTE)
    padded = F.pad((weight + 1).to(torch.uint8), (0, 0, 0, _PER_BYTE * rows - len(weight)))
    first, second, third, fourth = padded.view(_PER_BYTE, rows, -1)
    return first | second << 2 | third << 4 | fourth << 6


def unpack_numbers(packed: Tensor, rows: int) -> Tensor:
    """Return the numbers in {-1, 0, 1}, int8 `[rows, D]`, that `pack_numbers` packed."""
    return torch.cat([packed >> 2 * i & 3 for i in range(_PER_BYTE)])[:rows].to(torch.int8) - 1


def make_linear(in_features: int, out_features: int, *, weights: str, bias: bool = False, **factory: Any) -> Any:
    """Return a linear map whose weights are kept as one of `WEIGHTS` says.

    Raises:
        ValueError: another word.
    """
    kinds = {"float": nn.Linear, "ternary": TernaryLinear, "packed": PackedLinear}
    if weights not in kinds:
        raise ValueError(f"weights is {weights!r}; it must be one of {', '.join(kinds)}")
    return kinds[weights](in_features, out_features, bias=bias, **factory)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _scale(weight: Tensor) -> Tensor:
    """Return what a weight is multiplied with before it is rounded."""
    return 1.0 / weight.to(_wide(weight.dtype)).abs().mean().clamp_(min=_LEAST)


def _rounded(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight.to(scale.dtype) * scale).round_().clamp_(-1, 1)


class _Ternary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        scale = _scale(weight)
        return _rounded(weight, scale).div_(scale).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Int8(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        wide = x.to(_wide(x.dtype))
        scale = 127 / wide.abs().amax(dim=-1, keepdim=True).clamp_(min=_LEAST)
        return (wide * scale).round_().clamp_(-128, 127).div_(scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad
