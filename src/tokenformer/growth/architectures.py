"""Where a model keeps its parameter tokens: one row of a table for each architecture, a TokenFormer's among them.

The hidden neurons of an ordinary MLP are parameter tokens whose normalisation is off: a row of the first map is a key
(two rows where it is gated), a column of the last one a value. So every operation on token groups is one function for
all architectures, and adding an architecture is adding a row to `ARCHITECTURES`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import GrowthError
from ..models.configuration_tokenformer import PROJECTIONS, count_at
from ..models.pattention import BASE_GROUP, check_group

Group = dict[str, Any]
# The tensors of each token group of one map, by the names that its `Part`s give them.
Groups = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """A tensor of a block that holds parameter tokens.

    Attributes:
        tensor: its name in the block; with "{group}" in it, every token group has one of its own, else the groups
            follow each other in it.
        axis: along which the parameter tokens lie once it is turned: 0 for keys, 1 for values; None where it belongs to
            the whole group, as a gate does.
        transposed: the model holds it the other way round.
    """

    tensor: str
    axis: int | None
    transposed: bool = False

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
    """

    name: str
    projection: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Architecture:
    """Names of one kind of model.

    Attributes:
        prefix: of the base model in the language model.
        blocks: of the list of blocks in the base model.
        depth: configuration field that counts them.
        counts: configuration field that counts the parameter tokens of each projection.
        maps: those of a block that have parameter tokens.
        last: modules whose outputs are all that a block adds to the residual stream.
        stored: tensors that have another name in files, and that name.
    """

    prefix: str
    blocks: str
    depth: str
    counts: Mapping[str, str]
    maps: tuple[TokenMap, ...]
    last: tuple[str, ...]
    stored: Mapping[str, str] = field(default_factory=dict)

    def block_name(self, index: int) -> str:
        """Prefix of the names of a block's tensors in the language model's state dict."""
        return f"{self.prefix}.{self.blocks}.{index}."

    def is_last(self, tensor: str) -> bool:
        """Whether a block whose last maps' tensors (name in the block) are zero adds nothing: is this one of them?"""
        inside = any(tensor.startswith(f"{module}.") for module in self.last)
        return inside and ".keys." not in tensor and ".gates." not in tensor


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


def _mlp(keys: tuple[str, ...], values: str, *, transposed: bool = False) -> tuple[TokenMap, ...]:
    parts = [Part(f"{key}.weight", 0, transposed) for key in keys] + [Part(f"{key}.bias", 0) for key in keys]
    return (TokenMap(values, "ffn", (*parts, Part(f"{values}.weight", 1, transposed))),)


_GATED = Architecture(
    prefix="model",
    blocks="layers",
    depth="num_hidden_layers",
    counts={"ffn": "intermediate_size"},
    maps=_mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    last=("self_attn.o_proj", "mlp.down_proj"),
)
ARCHITECTURES: dict[str, Architecture] = {
    "tokenformer": Architecture(
        prefix="model",
        blocks="layers",
        depth="num_hidden_layers",
        counts={projection: f"{projection}_param_tokens" for projection in PROJECTIONS},
        maps=tuple(_pattention(name, p) for p, names in PROJECTIONS.items() for name in names),
        last=("self_attn.o_proj", "mlp"),
    ),
    "llama": _GATED,
    "mistral": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gpt_neox": Architecture(
        prefix="gpt_neox",
        blocks="layers",
        depth="num_hidden_layers",
        counts={"ffn": "intermediate_size"},
        maps=_mlp(("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h"),
        last=("attention.dense", "mlp.dense_4h_to_h"),
        stored={"lm_head.weight": "embed_out.weight"},
    ),
    "gpt2": Architecture(
        prefix="transformer",
        blocks="h",
        depth="n_layer",
        counts={"ffn": "n_inner"},
        maps=_mlp(("mlp.c_fc",), "mlp.c_proj", transposed=True),  # transformers' Conv1D
        last=("attn.c_proj", "mlp.c_proj"),
    ),
    "opt": Architecture(
        prefix="model",
        blocks="decoder.layers",
        depth="num_hidden_layers",
        counts={"ffn": "ffn_dim"},
        maps=_mlp(("fc1",), "fc2"),
        last=("self_attn.out_proj", "fc2"),
    ),
}


def architecture_of(config: Any) -> Architecture:
    """Return the row of a model's configuration.

    Raises:
        GrowthError: there is none.
    """
    if config.model_type not in ARCHITECTURES:
        raise GrowthError(
            f"where a {config.model_type!r} model keeps its neurons is not in the table; these are: "
            f"{', '.join(ARCHITECTURES)}. A row in growth/architectures.py adds one"
        )
    return ARCHITECTURES[config.model_type]


