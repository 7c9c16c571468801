"""int8 by torchao, weights only and with dynamic activations: size, speed, bits per byte beside float32.

Needs: pip install tokenformer torchao. The speed of a small checkpoint is mostly that of Python, so speed is measured
again on larger, randomly initialised models of its family.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from measure import held_out, map_weights, speed
from record import arguments, record
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8Tensor, Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

from tokenformer import TokenformerConfig, TokenformerForCausalLM
from tokenformer.evaluation import evaluate
from tokenformer.models.pattention import Pattention

SCHEMES = {"int8 weight-only": Int8WeightOnlyConfig, "int8 dynamic": Int8DynamicActivationInt8WeightConfig}
PRESETS = ("24m", "150m")


def load(folder: Path) -> dict[str, Any]:
    """Load a checkpoint as it is and quantised, and check that every map of every token group was."""
    models = {"float32": AutoModelForCausalLM.from_pretrained(folder).eval()}
    for name, scheme in SCHEMES.items():
        models[name] = AutoModelForCausalLM.from_pretrained(folder, quantization_config=TorchAoConfig(scheme())).eval()
        assert all(type(weight) is Int8Tensor for weight in map_weights(models[name]).values())
    for name, model in models.items():
        layers = [m for m in model.modules() if isinstance(m, Pattention) and m.groups]
        assert layers and all(layer._can_fuse() == (name == "float32") for layer in layers)
    return models


def megabytes(model: nn.Module) -> dict[str, float]:
    """Size in memory of the maps, and of everything (the embedding, tied to the head, stays float32)."""
    maps = map_weights(model).values()
    in_maps = sum(sum(t.nbytes for t in parts(weight)) for weight in maps)
    total = sum(sum(t.nbytes for t in parts(p)) for p in model.parameters())
    return {"maps_mb": in_maps / 1e6, "total_mb": total / 1e6}


def parts(weight: torch.Tensor) -> list[torch.Tensor]:
    """Return the tensors that a weight is made of."""
    return [weight.qdata, weight.scale, weight.zero_point] if isinstance(weight, Int8Tensor) else [weight]


@torch.no_grad()
def save_and_load(model: Any, text: torch.Tensor) -> float:
    """Save, load, compare the logits bit for bit, and return the megabytes of the weights on disk."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(loaded(text).logits, model(text).logits)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors")) / 1e6


def main() -> None:
    """Measure the checkpoint, then the speed of larger models."""
    args = arguments(__doc__)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    models = load(args.checkpoint)
    blocks, num_bytes = held_out(args.checkpoint, num_blocks=256)
    text = torch.tensor(blocks[:4]["input_ids"])
    quality: dict[str, Any] = {}
    with torch.no_grad():
        want = models["float32"](text).logits
        for name, model in models.items():
            quality[name] = megabytes(model) | {
                "saved_mb": save_and_load(model, text),
                "bits_per_byte": evaluate(model, blocks, num_bytes=num_bytes).bits_per_byte,
                "logits_distance": ((model(text).logits - want).norm() / want.norm()).item(),
            }
            print(name, quality[name], flush=True)
    plain = quality["float32"]
    cost = {name: quality[name]["bits_per_byte"] - plain["bits_per_byte"] for name in SCHEMES}
    for name in SCHEMES:
        assert quality[name]["maps_mb"] < 0.27 * plain["maps_mb"]
        assert 0 < quality[name]["logits_distance"] < 0.02 and abs(cost[name]) < 0.01

    speeds = {"checkpoint": speed(models)}
    family = "" if models["float32"].config.qkv_param_tokens else "-ffn"
    for preset in PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            TokenformerForCausalLM(TokenformerConfig.from_preset(preset + family)).save_pretrained(folder)
            # Few text tokens: where there is no VNNI, int8 products run at a few hundred million a second.
            speeds[preset + family] = speed(load(Path(folder)), text_tokens=8, repetitions=3)
        print(preset + family, speeds[preset + family], flush=True)

    def times(name: str) -> str:
        return ", ".join(
            f"{size} {by['decode'][name]['ratio']:.2g}× decoding {by['forward'][name]['ratio']:.2g}× forward"
            for size, by in speeds.items()
        )

    vnni = torch.cpu._is_vnni_supported()
    record(
        args.results,
        "torchao int8",
        packages=["torchao", "torch", "transformers", "tokenformer"],
        ran="from_pretrained(quantization_config=TorchAoConfig(…)), save_pretrained, from_pretrained, generate",
        result="; ".join(
            f"{name}: maps {quality[name]['maps_mb']:.2f} of {plain['maps_mb']:.2f} MB, saved model "
            f"{quality[name]['saved_mb']:.2f} of {plain['saved_mb']:.2f} MB, bits per byte {cost[name]:+.5f} on "
            f"{plain['bits_per_byte']:.4f}, time over float32: {times(name)}"
            for name in SCHEMES
        ),
        limits="The embedding, tied to the head, stays float32. Smaller, not faster: without torch.compile every "
        "product turns its int8 map into float32 first. "
        + ("" if vnni else "This CPU has no VNNI, and there PyTorch multiplies int8 by int8 in a plain loop. ")
        + "Parameter tokens can be grown beside int8 ones; blocks only before quantising.",
        threads=torch.get_num_threads(),
        vnni=vnni,
        num_bytes=num_bytes,
        quality=quality,
        speeds=speeds,
    )


if __name__ == "__main__":
    main()
