"""LoRA by peft on the keys and values of a checkpoint's token groups: train, merge exactly, save, load, grow.

Needs: pip install tokenformer peft. The text is the Python standard library's `email` package, which is on every
machine; a model of other text has much to learn from it.
"""

from __future__ import annotations

import logging
import math
import sysconfig
import tempfile
from pathlib import Path

import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from record import arguments, record
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from tokenformer import TokenformerForCausalLM, grow
from tokenformer.data.blocks import pack, utf8_bytes
from tokenformer.data.sources import load_documents
from tokenformer.data.text import hold_out
from tokenformer.evaluation import evaluate

LORA = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["keys", "values"])
STEPS, BATCH_SIZE, BLOCK_LENGTH = 40, 8, 64


def new_text(tokenizer: PreTrainedTokenizerBase) -> tuple[datasets.Dataset, datasets.Dataset, int]:
    """Return blocks to train on, blocks to evaluate on, and the UTF-8 bytes of the latter."""
    documents = load_documents(str(Path(sysconfig.get_path("stdlib")) / "email"))
    train, held = hold_out(documents, fraction=0.1, max_bytes=16_384)
    train_blocks = pack(train, tokenizer, block_length=BLOCK_LENGTH)
    return train_blocks, pack(held, tokenizer, block_length=BLOCK_LENGTH, keep_tail=True), utf8_bytes(held)


def train_adapter(model: nn.Module, blocks: datasets.Dataset, *, steps: int = STEPS) -> None:
    """Train what is trainable on random blocks."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    order = torch.randint(len(blocks), (steps, BATCH_SIZE), generator=torch.Generator().manual_seed(0))
    model.train()
    for step, rows in enumerate(order.tolist()):
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.5 * (1 + math.cos(math.pi * step / steps))
        ids = torch.tensor(blocks[rows]["input_ids"])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def main() -> None:
    """Adapt, compare with what it must be, merge, and go on with the merged model."""
    args = arguments(__doc__)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.checkpoint).eval()
    train_blocks, blocks, num_bytes = new_text(AutoTokenizer.from_pretrained(args.checkpoint))
    text = torch.tensor(blocks[:4]["input_ids"])
    untuned, weights = base(text).logits, {k: v.clone() for k, v in base.state_dict().items()}
    before = evaluate(base, blocks, num_bytes=num_bytes)

    model = get_peft_model(base, LORA).eval()
    assert torch.equal(model(text).logits, untuned), "a new adapter must change nothing"
    with torch.enable_grad():
        train_adapter(model, train_blocks)
    after, tuned = evaluate(model, blocks, num_bytes=num_bytes), model(text).logits
    assert after.loss < before.loss - 0.5
    with model.disable_adapter():
        assert torch.equal(model(text).logits, untuned), "the frozen weights moved"

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        adapter_mb = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors")) / 1e6
        again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.checkpoint), folder).eval()
        assert torch.equal(again(text).logits, tuned), "the adapter came back different"

    trained, total = model.get_nb_trainable_parameters()
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            product = module.lora_B["default"].weight @ module.lora_A["default"].weight
            weights[f"{name}.weight"] += product * (LORA.lora_alpha / LORA.r)
    merged = model.merge_and_unload()
    assert type(merged) is TokenformerForCausalLM
    assert all(torch.equal(tensor, weights[name]) for name, tensor in merged.state_dict().items()), "not W + BA"
    merged_logits = merged(text).logits
    rounding = ((merged_logits - tuned).norm() / tuned.norm()).item()
    assert rounding < 1e-5

    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(loaded(text).logits, merged_logits), "the merged model came back different"
        grow(loaded, ffn_param_tokens="+50%", num_hidden_layers="+1")
        assert torch.equal(loaded(text).logits, merged_logits), "growing changed the merged model"

    record(
        args.results,
        "peft",
        packages=["peft", "torch", "transformers", "tokenformer"],
        ran=f"LoRA of rank {LORA.r} on keys and values, {STEPS} steps of {BATCH_SIZE} × {BLOCK_LENGTH} text tokens of "
        "Python source, save, load, merge_and_unload, save, load, grow",
        result=f"held-out loss {before.loss:.3f} → {after.loss:.3f} ({before.bits_per_byte:.3f} → "
        f"{after.bits_per_byte:.3f} bits per byte) by {trained:,} of {total:,} parameters, {adapter_mb:.2f} MB. Bit "
        "for bit: a new or disabled adapter leaves the base's logits, merged weights are W + BA·α/r, and the merged "
        "model saves, loads and grows",
        limits=f"The merged model's logits equal the adapter's up to rounding ({rounding:.0e} relative), and so does "
        "unmerging. With an adapter the layers take their plain path. Merge before adding blocks by `grow`.",
        loss_before=before.loss,
        loss_after=after.loss,
        trained_parameters=trained,
        parameters=total,
        adapter_mb=adapter_mb,
        rounding=rounding,
    )


if __name__ == "__main__":
    main()
