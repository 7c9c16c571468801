"""TokenFormer that reads text and images and writes text, in transformers' style: a union of two along the token axis.

Shape legend: B batch, T positions (text tokens and patches), D hidden_size, V vocab_size, I images, N positions of one.
Every position attends to all before it, and the patches of an image to one another as well. Text is rotated by its
position, as in the language model; patches are not, and have their learned positions, as in the vision model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_tokenformer_multimodal import TokenformerMultimodalConfig
from .modality import ByModality, Positions, own_positions, reading, split_by_modality
from .modeling_tokenformer import TokenformerAttention, TokenformerDecoderLayer, TokenformerForCausalLM
from .modeling_tokenformer_vision import TokenformerVisionEmbeddings, TokenformerVisionPreTrainedModel

# The image that a sequence has shown is remembered with what else is known of it: its keys and values.
_SEEN = "has_images"


class TokenformerMultimodalLayer(TokenformerDecoderLayer):
    """A block whose groups, linear maps and norms act by the modality of a position."""

    def __init__(self, config: TokenformerMultimodalConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        split_by_modality(self)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, positions: Positions, **kwargs: Unpack[TransformersKwargs]
    ) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]`; keyword arguments go to the attention."""
        with reading(positions):
            return super().forward(hidden_states, **kwargs)


class TokenformerMultimodalPreTrainedModel(TokenformerVisionPreTrainedModel):
    """What the models that read text and images share."""

    config: TokenformerMultimodalConfig
    config_class = TokenformerMultimodalConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    _no_split_modules = ["TokenformerVisionEmbeddings", "TokenformerMultimodalLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _input_embed_layer = "embed_tokens"
    _can_compile_fullgraph = False
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": TokenformerMultimodalLayer,
        "attentions": TokenformerAttention,
    }


