"""What plain transformers makes of a grown Llama: the text that another tool has to give."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["The capital of France is", "Once upon a time, there was a", "def fibonacci(n):\n", "What news, my lord?"]
NEW = 24


@dataclass(frozen=True)
class Continuation:
    """The greedy text after a prompt.

    Attributes:
        prompt: its text tokens.
        new: the text tokens that follow, up to the end of the text or NEW.
        log_probabilities: of each of `new`, in nats.
        margin: by how much the closest race was won, in logits.
    """

    prompt: list[int]
    new: list[int]
    log_probabilities: list[float]
    margin: float


@torch.no_grad()
def greedy(model: Any, prompt: list[int]) -> Continuation:
    """Continue a prompt by whole forward passes without a cache."""
    new: list[int] = []
    log_probabilities: list[float] = []
    margin = float("inf")
    while len(new) < NEW and model.config.eos_token_id not in new:
        logits = model(torch.tensor([prompt + new]), use_cache=False).logits[0, -1]
        first, second = logits.topk(2).values.tolist()
        margin = min(margin, first - second)
        new.append(int(logits.argmax()))
        log_probabilities.append(float(logits.log_softmax(-1)[new[-1]]))
    return Continuation(prompt, new, log_probabilities, margin)


@torch.no_grad()
def silence_grown(model: Any) -> None:
    """Let everything that was added to an ordinary Llama, neurons and blocks, add nothing."""
    first, *later = model.config.token_groups
    for layer in model.model.layers:
        layer.mlp.down_proj.weight[:, first["ffn"] :] = 0
    for block in (block for group in later for block in group.get("blocks", ())):
        model.model.layers[block].self_attn.o_proj.weight.zero_()
        model.model.layers[block].mlp.down_proj.weight.zero_()


def continuations(folder: Path) -> list[Continuation]:
    """Return the greedy text after PROMPTS, in float32; check that it is another without what was grown."""
    assert find_spec("tokenformer") is None, "this shows what works without the package, and here it is installed"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    grown = [greedy(model, tokenizer(prompt).input_ids) for prompt in PROMPTS]
    silence_grown(model)
    assert any(greedy(model, c.prompt).new != c.new for c in grown), "what was grown adds nothing: this shows nothing"
    return grown


def growth(folder: Path) -> str:
    """Say of which token groups a checkpoint consists."""
    config = AutoConfig.from_pretrained(folder)
    groups = " + ".join(f"{group['ffn']} {group['name']}" for group in config.token_groups)
    return f"{config.num_hidden_layers} blocks of {groups} neurons"


def agreement(expected: list[Continuation]) -> str:
    """Say that another tool gave `expected`."""
    return (
        f"the greedy text tokens of uncached transformers, {sum(len(c.new) for c in expected)} after {len(expected)} "
        "prompts, which are others when what was grown is silenced (closest race won by "
        f"{min(c.margin for c in expected):.4f} in the logits)"
    )
