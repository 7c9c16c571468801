"""TokenFormer that classifies images, in transformers' style: the blocks of the language model over patches.

Shape legend: B batch, C channels, P patch_size, N patches of an image, T positions (N, or N + 1 with a class token), D
hidden_size, L labels. What differs from the language model is here: patches for text tokens, learned positions for
the rotary embedding, attention in both directions (the configuration says so), and the head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_tokenformer_vision import TokenformerVisionConfig
from .modeling_tokenformer import TokenformerDecoderLayer, TokenformerPreTrainedModel


class TokenformerVisionEmbeddings(nn.Module):
    """Images `[B, C, height, width]` to the residual stream `[B, T, D]`: patches, a class token if any, positions."""

    def __init__(self, config: TokenformerVisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.image_size = config.image_height_width
        # A convolution over patches that do not overlap, as a linear map of the patch's pixels in their order C, P, P.
        self.patch_embeddings = nn.Linear(config.num_channels * config.patch_size**2, config.hidden_size)
        classes = config.pooling == "cls"
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if classes else None
        self.position_embeddings = nn.Parameter(torch.empty(1, config.num_patches + classes, config.hidden_size))
        self.num_channels = config.num_channels

    def forward(self, pixel_values: Tensor, *, interpolate_pos_encoding: bool = False) -> Tensor:
        """Embed images; of another size than the model's only with `interpolate_pos_encoding`.

        Raises:
            ValueError: other channels, or a height or width that the model does not read.
        """
        channels, height, width = pixel_values.shape[1:]
        size, expected = (height, width), self.image_size
        if channels != self.num_channels:
            raise ValueError(f"the images have {channels} channels, the model reads {self.num_channels}")
        if size != expected and not interpolate_pos_encoding:
            raise ValueError(
                f"the images have {height} × {width} pixels, the model reads {expected[0]} × {expected[1]}; resize "
                "them, as the image processor beside the model does, or give interpolate_pos_encoding=True"
            )
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"the images have {height} × {width} pixels, which is no whole number of patches of {self.patch_size}"
            )
        grid = (height // self.patch_size, width // self.patch_size)
        patches = F.pixel_unshuffle(pixel_values.to(self.patch_embeddings.weight.dtype), self.patch_size)
        embeddings = self.patch_embeddings(patches.flatten(2).transpose(1, 2).contiguous())
        if self.cls_token is not None:
            embeddings = torch.cat([self.cls_token.expand(embeddings.shape[0], -1, -1), embeddings], dim=1)
        return embeddings + (self.position_embeddings if size == expected else self.interpolated(*grid))

    def waves(self) -> Tensor:
        """Return what positions are before they learn, `[1, T, D]`: sines and cosines of a patch's row and column.

        Their wavelengths grow from 2π patches towards 10,000 times that over D / 4 features each. What is left of D,
        and the class token's position, is zero.
        """
        like = self.position_embeddings
        quarter = like.shape[-1] // 4
        rows, columns = (torch.arange(side // self.patch_size, device=like.device) for side in self.image_size)
        frequencies = 10000.0 ** (-torch.arange(quarter, device=like.device) / max(quarter, 1))
        places = torch.cartesian_prod(rows, columns).T[..., None] * frequencies  # [2, N, D / 4]
        found = torch.cat([*places.sin(), *places.cos()], dim=-1).to(like.dtype)
        return F.pad(found, (0, like.shape[-1] - 4 * quarter, like.shape[1] - len(found), 0))[None]

    def interpolated(self, rows: int, columns: int) -> Tensor:
        """Return the positions of an image with so many patches, `[1, T, D]`: bicubic between those learned."""
        first = 0 if self.cls_token is None else 1
        of_class, of_patches = self.position_embeddings[:, :first], self.position_embeddings[:, first:]
        grid = [side // self.patch_size for side in self.image_size]
        learned = of_patches.unflatten(1, grid).permute(0, 3, 1, 2)
        new = F.interpolate(learned, size=(rows, columns), mode="bicubic", align_corners=False)
        return torch.cat([of_class, new.flatten(2).transpose(1, 2)], dim=1)


class TokenformerVisionPreTrainedModel(TokenformerPreTrainedModel):
    """What the models that read images share."""

    config: TokenformerVisionConfig
    config_class = TokenformerVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ["TokenformerVisionEmbeddings", "TokenformerDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = []  # noqa: RUF012
    _input_embed_layer = "patch_embeddings"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw initial weights as the language model; patches and positions about equally large, as MAE's code does."""
        if isinstance(module, TokenformerVisionEmbeddings):
            init.copy_(module.position_embeddings, module.waves())
            if module.cls_token is not None:
                init.normal_(module.cls_token, std=self.config.initializer_range)
            init.xavier_uniform_(module.patch_embeddings.weight)
            init.zeros_(module.patch_embeddings.bias)
        else:
            super()._init_weights(module)


class TokenformerVisionModel(TokenformerVisionPreTrainedModel):
    """Embedding, blocks and final norm: images `[B, C, height, width]` to hidden states `[B, T, D]` and `[B, D]`."""

    _auto_class = "AutoModel"

    def __init__(self, config: TokenformerVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = TokenformerVisionEmbeddings(config)
        self.layers = nn.ModuleList(TokenformerDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Run the encoder; arguments as in every transformers image encoder.

        Raises:
            ValueError: no images, or images that the model does not read.
        """
        if pixel_values is None:
            raise ValueError("give pixel_values, as the image processor beside the model makes them of images")
        hidden_states = self.scaled_embeddings(
            self.embeddings(pixel_values, interpolate_pos_encoding=bool(interpolate_pos_encoding))
        )
        for loop, layer in self.run_blocks:
            hidden_states = layer(hidden_states, loop=loop, **kwargs)
        last = self.norm(hidden_states)
        pooled = last.mean(dim=1) if self.config.pooling == "mean" else last[:, 0]
        return BaseModelOutputWithPooling(last_hidden_state=last, pooler_output=pooled)


class TokenformerForImageClassification(TokenformerVisionPreTrainedModel):
    """Image classifier: the encoder and a linear head, images `[B, C, height, width]` to logits `[B, L]`."""

    _auto_class = "AutoModelForImageClassification"

    def __init__(self, config: TokenformerVisionConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = TokenformerVisionModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """Return logits; with `labels` `[B]` also the mean cross entropy in nats, or what `problem_type` asks for."""
        outputs: BaseModelOutputWithPooling = self.model(
            pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs
        )
        logits = self.classifier(outputs.pooler_output)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )
