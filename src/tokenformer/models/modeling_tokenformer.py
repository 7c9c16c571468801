"""TokenFormer decoder in transformers' style: every projection of a block is Pattention.

Shape legend: B batch, T text tokens, D hidden_size, H heads, V vocab_size.
Rotary embedding and eager attention are GPT-NeoX's own, which the official code is a fork of.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import (
    GPTNeoXRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_blocks import TokenformerBlocksConfig, count_at
from .configuration_tokenformer import TokenformerConfig
from .modality import apply_notes
from .names import PROJECTIONS
from .pattention import DEFAULT_EPS, Pattention
from .token_group import Gate, LoopScale, reset_linear


def make_pattention(config: TokenformerBlocksConfig, projection: str, layer_idx: int) -> Pattention:
    """Make one D to D map of `projection` ("qkv", "output" or "ffn") with the groups block `layer_idx` has there."""
    assert config.token_groups is not None and config.linear_projections is not None
    writes, at_creation = projection != "qkv", config.output_initializer_range
    linear_std = config.wang_std if at_creation is None else at_creation
    layer = Pattention(
        config.hidden_size,
        config.hidden_size,
        {group["name"]: count_at(group[projection], layer_idx) for group in config.token_groups},
        tau=getattr(config, f"{projection}_tau"),
        norm_activation_type=config.norm_activation_type,
        eps=config.pattention_eps,
        linear=projection in config.linear_projections,
        bias=config.pattention_bias,
        token_group_norm=config.token_group_norm,
        weights=config.weights,
        group_weights={group["name"]: group.get("weights", "float") for group in config.token_groups},
        key_std=config.initializer_range,
        value_std=config.value_std,
        linear_std=linear_std if writes else config.initializer_range,
    )
    if writes and at_creation is not None:
        for name in layer.groups:
            layer.get_submodule(f"groups.{name}.values").init_std = at_creation  # type: ignore[assignment]
    for group in config.token_groups:
        if group.get("routed") and group["name"] in layer.groups:
            layer.add_gate(group["name"])
        if group.get("loops") and writes:
            layer.add_scale(group["name"])
    apply_notes(layer, config, projection)
    return layer


# Servers that put their own cache behind attention, with one place a block.
_ONE_PLACE_A_BLOCK = ("vllm", "sglang")


class TokenformerAttention(nn.Module):
    """Self-attention whose query, key, value and output projections are Pattention; causal where the model is."""

    def __init__(self, config: TokenformerBlocksConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = 0.0
        self.is_causal = not config.attends_both_ways
        self.q_proj = make_pattention(config, "qkv", layer_idx)
        self.k_proj = make_pattention(config, "qkv", layer_idx)
        self.v_proj = make_pattention(config, "qkv", layer_idx)
        self.o_proj = make_pattention(config, "output", layer_idx)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Cache | None = None,
        loop: int = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[Tensor, Tensor | None]:
        """Map `[B, T, D]` to `[B, T, D]`; also the attention weights `[B, H, T, T_all]` where the backend has them.

        `position_embeddings`: of the rotation of queries and keys; None where positions are told otherwise.
        `loop`: which time this block runs, each with keys and values of its own.
        """
        if self.config.num_loops > 1 and self.config._attn_implementation in _ONE_PLACE_A_BLOCK:
            raise ValueError(
                f"num_loops is {self.config.num_loops}, but {self.config._attn_implementation} caches one key and one "
                "value a block, so that loops would overwrite each other's; serve this model with transformers"
            )
        input_shape = hidden_states.shape[:-1]
        heads = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states, loop).view(heads).transpose(1, 2)
        key = self.k_proj(hidden_states, loop).view(heads).transpose(1, 2)
        value = self.v_proj(hidden_states, loop).view(heads).transpose(1, 2)
        if self.config.use_qk_norm:
            # On GPUs autocast widens norms to float32; not every attention takes that beside narrower values.
            query, key = (self._norm(x).to(value.dtype) for x in (query, key))
        if position_embeddings is not None:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            slot = self.layer_idx + loop * self.config.num_hidden_layers
            key, value = past_key_values.update(key, value, slot)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self, query, key, value, attention_mask, scaling=self.scaling, dropout=self.attention_dropout, **kwargs
        )
        output = output.reshape(*input_shape, -1)
        if output.shape[-1] != self.config.hidden_size:
            raise ValueError(
                f"attention returned {output.shape[-1]} features, not hidden_size {self.config.hidden_size}: a server "
                "that splits heads over processes cannot run this model, whose projections give all heads; set its "
                "tensor parallel size to 1"
            )
        return self.o_proj(output, loop), weights

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (self.head_dim,), eps=self.config.layer_norm_eps)


class TokenformerDecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block: x + attention(norm(x)), then x + Pattention(norm(x)); the paper's norms have no parameters.

    With `use_parallel_residual` both maps read the block's input, and their outputs are added to it.
    """

    def __init__(self, config: TokenformerBlocksConfig, layer_idx: int) -> None:
        super().__init__()
        self.use_parallel_residual = config.use_parallel_residual
        norm = partial(nn.LayerNorm, config.hidden_size, config.layer_norm_eps, config.elementwise_affine)
        self.input_layernorm = norm()
        self.self_attn = TokenformerAttention(config, layer_idx)
        self.post_attention_layernorm = norm()
        self.mlp = make_pattention(config, "ffn", layer_idx)

    def forward(self, hidden_states: Tensor, loop: int = 0, **kwargs: Unpack[TransformersKwargs]) -> Tensor:
        """Map `[B, T, D]` to `[B, T, D]` in one loop of the model; keyword arguments go to the attention."""
        attended = hidden_states + self.self_attn(self.input_layernorm(hidden_states), loop=loop, **kwargs)[0]
        mlp_input = hidden_states if self.use_parallel_residual else attended
        return attended + self.mlp(self.post_attention_layernorm(mlp_input), loop)


