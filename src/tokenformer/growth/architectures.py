"""Where a model keeps its parameter tokens: one row of a table for each architecture, a TokenFormer's among them.

The hidden neurons of an ordinary MLP are parameter tokens whose normalisation is off: a row of the first map is a key
(two rows where it is gated), a column of the last one a value. So every operation on token groups is one function for
all architectures, and adding an architecture is adding a row to `ARCHITECTURES`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import GrowthError
from ..models.configuration_tokenformer import PROJECTIONS
from ..models.pattention import BASE_GROUP, check_group

# Parameter tokens in every block: one number, or one for each.
Count = int | tuple[int, ...]
# The tensors of each token group of one map, by the names that its `Part`s give them.
Groups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class GroupEntry:
    """What a configuration says of one token group.

    Attributes:
        name: of the group.
        counts: its parameter tokens for each projection that can have some; 0 where one is not named.
        blocks: numbers of the blocks that came with it, and go with it.
        routed: whether gates decide for each text token if it takes part.
    """

    name: str
    counts: Mapping[str, Count]
    blocks: tuple[int, ...] = ()
    routed: bool = False

    @classmethod
    def from_config(cls, entry: Mapping[str, Any]) -> GroupEntry:
        """Read an entry of the configuration field `token_groups`."""
        counts = {
            key: tuple(count) if isinstance(count, list) else count
            for key, count in entry.items()
            if key not in ("name", "blocks", "routed")
        }
        return cls(entry["name"], counts, tuple(entry.get("blocks", ())), bool(entry.get("routed")))

    def to_config(self) -> dict[str, Any]:
        """Return the entry that `from_config` reads: plain types, one number where all blocks have the same."""
        entry: dict[str, Any] = {"name": self.name}
        for projection, count in self.counts.items():
            each = {count} if isinstance(count, int) else set(count)
            entry[projection] = each.pop() if len(each) == 1 else list(self.over(projection))
        return {
            **entry,
            **({"routed": True} if self.routed else {}),
            **({"blocks": list(self.blocks)} if self.blocks else {}),
        }

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
        return GroupEntry(self.name, counts, tuple(blocks.index(block) for block in self.blocks), self.routed)


@dataclass(frozen=True)
class Part:
    """A tensor of a block that holds parameter tokens.

    Attributes:
        tensor: its name in the block; with "{group}" in it, every token group has one of its own, else the groups
            follow each other in it.
        axis: along which the parameter tokens lie once it is turned: 0 for keys, 1 for values; None where it belongs to
            the whole group, as a gate does.
        transposed: the model holds it the other way round.
        fused: name of the tensor that the model holds instead, where it has this one and others of the same shape one
            after the other in one.
        piece: which of them this is, and how many there are.
    """

    tensor: str
    axis: int | None
    transposed: bool = False
    fused: str | None = None
    piece: tuple[int, int] = (0, 1)

    @property
    def stored(self) -> str:
        """Name in the block of the tensor that the ordinary model has."""
        return self.fused or self.tensor

    def read(self, stored: Tensor) -> Tensor:
        """Return this part, turned, of the tensor that the ordinary model has."""
        position, pieces = self.piece
        return (stored.t() if self.transposed else stored).chunk(pieces)[position]

    @property
    def own(self) -> str:
        """Name of the tensor, never transposed, that one token group has of its own while the model is in memory."""
        module, _, leaf = self.tensor.rpartition(".")
        return self.tensor if "{group}" in self.tensor else f"{module}.groups.{{group}}.{leaf}"


@dataclass(frozen=True)
class TokenMap:
    """One map of a block that has parameter tokens: a Pattention, or an MLP.

    Attributes:
        name: of the module in the block that applies the values.
        projection: whose count the configuration gives: "qkv", "output" or "ffn".
        parts: its tensors; those that a model does without (biases) are simply not there.
        activation: name of the module in the block that reads a piece of a fused map's outputs. Copied to lie close
            together, every number takes the same path through the processor, however many neurons there are.
    """

    name: str
    projection: str
    parts: tuple[Part, ...]
    activation: str | None = None


@dataclass(frozen=True)
class Architecture:
    """Where one kind of model keeps what operations on token groups need.

    Attributes:
        prefix: name of the base model in the language model.
        blocks: name of the list of blocks in the base model.
        depth: configuration field that counts them.
        final_norm: name of the norm after the blocks in the base model.
        counts: configuration field that counts the parameter tokens of each projection.
        maps: those of a block that have parameter tokens.
        last: modules whose outputs are all that a block adds to the residual stream.
        stored: tensors that have another name in files, and that name.
        open_count: parameter tokens where the configuration leaves their number open, in multiples of the width.
        why_not_deeper: says of a configuration why a block cannot be inserted without changing the outputs; None where
            one whose last maps are zero adds nothing, and no block depends on its number.
    """

    prefix: str
    blocks: str
    depth: str
    final_norm: str
    counts: Mapping[str, str]
    maps: tuple[TokenMap, ...]
    last: tuple[str, ...]
    stored: Mapping[str, str] = field(default_factory=dict)
    open_count: int = 4
    why_not_deeper: Callable[[PreTrainedConfig], str | None] = lambda config: None

    def block_name(self, index: int) -> str:
        """Prefix of the names of a block's tensors in the language model's state dict."""
        return f"{self.prefix}.{self.blocks}.{index}."

    def is_last(self, tensor: str) -> bool:
        """Whether a block whose last maps' tensors (name in the block) are zero adds nothing: is this one of them?"""
        inside = any(tensor.startswith(f"{module}.") for module in self.last)
        return inside and ".keys." not in tensor and ".gates." not in tensor

    def depth_of(self, config: PreTrainedConfig) -> int:
        """Count the blocks."""
        return int(getattr(config, self.depth))

    def blocks_of(self, model: PreTrainedModel) -> nn.ModuleList:
        """Return the list of blocks."""
        return model.base_model.get_submodule(self.blocks)

    def final_norm_of(self, model: PreTrainedModel) -> nn.Module | None:
        """Return the norm after the blocks; None in a model without."""
        return dict(model.base_model.named_modules()).get(self.final_norm)

    def count_of(self, config: PreTrainedConfig, projection: str) -> int:
        """Parameter tokens of a projection in all groups, of the block that has most."""
        count = getattr(config, self.counts[projection])
        return self.open_count * config.hidden_size if count is None else count


def _pattention(name: str, projection: str) -> TokenMap:
    group = f"{name}.groups.{{group}}"
    parts = (
        Part(f"{group}.keys.weight", 0),
        Part(f"{group}.keys.bias", 0),
        Part(f"{group}.values.weight", 1),
        Part(f"{name}.gates.{{group}}.weight", None),
        Part(f"{name}.gates.{{group}}.bias", None),
    )
    return TokenMap(name, projection, parts)


def mlp_maps(
    keys: tuple[str, ...],
    values: str,
    *,
    transposed: bool = False,
    fused: str | None = None,
    activation: str | None = None,
) -> tuple[TokenMap, ...]:
    """Return the maps of an MLP: names of its linear maps in the block.

    Args:
        keys: those whose rows are keys; two where it is gated.
        values: the one whose columns are values.
        transposed: they are transformers' Conv1D.
        fused: the one map in which the model holds those of the keys, one after the other; theirs are then our names.
        activation: with `fused`, the activation's module.
    """
    parts = [
        Part(
            f"{key}.{leaf}", 0, transposed and leaf == "weight", *((f"{fused}.{leaf}", (i, len(keys))) if fused else ())
        )
        for leaf in ("weight", "bias")
        for i, key in enumerate(keys)
    ]
    return (TokenMap(values, "ffn", (*parts, Part(f"{values}.weight", 1, transposed)), activation),)


_GATED = Architecture(
    prefix="model",
    blocks="layers",
    depth="num_hidden_layers",
    final_norm="norm",
    counts={"ffn": "intermediate_size"},
    maps=mlp_maps(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    last=("self_attn.o_proj", "mlp.down_proj"),
)
ARCHITECTURES: dict[str, Architecture] = {
    "tokenformer": Architecture(
        prefix="model",
        blocks="layers",
        depth="num_hidden_layers",
        final_norm="norm",
        counts={projection: f"{projection}_param_tokens" for projection in PROJECTIONS},
        maps=tuple(_pattention(name, p) for p, names in PROJECTIONS.items() for name in names),
        last=("self_attn.o_proj", "mlp"),
    ),
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3_text": _GATED,
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
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """Return the row of a model's configuration.

    Raises:
        GrowthError: there is none.
    """
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


def token_groups(config: PreTrainedConfig) -> list[GroupEntry]:
    """Return what a configuration says of the token groups of any model, in the order in which they were added."""
    listed = getattr(config, "token_groups", None)
    if listed:
        return [GroupEntry.from_config(entry) for entry in listed]
    row = architecture_of(config)
    return [GroupEntry(BASE_GROUP, {projection: row.count_of(config, projection) for projection in row.counts})]


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
        if config.model_type != "tokenformer" and len(set(totals)) > 1:
            raise GrowthError(
                f"the blocks would have {min(totals)} to {max(totals)} neurons, but a {config.model_type!r} model "
                f"has one number for all, {count}; choose the same for every block"
            )
        if min(totals) == 0 and projection not in (getattr(config, "linear_projections", None) or ()):
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
