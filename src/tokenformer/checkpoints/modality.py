"""Unite a checkpoint that reads text and one that reads images: `tokenformer merge … --by modality`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..errors import CheckpointError, GrowthError
from ..growth.modality import Renamed, bridge_operation, unite
from ..growth.state import check_finite, rewritten
from ..models.processing_tokenformer_multimodal import IMAGE_TOKEN, TokenformerProcessor
from .checkpoint import load_image_processor, load_tokenizer, need_tokenizer, save_checkpoint
from .files import check_target
from .lineage import Lineage
from .rewrite import Stored, check_names, without_weights


def merge_modality_checkpoints(
    language: Stored,
    vision: Stored,
    output: str | Path,
    *,
    bridge: int,
    seed: int = 0,
    force: bool = False,
    **options: Any,
) -> Lineage:
    """Write the union of a language model and a vision model; see `growth.groups.merge`, and `rewrite` for the options.

    Raises:
        GrowthError: as `merge`, or weights of different types.
        TokenizerError: the language model has no tokenizer, or one that belongs to another.
        CheckpointError: as `rewrite`, or the vision model has no image processor.
    """
    check_target(Path(output), force=force)
    image_token_id: int | None = None
    text: Any = load_tokenizer(language.path, language.config) if language.config.model_type == "tokenformer" else None
    if text is not None:
        text.add_tokens([IMAGE_TOKEN], special_tokens=True)
        image_token_id = text.convert_tokens_to_ids(IMAGE_TOKEN)
    names = (list(language.tensors), list(vision.tensors))
    config, sources = unite(language.config, vision.config, *names, image_token_id=image_token_id)
    for stored in (language, vision):
        check_names(stored)
    if language.dtype != vision.dtype:
        raise GrowthError(f"{language.path} is stored in {language.dtype} and {vision.path} in {vision.dtype}")
    processor = _processor(language, vision, text, config.image_positions)
    operation = bridge_operation(config, bridge, seed=seed, dtype=language.dtype)
    give = rewritten(config, Renamed(sources, language.tensors, vision.tensors), operation)

    def lineage() -> Lineage:
        arguments = {"other": vision.lineage.weights_sha256, **operation.arguments}
        return language.lineage.then("merge", arguments=arguments, seed=seed)

    return save_checkpoint(
        output,
        without_weights(operation.config, language.dtype),
        processor,
        lineage,
        force=force,
        weights=lambda names: check_finite(give(names), f"{language.path} or {vision.path}"),
        **options,
    )


def _processor(
    language: Stored, vision: Stored, tokenizer: PreTrainedTokenizerBase | None, positions: int
) -> TokenformerProcessor:
    images = load_image_processor(vision.path)
    if images is None:
        raise CheckpointError(
            f"checkpoint {vision.path} has no image processor; save the one it was trained with there"
        )
    text = need_tokenizer(language.path, language.config, tokenizer)
    return TokenformerProcessor(images, text, image_positions=positions)
