"""Unite a model that reads text and one that reads images: `merge(language, vision, by="modality")`.

The blocks of the union hold the token groups, linear maps and norms of both, and a position's modality decides which
act there. A new group, the bridge, takes part at images and at text after them. Text without images goes through what
the language model has, and an image without text through what the vision model has: to the last bit.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import GrowthError
from ..models.configuration_tokenformer_multimodal import TokenformerMultimodalConfig
from ..models.modeling_tokenformer_multimodal import TokenformerForConditionalGeneration
from ..models.names import BOTH, BRIDGE_TOKENS, IMAGE, PROJECTIONS, TEXT
from .architectures import GroupEntry, frozen_names, token_groups, with_groups
from .freeze import EMBEDDING, FINAL_NORM, LINEAR_MAPS, freeze
from .grow import grow_operation
from .operations import Operation
from .sites import sites
from .state import State, rewritten

BRIDGE = "bridge"
# What both models must have alike: they share one residual stream and one attention.
_SHARED = (
    "hidden_size",
    "num_attention_heads",
    "norm_activation_type",
    "token_group_norm",
    "use_parallel_residual",
    "use_qk_norm",
    "elementwise_affine",
    "layer_norm_eps",
    "pattention_eps",
    "linear_projections",
)
_IMAGE_FIELDS = ("image_size", "patch_size", "num_channels", "pooling")
_TWO_OF_EACH = re.compile(r"(\.linear|layernorm|^model\.norm)\.(weight|bias)$")


def merge_modalities(
    language: PreTrainedModel, vision: PreTrainedModel, *, bridge: int = BRIDGE_TOKENS, seed: int = 0
) -> PreTrainedModel:
    """Do what `merge(language, vision, by="modality")` does; errors as there."""
    for model in (language, vision):
        if sites(model):
            raise GrowthError(
                f"this {type(model).__name__} has tokens beside its linear maps, which stay apart: split or drop them"
            )
    if language.dtype != vision.dtype:
        raise GrowthError(f"language is {language.dtype} and vision {vision.dtype}; bring both to one type")
    config, names = unite(language.config, vision.config, list(language.state_dict()), list(vision.state_dict()))
    state = Renamed(names, language.state_dict(), vision.state_dict())
    operation = bridge_operation(config, bridge, seed=seed, dtype=language.dtype)
    united = TokenformerForConditionalGeneration._from_config(
        operation.config, dtype=language.dtype, attn_implementation=language.config._attn_implementation
    )
    tied = united.all_tied_weights_keys
    give = rewritten(config, state, operation)
    united.load_state_dict(give([name for name in united.state_dict() if name not in tied]), strict=False)
    united.model.rotary_emb = copy.deepcopy(language.model.rotary_emb)  # in whatever type `to` has brought it to
    freeze(united, frozen_names(operation.config))
    return united.to(language.device).train(language.training)


def unite(
    language: PreTrainedConfig,
    vision: PreTrainedConfig,
    language_names: Sequence[str],
    vision_names: Sequence[str],
    *,
    image_token_id: int | None = None,
) -> tuple[TokenformerMultimodalConfig, dict[str, tuple[int, str]]]:
    """Return the configuration of the union without bridge, and where its tensors come from.

    Args:
        language, vision: the configurations of the two.
        language_names, vision_names: of their tensors.
        image_token_id: stands for a patch. Default: the first id that the language model has no row for.

    Returns:
        The configuration, and for each tensor's name there the number of the model, 0 or 1, and its name in it.

    Raises:
        GrowthError: the two cannot share blocks.
    """
    _check(language, vision)
    ours, theirs = token_groups(language), token_groups(vision)
    new = {group.name: f"vision_{group.name}" for group in theirs}
    taus = {p: tau for p in PROJECTIONS if (tau := getattr(vision, f"{p}_tau")) is not None}
    groups = [
        *(replace(group, blocks=(), modality=TEXT) for group in ours),
        *(replace(group, name=new[group.name], blocks=(), modality=IMAGE, tau=taus) for group in theirs),
    ]
    clash = sorted({BRIDGE, *new.values()} & {group.name for group in ours})
    if clash:
        raise GrowthError(
            f"token group {', '.join(clash)} of the language model would have a name that the union needs"
        )
    fields = {name: value for name, value in language.to_dict().items() if hasattr(TokenformerMultimodalConfig, name)}
    for name in (
        "model_type",
        "token_groups",
        "architectures",
        "auto_map",
        *(f"{p}_param_tokens" for p in PROJECTIONS),
    ):
        fields.pop(name, None)
    config = TokenformerMultimodalConfig(
        **fields,
        **{name: getattr(vision, name) for name in _IMAGE_FIELDS},
        use_image_embedding_norm=vision.use_embedding_norm,
        image_token_id=language.vocab_size if image_token_id is None else image_token_id,
        token_groups=[group.to_config() for group in groups],
    )
    config.frozen = [*(group.name for group in groups), EMBEDDING, FINAL_NORM, LINEAR_MAPS]
    names = {_name(name, TEXT, {}): (0, name) for name in language_names}
    names |= {_name(name, IMAGE, new): (1, name) for name in vision_names if not name.startswith("classifier.")}
    return config, names


class Renamed(Mapping[str, Tensor]):
    """Tensors of two models under the names that they have in the union, each read when it is asked for."""

    def __init__(self, names: Mapping[str, tuple[int, str]], *states: State) -> None:
        self._names, self._states = names, states

    def __getitem__(self, name: str) -> Tensor:
        """Return one of them."""
        model, old = self._names[name]
        return self._states[model][old]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._names)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._names)


def bridge_operation(config: PreTrainedConfig, tokens: int, *, seed: int, dtype: torch.dtype) -> Operation:
    """Return the operation that adds the bridge to a union: so many parameter tokens in every map.

    Raises:
        GrowthError: fewer than one.
    """
    if tokens < 1:
        raise GrowthError(
            f"the bridge would have {tokens} parameter tokens in each map, and nothing else trains; give 1"
        )
    asked: Any = {f"{projection}_param_tokens": f"+{tokens}" for projection in PROJECTIONS}
    grown = grow_operation(config, **asked, name=BRIDGE, seed=seed, dtype=dtype)
    *others, bridge = token_groups(grown.config)
    arguments = {"by": "modality", "bridge": tokens}
    marked = with_groups(grown.config, [*others, replace(bridge, modality=BOTH)])
    return replace(grown, name="merge", config=marked, arguments=arguments)


def _name(name: str, modality: str, groups: Mapping[str, str]) -> str:
    """Return a tensor's name in the union."""
    for old, new in groups.items():
        if f".groups.{old}." in name:
            return name.replace(f".groups.{old}.", f".groups.{new}.")
    if name.startswith("model.embeddings."):
        return name.replace("model.embeddings.", "model.vision_embeddings.")
    return _TWO_OF_EACH.sub(rf"\1.{modality}.\2", name)


