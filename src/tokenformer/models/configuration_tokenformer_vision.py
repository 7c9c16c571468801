"""Configuration of a TokenFormer that classifies images, and the named sizes of the paper.

No postponed annotations here: `strict` would then leave the types of the fields unchecked.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_blocks import TokenformerBlocksConfig, families, sizes_of
from .pattention import check_choice

POOLINGS = ("mean", "cls")

# Paper, table 2, by the parameters that it states: B†, B, L†, L. It prints 768 tokens for the feed-forward of L†, which
# would be 191M; 3,072 give what it states. B computes to 115M.
VISION_PRESETS = families(
    {
        "vit-b-86m": sizes_of(12, 768, 12, 576, 2304),
        "vit-b-109m": sizes_of(12, 768, 12, 768, 3072),
        "vit-l-307m": sizes_of(24, 1024, 16, 768, 3072),
        "vit-l-407m": sizes_of(24, 1024, 16, 1024, 4096),
    }
)


@strict
class TokenformerVisionConfig(TokenformerBlocksConfig):
    """Sizes of a TokenFormer that reads images. The defaults are the paper's ViT-B/16 for ImageNet.

    Args:
        image_size: height and width in pixels, one number where they are equal.
        patch_size: side of the square patches that an image is cut into, in pixels.
        num_channels: of a pixel.
        pooling: what the head reads, `mean`: of all patches; `cls`: a learned position of its own before them.

    All other fields are those of `TokenformerBlocksConfig`. The labels are in `id2label`, as in any classifier, and an
    image has one of them unless `problem_type` says otherwise.

    Raises:
        ValueError: as `TokenformerBlocksConfig`, or an image that is no whole number of patches.
    """

    model_type = "tokenformer_vision"
    presets: ClassVar[Mapping[str, Mapping[str, float]]] = VISION_PRESETS
    auto_classes: ClassVar[Mapping[str, str]] = {
        "AutoConfig": "configuration_tokenformer_vision.TokenformerVisionConfig",
        "AutoModel": "modeling_tokenformer_vision.TokenformerVisionModel",
        "AutoModelForImageClassification": "modeling_tokenformer_vision.TokenformerForImageClassification",
    }
    attends_both_ways: ClassVar[bool] = True

    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    pooling: str = "mean"
    problem_type: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Say what the labels are where nobody has: transformers would write it here in the first training step."""
        super().__post_init__(**kwargs)
        several = "single_label_classification" if self.num_labels > 1 else "regression"
        self.problem_type = self.problem_type or several

    @property
    def image_height_width(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        size = self.image_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def num_patches(self) -> int:
        """Patches in an image."""
        height, width = self.image_height_width
        return (height // self.patch_size) * (width // self.patch_size)

    def validate_image(self) -> None:
        """Check what the types cannot."""
        check_choice("pooling", self.pooling, POOLINGS)
        sides = self.image_size if isinstance(self.image_size, list | tuple) else [self.image_size]
        if len(sides) not in (1, 2) or min(*sides, self.patch_size, self.num_channels) < 1:
            raise ValueError(
                f"image_size is {self.image_size}, patch_size {self.patch_size}, num_channels {self.num_channels}; all "
                "must be positive, and image_size one side or [height, width]"
            )
        if any(side % self.patch_size for side in sides):
            raise ValueError(
                f"an image of {' × '.join(map(str, self.image_height_width))} pixels is no whole number of patches of "
                f"{self.patch_size} × {self.patch_size}; change image_size or patch_size"
            )
