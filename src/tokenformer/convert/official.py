"""The official checkpoint format: tables from its names to ours, and the algebra where the two differ.

The official code (GPT-NeoX fork, commit 4d56c73) numbers its modules: 0 embedding, 1 a transposition, 2 … L+1 blocks,
L+2 a transposition, L+3 final norm. Its keys and values are both `[n, D]`; our values are `[D, n]`. It has one token
group, no linear maps, no eps in the norm, and recomputes τ from the number of parameter tokens: √n, or n for `softmax`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from ..errors import ConversionError
from ..growth.architectures import token_groups
from ..models.configuration_tokenformer import TokenformerConfig
from ..models.names import BASE_GROUP, PROJECTIONS
from ..models.token_group import default_tau
from ..units import counted

# The YAML's fields that decide what the model computes, and ours. `None`: no default, must be there.
FIELDS: dict[str, tuple[str, Any]] = {
    "num_layers": ("num_hidden_layers", None),
    "hidden_size": ("hidden_size", None),
    "num_attention_heads": ("num_attention_heads", None),
    "qkv_slot_num": ("qkv_param_tokens", None),
    "proj_slot_num": ("output_param_tokens", None),
    "ffn_slot_num": ("ffn_param_tokens", None),
    "max_position_embeddings": ("max_position_embeddings", None),
    "norm_activation_type": ("norm_activation_type", "l2_norm_gelu"),
    "layernorm_epsilon": ("layer_norm_eps", 1e-5),
    "init_method_std": ("initializer_range", 0.02),
    "rotary_pct": ("partial_rotary_factor", 1.0),
    "rotary_emb_base": ("rope_theta", 10000),
}
# Fields that choose another architecture: (official default, what a TokenFormer has). All others concern training.
ARCHITECTURE: dict[str, tuple[Any, Any]] = {
    "pos_emb": ("learned", "rotary"),
    "norm": ("layernorm", "layernorm_nonparam"),
    "final_norm": (None, "layernorm"),
    "no_weight_tying": (False, False),
    "use_mup": (False, False),
    "sliding_window_width": (None, None),
    "apply_query_key_layer_scaling": (False, False),
    "model_parallel_size": (1, 1),
}
# Official module of a block and ours; "qkv" and so on is the projection that counts its parameter tokens.
_MODULES = {
    "attention.query": ("self_attn.q_proj", "qkv"),
    "attention.key": ("self_attn.k_proj", "qkv"),
    "attention.value": ("self_attn.v_proj", "qkv"),
    "attention.proj": ("self_attn.o_proj", "output"),
    "mlp": ("mlp", "ffn"),
}
_ROTARY_BUFFER = "attention.rotary_emb.inv_freq"


def config_from_official(fields: Mapping[str, Any], *, vocab_size: int, where: str = "the YAML") -> TokenformerConfig:
    """Return the configuration that an official YAML describes.

    Args:
        fields: the YAML's content; hyphens and underscores in names mean the same there.
        vocab_size: rows of the embedding, which the YAML does not say.
        where: what to call the YAML in errors.

    Raises:
        ConversionError: a field is missing, or chooses something a TokenFormer of ours does not have.
    """
    fields = {str(name).replace("-", "_"): value for name, value in fields.items()}
    missing = [name for name, (_, default) in FIELDS.items() if default is None and name not in fields]
    if missing:
        found = counted(len(fields), "other field") if fields else "nothing"
        raise ConversionError(
            f"{where} does not say {', '.join(missing)} (it says {found}); give the YAML that the official code was "
            "run with, such as configs/tokenformer/150M_eval.yml"
        )
    for name, (default, wanted) in ARCHITECTURE.items():
        value = fields.get(name, default)
        if value != wanted:
            raise ConversionError(f"{where} has {name} {value!r}; a TokenFormer that can be converted has {wanted!r}")
    layers = fields["num_layers"]
    kinds = [kind for kinds, repeat in fields.get("attention_config") or [[["global"], layers]] for kind in kinds]
    if set(kinds) != {"tokenformer"}:
        raise ConversionError(
            f"{where} has attention_config {fields.get('attention_config')!r}: its blocks are {sorted(set(kinds))}, "
            "not tokenformer; only TokenFormer checkpoints can be converted"
        )
    sizes = {ours: fields.get(official, default) for official, (ours, default) in FIELDS.items()}
    rotary = {name: sizes.pop(name) for name in ("rope_theta", "partial_rotary_factor")}
    try:
        return TokenformerConfig(**sizes, vocab_size=vocab_size, rope_parameters=rotary)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ConversionError(f"{where} describes no TokenFormer: {error.__cause__ or error}") from error


def official_tensors(config: TokenformerConfig) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    """List every tensor of the official checkpoint: name → (our name, official shape, whether ours is transposed)."""
    d, depth = config.hidden_size, config.num_hidden_layers
    table: dict[str, tuple[str, tuple[int, ...], bool]] = {
        "sequential.0.word_embeddings.weight": ("model.embed_tokens.weight", (config.vocab_size, d), False)
    }
    for i in range(depth):
        for official, (ours, projection) in _MODULES.items():
            n = getattr(config, f"{projection}_param_tokens")
            for kind in ("key", "value"):
                table[f"sequential.{i + 2}.{official}.{kind}_param_tokens"] = (
                    f"model.layers.{i}.{ours}.groups.{BASE_GROUP}.{kind}s.weight",
                    (n, d),
                    kind == "value",
                )
    for kind in ("weight", "bias"):
        table[f"sequential.{depth + 3}.norm.{kind}"] = (f"model.norm.{kind}", (d,), False)
    return table


def canonical_name(name: str) -> str:
    """Return an official tensor name as `sequential.N.…`, whatever it was wrapped in when saved; others as they are."""
    match = re.fullmatch(r"(?:module\.)*(?:sequential\.)?(\d+\.\S+)", name)
    return f"sequential.{match[1]}" if match else name


def check_official(config: TokenformerConfig, found: Mapping[str, Tensor], *, where: str = "the checkpoint") -> int:
    """Check that `found` holds exactly the tensors of `config`; return how many rotary buffers it holds beside them.

    Rotary buffers, which some versions save, must be those that the configuration gives.

    Raises:
        ConversionError: tensors are missing, unknown or of another shape or kind; names them.
    """
    table = official_tensors(config)
    buffers = {f"sequential.{i + 2}.{_ROTARY_BUFFER}" for i in range(config.num_hidden_layers)} & set(found)
    problems = []
    for what, names in (("missing", set(table) - set(found)), ("unknown", set(found) - set(table) - buffers)):
        if names:
            problems.append(f"{len(names)} {what}: {_some(names)}")
    misshapen = [
        f"{name} is {list(found[name].shape)}, the YAML says {list(shape)}"
        for name, (_, shape, _) in table.items()
        if name in found and tuple(found[name].shape) != shape
    ]
    if misshapen:
        problems.append(f"{len(misshapen)} of other shapes: {_some(misshapen, separator='; ')}")
    integers = [name for name in set(table) & set(found) if not found[name].is_floating_point()]
    if integers:
        problems.append(f"{len(integers)} not of floating point: {_some(integers)}")
    if problems:
        raise ConversionError(f"the tensors of {where} are not those its YAML describes. " + ". ".join(problems))
    rope: Any = config.rope_parameters
    dims = int(config.hidden_size // config.num_attention_heads * rope["partial_rotary_factor"])
    frequencies = rope["rope_theta"] ** -(torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    for name in sorted(buffers):
        buffer = found[name].double()
        if buffer.shape != frequencies.shape or not torch.allclose(buffer, frequencies, rtol=1e-3):
            raise ConversionError(
                f"{name} of {where} holds {list(buffer.shape)} frequencies {buffer.flatten()[:3].tolist()}…, but "
                f"rotary_pct {rope['partial_rotary_factor']} and rotary_emb_base {rope['rope_theta']} give "
                f"{list(frequencies.shape)}, {frequencies[:3].tolist()}…: this is not the YAML of this checkpoint"
            )
    return len(buffers)


def check_expressible(config: TokenformerConfig) -> None:
    """Raise ConversionError, saying why, where the official code has no way to say what this model computes."""
    rope: Any = config.rope_parameters
    reasons = [
        f"its {p} projection {'has' if p in config.linear_projections else 'lacks'} "  # type: ignore[operator]
        + ("a linear map" if p in config.linear_projections else "parameter tokens")  # type: ignore[operator]
        for p in PROJECTIONS
        if p in config.linear_projections or not getattr(config, f"{p}_param_tokens")  # type: ignore[operator]
    ]
    if rope["rope_type"] != "default":
        reasons.append(f"its rotary embedding is scaled ({rope['rope_type']})")
    if not config.tie_word_embeddings:
        reasons.append("its output head is not tied to its embedding")
    if config.norm_activation_type in ("gelu", "gelu_l1_norm"):
        reasons.append(f"it turns scores into weights by {config.norm_activation_type!r}")
    if config.token_group_norm == "per_group" and len(config.token_groups or []) > 1:
        reasons.append("its token groups are normalised each by itself")
    if config.pattention_bias:
        reasons.append("its projections have biases")
    if config.use_parallel_residual:
        reasons.append("its attention and feed-forward run in parallel")
    if config.elementwise_affine:
        reasons.append("the norms in its blocks have weights and biases")
    if config.use_qk_norm:
        reasons.append("its queries and keys are normalised")
    if config.num_loops > 1:
        reasons.append(f"its blocks run {config.num_loops} times")
    if config.use_embedding_norm:
        reasons.append("its embeddings are normalised")
    for group in token_groups(config):
        if group.routed:
            reasons.append(f"its token group {group.name!r} is routed")
        if any(len(set(group.over(p))) > 1 for p in PROJECTIONS):
            reasons.append(f"its blocks differ in the parameter tokens of {group.name!r}")
    if reasons:
        raise ConversionError(f"the official code cannot express this model: {'; '.join(reasons)}")


def expressed_tokens(config: TokenformerConfig) -> dict[str, int]:
    """Parameter tokens that each projection needs in the official format; see `express`."""
    kind = config.norm_activation_type
    counts = {}
    for p in PROJECTIONS:
        n, tau = getattr(config, f"{p}_param_tokens"), getattr(config, f"{p}_tau")
        counts[p] = n + (_norm_tokens(n, config.hidden_size, tau) if kind == "l2_norm_gelu" else 0)
    return counts


def fields_to_official(config: TokenformerConfig) -> dict[str, Any]:
    """Return the YAML fields under which the official code builds the model that `express` gives."""
    rope: Any = config.rope_parameters
    tokens = {f"{p}_param_tokens": n for p, n in expressed_tokens(config).items()}
    values = {**config.to_dict(), **tokens, **rope}
    return {
        **{official: values[ours] for official, (ours, _) in FIELDS.items()},
        **{name: wanted for name, (_, wanted) in ARCHITECTURE.items() if wanted is not None},
        "seq_length": config.max_position_embeddings,
        "make_vocab_size_divisible_by": config.vocab_size,
        "attention_config": [[["tokenformer"], config.num_hidden_layers]],
        "pipe_parallel_size": 1,
        "init_method": "normal",
        "output_layer_init_method": "wang_init",
    }


def state_to_official(config: TokenformerConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the official state dict, named `sequential.N.…`, that computes what `state` does in our model."""
    official = {
        name: state[ours]
        for name, (ours, _, _) in official_tensors(config).items()
        if not name.endswith("_param_tokens")
    }
    for i in range(config.num_hidden_layers):
        for module, (ours, projection) in _MODULES.items():
            groups = [f"model.layers.{i}.{ours}.groups.{g['name']}" for g in config.token_groups or [] if g[projection]]
            prefix = f"sequential.{i + 2}.{module}"
            official[f"{prefix}.key_param_tokens"], official[f"{prefix}.value_param_tokens"] = express(
                [state[f"{group}.keys.weight"] for group in groups],
                [state[f"{group}.values.weight"] for group in groups],
                tau=getattr(config, f"{projection}_tau"),
                norm_activation_type=config.norm_activation_type,
            )
    return official


