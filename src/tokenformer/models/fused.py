"""From scores to outputs: the normalisations as they read, and l2_norm_gelu fused, with few wide tensors kept.

Shape legend: as in pattention.py.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows normalised at a time by the fused path on a CPU: few enough that a chunk stays in cache, enough that starting
# the threads costs little. The same for any number of tokens, so that growing changes no bit.
_CPU_CHUNK_ROWS = 256


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def sum_of_squares(scores: Sequence[Tensor]) -> Tensor:
    """Add the squares of a row's scores, `[*, 1]`; in float64, for in float32 they overflow from a norm of 1.8e19 on.

    In compiled and exported graphs, and on devices without float64, they are float32 all the same.
    """
    narrow = scores[0].device.type == "mps" or torch.compiler.is_compiling() or torch.jit.is_tracing()
    dtype = norm_dtype(scores[0].dtype) if narrow else torch.float64
    return add_up(torch.linalg.vector_norm(s, dim=-1, keepdim=True, dtype=dtype).square() for s in scores)


def scale_of(squares: Tensor, tau: float, eps: float, dtype: torch.dtype) -> Tensor:
    """Return what a row's scores are multiplied with: τ over their norm, `[*, 1]`, in `dtype`."""
    return (torch.rsqrt(squares + eps) * tau).to(dtype)


def sum_of_sizes(scores: Sequence[Tensor]) -> Tensor:
    return add_up(torch.linalg.vector_norm(s, ord=1, dim=-1, keepdim=True, dtype=norm_dtype(s.dtype)) for s in scores)


def add_up(tensors: Iterable[Tensor]) -> Tensor:
    """Add from left to right; unlike `sum`, without starting from 0."""
    return functools.reduce(operator.add, tensors)


def token_weights(
    scores: Sequence[Tensor],
    *,
    tau: float,
    norm_activation_type: str,
    eps: float,
    squares: Callable[[Sequence[Tensor]], Tensor] = sum_of_squares,
) -> list[Tensor]:
    """Turn the scores of every group, `[*, n_g]` each, into weights of the same shapes under one joint norm.

    `squares` replaces the sum over this process's parameter tokens where they are spread over several.
    """
    if norm_activation_type == "gelu":
        return [F.gelu(s) for s in scores]
    if norm_activation_type == "l2_norm_gelu":
        scale = scale_of(squares(scores), tau, eps, norm_dtype(scores[0].dtype))
        return [F.gelu((s * scale).to(s.dtype)) for s in scores]
    if norm_activation_type == "gelu_l2_norm":
        activated = [F.gelu(s) for s in scores]
        scale = scale_of(squares(activated), tau, eps, norm_dtype(scores[0].dtype))
        return [(a * scale).to(a.dtype) for a in activated]
    if norm_activation_type == "gelu_l1_norm":
        activated = [F.gelu(s) for s in scores]
        scale = tau / (sum_of_sizes(activated) + eps)
        return [(a * scale).to(a.dtype) for a in activated]
    joint = torch.cat(list(scores), dim=-1)
    weights = torch.softmax(joint, dim=-1, dtype=norm_dtype(joint.dtype)) * tau
    return list(weights.to(joint.dtype).split([s.shape[-1] for s in scores], dim=-1))


def weigh_in_place(x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], tau: float, eps: float) -> Tensor:
    """l2_norm_gelu where nothing is kept for backward: one N-wide tensor a group, the same bits as in training."""
    scores = [F.linear(x, k) for k in keys]
    scale = scale_of(sum_of_squares(scores), tau, eps, norm_dtype(x.dtype))
    for s in scores:
        F.gelu(s.mul_(scale), out=s)  # type: ignore[call-arg]
    out = F.linear(scores[0], values[0])
    for s, v in zip(scores[1:], values[1:], strict=True):
        out += F.linear(s, v)
    return out


def why_not_plain(module: nn.Module, *, kinds: tuple[type, ...] = (nn.Linear,)) -> str | None:
    """Say what makes a linear map more or less than its weights: an adapter, quantisation, shards.

    Args:
        module: the map.
        kinds: classes that compute with their weights alone.

    Returns:
        A reason in words; None where reading or moving the weights is all there is to the map.
    """
    if type(module) not in kinds:
        return f"a map is a {type(module).__module__}.{type(module).__name__}"
    for name, tensor in module._parameters.items():
        if tensor is not None and type(tensor) is not nn.Parameter:
            return f"the {name} of a map is a {type(tensor).__module__}.{type(tensor).__name__}"
    return None


