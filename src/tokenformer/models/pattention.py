"""Pattention: attention from text tokens to learnable parameter tokens (TokenFormer, arXiv 2410.23168, section 3.2).

Shape legend: `*` any leading dimensions (batch, text tokens), D `in_features`, E `out_features`,
n_g parameter tokens of group g, N those of all groups together. Needs torch only and works in any PyTorch model:

    layer = Pattention(512, 512, num_tokens=1024)
    y = layer(x)                               # x [*, 512] -> y [*, 512]
    layer.add_group("more", 256)               # y stays bit for bit the same, and the new tokens can learn
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from .fused import FusedPattention, add_up, can_read, sum_of_squares, token_weights, weigh_in_place
from .names import BASE_GROUP
from .token_group import (
    Gate,
    LoopScale,
    TokenGroup,
    check_group,
    default_tau,
    draw_tokens,
    linear_map,
    reset_linear,
    zero_of_new_group,
)

NORM_ACTIVATION_TYPES = ("l2_norm_gelu", "gelu_l2_norm", "gelu_l1_norm", "softmax", "gelu")
TOKEN_GROUP_NORMS = ("joint", "per_group")
# Far below any squared norm of trained scores, and above 1e-8, which optimizers of exported graphs take for 0.
DEFAULT_EPS = 1e-7


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
        tau: scale of the normalised scores; √N when the model was created, N for L1 norms.
        norm_activation_type: `l2_norm_gelu`, `gelu_l2_norm` or `softmax`, the official code's names; `gelu_l1_norm` of
            the paper's table 4; or `gelu`: no normalisation and no τ, as in an ordinary feed-forward.
        eps: added to the squared (L1: plain) norm, so that an all-zero row gives zeros rather than NaN.

    Returns:
        `[*, E]` in the dtype of `x`. Norms are taken in float32 or wider.
    """
    scores = [F.linear(x, k) for k in keys]
    weights = token_weights(scores, tau=tau, norm_activation_type=norm_activation_type, eps=eps)
    return add_up(F.linear(w, v) for w, v in zip(weights, values, strict=True))


