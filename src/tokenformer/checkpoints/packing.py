"""A checkpoint whose ternary maps are packed in 2 bits: what `tokenformer pack` writes."""

from __future__ import annotations

from pathlib import Path

from ..growth.architectures import architecture_of
from ..growth.pack import pack
from .checkpoint import load_checkpoint, load_image_processor, save_checkpoint
from .lineage import Lineage
from .verify import carry_files


def pack_checkpoint(path: str | Path, output: str | Path, *, force: bool = False) -> Lineage:
    """Load the checkpoint at `path`, `pack` its model, write it to `output`, and return the new lineage.

    Raises:
        GrowthError: as `pack`. CheckpointError: as `load_checkpoint` and `save_checkpoint`.
    """
    model, tokenizer, lineage = load_checkpoint(path)
    pack(model)
    last = lineage.last
    # An ordinary transformer's inputs are no longer rounded, so that its losses are others.
    same = architecture_of(model.config).has_pattention
    losses = {"loss": last.loss, "bits_per_byte": last.bits_per_byte} if same else {}
    return save_checkpoint(
        output,
        model,
        tokenizer or load_image_processor(path),
        lineage.then("pack", **losses),
        force=force,
        extra=lambda folder: carry_files(Path(path), folder),
    )
