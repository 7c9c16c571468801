"""What takes part where, in a model that reads text and images: a position's modality is a gate without weights.

Shape legend: B batch, T positions, D hidden_size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .configuration_blocks import TokenformerBlocksConfig
from .names import BOTH, IMAGE, TEXT
from .pattention import Pattention


@dataclass(frozen=True)
class Positions:
    """What the positions of a forward pass hold.

    Attributes:
        is_image: `[B, T]`, a patch of an image, not a text token.
        is_met: `[B, T]`, where both modalities take part: a patch, or a text token after one, of a sequence of both.
    """

    is_image: Tensor
    is_met: Tensor

    def of(self, modality: str) -> Tensor:
        """Return where the groups of a modality take part, `[B, T]`."""
        return {TEXT: ~self.is_image, IMAGE: self.is_image, BOTH: self.is_met}[modality]


_POSITIONS: ContextVar[Positions | None] = ContextVar("positions", default=None)


@contextmanager
def reading(positions: Positions) -> Iterator[None]:
    """Within the context, let groups, linear maps and norms of a modality act at its positions."""
    token = _POSITIONS.set(positions)
    try:
        yield
    finally:
        _POSITIONS.reset(token)


def _where(modality: str, x: Tensor) -> Tensor:
    positions = _POSITIONS.get()
    if positions is None or positions.is_image.shape != x.shape[:-1]:
        raise ValueError(
            f"a map that tells text from images was called on {list(x.shape)} outside of its model, which knows what "
            "each position holds; call the whole model"
        )
    return positions.of(modality)


class ModalityGate(nn.Module):
    """The gate of a token group that takes part where a position is of its modality; it has no weights.

    Args:
        modality: "text", "image" or "both".
    """

    def __init__(self, modality: str) -> None:
        super().__init__()
        self.modality = modality
        self.register_buffer("weight", None)
        self.register_buffer("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return for `x` `[B, T, D]` a score `[B, T, 1]` that is positive where the group takes part."""
        return (_where(self.modality, x).to(x.dtype) - 0.5).unsqueeze(-1)

    def extra_repr(self) -> str:
        """Show the modality."""
        return self.modality


class ByModality(nn.Module):
    """Two modules of one kind, such as linear maps or norms: one acts on text tokens, the other on images."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text, self.image = text, copy.deepcopy(text)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, T, D]` to `[B, T, E]`."""
        is_image = _where(IMAGE, x)
        if not is_image.any():
            return self.text(x)
        if is_image.all():
            return self.image(x)
        image, text = self.image(x[is_image]), self.text(x[~is_image])
        out = text.new_empty(*x.shape[:-1], text.shape[-1])
        out[is_image], out[~is_image] = image, text
        return out


def apply_notes(layer: Pattention, config: TokenformerBlocksConfig, projection: str) -> None:
    """Give the token groups of a map what the configuration says of each: its τ, its modality, its loops."""
    layer.loops = {entry["name"]: tuple(entry["loops"]) for entry in config.token_groups or [] if entry.get("loops")}
    for entry in config.token_groups or []:
        name = entry["name"]
        if name in layer.groups:
            layer.groups[name].tau = entry.get("tau", {}).get(projection)
            if "modality" in entry:
                layer.gates[name] = ModalityGate(entry["modality"])


def split_by_modality(block: nn.Module) -> None:
    """Let each modality have linear maps and norms of its own in a block, where these have weights."""
    for layer in block.modules():
        if isinstance(layer, Pattention) and layer.linear is not None:
            layer.linear = ByModality(layer.linear)
    for name, module in list(block.named_children()):
        if isinstance(module, nn.LayerNorm) and module.weight is not None:
            block.add_module(name, ByModality(module))


def own_positions(is_image: Tensor, seen: Tensor | None, *, alone: bool) -> Positions:
    """Say what positions hold, from where there are patches now, `[B, T]`, and which sequences had some before, `[B]`.

    `alone`: the images come without text, so that there is nothing that they could meet.
    """
    if alone:
        return Positions(is_image, torch.zeros_like(is_image))
    met = is_image.cumsum(1) > 0
    return Positions(is_image, met if seen is None else met | seen.unsqueeze(1))
