"""Transformers whose parameters are tokens: train one, then keep making it bigger without losing what it knows."""

import warnings
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from .checkpoints.addons import attach, split
from .growth.freeze import freeze, unfreeze
from .growth.groups import consolidate, drop, merge
from .growth.grow import grow
from .growth.route import route
from .growth.select import prune, shrink, sort
from .models.configuration_tokenformer import PRESETS, TokenformerConfig
from .models.modeling_tokenformer import TokenformerForCausalLM, TokenformerModel
from .models.pattention import Pattention


def slice(model: PreTrainedModel, blocks: Any) -> None:
    """Call `sort`, as it is called now; goes with the next release."""
    warnings.warn("tokenformer.slice is called tokenformer.sort now", DeprecationWarning, stacklevel=2)
    sort(model, blocks)


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
    "shrink",
    "sort",
    "split",
    "unfreeze",
]
