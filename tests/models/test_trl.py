"""trl's trainers teach a new token group something; the rest does not move by one bit, and dropping it undoes it."""

import os
import random
import string
from statistics import mean

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import FAMILIES, tiny, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("trl")
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

from datasets import Dataset
from trl import SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from tokenformer import drop, freeze, grow
from tokenformer.data.tokenizer import make_tokenizer

GROUP = "preference"
ROWS, STEPS = 8, 30
# trl computes in bfloat16 and recomputes activations unless told not to.
PLAIN = {"bf16": False, "activation_checkpointing": False}
LETTERS = random.Random(0)
# Of 2 to 9 letters, so that every batch is padded, with the end-of-text token.
WORDS = ["".join(LETTERS.choices(string.ascii_lowercase, k=LETTERS.randint(2, 9))) for _ in range(120)]
PAIRS = [{"prompt": f"{number}. ", "chosen": word.upper(), "rejected": word} for number, word in enumerate(WORDS)]
TRAINING, HELD_OUT = PAIRS[:-20], PAIRS[-20:]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("bytes", Dataset.from_dict({"text": []}))


def grown(family="ffn", **changes):
    """A tiny model with one more group, which alone may learn, and a copy of all of its weights."""
    model = tiny(family, vocab_size=257, **changes)
    counts = {field: "+50%" for field, count in FAMILIES[family].items() if count}
    grow(model, **counts, name=GROUP)
    others = [group["name"] for group in model.config.token_groups if group["name"] != GROUP]
    freeze(model, [*others, "embedding", "final_norm", "linear_maps"])
    return model, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def make(trainer, config, model, tokenizer, folder, rows, **options):
    args = config(
        output_dir=str(folder),
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=len(HELD_OUT),
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        max_length=64,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
        **{"max_steps": STEPS, **PLAIN, **options},
    )
    return trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(HELD_OUT) if trainer is ORPOTrainer else None,
        processing_class=tokenizer,
    )


def sft(model, tokenizer, folder, **options):
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in TRAINING]
    return make(SFTTrainer, SFTConfig, model, tokenizer, folder, rows, **options)


def orpo(model, tokenizer, folder, **options):
    return make(
        ORPOTrainer, ORPOConfig, model, tokenizer, folder, TRAINING, remove_unused_columns=False, beta=1.0, **options
    )


TRAINERS = {"sft": sft, "orpo": orpo}


@torch.no_grad()
def log_probability(model, tokenizer, prompt, completion):
    """Mean over the text tokens of `completion` and its end: nothing of trl's, one row at a time, no padding."""
    eos = tokenizer.eos_token_id
    before, after = [eos, *tokenizer(prompt)["input_ids"]], [*tokenizer(completion)["input_ids"], eos]
    ids = torch.tensor(before + after)
    logits = model.eval()(ids[None]).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[len(before) - 1 :].mean().item()


def held_out(model, tokenizer, kind):
    """Mean log-probability of the held-out completions of a kind, "chosen" or "rejected", in nats per text token."""
    return mean(log_probability(model, tokenizer, pair["prompt"], pair[kind]) for pair in HELD_OUT)


def margin(model, tokenizer):
    """By how much the held-out chosen completions are likelier than the rejected ones."""
    return held_out(model, tokenizer, "chosen") - held_out(model, tokenizer, "rejected")


def check_only_the_group_moved(trainer, before):
    """By the names, by the bits, and in the optimizer's memory."""
    model = trainer.model
    names = {id(p): name for name, p in model.named_parameters()}
    group = {name for name in before if f".groups.{GROUP}." in name}
    after = model.state_dict()
    assert after.keys() == before.keys() and {"model.embed_tokens.weight", "model.norm.weight"} <= before.keys() - group
    for name in before:
        assert torch.equal(after[name], before[name]) == (name not in group), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {names[id(p)] for p in trainer.optimizer.state} == group
    assert {name for name, p in model.named_parameters() if p.grad is not None} <= group


def check_dropping_undoes_it(model, family):
    parent, text = tiny(family, vocab_size=257), tokens()
    with torch.no_grad():
        assert not torch.equal(model.eval()(text).logits, parent(text).logits)
        drop(model, [GROUP])
        assert torch.equal(model(text).logits, parent(text).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_sft_teaches_the_new_group_alone(tmp_path, tokenizer, family):
    model, before = grown(family)
    likely = held_out(model, tokenizer, "chosen")
    trainer = sft(model, tokenizer, tmp_path)
    trainer.train()
    assert held_out(model, tokenizer, "chosen") > likely + 0.5
    check_only_the_group_moved(trainer, before)
    check_dropping_undoes_it(model, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_orpo_teaches_the_new_group_alone(tmp_path, tokenizer, family):
    model, before = grown(family)
    preferred = margin(model, tokenizer)
    trainer = orpo(model, tokenizer, tmp_path)
    trainer.train()
    assert margin(model, tokenizer) > preferred + 0.5
    check_only_the_group_moved(trainer, before)
    check_dropping_undoes_it(model, family)


def test_trl_measures_the_margin_that_we_measure(tmp_path, tokenizer):
    """Its held-out rewards, made from padded batches, are beta times the log-probabilities."""
    model, _ = grown()
    trainer = orpo(model, tokenizer, tmp_path)
    measured = trainer.evaluate()["eval_rewards/margins"]
    assert measured == pytest.approx(trainer.beta * margin(model, tokenizer), abs=1e-5)


def test_what_the_trainer_saves_is_a_checkpoint_with_one_more_group(tmp_path, tokenizer):
    model, before = grown()
    trainer = orpo(model, tokenizer, tmp_path, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert all(torch.equal(saved[name], before[name]) for name in saved if f".groups.{GROUP}." not in name)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("a. b")["input_ids"] == tokenizer("a. b")["input_ids"]
    assert again.config.token_groups == model.config.token_groups
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model.eval()(tokens()).logits)
    check_dropping_undoes_it(again, "ffn")


@pytest.mark.parametrize("way", TRAINERS)
def test_its_own_defaults_keep_the_frozen_bits_too(tmp_path, tokenizer, way):
    model, before = grown("paper")
    trainer = TRAINERS[way](model, tokenizer, tmp_path, max_steps=3, bf16=True, activation_checkpointing=True)
    trainer.train()
    check_only_the_group_moved(trainer, before)
