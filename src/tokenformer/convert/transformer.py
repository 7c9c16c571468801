"""GPT-NeoX checkpoints (Pythia among them) into TokenFormers that compute the same logits up to rounding.

Nothing is normalised but by the norms in front of the maps (`norm_activation_type` "gelu"), so that

- a feed-forward is a token group as it is: a neuron's input weights and bias are a key, its output weights a value;
- a linear map W is the group K = [I; -I], V = [W, -W], because gelu(u) - gelu(-u) = u;
- the weight and bias of a norm go into the maps that read it: W (γ ∘ x + β) + b = (W diag(γ)) x + (W β + b).

Not τ = √(2D) and the L2 norm for the maps behind a norm, whose inputs would all have the norm √D if LayerNorm had no
eps: it gives √(D σ² / (σ² + eps)), and what has a small variance σ², such as an embedding, comes out too long.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import Tensor
from transformers import GPTNeoXConfig

from ..checkpoint import OnProgress, check_target, load_tokenizer, save_checkpoint, verify_checkpoint, weight_files
from ..errors import ConversionError
from ..lineage import Lineage
from ..models.configuration_tokenformer import TokenformerConfig
from ..models.modeling_tokenformer import TokenformerForCausalLM
from ..models.pattention import BASE_GROUP

_MODEL_TYPE = "gpt_neox"
_GROUP = f"groups.{BASE_GROUP}"
# Configuration fields that mean the same in both.
_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "layer_norm_eps",
    "initializer_range",
    "use_parallel_residual",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
# Maps of a block: ours, theirs, which third of theirs (query, key, value), and the norm that goes into it.
_LINEAR_MAPS: dict[str, tuple[str, int | None, str | None]] = {
    "self_attn.q_proj": ("attention.query_key_value", 0, "input_layernorm"),
    "self_attn.k_proj": ("attention.query_key_value", 1, "input_layernorm"),
    "self_attn.v_proj": ("attention.query_key_value", 2, "input_layernorm"),
    "self_attn.o_proj": ("attention.dense", None, None),
}
_MLP, _MLP_KEYS, _MLP_VALUES, _MLP_NORM = "mlp", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "post_attention_layernorm"
# Outside the blocks: ours and theirs.
_OUTSIDE = {
    "model.embed_tokens.weight": "gpt_neox.embed_in.weight",
    "model.norm.weight": "gpt_neox.final_layer_norm.weight",
    "model.norm.bias": "gpt_neox.final_layer_norm.bias",
    "lm_head.weight": "embed_out.weight",
}
# What older versions saved beside the weights; it follows from the configuration.
_BUFFERS = re.compile(r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Read = Callable[[str], Tensor]


def convert_transformer(
    source: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    on_progress: OnProgress = lambda done, total: None,
) -> Lineage:
    """Write the GPT-NeoX checkpoint `source` as a TokenFormer, in its own dtype, one map at a time.

    Args:
        source: folder with config.json and safetensors, as transformers saves it; its tokenizer is kept.
        output: folder of the new checkpoint.
        force: replace what stands at `output`.
        on_progress: called with bytes written so far and in all.

    Returns:
        The new checkpoint's lineage, whose parent is the digest of `source`'s weights.

    Raises:
        ConversionError: another kind of model, one that cannot be expressed, or tensors that are not those its
            configuration describes; nothing is written.
        CheckpointError: `source` is missing or damaged, or `output` exists and not `force`, or cannot be written.
        TokenizerError: the tokenizer has more entries than the embedding has rows.
    """
    source = Path(source)
    check_target(Path(output), force=force)
    theirs = read_gpt_neox_config(source)
    lineage = verify_checkpoint(source).then("convert", arguments={"from": _MODEL_TYPE, "checkpoint": source.name})
    found = _list_tensors(weight_files(source))
    dtype = check_tensors(theirs, {name: (shape, kind) for name, (_, shape, kind) in found.items()}, where=str(source))
    ours = config_from_gpt_neox(theirs)
    tokenizer = load_tokenizer(source, theirs)
    with torch.device("meta"):
        model = TokenformerForCausalLM._from_config(ours, dtype=dtype)

    def read(name: str) -> Tensor:
        file, _, _ = found[name]
        with safe_open(file, framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
        if not tensor.isfinite().all():
            raise ConversionError(f"{name} in {file} holds numbers that are not finite; take an earlier checkpoint")
        return tensor

    def weights(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = {}
        for owner, wanted in groupby(names, key=_owner):
            made = convert_tensors(theirs, owner, read)
            tensors.update({name: made[name].to(dtype).contiguous() for name in wanted})
        return tensors

    return save_checkpoint(output, model, tokenizer, lineage, force=force, weights=weights, on_progress=on_progress)


def read_gpt_neox_config(source: Path) -> GPTNeoXConfig:
    """Read the configuration of a GPT-NeoX checkpoint.

    Raises:
        ConversionError: there is none, it is of another kind, or it has what a TokenFormer has not.
    """
    file = source / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        kind = content.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConversionError(
            f"cannot read {file}: {error}; give a folder that transformers' save_pretrained wrote"
        ) from error
    if kind != _MODEL_TYPE:
        raise ConversionError(
            f"{source} is a {kind!r} model; only GPT-NeoX-like ones ({_MODEL_TYPE!r}, such as Pythia) can become "
            "TokenFormers exactly. `tokenformer grow` grows others as they are"
        )
    try:
        config = GPTNeoXConfig.from_dict(content)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ConversionError(f"{file} describes no GPT-NeoX: {error.__cause__ or error}") from error
    rope: Any = config.rope_parameters
    reasons = []
    if config.hidden_act != "gelu":
        reasons.append(
            f"hidden_act is {config.hidden_act!r}, and only the exact 'gelu' has gelu(u) - gelu(-u) = u here"
        )
    if rope["rope_type"] != "default":
        reasons.append(f"its rotary embedding is scaled ({rope['rope_type']!r})")
    if content.get("quantization_config"):
        reasons.append("it is quantised; give the one that it was made from")
    if reasons:
        raise ConversionError(f"{source} cannot become a TokenFormer: {'; '.join(reasons)}")
    return config


def config_from_gpt_neox(config: GPTNeoXConfig) -> TokenformerConfig:
    """Return the configuration of the TokenFormer that computes what a GPT-NeoX does."""
    twice = 2 * config.hidden_size
    return TokenformerConfig(
        **{field: getattr(config, field) for field in _FIELDS},
        qkv_param_tokens=twice,
        output_param_tokens=twice,
        ffn_param_tokens=config.intermediate_size,
        norm_activation_type="gelu",
        pattention_bias=True,
        rope_parameters=dict(config.rope_parameters),
    )


def gpt_neox_tensors(config: GPTNeoXConfig) -> dict[str, tuple[int, ...]]:
    """List the tensors of a GPT-NeoX checkpoint with their shapes."""
    d, inner = config.hidden_size, config.intermediate_size
    table: dict[str, tuple[int, ...]] = {name: (d,) for name in _OUTSIDE.values() if "norm" in name}
    table["gpt_neox.embed_in.weight"] = table["embed_out.weight"] = (config.vocab_size, d)
    if config.tie_word_embeddings:
        del table["embed_out.weight"]
    for i in range(config.num_hidden_layers):
        maps: dict[str, tuple[int, ...]] = {"attention.query_key_value": (3 * d, d), "attention.dense": (d, d)}
        biased = {_MLP_KEYS: (inner, d), _MLP_VALUES: (d, inner)} | (maps if config.attention_bias else {})
        block = {f"{name}.weight": shape for name, shape in (maps | biased).items()}
        block |= {f"{name}.bias": shape[:1] for name, shape in biased.items()}
        block |= {f"{norm}.{kind}": (d,) for norm in ("input_layernorm", _MLP_NORM) for kind in ("weight", "bias")}
        table |= {f"gpt_neox.layers.{i}.{name}": shape for name, shape in block.items()}
    return table


def check_tensors(
    config: GPTNeoXConfig, found: Mapping[str, tuple[tuple[int, ...], torch.dtype]], *, where: str
) -> torch.dtype:
    """Check that `found` (name to shape and dtype) holds exactly the tensors of `config`; return their dtype.

    Raises:
        ConversionError: tensors are missing, unknown, or of another shape or kind; names them.
    """
    table = gpt_neox_tensors(config)
    ignored = {name for name in found if _BUFFERS.fullmatch(name)}
    if config.tie_word_embeddings:
        ignored.add("embed_out.weight")
    shared = sorted(set(table) & set(found))
    problems = {
        "missing": sorted(set(table) - set(found)),
        "unknown": sorted(set(found) - set(table) - ignored),
        "of other shapes": [
            f"{name} is {list(found[name][0])}, not {list(table[name])}"
            for name in shared
            if found[name][0] != table[name]
        ],
        "not of floating point": [f"{name} is {found[name][1]}" for name in shared if found[name][1] not in _DTYPES],
    }
    if any(problems.values()):
        raise ConversionError(
            f"the tensors of {where} are not those its config.json describes: "
            + "; ".join(
                f"{len(names)} {what}: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
                for what, names in problems.items()
                if names
            )
        )
    return reduce(torch.promote_types, {found[name][1] for name in table})


def convert_tensors(config: GPTNeoXConfig, owner: str, read: Read) -> dict[str, Tensor]:
    """Make the tensors of one map of ours, `owner`, or the one tensor that is `owner` itself, from theirs.

    Args:
        config: theirs.
        owner: such as "model.layers.3.self_attn.q_proj" or "model.norm.weight".
        read: gives one of their tensors by name.
    """
    if owner in _OUTSIDE:
        return {owner: read(_OUTSIDE[owner])}
    _, _, block, module = owner.split(".", 3)

    def linear(name: str, norm: str | None, *, part: int | None = None, bias: bool = True) -> tuple[Tensor, Tensor]:
        prefix = f"gpt_neox.layers.{block}."
        weight = read(f"{prefix}{name}.weight")
        offset = read(f"{prefix}{name}.bias") if bias else weight.new_zeros(len(weight))
        if part is not None:
            weight, offset = (third_of_heads(t, config.num_attention_heads, part) for t in (weight, offset))
        weight, offset = weight.double(), offset.double()
        if norm is not None:
            weight, offset = fold_norm(weight, offset, *(read(f"{prefix}{norm}.{kind}") for kind in ("weight", "bias")))
        return weight, offset

    if module == _MLP:
        keys, key_biases = linear(_MLP_KEYS, _MLP_NORM)
        values, bias = linear(_MLP_VALUES, None)
    else:
        theirs, part, norm = _LINEAR_MAPS[module]
        weight, bias = linear(theirs, norm, part=part, bias=config.attention_bias)
        keys, values = linear_as_tokens(weight)
        key_biases = keys.new_zeros(len(keys))
    return {
        f"{owner}.{_GROUP}.keys.weight": keys,
        f"{owner}.{_GROUP}.keys.bias": key_biases,
        f"{owner}.{_GROUP}.values.weight": values,
        f"{owner}.bias": bias,
    }


def third_of_heads(fused: Tensor, heads: int, part: int) -> Tensor:
    """Take the query, key or value rows (`part` 0, 1, 2) out of `[3D, …]`, which holds all three head by head."""
    return fused.unflatten(0, (heads, 3, -1))[:, part].flatten(0, 1)


def fold_norm(weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the map that does to x what `weight` and `bias` do to scale ∘ x + shift."""
    return weight * scale.to(weight.dtype), bias + weight @ shift.to(weight.dtype)


def linear_as_tokens(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys `[2D, D]` and values `[E, 2D]` that, without a norm, compute the linear map `weight` `[E, D]`."""
    one = torch.eye(weight.shape[1], dtype=weight.dtype)
    return torch.cat([one, -one]), torch.cat([weight, -weight], dim=1)


def _owner(name: str) -> str:
    """Return the map that a tensor of ours belongs to, or its own name outside the blocks."""
    match = re.match(r"model\.layers\.\d+\.(self_attn\.\w+|mlp)", name)
    return match[0] if match else name


def _list_tensors(files: Sequence[Path]) -> dict[str, tuple[Path, tuple[int, ...], torch.dtype]]:
    """Return file, shape and dtype of every tensor by its name, without reading it."""
    listed = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                listed[name] = (file, tuple(tensors.get_slice(name).get_shape()), _dtype(tensors.get_slice(name)))
    return listed


def _dtype(part: Any) -> torch.dtype:
    return part[:0].dtype if part.get_shape() else part[...].dtype
