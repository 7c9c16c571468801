"""In which type to compute."""

from __future__ import annotations

import torch


def use_bfloat16(precision: str) -> bool:
    """Whether to compute in bfloat16: on "auto" only with units for it, since CPUs without emulate it slowly."""
    if precision != "auto":
        return precision == "bfloat16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast_type(precision: str) -> torch.dtype | None:
    """Return the type to autocast to; None computes in that of the weights."""
    return torch.bfloat16 if use_bfloat16(precision) else None