class TokenformerPreTrainedModel(PreTrainedModel):
    """What all models share: capabilities transformers asks for, and initialisation."""

    config: TokenformerBlocksConfig
    config_class = TokenformerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TokenformerDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": TokenformerDecoderLayer,
        "attentions": TokenformerAttention,
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw every initial weight; the maps of a Pattention carry their official scales."""
        if isinstance(module, nn.Linear) and hasattr(module, "init_std"):
            reset_linear(module)
        elif isinstance(module, Pattention) and module.bias is not None:
            nn.init.zeros_(module.bias)
        elif isinstance(module, Gate | LoopScale):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @property
    def pattention_layers(self) -> dict[str, list[Pattention]]:
        """The maps of every block by projection ("qkv", "output", "ffn"), in the order of the blocks."""
        blocks = self.base_model.layers
        return {p: [b.get_submodule(name) for b in blocks for name in names] for p, names in PROJECTIONS.items()}

    @property
    def run_blocks(self) -> list[tuple[int, nn.Module]]:
        """The blocks of a base model as they run, each with the number of its loop."""
        return [(loop, layer) for loop in range(self.config.num_loops) for layer in self.layers]

    def scaled_embeddings(self, embeddings: Tensor, *, field: str = "use_embedding_norm") -> Tensor:
        """Return embeddings `[*, D]` as the first block reads them: over their root mean square if a field says so."""
        if not getattr(self.config, field):
            return embeddings
        return F.rms_norm(embeddings, (self.config.hidden_size,), eps=DEFAULT_EPS).to(embeddings.dtype)

    @staticmethod
    def position_ids_of(embeddings: Tensor, cache: Cache | None) -> Tensor:
        """Return the positions `[1, T]` of embeddings `[B, T, D]` after what a cache holds."""
        seen = cache.get_seq_length() if cache is not None else 0
        return (torch.arange(embeddings.shape[1], device=embeddings.device) + seen).unsqueeze(0)


class TokenformerModel(TokenformerPreTrainedModel):
    """Embedding, blocks and final norm: token ids `[B, T]` to hidden states `[B, T, D]`."""

    _auto_class = "AutoModel"

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TokenformerDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary_emb = GPTNeoXRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        """Run the decoder; arguments as in every transformers decoder.

        Raises:
            ValueError: unless exactly one of `input_ids` and `inputs_embeds` is given, or images are.
        """
        if kwargs.get("pixel_values") is not None:
            raise ValueError(
                "pixel_values were given, and this model reads text alone; merge(…, by='modality') makes "
                "one that sees, of it and of a TokenFormer for images"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            position_ids = self.position_ids_of(inputs_embeds, past_key_values)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        hidden_states = self.scaled_embeddings(inputs_embeds)
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for loop, layer in self.run_blocks:
            hidden_states = layer(
                hidden_states,
                loop=loop,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class TokenformerForCausalLM(TokenformerPreTrainedModel, GenerationMixin):
    """Language model: the decoder and a head tied to the embedding, token ids `[B, T]` to logits `[B, T, V]`."""

    _auto_class = "AutoModelForCausalLM"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config: TokenformerConfig) -> None:
        super().__init__(config)
        self.model = TokenformerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """Return logits; with `labels` `[B, T]` (-100: ignored) also the mean next-token cross entropy in nats.

        `logits_to_keep`: the last so many positions (0: all), or the positions as a 1-D tensor.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
