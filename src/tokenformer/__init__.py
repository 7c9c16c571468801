"""Transformers whose parameters are tokens: train one, then keep making it bigger without losing what it knows.

A name is imported when it is first used, so that `import tokenformer` and the command line answer at once. The Auto
classes of transformers know a TokenFormer as soon as both packages are imported, in either order.
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .after_import import after_import

if TYPE_CHECKING:
    from .checkpoints.addons import attach, split
    from .checkpoints.checkpoint import load_checkpoint as load
    from .checkpoints.checkpoint import save_checkpoint as save
    from .data.blocks import text_blocks
    from .errors import (
        CheckpointError,
        ConversionError,
        DataError,
        EvaluationError,
        GrowthError,
        HubError,
        MissingExtraError,
        RecipeError,
        TokenformerError,
        TokenizerError,
    )
    from .evaluation import evaluate_text as evaluate
    from .growth.freeze import freeze, unfreeze
    from .growth.groups import consolidate, drop, merge
    from .growth.grow import grow
    from .growth.pack import pack
    from .growth.route import route
    from .growth.select import prune, shrink, sort
    from .growth.sequence import using
    from .growth.tokenise import tokenise
    from .models.configuration_blocks import TokenformerBlocksConfig
    from .models.configuration_tokenformer import PRESETS, TokenformerConfig
    from .models.configuration_tokenformer_multimodal import TokenformerMultimodalConfig
    from .models.configuration_tokenformer_vision import TokenformerVisionConfig
    from .models.modeling_tokenformer import TokenformerForCausalLM, TokenformerModel
    from .models.modeling_tokenformer_multimodal import TokenformerForConditionalGeneration, TokenformerMultimodalModel
    from .models.modeling_tokenformer_vision import TokenformerForImageClassification, TokenformerVisionModel
    from .models.pattention import Pattention
    from .models.processing_tokenformer_multimodal import TokenformerProcessor
    from .serve.export import export
    from .serve.exported import ExportedForCausalLM
    from .training.train import train

    __version__: str

__all__ = [
    "PRESETS",
    "CheckpointError",
    "ConversionError",
    "DataError",
    "EvaluationError",
    "ExportedForCausalLM",
    "GrowthError",
    "HubError",
    "MissingExtraError",
    "Pattention",
    "RecipeError",
    "TokenformerBlocksConfig",
    "TokenformerConfig",
    "TokenformerError",
    "TokenformerForCausalLM",
    "TokenformerForConditionalGeneration",
    "TokenformerForImageClassification",
    "TokenformerModel",
    "TokenformerMultimodalConfig",
    "TokenformerMultimodalModel",
    "TokenformerProcessor",
    "TokenformerVisionConfig",
    "TokenformerVisionModel",
    "TokenizerError",
    "__version__",
    "attach",
    "consolidate",
    "drop",
    "evaluate",
    "export",
    "freeze",
    "grow",
    "load",
    "merge",
    "pack",
    "prune",
    "route",
    "save",
    "shrink",
    "sort",
    "split",
    "text_blocks",
    "tokenise",
    "train",
    "unfreeze",
    "using",
]

# Where a name is defined; errors are in errors.py under their own names.
_HOMES = {
    "ExportedForCausalLM": "serve.exported.ExportedForCausalLM",
    "PRESETS": "models.configuration_tokenformer.PRESETS",
    "Pattention": "models.pattention.Pattention",
    "TokenformerBlocksConfig": "models.configuration_blocks.TokenformerBlocksConfig",
    "TokenformerConfig": "models.configuration_tokenformer.TokenformerConfig",
    "TokenformerForCausalLM": "models.modeling_tokenformer.TokenformerForCausalLM",
    "TokenformerForConditionalGeneration": "models.modeling_tokenformer_multimodal.TokenformerForConditionalGeneration",
    "TokenformerForImageClassification": "models.modeling_tokenformer_vision.TokenformerForImageClassification",
    "TokenformerModel": "models.modeling_tokenformer.TokenformerModel",
    "TokenformerMultimodalConfig": "models.configuration_tokenformer_multimodal.TokenformerMultimodalConfig",
    "TokenformerMultimodalModel": "models.modeling_tokenformer_multimodal.TokenformerMultimodalModel",
    "TokenformerProcessor": "models.processing_tokenformer_multimodal.TokenformerProcessor",
    "TokenformerVisionConfig": "models.configuration_tokenformer_vision.TokenformerVisionConfig",
    "TokenformerVisionModel": "models.modeling_tokenformer_vision.TokenformerVisionModel",
    "attach": "checkpoints.addons.attach",
    "consolidate": "growth.groups.consolidate",
    "drop": "growth.groups.drop",
    "evaluate": "evaluation.evaluate_text",
    "export": "serve.export.export",
    "freeze": "growth.freeze.freeze",
    "grow": "growth.grow.grow",
    "load": "checkpoints.checkpoint.load_checkpoint",
    "merge": "growth.groups.merge",
    "pack": "growth.pack.pack",
    "prune": "growth.select.prune",
    "route": "growth.route.route",
    "save": "checkpoints.checkpoint.save_checkpoint",
    "shrink": "growth.select.shrink",
    "sort": "growth.select.sort",
    "split": "checkpoints.addons.split",
    "text_blocks": "data.blocks.text_blocks",
    "tokenise": "growth.tokenise.tokenise",
    "train": "training.train.train",
    "unfreeze": "growth.freeze.unfreeze",
    "using": "growth.sequence.using",
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name == "slice":  # for one release
        import warnings

        warnings.warn("tokenformer.slice is called tokenformer.sort now", DeprecationWarning, 2)
        return __getattr__("sort")
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version(__name__)
    elif name in __all__:
        from .quiet import without_logs

        module, _, attribute = _HOMES.get(name, f"errors.{name}").rpartition(".")
        with without_logs():
            value = getattr(import_module(f".{module}", __name__), attribute)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List public names, imported or not."""
    return sorted({*globals(), *__all__})