class Pattention(nn.Module):
    """A projection `[*, D]` to `[*, E]` through named groups of parameter tokens.

    `keep`, 1.0 unless set, is the share of each group's tokens, from the first on and rounded up, that takes part.
    `loops` names, for groups that take part in some loops of a looped model alone, these.

    Args:
        in_features, out_features: D and E.
        num_tokens: tokens of the first group, or a mapping from group name to tokens. 0 makes a plain bias-free
            linear map, beside which groups can be grown later.
        tau: constant scale of the normalised scores. Default: √N (N for L1 norms, 1 for `gelu`) of the groups the
            layer gets first. Growth never changes it.
        norm_activation_type: `l2_norm_gelu` (paper), `gelu_l2_norm`, `gelu_l1_norm`, `softmax`, or `gelu`: no norm.
        eps: added to the squared norm.
        linear: also keep a bias-free linear map and add its output. Default: only where there are no tokens.
        bias: give every key a bias, and the output one.
        token_group_norm: `joint`: one norm over the tokens of all groups; `per_group`: one for each, so that the layer
            is the sum of layers with one group.
        weights: how maps are kept: `float`; `ternary`, {-1, 0, 1} · one scale for the keys and one for the values of
            each group, beside 8-bit inputs; or `packed`, ternary in 2 bits, which do not train.
        group_weights: how those of the groups named in it are, where that is another way.
        key_std, value_std, linear_std: standard deviation of a random key (officially 0.02), value and linear map.

    Raises:
        ValueError: a negative count, an impossible group name, an unknown `norm_activation_type` or `token_group_norm`.
    """

    tau: float | None
    bias: nn.Parameter | None

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
        bias: bool = False,
        token_group_norm: str = "joint",
        weights: str = "float",
        group_weights: Mapping[str, str] | None = None,
        key_std: float = 0.02,
        value_std: float = 0.02,
        linear_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("norm_activation_type", norm_activation_type, NORM_ACTIVATION_TYPES)
        check_choice("token_group_norm", token_group_norm, TOKEN_GROUP_NORMS)
        counts = {BASE_GROUP: num_tokens} if isinstance(num_tokens, int) else dict(num_tokens)
        self.in_features, self.out_features = in_features, out_features
        self.norm_activation_type, self.eps, self.tau = norm_activation_type, eps, tau
        self.token_group_norm = token_group_norm
        self.stds: dict[str, Any] = {"key_std": key_std, "value_std": value_std}
        self.fused = True
        self.keep = 1.0
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        has_linear = not any(counts.values()) if linear is None else linear
        self.linear = None
        if has_linear:
            self.linear = linear_map(in_features, out_features, linear_std, factory, weights=weights)
        self.register_parameter("bias", nn.Parameter(torch.zeros(out_features, **factory)) if bias else None)
        self.groups = nn.ModuleDict()
        self.gates = nn.ModuleDict()
        self.scales = nn.ModuleDict()
        self.loops: dict[str, tuple[int, ...]] = {}
        for name, n in counts.items():
            check_group(name, n)
            if n:
                kept = (group_weights or {}).get(name, weights)
                self.groups[name] = TokenGroup(
                    in_features, out_features, n, bias=bias, weights=kept, **self.stds, **factory
                )
        self._set_default_tau()
        self.reset_parameters()

    @property
    def num_tokens(self) -> int:
        """Parameter tokens of all groups."""
        return sum(group.keys.out_features for group in self._token_groups)

    @property
    def _token_groups(self) -> list[TokenGroup]:
        return list(self.groups.values())  # type: ignore[arg-type]

    @property
    def like(self) -> Tensor:
        """A tensor of the device and type that new parameters get: the first, or where all maps are packed a scale."""
        return next(t for t in (*self.parameters(), *self.buffers()) if t.is_floating_point())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw every map from N(0, init_std²), `init_std` being an attribute of each; biases are zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                reset_linear(module)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @torch.no_grad()
    def add_group(
        self,
        name: str,
        num_tokens: int,
        generator: torch.Generator | None = None,
        *,
        weights: str = "float",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Append a token group so that every output stays bit for bit the same and the new tokens can still learn.

        Beside existing tokens the new keys are zero and the values random; beside a linear map alone, where τ is set
        here, and under `per_group` the other way round: see `zero_of_new_group`. `generator`: of the random half.
        `weights`: "float" or "ternary". `device`, `dtype`: by default those of the layer's first parameter.

        Raises:
            ValueError: name taken or impossible, count not positive, or `softmax` with tokens already there under a
                joint norm (exp(0) = 1 takes weight from every old token).
        """
        check_group(name, num_tokens)
        if name in self.groups:
            raise ValueError(f"token group {name!r} exists already; its neighbours: {', '.join(self.groups)}")
        if num_tokens == 0:
            raise ValueError(f"token group {name!r} needs at least one parameter token")
        zero = zero_of_new_group(bool(self.groups), self.token_group_norm)
        if zero == "keys" and self.norm_activation_type == "softmax":
            raise ValueError(
                "softmax does not keep its outputs when tokens are added: a new zero-score token has weight exp(0) = 1 "
                "and takes it from the old ones; grow an l2_norm_gelu or gelu_l2_norm layer instead"
            )
        if device is None or dtype is None:
            device, dtype = device or self.like.device, dtype or self.like.dtype
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        std = self.stds["value_std" if zero == "keys" else "key_std"]
        sizes = (self.in_features, self.out_features, num_tokens)
        keys, values = draw_tokens(*sizes, zero=zero, std=std, generator=generator, **factory)
        group = TokenGroup(*sizes, weights=weights, **self.stds, device="meta")
        group.keys.weight, group.values.weight = nn.Parameter(keys), nn.Parameter(values)
        if self.bias is not None:
            group.keys.bias = nn.Parameter(torch.zeros(num_tokens, **factory))
        self.groups[name] = group.train(self.training)
        self._set_default_tau()

    def add_gate(self, name: str) -> None:
        """Route token group `name`: from now on it takes part only where its gate is open, which it is at first.

        Raises:
            ValueError: there is no such group.
        """
        if name not in self.groups:
            raise ValueError(f"there is no token group {name!r} to route; there are {', '.join(self.groups) or 'none'}")
        self.gates[name] = Gate(self.in_features, device=self.like.device, dtype=self.like.dtype)

    def add_scale(self, name: str) -> None:
        """Scale the outputs in the loops that came with token group `name`, which `loops` has."""
        self.scales[name] = LoopScale(self.out_features, device=self.like.device, dtype=self.like.dtype)

    def forward(self, x: Tensor, loop: int = 0) -> Tensor:
        """Project `x` `[*, D]` to `[*, E]`, same dtype (autocast's dtype under autocast), in one loop of the model."""
        groups, linear = self._groups_in(loop), self.linear
        if linear is not None and not groups:
            out = linear(x)
        else:
            out = self._routed_output(x, groups) if self.gates else self._tokens_output(x, groups)
            out = out if linear is None else linear(x) + out
        if self.bias is not None:
            out = out + self.bias.to(out.dtype)
        for name, scale in self.scales.items():
            out = scale(out) if loop in self.loops[name] else out
        return out

    def _groups_in(self, loop: int) -> dict[str, Any]:
        return {name: group for name, group in self.groups.items() if loop in self.loops.get(name, (loop,))}

    def extra_repr(self) -> str:
        """Show what printing the child modules does not."""
        norm = f"tau={self.tau}, norm_activation_type={self.norm_activation_type}, eps={self.eps}"
        return norm if self.token_group_norm == "joint" else f"{norm}, token_group_norm={self.token_group_norm}"

    def _routed_output(self, x: Tensor, groups: Mapping[str, Any]) -> Tensor:
        """Sort the rows by which groups are open for them, so that closed groups cost nothing."""
        if _is_traced():
            return self._masked_output(x, groups)
        rows = x.reshape(-1, x.shape[-1])
        is_open = torch.cat([gate(x) > 0 for gate in self.gates.values()], dim=-1).reshape(-1, len(self.gates))
        first = is_open[:1]
        if (is_open == first).all():
            return self._tokens_output(x, self._open_groups(groups, first.any(0).tolist()))
        patterns, of_row, counts = torch.unique(is_open, dim=0, return_inverse=True, return_counts=True)
        order = of_row.argsort()
        opened = [self._open_groups(groups, pattern) for pattern in patterns.tolist()]
        parts = zip(rows[order].split(counts.tolist()), opened, strict=True)
        return torch.cat([self._tokens_output(*part) for part in parts])[order.argsort()].view(*x.shape[:-1], -1)

    def _masked_output(self, x: Tensor, groups: Mapping[str, Any]) -> Tensor:
        """Compute every group for every row and leave out what is closed: nothing saved, and no sorting."""
        closed = {name: ~(gate(x) > 0) for name, gate in self.gates.items()}
        return self._tokens_output(x, groups, closed)

    def _open_groups(self, groups: Mapping[str, Any], pattern: Sequence[bool]) -> dict[str, Any]:
        gates = dict(zip(self.gates, pattern, strict=True))
        return {name: group for name, group in groups.items() if gates.get(name, True)}

    def _tokens_output(
        self, x: Tensor, groups: Mapping[str, Any], closed: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Add up what these groups give; `closed`, a mask `[*, 1]` by name, leaves groups out of some rows."""
        if not groups:
            autocast = torch.is_autocast_enabled(x.device.type)
            dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
            return x.new_zeros(*x.shape[:-1], self.out_features, dtype=dtype)
        if self.token_group_norm == "per_group" and len(groups) > 1:
            return add_up(self._tokens_output(x, {name: group}, closed) for name, group in groups.items())
        if closed is None and self._can_fuse(list(groups.values())):
            return self._fused_output(x, list(groups.values()))
        return self._plain_output(x, list(groups.values()), [(closed or {}).get(name) for name in groups])

    def _plain_output(self, x: Tensor, groups: list[TokenGroup], closed: list[Tensor | None]) -> Tensor:
        """Call the maps, whatever they have become: quantised, LoRA-wrapped, sharded, hooked."""
        maps = [self._maps(group) for group in groups]
        scores = [keys(x) for keys, _ in maps]
        nothing = torch.finfo(scores[0].dtype).min if self.norm_activation_type == "softmax" else 0.0
        weights = token_weights(
            [_fill(s, mask, nothing) for s, mask in zip(scores, closed, strict=True)],
            tau=self._tau_of(groups),
            norm_activation_type=self.norm_activation_type,
            eps=self.eps,
            squares=self._sum_of_squares,
        )
        # Once more: where all groups are closed, softmax has spread its weight over them.
        weights = [_fill(w, mask, 0.0) for w, mask in zip(weights, closed, strict=True)]
        return add_up(values(w) for (_, values), w in zip(maps, weights, strict=True))

    def _maps(self, group: TokenGroup) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Return keys and values as functions, of the first tokens alone where `keep` says so."""
        if self.keep == 1.0:
            return group.keys, group.values
        if not can_read(group.keys) or not can_read(group.values):
            raise ValueError(
                f"keep is {self.keep}, but this layer's maps are quantised, adapted, sharded or hooked; shrink the "
                "model before"
            )
        kept = math.ceil(self.keep * group.keys.out_features - 1e-9)
        bias = None if group.keys.bias is None else group.keys.bias[:kept]
        keys = partial(F.linear, weight=group.keys.weight[:kept], bias=bias)
        return keys, partial(F.linear, weight=group.values.weight[:, :kept])

    def _sum_of_squares(self, scores: Sequence[Tensor]) -> Tensor:
        """Add over the tokens of all groups, and over all processes where transformers' tensor parallelism splits them.

        Not by a style of its own in the plan: SGLang refuses plans with styles it does not know.
        """
        squares = sum_of_squares(scores)
        weight = getattr(self._token_groups[0].keys, "weight", None)
        if not isinstance(weight, DTensor) or weight.device_mesh.mesh_dim_names != ("tp",):
            return squares
        total = DTensor.from_local(squares, weight.device_mesh, [Partial()], run_check=False)
        # The gradient differs between the processes as well, for each scales only its own tokens by the norm.
        return total.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])

    def _fused_output(self, x: Tensor, groups: list[TokenGroup]) -> Tensor:
        tensors = [m.weight for group in groups for m in (group.keys, group.values)]
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, tensors = x.to(dtype), [t.to(dtype) for t in tensors]
        tau = self._tau_of(groups)
        if torch.is_grad_enabled():
            return FusedPattention.apply(x, tau, self.eps, *tensors)
        return weigh_in_place(x, tensors[::2], tensors[1::2], tau, self.eps)

    def _tau_of(self, groups: Sequence[TokenGroup]) -> float:
        """Return τ of groups under one norm."""
        tau = self.tau if groups[0].tau is None else groups[0].tau
        assert tau is not None
        return tau

    def _can_fuse(self, groups: Sequence[TokenGroup] = ()) -> bool:
        """Reading the weights is right only while every map is a plain, unhooked nn.Linear; compilers fuse better."""
        return (
            self.fused
            and self.norm_activation_type == "l2_norm_gelu"
            and self.bias is None
            and self.keep == 1.0
            and not _is_traced()
            and all(can_read(m) for group in groups or self._token_groups for m in (group.keys, group.values))
        )

    def _set_default_tau(self) -> None:
        if self.tau is None and self.groups:
            self.tau = default_tau(self.num_tokens, self.norm_activation_type)


def _fill(x: Tensor, mask: Tensor | None, value: float) -> Tensor:
    return x if mask is None else x.masked_fill(mask, value)


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()


def check_choice(what: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{what} is {value!r}; it must be one of {', '.join(known)}")
