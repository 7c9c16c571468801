"""GPT-NeoX checkpoints (Pythia among them) into TokenFormers that compute the same logits up to rounding.

Nothing is normalised but by the norms in front of the maps (`norm_activation_type` "gelu"), so that

- a feed-forward is a token group as it is: a neuron's input weights and bias are a key, its output weights a value;
- a linear map W is the group K = [I; -I], V = [W, -W], because gelu(u) - gelu(-u) = u;
- the weight and bias of a norm go into the maps that read it: W (γ ∘ x + β) + b = (W diag(γ)) x + (W β + b).

Not τ = √(2D) and the L2 norm for the maps behind a norm, whose inputs would all have the norm √D if LayerNorm had no
eps: it gives √(D σ² / (σ² + eps)), and what has a small variance σ², such as an embedding, comes out too long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPTNeoXConfig, PreTrainedConfig

from ..checkpoints.checkpoint import OnProgress, load_tokenizer, save_checkpoint
from ..checkpoints.files import check_target
from ..checkpoints.lineage import Lineage
from ..checkpoints.rewrite import check_names, open_checkpoint
from ..checkpoints.verify import carry_files
from ..errors import ConversionError
from ..growth.state import check_finite
from ..models.configuration_tokenformer import TokenformerConfig
from ..models.modeling_tokenformer import TokenformerForCausalLM
from ..models.names import BASE_GROUP

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
    "lm_head.weight": "lm_head.weight",
}
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
        ConversionError: another kind of model, or one that cannot be expressed; nothing is written.
        CheckpointError: `source` is missing, damaged or quantised, its tensors are not finite or not those that its
            configuration describes, or `output` exists and not `force`, or cannot be written.
        TokenizerError: the tokenizer has more entries than the embedding has rows.
    """
    check_target(Path(output), force=force)
    theirs = open_checkpoint(source)
    check_expressible(theirs.config, where=str(source))
    check_names(theirs)
    tokenizer = load_tokenizer(source, theirs.config)
    with torch.device("meta"):
        model = TokenformerForCausalLM._from_config(config_from_gpt_neox(theirs.config), dtype=theirs.dtype)

    def read(name: str) -> Tensor:
        return check_finite({name: theirs.tensors[name]}, f"checkpoint {source}")[name]

    def lineage() -> Lineage:
        return theirs.lineage.then("convert", arguments={"from": _MODEL_TYPE, "checkpoint": Path(source).name})

    def weights(names: Sequence[str]) -> dict[str, Tensor]:
        tensors = {}
        for owner, wanted in groupby(names, key=_owner):
            made = convert_tensors(theirs.config, owner, read)
            tensors.update({name: made[name].to(theirs.dtype).contiguous() for name in wanted})
        return tensors

    return save_checkpoint(
        output,
        model,
        tokenizer,
        lineage,
        force=force,
        extra=lambda folder: carry_files(source, folder),
        weights=weights,
        on_progress=on_progress,
    )


def check_expressible(config: PreTrainedConfig, *, where: str) -> None:
    """Raise ConversionError, saying why, where a model is no GPT-NeoX or has what a TokenFormer has not."""
    if config.model_type != _MODEL_TYPE:
        raise ConversionError(
            f"{where} is a {config.model_type!r} model; only GPT-NeoX-like ones ({_MODEL_TYPE!r}, such as Pythia) can "
            "become TokenFormers exactly. `tokenformer grow` grows others as they are"
        )
    reasons = []
    if config.hidden_act != "gelu":
        reasons.append(
            f"hidden_act is {config.hidden_act!r}, and only the exact 'gelu' has gelu(u) - gelu(-u) = u here"
        )
    if config.rope_parameters["rope_type"] != "default":
        reasons.append(f"its rotary embedding is scaled ({config.rope_parameters['rope_type']!r})")
    if reasons:
        raise ConversionError(f"{where} cannot become a TokenFormer: {'; '.join(reasons)}")


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