def express(
    keys: list[Tensor], values: list[Tensor], *, tau: float, norm_activation_type: str
) -> tuple[Tensor, Tensor]:
    """Write the groups of one Pattention, keys `[n_g, D]` and values `[E, n_g]`, as one whose τ follows from its size.

    The official code scales by √N (softmax: N) where ours scales by a constant τ. With `gelu_l2_norm` and `softmax`,
    whose outputs are proportional to τ, the values take τ/√N (τ/N). With `l2_norm_gelu` GELU stands in between, so the
    norm is corrected instead, by tokens whose values are zero: e further keys M with MᵀM = b²·KᵀK multiply every norm
    by √(1 + b²), and √(N + e) / √(1 + b²) = τ. b = 0 where τ² is a larger number of tokens: then they are zeros.

    Returns:
        Keys `[N, D]` and values `[N, E]`, the official layout, in the dtype of `keys`.
    """
    dtype = keys[0].dtype
    k = torch.cat([t.double() for t in keys])
    v = torch.cat([t.double() for t in values], dim=1).t()
    if norm_activation_type != "l2_norm_gelu":
        v = v * (tau / default_tau(len(k), norm_activation_type))
        return k.to(dtype), v.to(dtype).contiguous()
    extra = _norm_tokens(k.shape[0], k.shape[1], tau)
    if extra:
        new = k.new_zeros(extra, k.shape[1])
        if not _is_root_of(tau, len(k) + extra):
            root = k if len(k) <= k.shape[1] else torch.linalg.qr(k, mode="r").R
            new[: len(root)] = math.sqrt((len(k) + extra) / tau**2 - 1) * root
        k, v = torch.cat([k, new]), torch.cat([v, v.new_zeros(extra, v.shape[1])])
    return k.to(dtype), v.to(dtype).contiguous()


def _norm_tokens(n: int, d: int, tau: float) -> int:
    """How many tokens without value bring the official norm to τ."""
    if tau**2 > n and _is_root_of(tau, round(tau**2)):
        return round(tau**2) - n
    return 0 if _is_root_of(tau, n) else max(min(n, d), math.ceil(tau**2) - n)


def _is_root_of(tau: float, n: int) -> bool:
    """Whether τ is √n up to rounding."""
    return math.isclose(tau**2, n, rel_tol=1e-9)


def _some(names: Any, *, separator: str = ", ") -> str:
    names = sorted(names)
    return separator.join(names[:4]) + (f"{separator}…" if len(names) > 4 else "")
