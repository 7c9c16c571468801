"""Pattention: attention from text tokens to learnable parameter tokens (TokenFormer, arXiv 2410.23168, section 3.2).

Shape legend: `*` any leading dimensions (batch, text tokens), D `in_features`, E `out_features`,
n_g parameter tokens of group g, N those of all groups together. Needs torch only and works in any PyTorch model:

    layer = Pattention(512, 512, num_tokens=1024)
    y = layer(x)                               # x [*, 512] -> y [*, 512]
    layer.add_group("more", 256)               # y stays bit for bit the same, and the new tokens can learn
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Replicate

NORM_ACTIVATION_TYPES = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
BASE_GROUP = "base"
# Far below any squared norm of trained scores, and above 1e-8, which optimizers of exported graphs take for 0.
DEFAULT_EPS = 1e-7
# What a model has beside token groups, in the words in which a recipe freezes it.
_OTHER_PARTS = ("embedding", "final_norm", "linear_maps")
# Rows normalised at a time by the fused path on a CPU: few enough that a chunk stays in cache, enough that starting
# the threads costs little. The same for any number of tokens, so that growing changes no bit.
_CPU_CHUNK_ROWS = 256


def pattention(
    x: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    *,
    tau: float,
    norm_activation_type: str = "l2_norm_gelu",
    eps: float = DEFAULT_EPS,
) -> Tensor:
    """Compute Pattention as its equations read: the reference every faster path is compared with.

    Args:
        x: `[*, D]`, any floating dtype.
        keys: one `[n_g, D]` per token group, dtype of `x`.
        values: one `[E, n_g]` per token group, dtype of `x` (the transpose of the paper's V_P).
        tau: scale of the normalised scores; √N when the model was created, N for `softmax`.
        norm_activation_type: `l2_norm_gelu`, `gelu_l2_norm` or `softmax`, the official code's names.
        eps: added to the squared norm, so that an all-zero row gives zeros rather than NaN.

    Returns:
        `[*, E]` in the dtype of `x`. Norms are taken in float32 or wider.
    """
    scores = [F.linear(x, k) for k in keys]
    weights = token_weights(scores, tau=tau, norm_activation_type=norm_activation_type, eps=eps)
    return _sum(F.linear(w, v) for w, v in zip(weights, values, strict=True))


def token_weights(
    scores: Sequence[Tensor],
    *,
    tau: float,
    norm_activation_type: str,
    eps: float,
    sum_of_squares: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> list[Tensor]:
    """Turn the scores of every group, `[*, n_g]` each, into weights of the same shapes under one joint norm.

    `sum_of_squares` replaces the sum over this process's parameter tokens where they are spread over several.
    """
    squares = sum_of_squares or _sum_of_squares
    if norm_activation_type == "l2_norm_gelu":
        scale = tau * torch.rsqrt(squares(scores) + eps)
        return [F.gelu((s * scale).to(s.dtype)) for s in scores]
    if norm_activation_type == "gelu_l2_norm":
        activated = [F.gelu(s) for s in scores]
        scale = tau * torch.rsqrt(squares(activated) + eps)
        return [(a * scale).to(a.dtype) for a in activated]
    joint = torch.cat(list(scores), dim=-1)
    weights = torch.softmax(joint, dim=-1, dtype=_norm_dtype(joint.dtype)) * tau
    return list(weights.to(joint.dtype).split([s.shape[-1] for s in scores], dim=-1))


class TokenGroup(nn.Module):
    """n parameter tokens: `keys` (weight `[n, D]`, a row a key) and `values` (weight `[E, n]`, a column a value)."""

    def __init__(
        self, in_features: int, out_features: int, num_tokens: int, *, key_std: float, value_std: float, **factory: Any
    ) -> None:
        super().__init__()
        self.keys = _linear(in_features, num_tokens, key_std, factory)
        self.values = _linear(num_tokens, out_features, value_std, factory)


class Pattention(nn.Module):
    """A projection `[*, D]` to `[*, E]` through named groups of parameter tokens.

    Args:
        in_features, out_features: D and E.
        num_tokens: tokens of the first group, or a mapping from group name to tokens. 0 makes a plain bias-free
            linear map, beside which groups can be grown later.
        tau: constant scale of the normalised scores. Default: √N (N for `softmax`) of the groups the layer gets first.
            Growth never changes it.
        norm_activation_type: `l2_norm_gelu` (the paper's), `gelu_l2_norm` or `softmax`.
        eps: added to the squared norm.
        linear: also keep a bias-free linear map and add its output. Default: only where there are no tokens.
        key_std, value_std, linear_std: standard deviation of a random key (officially 0.02), value and linear map.

    Raises:
        ValueError: a negative count, an impossible group name or an unknown `norm_activation_type`.
    """

    tau: float | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_tokens: int | Mapping[str, int],
        *,
        tau: float | None = None,
        norm_activation_type: str = "l2_norm_gelu",
        eps: float = DEFAULT_EPS,
        linear: bool | None = None,
        key_std: float = 0.02,
        value_std: float = 0.02,
        linear_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if norm_activation_type not in NORM_ACTIVATION_TYPES:
            known = ", ".join(NORM_ACTIVATION_TYPES)
            raise ValueError(f"norm_activation_type is {norm_activation_type!r}; it must be one of {known}")
        counts = {BASE_GROUP: num_tokens} if isinstance(num_tokens, int) else dict(num_tokens)
        self.in_features, self.out_features = in_features, out_features
        self.norm_activation_type, self.eps, self.tau = norm_activation_type, eps, tau
        self.stds = {"key_std": key_std, "value_std": value_std}
        self.fused = True
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        has_linear = not any(counts.values()) if linear is None else linear
        self.linear = _linear(in_features, out_features, linear_std, factory) if has_linear else None
        self.groups = nn.ModuleDict()
        for name, n in counts.items():
            check_group(name, n)
            if n:
                self.groups[name] = TokenGroup(in_features, out_features, n, **self.stds, **factory)
        self._set_default_tau()
        self.reset_parameters()

    @property
    def num_tokens(self) -> int:
        """Parameter tokens of all groups."""
        return sum(group.keys.out_features for group in self._token_groups)

    @property
    def _token_groups(self) -> list[TokenGroup]:
        return list(self.groups.values())  # type: ignore[arg-type]

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every map from N(0, init_std²), `init_std` being an attribute of each."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_init_std(module))

    @torch.no_grad()
    def add_group(self, name: str, num_tokens: int) -> None:
        """Append a token group so that every output stays bit for bit the same and the new tokens can still learn.

        Beside existing tokens the new keys are zero and the values random: zero scores add exact zeros to the norm and
        to the output, and the keys receive gradient through the values. Beside a linear map alone it is the other way
        round (a zero-score row has no direction to normalise): keys random, values zero, and τ is set here.

        Raises:
            ValueError: name taken or impossible, count not positive, or `softmax` with tokens already there (exp(0) = 1
                takes weight from every old token).
        """
        check_group(name, num_tokens)
        if name in self.groups:
            raise ValueError(f"token group {name!r} exists already; its neighbours: {', '.join(self.groups)}")
        if num_tokens == 0:
            raise ValueError(f"token group {name!r} needs at least one parameter token")
        if self.groups and self.norm_activation_type == "softmax":
            raise ValueError(
                "softmax does not keep its outputs when tokens are added: a new zero-score token has weight exp(0) = 1 "
                "and takes it from the old ones; grow an l2_norm_gelu or gelu_l2_norm layer instead"
            )
        like = next(self.parameters())
        group = TokenGroup(
            self.in_features, self.out_features, num_tokens, **self.stds, device=like.device, dtype=like.dtype
        )
        random, zero = (group.values, group.keys) if self.groups else (group.keys, group.values)
        nn.init.normal_(random.weight, std=_init_std(random))
        zero.weight.zero_()
        self.groups[name] = group.train(self.training)
        self._set_default_tau()

    def forward(self, x: Tensor) -> Tensor:
        """Project `x` `[*, D]` to `[*, E]`, same dtype (autocast's dtype under autocast)."""
        if not self.groups:
            return self.linear(x)  # type: ignore[misc]
        tokens = self._fused_output(x) if self._can_fuse() else self._plain_output(x)
        return tokens if self.linear is None else self.linear(x) + tokens

    def extra_repr(self) -> str:
        """Show what printing the child modules does not."""
        return f"tau={self.tau}, norm_activation_type={self.norm_activation_type}, eps={self.eps}"

    def _plain_output(self, x: Tensor) -> Tensor:
        """Call the maps, whatever they have become: quantised, LoRA-wrapped, sharded, hooked."""
        assert self.tau is not None
        groups = self._token_groups
        scores = [group.keys(x) for group in groups]
        weights = token_weights(
            scores,
            tau=self.tau,
            norm_activation_type=self.norm_activation_type,
            eps=self.eps,
            sum_of_squares=self._sum_of_squares,
        )
        return _sum(group.values(w) for group, w in zip(groups, weights, strict=True))

    def _sum_of_squares(self, scores: Sequence[Tensor]) -> Tensor:
        """Add over the tokens of all groups, and over all processes where transformers' tensor parallelism splits them.

        Not by a style of its own in the plan: SGLang refuses plans with styles it does not know.
        """
        squares = _sum_of_squares(scores)
        weight = getattr(self._token_groups[0].keys, "weight", None)
        if not isinstance(weight, DTensor) or weight.device_mesh.mesh_dim_names != ("tp",):
            return squares
        total = DTensor.from_local(squares, weight.device_mesh, [Partial()], run_check=False)
        # The gradient differs between the processes as well, for each scales only its own tokens by the norm.
        return total.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def _fused_output(self, x: Tensor) -> Tensor:
        tensors = [m.weight for group in self._token_groups for m in (group.keys, group.values)]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, tensors = x.to(dtype), [t.to(dtype) for t in tensors]
        assert self.tau is not None
        if torch.is_grad_enabled():
            return _FusedPattention.apply(x, self.tau, self.eps, *tensors)
        return _weigh_in_place(x, tensors[::2], tensors[1::2], self.tau, self.eps)

    def _can_fuse(self) -> bool:
        """Reading the weights is right only while every map is a plain, unhooked nn.Linear; compilers fuse better."""
        return (
            self.fused
            and self.norm_activation_type == "l2_norm_gelu"
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch._C._are_functorch_transforms_active()
            and all(_is_plain(m, nn.Linear) for group in self._token_groups for m in (group.keys, group.values))
        )

    def _set_default_tau(self) -> None:
        if self.tau is None and self.groups:
            self.tau = default_tau(self.num_tokens, self.norm_activation_type)


def _linear(in_features: int, out_features: int, std: float, factory: dict[str, Any]) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=False, **factory)
    linear.init_std = std  # type: ignore[assignment]
    return linear


def _init_std(linear: nn.Linear) -> float:
    return linear.init_std  # type: ignore[return-value]


def default_tau(num_tokens: int, norm_activation_type: str) -> float:
    """Return τ of a layer created with `num_tokens`: √n for the L2 norms, n for `softmax` (official code)."""
    return float(num_tokens) if norm_activation_type == "softmax" else math.sqrt(num_tokens)


def check_group(name: str, num_tokens: int) -> None:
    """Raise ValueError unless `name` can name a token group and `num_tokens` is a count."""
    if not name.isidentifier() or hasattr(nn.ModuleDict(), name) or name in _OTHER_PARTS:
        raise ValueError(
            f"token group name {name!r} cannot be used: it becomes part of tensor names, so it must be letters, digits "
            "and underscores, not start with a digit, and not be a word such as 'keys', 'values' or 'embedding'"
        )
    if num_tokens < 0:
        raise ValueError(f"token group {name!r} cannot have {num_tokens} parameter tokens")


def _weigh_in_place(x: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], tau: float, eps: float) -> Tensor:
    """l2_norm_gelu where nothing is kept for backward: one N-wide tensor a group, the same bits as in training."""
    scores = [F.linear(x, k) for k in keys]
    scale = torch.rsqrt(_sum_of_squares(scores) + eps) * tau
    for s in scores:
        F.gelu(s.mul_(scale), out=s)  # type: ignore[call-arg]
    out = F.linear(scores[0], values[0])
    for s, v in zip(scores[1:], values[1:], strict=True):
        out += F.linear(s, v)
    return out


class _FusedPattention(torch.autograd.Function):
    """l2_norm_gelu keeping one N-wide activation for backward (the normalised scores) where autograd keeps four.

    With u = s·r, r = τ/√(Σs² + eps), w = gelu(u), g = ∂L/∂w ⊙ gelu'(u):  ∂L/∂s = r·(g − u·(Σ g·u)/τ²), the sum running
    over the tokens of all groups.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, tau: float, eps: float, *maps: Tensor) -> Tensor:
        keys, values = maps[::2], maps[1::2]
        x_2d = x.reshape(-1, x.shape[-1])
        scores = [F.linear(x_2d, k) for k in keys]
        weights = [torch.empty_like(s) for s in scores]
        scale = x_2d.new_empty(x_2d.shape[0], 1, dtype=_norm_dtype(x.dtype))
        for rows in _row_chunks(x_2d):
            chunk = [s[rows] for s in scores]
            r = torch.mul(torch.rsqrt(_sum_of_squares(chunk) + eps), tau, out=scale[rows])
            for s, w in zip(chunk, weights, strict=True):
                F.gelu(s.mul_(r), out=w[rows])  # type: ignore[call-arg]
        ctx.save_for_backward(x_2d, scale, *maps, *scores)
        ctx.tau = tau
        out = F.linear(weights[0], values[0])
        for w, v in zip(weights[1:], values[1:], strict=True):
            out += F.linear(w, v)
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        n_maps = len(ctx.needs_input_grad) - 3
        x, scale, *rest = ctx.saved_tensors
        keys, values, normed = rest[0:n_maps:2], rest[1:n_maps:2], rest[n_maps:]
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
            along = _sum(torch.linalg.vecdot(g, u).unsqueeze(1) for u, g in chunk)
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


def _row_chunks(x: Tensor) -> list[slice]:
    step = _CPU_CHUNK_ROWS if x.device.type == "cpu" else max(1, len(x))
    return [slice(i, i + step) for i in range(0, len(x), step)]


def _norm_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _sum_of_squares(scores: Sequence[Tensor]) -> Tensor:
    return _sum(torch.linalg.vector_norm(s, dim=-1, keepdim=True, dtype=_norm_dtype(s.dtype)).square() for s in scores)


def _sum(tensors: Iterable[Tensor]) -> Tensor:
    """Add from left to right; unlike `sum`, without starting from 0."""
    first, *rest = tensors
    for t in rest:
        first = first + t
    return first


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    return (
        type(module) is kind
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
        and all(type(p) is nn.Parameter for p in module._parameters.values() if p is not None)
    )
