"""bitsandbytes on a CPU: LLM.int8 and 4-bit NF4 beside float32, and LoRA trained on the 4-bit model (QLoRA).

Needs: pip install tokenformer bitsandbytes peft.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from measure import held_out, map_weights, speed
from peft import get_peft_model
from peft_lora import LORA, new_text, train_adapter
from record import arguments, record
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from tokenformer.evaluation import evaluate
from tokenformer.models.pattention import Pattention

SCHEMES: dict[str, tuple[type, dict[str, Any]]] = {
    "LLM.int8": (Linear8bitLt, {"load_in_8bit": True}),
    "NF4": (
        Linear4bit,
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    ),
}


@torch.no_grad()
def main() -> None:
    """Load, compare, save, load again, train."""
    args = arguments(__doc__)
    for name in ("transformers", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")  # once a product
    blocks, num_bytes = held_out(args.checkpoint, num_blocks=256)
    text = torch.tensor(blocks[:4]["input_ids"])
    models = {"float32": AutoModelForCausalLM.from_pretrained(args.checkpoint).eval()}
    want = models["float32"](text).logits
    figures: dict[str, dict[str, Any]] = {
        "float32": {"bits_per_byte": evaluate(models["float32"], blocks, num_bytes=num_bytes).bits_per_byte}
    }
    figures["float32"]["saved_mb"] = (args.checkpoint / "model.safetensors").stat().st_size / 1e6
    for name, (kind, options) in SCHEMES.items():
        config = BitsAndBytesConfig(**options)
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint, quantization_config=config, device_map="cpu")
        models[name] = model.eval()
        assert all(type(model.get_submodule(name)) is kind for name in map_weights(models["float32"]))
        layers = [m for m in model.modules() if isinstance(m, Pattention) and m.groups]
        assert layers and not any(layer._can_fuse() for layer in layers)
        got = model(text).logits
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu").eval()
            assert torch.equal(loaded(text).logits, got), f"{name} came back different"
            saved_mb = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) / 1e6
        bits_per_byte = evaluate(model, blocks, num_bytes=num_bytes).bits_per_byte
        distance = ((got - want).norm() / want.norm()).item()
        figures[name] = {"bits_per_byte": bits_per_byte, "saved_mb": saved_mb, "logits_distance": distance}
        assert 0 < distance < {"LLM.int8": 0.02, "NF4": 0.2}[name]
        assert saved_mb < 0.5 * figures["float32"]["saved_mb"]
    speeds = speed(models)

    train_blocks, new_blocks, new_bytes = new_text(AutoTokenizer.from_pretrained(args.checkpoint))
    before = evaluate(models["NF4"], new_blocks, num_bytes=new_bytes).loss
    packed = {name: weight.clone() for name, weight in map_weights(models["NF4"]).items()}
    adapted = get_peft_model(models["NF4"], LORA)
    with torch.enable_grad():
        train_adapter(adapted, train_blocks)
    after = evaluate(adapted, new_blocks, num_bytes=new_bytes).loss
    assert after < before - 0.5
    bases = {n: m.base_layer for n, m in adapted.get_base_model().named_modules() if hasattr(m, "lora_A")}
    assert bases and all(torch.equal(base.weight, packed[name]) for name, base in bases.items())

    plain = figures["float32"]
    record(
        args.results,
        "bitsandbytes",
        packages=["bitsandbytes", "peft", "torch", "transformers", "tokenformer"],
        ran="from_pretrained(quantization_config=BitsAndBytesConfig(…)), save_pretrained, from_pretrained, generate; "
        "LoRA by peft on NF4",
        result="; ".join(
            f"{name}: saved model {figures[name]['saved_mb']:.2f} of {plain['saved_mb']:.2f} MB, bits per byte "
            f"{figures[name]['bits_per_byte'] - plain['bits_per_byte']:+.5f} on {plain['bits_per_byte']:.4f}, time "
            f"{speeds['decode'][name]['ratio']:.2g}× decoding {speeds['forward'][name]['ratio']:.2g}× forward"
            for name in SCHEMES
        )
        + f"; LoRA on NF4: held-out loss {before:.3f} → {after:.3f}",
        limits="The embedding, tied to the head, stays float32. Smaller, not faster, on a CPU. LLM.int8 rounds what "
        "goes into a map to float16. Not tried on a GPU.",
        threads=torch.get_num_threads(),
        num_bytes=num_bytes,
        quality=figures,
        speeds=speeds,
        loss_before=before,
        loss_after=after,
    )


if __name__ == "__main__":
    main()
