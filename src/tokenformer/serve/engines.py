"""The engines that an exported model runs on: what each needs installed, and how it stores weights in fewer bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from ..errors import ConversionError, MissingExtraError


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        title: what it is called.
        extra: of this package, which installs it.
        packages: modules that exporting and running need.
        weights: how weights can be stored in fewer bits: what else must be installed, and a function that makes the
            quantizer of transformers' exporters.
        settings: of transformers' exporter.
        computes_all_logits: the graph is not told for which text tokens logits are wanted.
        max_batch: sequences at a time where memory is planned when exporting; None where it is not.
    """

    title: str
    extra: str
    packages: tuple[str, ...]
    weights: Mapping[str, tuple[tuple[str, ...], Callable[[], Any]]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    computes_all_logits: bool = False
    max_batch: int | None = None


def _compression(mode: str) -> Any:
    """Return what NNCF is to do; groups of int4 weights that share a scale become smaller where maps are narrow."""
    import nncf
    from transformers.exporters import NNCFWeightCompressionConfig

    narrow = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)
    return NNCFWeightCompressionConfig(mode=nncf.CompressWeightsMode[mode], advanced_parameters=narrow)


def _openvino_int8() -> Any:
    from transformers.exporters import NNCFOpenVINOQuantizer

    return NNCFOpenVINOQuantizer(_compression("INT8_ASYM"))


def _openvino_int4() -> Any:
    from transformers.exporters import NNCFOpenVINOQuantizer

    return NNCFOpenVINOQuantizer(_compression("INT4_SYM"))


def _onnx_int8() -> Any:
    from onnxruntime.quantization import QuantType
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

    # Unsigned: CPUs without VNNI add up products with signed weights in 16 bits, which are too few.
    return OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True, weight_type=QuantType.QUInt8))


def _onnx_int4() -> Any:
    from transformers.exporters import NNCFOnnxQuantizer

    return NNCFOnnxQuantizer(_compression("INT4_SYM"))


def _executorch_int8() -> Any:
    from transformers.exporters import NNCFTorchFXQuantizer

    return NNCFTorchFXQuantizer(_compression("INT8_ASYM"))


ENGINES = {
    # OpenVINO GenAI runs such a graph, too; what loads it leaves the other logits out.
    "openvino": Engine(
        "OpenVINO",
        "openvino",
        ("openvino", "openvino_tokenizers"),
        {
            "int8": (("nncf",), _openvino_int8),
            "int4": (("nncf",), _openvino_int4),
        },
        {"stateful": True},
        computes_all_logits=True,
    ),
    "onnx": Engine(
        "ONNX Runtime",
        "onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        {"int8": ((), _onnx_int8), "int4": (("nncf",), _onnx_int4)},
    ),
    "executorch": Engine(
        "ExecuTorch, by XNNPACK",
        "executorch",
        ("executorch",),
        {"int8": (("nncf",), _executorch_int8)},
        {"backend": "xnnpack"},
        max_batch=8,
    ),
}


def find_engine(name: str, weights: str | None = None) -> Engine:
    """Return an engine that is installed, with what it needs for `weights`.

    Raises:
        ConversionError: there is no such engine, or it has no such weights.
        MissingExtraError: it is not installed.
    """
    if name not in ENGINES:
        raise ConversionError(f"no engine is called {name!r}; there are {', '.join(ENGINES)}")
    engine = ENGINES[name]
    if weights is not None and weights not in engine.weights:
        raise ConversionError(
            f"{engine.title} has no {weights!r} weights here; it has {', '.join(engine.weights)}, and float32 where "
            "nothing is asked for"
        )
    also = engine.weights[weights][0] if weights else ()
    missing = [package for package in (*engine.packages, *also) if find_spec(package) is None]
    if missing:
        command = " ".join(["pip install", f"'tokenformer[{engine.extra}]'", *also])
        raise MissingExtraError(f"{engine.title} needs {', '.join(missing)}, not installed here: {command}")
    return engine
