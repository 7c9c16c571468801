"""Transformers whose parameters are tokens: train one, then keep making it bigger without losing what it knows."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .growth.grow import grow
from .models.configuration_tokenformer import PRESETS, TokenformerConfig
from .models.modeling_tokenformer import TokenformerForCausalLM, TokenformerModel
from .models.pattention import Pattention

AutoConfig.register("tokenformer", TokenformerConfig)
AutoModel.register(TokenformerConfig, TokenformerModel)
AutoModelForCausalLM.register(TokenformerConfig, TokenformerForCausalLM)

__all__ = [
    "PRESETS",
    "Pattention",
    "TokenformerConfig",
    "TokenformerForCausalLM",
    "TokenformerModel",
    "grow",
]