# Of each kind of model: its module in models/, and the class for each table of transformers' Auto classes.
_AUTO = {
    "tokenformer": {
        "MODEL_MAPPING": "TokenformerModel",
        "MODEL_FOR_CAUSAL_LM_MAPPING": "TokenformerForCausalLM",
    },
    "tokenformer_vision": {
        "MODEL_MAPPING": "TokenformerVisionModel",
        "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING": "TokenformerForImageClassification",
    },
    "tokenformer_multimodal": {
        "MODEL_MAPPING": "TokenformerMultimodalModel",
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING": "TokenformerForConditionalGeneration",
    },
}


def _configs() -> dict[str, Any]:
    from .models.configuration_tokenformer import TokenformerConfig
    from .models.configuration_tokenformer_multimodal import TokenformerMultimodalConfig
    from .models.configuration_tokenformer_vision import TokenformerVisionConfig

    return {
        "tokenformer": TokenformerConfig,
        "tokenformer_vision": TokenformerVisionConfig,
        "tokenformer_multimodal": TokenformerMultimodalConfig,
    }


def _register_configs() -> None:
    from transformers import AutoConfig

    for kind, config in _configs().items():
        AutoConfig.register(kind, config, exist_ok=True)


def _register_models() -> None:
    """Register models that import themselves when they are used.

    At once would be too early: what they are made of in transformers may be what is importing the Auto classes.
    """
    import transformers
    from wrapt import lazy_import

    for kind, config in _configs().items():
        for mapping, name in _AUTO[kind].items():
            model = lazy_import(f"{__name__}.models.modeling_{kind}", name, interface=type)
            getattr(transformers, mapping).register(config, model, exist_ok=True)


def _register_classes(kind: str) -> None:
    """Put the models themselves where those that import themselves were."""
    import transformers

    module = import_module(f".models.modeling_{kind}", __name__)
    for mapping, name in _AUTO[kind].items():
        getattr(transformers, mapping).register(_configs()[kind], getattr(module, name), exist_ok=True)


def _register_processor() -> None:
    from transformers import AutoProcessor
    from wrapt import lazy_import

    name = "TokenformerProcessor"
    processor = lazy_import(f"{__name__}.models.processing_tokenformer_multimodal", name, interface=type)
    AutoProcessor.register(_configs()["tokenformer_multimodal"], processor, exist_ok=True)


after_import("transformers.models.auto.configuration_auto", _register_configs)
after_import("transformers.models.auto.processing_auto", _register_processor)
after_import("transformers.models.auto.modeling_auto", _register_models)
for _kind in _AUTO:
    after_import(f"{__name__}.models.modeling_{_kind}", partial(_register_classes, _kind))
