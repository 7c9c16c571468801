"""Where models keep their parameter tokens, a row for each architecture, and what a configuration says of them.

Every operation on token groups is one function for all architectures, a TokenFormer's among them; adding one is adding
a row to `ARCHITECTURES` (docs/adding-an-architecture.md).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import GrowthError
from ..models.names import BASE_GROUP, IMAGE, PROJECTIONS, TEXT
from .layout import Architecture, TokenMap, mlp_maps, pattention_map

if TYPE_CHECKING:  # the table is read without torch by what tells files apart
    from torch import Tensor
    from transformers import PreTrainedConfig

# Parameter tokens in every block: one number, or one for each.
Count = int | tuple[int, ...]
# The tensors of each token group of one map, by the names that its `Part`s give them.
Groups: TypeAlias = "dict[str, dict[str, Tensor]]"


@dataclass(frozen=True)
class GroupEntry:
    """What a configuration says of one token group.

    Attributes:
        name: of the group.
        counts: its parameter tokens for each projection that can have some; 0 where one is not named.
        blocks: numbers of the blocks that came with it, and go with it.
        routed: whether gates decide for each text token if it takes part.
        weights: how its keys and values are kept, one of `models.ternary.WEIGHTS`.
        modality: where it takes part in a model that reads text and images; None: everywhere.
        tau: constant τ of its own by projection, where that is not the model's.
        loops: numbers of the loops over the blocks that came with it, and go with it, in which alone it takes part.
    """

    name: str
    counts: Mapping[str, Count]
    blocks: tuple[int, ...] = ()
    routed: bool = False
    weights: str = "float"
    modality: str | None = None
    tau: Mapping[str, float] = field(default_factory=dict)
    loops: tuple[int, ...] = ()

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> GroupEntry:
        """Read an entry of the configuration field `token_groups`."""
        counts = {
            key: tuple(count) if isinstance(count, list) else count
            for key, count in entry.items()
            if key not in ("name", "blocks", "routed", "weights", "modality", "tau", "loops")
        }
        return cls(
            entry["name"],
            counts,
            tuple(entry.get("blocks", ())),
            bool(entry.get("routed")),
            entry.get("weights", "float"),
            entry.get("modality"),
            entry.get("tau", {}),
            tuple(entry.get("loops", ())),
        )

    def to_config(self) -> dict[str, Any]:
        """Return the entry that `from_config` reads: plain types, one number where all blocks have the same."""
        entry: dict[str, Any] = {"name": self.name}
        for projection, count in self.counts.items():
            each = {count} if isinstance(count, int) else set(count)
            entry[projection] = each.pop() if len(each) == 1 else list(self.over(projection))
        return {
            **entry,
            **({"routed": True} if self.routed else {}),
            **({} if self.weights == "float" else {"weights": self.weights}),
            **({"modality": self.modality} if self.modality else {}),
            **({"tau": dict(self.tau)} if self.tau else {}),
            **({"blocks": list(self.blocks)} if self.blocks else {}),
            **({"loops": list(self.loops)} if self.loops else {}),
        }

    @property
    def brought(self) -> str:
        """What came with the group and goes with it, in words: "blocks 3, 4", "loops 1", or nothing."""
        brought = {"blocks": self.blocks, "loops": self.loops}
        return " and ".join(f"{what} {', '.join(map(str, which))}" for what, which in brought.items() if which)

    def count(self, projection: str, block: int) -> int:
        """Parameter tokens in each map of a projection in one block."""
        count = self.counts.get(projection, 0)
        return count if isinstance(count, int) else count[block]

    def over(self, projection: str) -> tuple[int, ...]:
        """Numbers of parameter tokens in the blocks, or the one number that all have."""
        count = self.counts.get(projection, 0)
        return (count,) if isinstance(count, int) else count

    def with_blocks(self, blocks: Sequence[int]) -> GroupEntry:
        """Say of the group what is true once `blocks` (their numbers until now) are the model's blocks."""
        counts = {
            projection: count if isinstance(count, int) else tuple(count[block] for block in blocks)
            for projection, count in self.counts.items()
        }
        return replace(self, counts=counts, blocks=tuple(blocks.index(block) for block in self.blocks))


