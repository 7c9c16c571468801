"""Transformers whose parameters are tokens: train one, then keep making it bigger without losing what it knows."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .checkpoints.addons import attach, split
from .growth.freeze import freeze, unfreeze
from .growth.groups import consolidate, drop, merge
from .growth.grow import grow
from .growth.route import route
from .growth.select import prune, slice
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
    "attach",
    "consolidate",
    "drop",
    "freeze",
    "grow",
    "merge",
    "prune",
    "route",
    "slice",
    "split",
    "unfreeze",
]
