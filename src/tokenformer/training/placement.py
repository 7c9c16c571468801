"""Tensors of which every process holds a part, and whole ones: from one to the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as every process would hold it alone; all must ask for it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def mesh_of(tensor: Tensor) -> Any:
    """Return the processes that hold parts of a tensor; None where each holds all of it."""
    return tensor.device_mesh if isinstance(tensor, DTensor) else None


def placed_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return, of a `tensor` that every process has whole, the part that it holds of `other`, of the same shape.

    Nothing is sent where each dimension is split once; one that is split twice, by tensor parallelism and by FSDP
    within its parts, is first split in plain pieces.
    """
    if not isinstance(other, DTensor):
        return tensor
    plain = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in other.placements]
    placed = distribute_tensor(tensor, other.device_mesh, plain, src_data_rank=None)
    return placed.redistribute(placements=other.placements)