_GATED = Architecture(
    prefix="model",
    blocks="layers",
    depth="num_hidden_layers",
    final_norm="norm",
    counts={"ffn": "intermediate_size"},
    maps=mlp_maps(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    last=("self_attn.o_proj", "mlp.down_proj"),
)
_TOKENFORMER = Architecture(
    prefix="model",
    blocks="layers",
    depth="num_hidden_layers",
    final_norm="norm",
    counts={projection: f"{projection}_param_tokens" for projection in PROJECTIONS},
    maps=tuple(pattention_map(name, p) for p, names in PROJECTIONS.items() for name in names),
    last=("self_attn.o_proj", "mlp"),
)
_NORMED = replace(_GATED, adds=("post_attention_layernorm", "post_feedforward_layernorm"))
ARCHITECTURES: dict[str, Architecture] = {
    "tokenformer": _TOKENFORMER,
    "tokenformer_vision": replace(_TOKENFORMER, auto="AutoModelForImageClassification", head="classifier"),
    "tokenformer_multimodal": replace(_TOKENFORMER, auto="AutoModelForImageTextToText"),
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": _NORMED,
    "gemma3_text": _NORMED,
    "phi3": replace(
        _GATED,
        maps=mlp_maps(
            ("mlp.gate_up_proj.gate", "mlp.gate_up_proj.up"),
            "mlp.down_proj",
            fused="mlp.gate_up_proj",
            activation="mlp.activation_fn",
        ),
    ),
    "starcoder2": replace(_GATED, maps=mlp_maps(("mlp.c_fc",), "mlp.c_proj"), last=("self_attn.o_proj", "mlp.c_proj")),
    "nanochat": replace(_GATED, maps=mlp_maps(("mlp.fc1",), "mlp.fc2"), last=("self_attn.o_proj", "mlp.fc2")),
    "gpt_neox": Architecture(
        prefix="gpt_neox",
        blocks="layers",
        depth="num_hidden_layers",
        final_norm="final_layer_norm",
        counts={"ffn": "intermediate_size"},
        maps=mlp_maps(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        last=("attention.dense", "mlp.dense_4h_to_h"),
        stored={"lm_head.weight": "embed_out.weight"},
    ),
    "gpt2": Architecture(
        prefix="transformer",
        blocks="h",
        depth="n_layer",
        final_norm="ln_f",
        counts={"ffn": "n_inner"},
        maps=mlp_maps(("mlp.c_fc",), "mlp.c_proj", transposed=True),  # transformers' Conv1D
        last=("attn.c_proj", "mlp.c_proj"),
        why_not_deeper=lambda config: (
            "it scales attention by the number of the block" if config.scale_attn_by_inverse_layer_idx else None
        ),
    ),
    "opt": Architecture(
        prefix="model",
        blocks="decoder.layers",
        depth="num_hidden_layers",
        final_norm="decoder.final_layer_norm",
        counts={"ffn": "ffn_dim"},
        maps=mlp_maps(("fc1",), "fc2"),
        last=("self_attn.out_proj", "fc2"),
        why_not_deeper=lambda config: (
            None
            if config.do_layer_norm_before
            else "its blocks normalise what they pass on, so that none can be silent"
        ),
    ),
}


# Configuration fields that count the experts of a block.
_MOST_BLOCKS = 2_000
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def is_tokenised(config: Any) -> bool:
    """Whether a configuration says that parameter tokens stand in place of some of the model's linear maps."""
    return any(not site["linear"] for site in (getattr(config, "token_sites", None) or {}).values())


def row_of(config: Any) -> Architecture | None:
    """Return the row of a model's configuration; None where the table has none, or its maps are tokens instead."""
    return None if is_tokenised(config) else ARCHITECTURES.get(getattr(config, "model_type", None) or "")


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the row of a model's configuration.

    Raises:
        GrowthError: there is none.
    """
    if is_tokenised(config):
        raise GrowthError(
            f"this {config.model_type!r} model has parameter tokens in place of linear maps: what can be done is done "
            "to these, in memory (grow with at=…, drop, freeze, consolidate), not to neurons and blocks"
        )
    if config.model_type not in ARCHITECTURES:
        experts = next((n for name in _EXPERTS if isinstance(n := getattr(config, name, None), int) and n > 1), None)
        if experts is not None:
            raise GrowthError(
                f"a {config.model_type!r} model is a mixture of {experts} experts, which is not supported: each expert "
                "has neurons of its own, and a token group cannot say yet to which expert its neurons belong. It will "
                "be when it can; until then use a dense model, one without experts"
            )
        raise GrowthError(
            f"where a {config.model_type!r} model keeps its neurons is not in the table; these are: "
            f"{', '.join(ARCHITECTURES)}. A row in growth/architectures.py adds one"
        )
    return ARCHITECTURES[config.model_type]


def check_depth(row: Architecture | None, fields: Mapping[str, Any], *, most: int | None = None) -> None:
    """Raise ValueError for more blocks than anybody can mean: even an empty model of them would take for ever to make.

    Args:
        row: of the model, where the table has one.
        fields: of its configuration.
        most: tensors that there are for it.
    """
    most = _MOST_BLOCKS if most is None else min(most, _MOST_BLOCKS)
    for name in {"num_hidden_layers", row.depth if row else "num_blocks"}:
        depth = fields.get(name)
        if isinstance(depth, int | float) and not depth <= most:
            raise ValueError(f"{name} is {depth}, and here there can be at most {most:,} blocks")


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the Auto class of transformers that makes the whole model of a configuration, with its head.

    Raises:
        GrowthError: the model is not in the table, and transformers has no causal language model of its kind.
    """
    import transformers

    row = ARCHITECTURES.get(config.model_type)
    if row is None and type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        raise GrowthError(f"transformers has no causal language model of the kind {config.model_type!r}")
    return getattr(transformers, row.auto if row else "AutoModelForCausalLM")


def site_groups(config: Any) -> dict[str, int]:
    """Return the parameter tokens of each token group that a configuration lists by linear maps, over all of them."""
    found: dict[str, int] = {}
    for site in (getattr(config, "token_sites", None) or {}).values():
        for name, group in site["groups"].items():
            found[name] = found.get(name, 0) + group["tokens"]
    return found


def token_groups(config: PreTrainedConfig) -> list[GroupEntry]:
    """Return what a configuration says of the token groups of any model, in the order in which they were added."""
    listed = getattr(config, "token_groups", None)
    if listed:
        return [GroupEntry.from_config(entry) for entry in listed]
    row = architecture_of(config)
    counts = {projection: row.count_of(config, projection) for projection in row.counts}
    return [GroupEntry(BASE_GROUP, counts, weights=weights_of(config))]


def weights_of(config: PreTrainedConfig) -> str:
    """Return how the linear maps in a model's blocks are kept, and new token groups unless they say otherwise."""
    return getattr(config, "weights", "float")


def group_names(config: PreTrainedConfig) -> list[str]:
    """Return the names of the token groups, in the order in which they were added."""
    return [group.name for group in token_groups(config)]


def frozen_names(config: PreTrainedConfig) -> list[str]:
    """Return what a configuration marks as frozen: token groups, and what there is beside them."""
    return list(getattr(config, "frozen", None) or [])


def with_groups(
    config: PreTrainedConfig, groups: Sequence[GroupEntry], *, blocks: Sequence[int] | None = None, **fields: Any
) -> PreTrainedConfig:
    """Return a copy of a configuration with other token groups and `fields`; the counts follow.

    Args:
        config: of the model until now.
        groups: their blocks numbered as until now.
        blocks: where the blocks change, for each one afterwards its number until now.
        fields: further fields to set.

    Raises:
        GrowthError: a projection without parameter tokens and without a linear map, or counts that differ between
            blocks where the architecture has one for all.
    """
    row = architecture_of(config)
    new = copy.deepcopy(config)
    if blocks is not None:
        groups = [group.with_blocks(blocks) for group in groups]
        setattr(new, row.depth, len(blocks))
        if getattr(config, "layer_types", None):
            new.layer_types = [config.layer_types[i] for i in blocks]
    new.token_groups = [group.to_config() for group in groups]
    for projection, count in row.counts.items():
        totals = [sum(group.count(projection, i) for group in groups) for i in range(row.depth_of(new))]
        if not row.has_pattention and len(set(totals)) > 1:
            raise GrowthError(
                f"the blocks would have {min(totals)} to {max(totals)} neurons, but a {config.model_type!r} model "
                f"has one number for all, {count}; choose the same for every block"
            )
        # What is there in every loop and, where groups take part by modality, for each.
        modalities: set[str | None] = {group.modality for group in token_groups(config)} & {TEXT, IMAGE} or {None}
        always = [
            sum(
                group.count(projection, i) for group in groups if not group.loops and group.modality in (None, modality)
            )
            for modality in modalities
            for i in range(row.depth_of(new))
        ]
        if min(always) == 0 and projection not in (getattr(config, "linear_projections", None) or ()):
            raise GrowthError(
                f"nothing would be left in the {projection} projection: its token groups are "
                f"{', '.join(group_names(config))}, and it has no linear map beside them; keep at least one"
            )
        setattr(new, count, max(totals))
    gone = set(group_names(config)) - {group.name for group in groups}
    if frozen_names(new):
        new.frozen = [name for name in new.frozen if name not in gone]
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def check_known(config: PreTrainedConfig, names: list[str]) -> None:
    """Raise GrowthError unless every name is that of a token group."""
    there = group_names(config)
    unknown = [name for name in names if name not in there]
    if unknown:
        raise GrowthError(f"there is no token group {', '.join(map(repr, unknown))}; there are {', '.join(there)}")


def check_new(config: PreTrainedConfig, name: str, *, besides: Collection[str] = ()) -> None:
    """Raise GrowthError unless a token group can get this name; `besides` are groups that make room."""
    taken = [there for there in group_names(config) if there not in besides]
    if name in taken:
        raise GrowthError(f"token group {name!r} exists already, beside {', '.join(taken)}; choose another name")
    from ..models.token_group import check_group

    try:
        check_group(name, 0)
    except ValueError as error:
        raise GrowthError(str(error)) from error


def places(config: PreTrainedConfig) -> Iterator[tuple[int, TokenMap]]:
    """Yield every (block, map) that can have parameter tokens, block after block."""
    row = architecture_of(config)
    for block in range(row.depth_of(config)):
        for token_map in row.maps:
            yield block, token_map
