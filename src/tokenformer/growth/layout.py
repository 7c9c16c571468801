"""What a row of the table of architectures says: which tensors of a model hold its parameter tokens, and how they lie.

The hidden neurons of an ordinary MLP are parameter tokens whose normalisation is off: a row of the first map is a key
(two rows where it is gated), a column of the last one a value.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the table is read without torch by what tells files apart
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Part:
    """A tensor of a block that holds parameter tokens.

    Attributes:
        tensor: its name in the block; with "{group}" in it, every token group has one of its own, else the groups
            follow each other in it.
        axis: along which the parameter tokens lie once it is turned: 0 for keys, 1 for values; None where it belongs to
            the whole group, as a gate and a loop's scale do.
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
        prefix: name of the base model in the whole model, which has a head.
        blocks: name of the list of blocks in the base model.
        depth: configuration field that counts them.
        final_norm: name of the norm after the blocks in the base model.
        counts: configuration field that counts the parameter tokens of each projection.
        maps: those of a block that have parameter tokens.
        last: modules whose outputs are all that a block adds to the residual stream.
        adds: modules whose outputs a block adds to the residual stream, attention's and the feed-forward's, where these
            are not those of `last`.
        stored: tensors that have another name in files, and that name.
        open_count: parameter tokens where the configuration leaves their number open, in multiples of the width.
        auto: name of the transformers' Auto class that makes the whole model.
        head: name of what the whole model has beside the base model.
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
    adds: tuple[str, ...] = ()
    stored: Mapping[str, str] = field(default_factory=dict)
    open_count: int = 4
    auto: str = "AutoModelForCausalLM"
    head: str = "lm_head"
    why_not_deeper: Callable[[PreTrainedConfig], str | None] = lambda config: None

    @property
    def has_pattention(self) -> bool:
        """Whether its maps are Pattention, which keeps its token groups apart; else they are an ordinary MLP's."""
        return any("{group}" in part.tensor for token_map in self.maps for part in token_map.parts)

    def block_name(self, index: int) -> str:
        """Prefix of the names of a block's tensors in the language model's state dict."""
        return f"{self.prefix}.{self.blocks}.{index}."

    def block_number(self, tensor: str) -> int | None:
        """Number of the block that a tensor of the language model's state dict is in; None outside of them."""
        start = self.block_name(0).removesuffix("0.")
        number = tensor.removeprefix(start).partition(".")[0] if tensor.startswith(start) else ""
        return int(number) if number.isdigit() else None

    def names_in_memory(self, files: Collection[str]) -> dict[str, str]:
        """Return for each tensor in files its name in the language model's state dict."""
        ours = {theirs: name for name, theirs in self.stored.items()}
        names = {name: ours.get(name, name) for name in files}
        if any(name.startswith(f"{self.prefix}.") for name in names.values()):
            return names
        # Saved without its head.
        head = f"{self.head}."
        return {file: name if name.startswith(head) else f"{self.prefix}.{name}" for file, name in names.items()}

    def is_last(self, tensor: str) -> bool:
        """Whether a block whose last maps' tensors (name in the block) are zero adds nothing: is this one of them?"""
        inside = any(tensor.startswith(f"{module}.") for module in self.last)
        return inside and not any(part in tensor for part in (".keys.", ".gates.", ".scales."))

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


def is_scale(part: str) -> bool:
    """Whether a tensor is what a map's outputs are multiplied with in the loops that came with a token group."""
    return ".scales." in part


def pattention_map(name: str, projection: str) -> TokenMap:
    """Return the map of a Pattention of this name in the block."""
    group = f"{name}.groups.{{group}}"
    parts = (
        Part(f"{group}.keys.weight", 0),
        Part(f"{group}.keys.bias", 0),
        Part(f"{group}.values.weight", 1),
        Part(f"{group}.keys.weight_scale", None),  # of what is packed
        Part(f"{group}.values.weight_scale", None),
        Part(f"{name}.gates.{{group}}.weight", None),
        Part(f"{name}.gates.{{group}}.bias", None),
        Part(f"{name}.scales.{{group}}.weight", None),
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
    parts = []
    for leaf in ("weight", "bias"):
        for i, key in enumerate(keys):
            part = Part(f"{key}.{leaf}", 0, transposed and leaf == "weight")
            parts.append(replace(part, fused=f"{fused}.{leaf}", piece=(i, len(keys))) if fused else part)
    return (TokenMap(values, "ffn", (*parts, Part(f"{values}.weight", 1, transposed)), activation),)