def _check(language: Any, vision: Any) -> None:
    kinds = (language.model_type, vision.model_type)
    if kinds != ("tokenformer", "tokenformer_vision"):
        hint = "; give them the other way round" if kinds == ("tokenformer_vision", "tokenformer") else ""
        raise GrowthError(
            "by modality, a 'tokenformer' model, which reads text, takes up a 'tokenformer_vision' model, which reads "
            f"images; these are {kinds[0]!r} and {kinds[1]!r}{hint}"
        )
    looped = max(language.num_loops, vision.num_loops)
    if looped > 1:
        raise GrowthError(
            f"the blocks of one of these models run {looped} times, and those of two modalities run once; drop the "
            "token groups that brought the loops"
        )
    different = [name for name in _SHARED if getattr(language, name) != getattr(vision, name)]
    if different:
        told = ", ".join(f"{name} ({getattr(language, name)}, {getattr(vision, name)})" for name in different)
        raise GrowthError(
            f"these models cannot share blocks: they differ in {told}. Growing adds parameter tokens and blocks and "
            "changes none of these: train one of them in the other's sizes"
        )
    depths = (language.num_hidden_layers, vision.num_hidden_layers)
    if depths[0] != depths[1]:
        less = "language" if depths[0] < depths[1] else "vision"
        raise GrowthError(
            f"the language model has {depths[0]} blocks and the vision model {depths[1]}; grow the {less} model to "
            f"--num-hidden-layers {max(depths)} first, which changes no output"
        )
    if any(c.weights != "float" or any(g.weights != "float" for g in token_groups(c)) for c in (language, vision)):
        raise GrowthError("maps are ternary in one of these models, and united they would be float; take float ones")
    if language.pattention_bias or vision.pattention_bias:
        raise GrowthError("pattention_bias is on, and the biases of outputs belong to no group; take models without")
    routed = [group.name for config in (language, vision) for group in token_groups(config) if group.routed]
    if routed:
        raise GrowthError(f"token group {', '.join(routed)} is routed by text token and would be by modality: drop it")
    for projection in PROJECTIONS:
        for block in range(depths[0]):
            has = [_tokens(token_groups(config), projection, block) > 0 for config in (language, vision)]
            if has[0] != has[1]:
                names = ("language", "vision") if has[0] else ("vision", "language")
                raise GrowthError(
                    f"in block {block} the {names[0]} model has parameter tokens in the {projection} projection and "
                    f"the {names[1]} model none; grow it there first: --{projection}-param-tokens +16 changes no output"
                )


def _tokens(groups: Sequence[GroupEntry], projection: str, block: int) -> int:
    return sum(group.count(projection, block) for group in groups)
