"""Configuration of a TokenFormer that reads text and images and writes text.

No postponed annotations here: `strict` would then leave the types of the fields unchecked.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_tokenformer import TokenformerConfig
from .configuration_tokenformer_vision import TokenformerVisionConfig
from .names import MODALITIES
from .pattention import check_choice


@strict
class TokenformerMultimodalConfig(TokenformerConfig, TokenformerVisionConfig):
    """Sizes of a TokenFormer made by `merge(language, vision, by="modality")`: the fields of both.

    Args:
        image_token_id: that stands in `input_ids` for each patch of an image. The embedding needs no row for it.
        use_image_embedding_norm: as `use_embedding_norm`, of the patches.

    Of an entry of `token_groups`, `"modality"` says where the group takes part: "text", "image", or "both": at images
    and at text after them. τ of the groups for images is in their entries, `"tau": {"ffn": …}`.

    Raises:
        ValueError: as the two configurations, or an unknown modality.
    """

    model_type = "tokenformer_multimodal"
    presets: ClassVar[Mapping[str, Mapping[str, float]]] = {}
    auto_classes: ClassVar[Mapping[str, str]] = {
        "AutoConfig": "configuration_tokenformer_multimodal.TokenformerMultimodalConfig",
        "AutoModel": "modeling_tokenformer_multimodal.TokenformerMultimodalModel",
        "AutoModelForImageTextToText": "modeling_tokenformer_multimodal.TokenformerForConditionalGeneration",
        "AutoProcessor": "processing_tokenformer_multimodal.TokenformerProcessor",
    }
    attends_both_ways: ClassVar[bool] = False

    image_token_id: int | None = None
    use_image_embedding_norm: bool = False

    def validate_token_ids(self) -> None:
        """Check nothing: transformers' own check wants a row for the placeholder."""

    def validate_modalities(self) -> None:
        """Check what the types cannot."""
        for group in self.token_groups or []:
            if "modality" in group:
                check_choice(f"modality of token group {group['name']!r}", group["modality"], MODALITIES)

    @property
    def image_positions(self) -> int:
        """Positions of an image: its patches, and one more with a class token."""
        return self.num_patches + (self.pooling == "cls")

    @property
    def base_model_tp_plan(self) -> dict[str, Any]:
        """No tensor-parallel plan: rows are sorted by modality."""
        return {}

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str]) -> None:
        """Ignore what transformers assigns while the configuration is made."""