def can_read(module: nn.Module) -> bool:
    """Whether the weights may be read instead of calling the map: nobody would miss the call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return why_not_plain(module) is None and "forward" not in module.__dict__ and not any(hooks)


class FusedPattention(torch.autograd.Function):
    """l2_norm_gelu keeping one N-wide activation for backward (the normalised scores) where autograd keeps four.

    With u = s·r, r = τ/√(Σs² + eps), w = gelu(u), g = ∂L/∂w ⊙ gelu'(u):  ∂L/∂s = r·(g − u·(Σ g·u)/τ²), the sum running
    over the tokens of all groups. Where a second derivative may be asked for (`create_graph=True`), autograd goes
    through the equations as they read instead.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tau: float, eps: float, *maps: Tensor) -> Tensor:
        keys, values = maps[::2], maps[1::2]
        x_2d = x.reshape(-1, x.shape[-1])
        scores = [F.linear(x_2d, k) for k in keys]
        weights = [torch.empty_like(s) for s in scores]
        scale = x_2d.new_empty(x_2d.shape[0], 1, dtype=norm_dtype(x.dtype))
        for rows in _row_chunks(x_2d):
            chunk = [s[rows] for s in scores]
            r = scale[rows].copy_(scale_of(sum_of_squares(chunk), tau, eps, scale.dtype))
            for s, w in zip(chunk, weights, strict=True):
                F.gelu(s.mul_(r), out=w[rows])  # type: ignore[call-arg]
        ctx.save_for_backward(x, scale, *maps, *scores)
        ctx.tau, ctx.eps = tau, eps
        out = F.linear(weights[0], values[0])
        for w, v in zip(weights[1:], values[1:], strict=True):
            out += F.linear(w, v)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        n_maps = len(ctx.needs_input_grad) - 3
        given, scale, *rest = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, given, rest[:n_maps], grad_out)
        keys, values, normed = rest[0:n_maps:2], rest[1:n_maps:2], rest[n_maps:]
        x = given.reshape(-1, given.shape[-1])
        gy = grad_out.reshape(-1, grad_out.shape[-1])
        needs_x, needs_map = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        needs_scores = needs_x or any(needs_map[::2])
        weights = [torch.empty_like(u) if needs else None for u, needs in zip(normed, needs_map[1::2], strict=True)]
        grads = [gy @ v for v in values] if needs_scores else []
        for rows in _row_chunks(x):
            for u, w in zip(normed, weights, strict=True):
                if w is not None:
                    F.gelu(u[rows], out=w[rows])  # type: ignore[call-arg]
            if not needs_scores:
                continue
            chunk = [(u[rows], g[rows]) for u, g in zip(normed, grads, strict=True)]
            for u, g in chunk:
                torch.ops.aten.gelu_backward.grad_input(g, u, grad_input=g)
            # Not bmm, which takes six times as long for one row by one column.
            along = add_up(torch.linalg.vecdot(g, u).unsqueeze(1) for u, g in chunk)
            along *= -1.0 / ctx.tau**2
            for u, g in chunk:
                g.addcmul_(u, along).mul_(scale[rows])
        grad_x = None
        if needs_x:
            grad_x = grads[0] @ keys[0]
            for g, k in zip(grads[1:], keys[1:], strict=True):
                grad_x += g @ k
            grad_x = grad_x.view(*grad_out.shape[:-1], x.shape[-1])
        grad_maps: list[Tensor | None] = []
        for i, w in enumerate(weights):
            grad_maps.append(grads[i].t() @ x if needs_map[2 * i] else None)
            grad_maps.append(gy.t() @ w if w is not None else None)
        return grad_x, None, None, *grad_maps


def _differentiable_gradients(
    ctx: Any, x: Tensor, maps: Sequence[Tensor], grad_out: Tensor
) -> tuple[Tensor | None, ...]:
    """Return what backward returns, with a graph of its own."""
    scores = [F.linear(x, k) for k in maps[::2]]
    weights = token_weights(scores, tau=ctx.tau, norm_activation_type="l2_norm_gelu", eps=ctx.eps)
    out = add_up(F.linear(w, v) for w, v in zip(weights, maps[1::2], strict=True))
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
    wanted = [tensor for tensor, need in zip([x, *maps], needs, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, grad_out, create_graph=True))
    grad_x, *grad_maps = [next(found) if need else None for need in needs]
    return grad_x, None, None, *grad_maps


def _row_chunks(x: Tensor) -> list[slice]:
    step = _CPU_CHUNK_ROWS if x.device.type == "cpu" else max(1, len(x))
    return [slice(i, i + step) for i in range(0, len(x), step)]