class TokenformerMultimodalModel(TokenformerMultimodalPreTrainedModel):
    """Embeddings, blocks and final norms: text tokens `[B, T]` and images to hidden states `[B, T, D]`."""

    _auto_class = "AutoModel"

    def __init__(self, config: TokenformerMultimodalConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision_embeddings = TokenformerVisionEmbeddings(config)
        self.layers = nn.ModuleList(TokenformerMultimodalLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = ByModality(nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps))
        self.rotary_emb = GPTNeoXRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the model; arguments as in every image-text-to-text model of transformers.

        Images `[I, C, height, width]` without text give the hidden states `[I, N, D]` of the vision model; text without
        images, those of the language model.

        Raises:
            ValueError: placeholders in `input_ids` that do not match the images, images with `inputs_embeds`, or
                neither text nor images.
        """
        alone = input_ids is None and inputs_embeds is None
        if alone and pixel_values is None:
            raise ValueError("give input_ids, inputs_embeds or pixel_values")
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError("give one of input_ids and inputs_embeds")
        images = None if pixel_values is None else self.vision_embeddings(pixel_values)
        if images is not None:
            images = self.scaled_embeddings(images, field="use_image_embedding_norm")
        if alone:
            assert images is not None
            hidden_states, use_cache = images, False
            is_image = images.new_ones(images.shape[:2], dtype=torch.bool)
        else:
            is_image = self._placeholders(input_ids, inputs_embeds, images)
            if input_ids is not None:
                inputs_embeds = self.embed_tokens(torch.where(is_image, 0, input_ids))
            assert inputs_embeds is not None
            hidden_states = self.scaled_embeddings(inputs_embeds)
            if images is not None:
                patches = images.to(hidden_states.dtype).flatten(0, 1)
                hidden_states = hidden_states.masked_scatter(is_image.unsqueeze(-1), patches)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        positions = own_positions(is_image, _remember(past_key_values, is_image), alone=alone)
        attended = (
            {"attention_mask": None, "position_embeddings": None, "is_causal": False}
            if alone
            else self._attended(hidden_states, is_image, attention_mask, position_ids, past_key_values)
        )
        for loop, layer in self.run_blocks:
            hidden_states = layer(
                hidden_states,
                positions=positions,
                loop=loop,
                past_key_values=past_key_values,
                **{**kwargs, **attended},
            )
        with reading(positions):
            last = self.norm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=last, past_key_values=past_key_values)

    @property
    def _image_token_id(self) -> int:
        """What stands for a patch; −1, which is no text token, where nothing does."""
        found = self.config.image_token_id
        return -1 if found is None else found

    def _placeholders(self, input_ids: Tensor | None, embeds: Tensor | None, images: Tensor | None) -> Tensor:
        """Return which positions are patches, `[B, T]`, once it is sure that they match the images."""
        if input_ids is None:
            assert embeds is not None
            if images is not None:
                raise ValueError(
                    "images were given with inputs_embeds, which do not say where they stand: give input_ids"
                )
            return torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        is_image = torch.eq(input_ids, self._image_token_id)
        each, given = self.config.image_positions, 0 if images is None else len(images)
        found = is_image.sum(1).tolist()
        odd = [row for row, count in enumerate(found) if count % each]
        if odd:
            raise ValueError(
                f"sequence {odd[0] + 1} of the batch has {found[odd[0]]} placeholders, and an image takes {each}; the "
                "processor beside the model writes them"
            )
        if sum(found) != given * each:
            raise ValueError(
                f"the text has placeholders for {sum(found) // each} images ({sum(found)} of token "
                f"{self.config.image_token_id}, {each} each), and {given} images were given"
            )
        return is_image

    def _attended(
        self,
        inputs_embeds: Tensor,
        is_image: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> dict[str, Any]:
        """Return what every block's attention is given: the mask, and the rotation, which leaves patches alone."""
        seen = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = self.position_ids_of(inputs_embeds, past_key_values)
        some = bool(is_image.any())
        blocks = (is_image.cumsum(1) - 1).div(self.config.image_positions, rounding_mode="floor")
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
            block_sequence_ids=F.pad(torch.where(is_image, blocks, -1), (seen, 0), value=-1) if some else None,
        )
        cos, sin = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        if some:
            here = is_image.unsqueeze(-1)
            cos, sin = cos.masked_fill(here, 1.0), sin.masked_fill(here, 0.0)
        return {"attention_mask": mask, "position_embeddings": (cos, sin), "position_ids": position_ids}


class TokenformerForConditionalGeneration(TokenformerMultimodalPreTrainedModel, TokenformerForCausalLM):
    """Language model that sees: text tokens `[B, T]`, some standing for patches, and images to logits `[B, T, V]`."""

    _auto_class = "AutoModelForImageTextToText"

    def __init__(self, config: TokenformerMultimodalConfig) -> None:
        PreTrainedModel.__init__(self, config)  # not TokenformerForCausalLM's, which makes another base model
        self.model: TokenformerMultimodalModel = TokenformerMultimodalModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Return logits, as `TokenformerForCausalLM` does; placeholders count as ignored in `labels`."""
        if labels is not None:
            is_image = torch.eq(labels, self.model._image_token_id)
            labels = torch.where(is_image, -100, labels)  # type: ignore[assignment]
        return super().forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            pixel_values=pixel_values,
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, *args: Any, pixel_values: Tensor | None = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Give images with the prompt alone: afterwards they are in the cache, where there is one."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration or not kwargs.get("use_cache", True):
            inputs["pixel_values"] = pixel_values
        return inputs


def _remember(cache: Cache | None, is_image: Tensor) -> Tensor | None:
    """Note in the cache which sequences have shown an image; returns which had before, `[B]`, None without a cache."""
    if cache is None:
        return None
    before = getattr(cache, _SEEN, None)
    if before is not None and len(before) != len(is_image):  # several of each since, as in beam search
        before = before.repeat_interleave(len(is_image) // len(before))
    now = is_image.any(1)
    setattr(cache, _SEEN, now if before is None else before | now)
    return before