def token_groups(config: Any) -> list[Group]:
    """Return the token groups of any model in the order in which they were added.

    Each is `{"name": …, "qkv": n, "output": n, "ffn": n}`, of the projections that can have parameter tokens; n is a
    list where blocks differ. "blocks" are those that came with the group; "routed": it has gates.
    """
    listed = getattr(config, "token_groups", None)
    if listed:
        return copy.deepcopy(listed)
    counts = architecture_of(config).counts
    return [{"name": BASE_GROUP, **{projection: _total(config, count) for projection, count in counts.items()}}]


def count_of(group: Group, projection: str, block: int) -> int:
    """Parameter tokens of a group in one block."""
    return count_at(group.get(projection, 0), block)


def over_blocks(group: Group, blocks: Sequence[int]) -> Group:
    """Say of a group what is true once `blocks` (their numbers until now) are the model's blocks."""
    kept = {key: [n[i] for i in blocks] if isinstance(n, list) and key != "blocks" else n for key, n in group.items()}
    if "blocks" in group:
        kept["blocks"] = [blocks.index(i) for i in group["blocks"]]
    return kept


def with_groups(config: Any, groups: list[Group], *, blocks: Sequence[int] | None = None, **fields: Any) -> Any:
    """Return a copy of a configuration with other token groups and `fields`; the counts follow.

    Args:
        config: of the model until now.
        groups: as `token_groups` gives them, their blocks numbered as until now.
        blocks: where the blocks change, for each one afterwards its number until now.
        fields: further fields to set.

    Raises:
        GrowthError: a projection without parameter tokens and without a linear map, or counts that differ between
            blocks where the architecture has one for all.
    """
    row = architecture_of(config)
    new = copy.deepcopy(config)
    new.token_groups = [over_blocks(group, blocks) if blocks is not None else copy.deepcopy(group) for group in groups]
    if blocks is not None:
        setattr(new, row.depth, len(blocks))
        if getattr(config, "layer_types", None):
            new.layer_types = [config.layer_types[i] for i in blocks]
    for projection, count in row.counts.items():
        totals = [
            sum(count_of(group, projection, i) for group in new.token_groups) for i in range(getattr(new, row.depth))
        ]
        if config.model_type != "tokenformer" and len(set(totals)) > 1:
            raise GrowthError(
                f"the blocks would have {min(totals)} to {max(totals)} neurons, but a {config.model_type!r} model "
                f"has one number for all, {count}; choose the same for every block"
            )
        if min(totals) == 0 and projection not in (getattr(config, "linear_projections", None) or ()):
            raise GrowthError(
                f"nothing would be left in the {projection} projection: its token groups are "
                f"{_names(config)}, and it has no linear map beside them; keep at least one"
            )
        setattr(new, count, max(totals))
    if getattr(new, "frozen", None):
        gone = {group["name"] for group in token_groups(config)} - {group["name"] for group in groups}
        new.frozen = [name for name in new.frozen if name not in gone]
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def check_known(config: Any, names: list[str]) -> None:
    """Raise GrowthError unless every name is that of a token group."""
    unknown = [name for name in names if name not in [group["name"] for group in token_groups(config)]]
    if unknown:
        raise GrowthError(f"there is no token group {', '.join(map(repr, unknown))}; there are {_names(config)}")


def check_new(config: Any, name: str, *, besides: Collection[str] = ()) -> None:
    """Raise GrowthError unless a token group can get this name; `besides` are groups that make room."""
    taken = [group["name"] for group in token_groups(config) if group["name"] not in besides]
    if name in taken:
        raise GrowthError(f"token group {name!r} exists already, beside {', '.join(taken)}; choose another name")
    try:
        check_group(name, 0)
    except ValueError as error:
        raise GrowthError(str(error)) from error


def places(config: Any) -> Iterator[tuple[int, TokenMap]]:
    """Yield every (block, map) that can have parameter tokens, block after block."""
    row = architecture_of(config)
    for block in range(getattr(config, row.depth)):
        for token_map in row.maps:
            yield block, token_map


def _total(config: Any, field: str) -> int:
    count = getattr(config, field)
    return 4 * config.hidden_size if count is None else count  # GPT-2's n_inner


def _names(config: Any) -> str:
    return ", ".join(group["name"] for group in token_groups(config))
