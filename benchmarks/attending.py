"""Are parameter tokens worth more if they attend to one another before they are read? A transformer in the transformer.

    python benchmarks/attending.py            every case that benchmarks/results/attending.jsonl does not hold yet

Once a step, not once a text token, the tokens of a group (key and value, a row each) read one another by attention:

    T = [keys, values]    T' = T + softmax(T Wq (T Wk)ᵀ / √r) T Wv

and text tokens attend to the keys and values of T'. `Wv` begins at zero, so that both arms begin as the same model.
In use, T' is computed once and kept: the model is then an ordinary TokenFormer, with the parameters that it has
without all this, so that only training can gain.

Rules, stated before the first run: model, text and training are those of "four blocks" in recipes/compare/reuse.yaml.
Both arms read equally many text tokens, 20 for each parameter that is left in use: the attention over parameter
tokens is not even charged. Each arm takes the best of the learning rates there by the documents that tune, with the
first seed; three seeds are reported, on other documents. An arm is better where the means differ by more than 0.01
bits per byte and every seed agrees.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenformer import TokenformerForCausalLM, cost
from tokenformer.compare.recipe import CompareRecipe, load_compare_recipe
from tokenformer.compare.run import Text, load_text
from tokenformer.data.order import training_order
from tokenformer.evaluation import evaluate
from tokenformer.models.pattention import Pattention, pattention
from tokenformer.quiet import quiet_libraries
from tokenformer.training.optimization import make_optimizer
from tokenformer.training.text import first_config

ROOT = Path(__file__).parent.parent
RECIPE, RESULTS = ROOT / "recipes" / "compare" / "reuse.yaml", ROOT / "benchmarks" / "results" / "attending.jsonl"
ARM, TOKENS_PER_PARAMETER, RANK = "four blocks", 20, 16


class AttendingPattention(Pattention):
    """A Pattention with one token group, whose tokens read one another first."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear

    def attend(self) -> None:
        """Give the tokens, 2 · D numbers each, an attention over one another, which changes nothing yet."""
        width = self.in_features + self.out_features
        self.query, self.key = (nn.Linear(width, RANK, bias=False) for _ in range(2))
        self.value = nn.Linear(width, width, bias=False)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, std=width**-0.5)
        nn.init.zeros_(self.value.weight)

    def _tokens_output(self, x: Tensor, groups: Any, closed: Any = None) -> Tensor:
        (group,) = groups.values()
        tokens = torch.cat([group.keys.weight, group.values.weight.t()], dim=1)  # [n, D + E]
        scores = self.query(tokens) @ self.key(tokens).t() / math.sqrt(RANK)
        read = tokens + torch.softmax(scores, dim=-1) @ self.value(tokens)
        keys, values = read.split([self.in_features, self.out_features], dim=1)
        assert self.tau is not None
        return pattention(x, [keys], [values.t()], tau=self.tau, eps=self.eps)


def make(recipe: CompareRecipe, text: Text, seed: int, *, attends: bool) -> Any:
    """Make the model of a case; both kinds begin with the same outputs."""
    length = recipe.training.sequence_length
    config = first_config(recipe.arms[ARM].model, text.report, context=length, where=ARM)
    torch.manual_seed(seed)
    model = TokenformerForCausalLM(config)
    layers = [layer for layer in model.modules() if attends and isinstance(layer, Pattention) and len(layer.groups)]
    for layer in layers:
        layer.__class__ = AttendingPattention
        layer.attend()  # type: ignore[operator]
    return model


def run(recipe: CompareRecipe, text: Text, *, attends: bool, seed: int, learning_rate: float) -> dict[str, Any]:
    """Train one case and return its line."""
    training = recipe.training.model_copy(update={"learning_rate": learning_rate})
    model = make(recipe, text, seed, attends=attends)
    parameters = cost.parameters(model.config)
    steps = math.ceil(TOKENS_PER_PARAMETER * parameters / training.tokens_per_step)
    optimizer = make_optimizer(model, training, {})
    multiples = [group["lr"] for group in optimizer.param_groups]
    blocks: Any
    (blocks,) = text.report.train_blocks.values()
    order = training_order(len(blocks), 0, steps * training.batch_size, seed=seed)
    began = time.perf_counter()
    for step in range(steps):
        rise, fall = (step + 1) / (training.warmup * steps), (steps - step) / (training.decay * steps)
        for group, multiple in zip(optimizer.param_groups, multiples, strict=True):
            group["lr"] = learning_rate * multiple * min(1.0, rise, fall)
        chosen = order[step * training.batch_size : (step + 1) * training.batch_size]
        ids = torch.tensor(blocks[chosen]["input_ids"])
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    scores = {
        purpose: evaluate(model, held.blocks, num_bytes=held.num_bytes).bits_per_byte
        for purpose, data in (("tuning", text.tuning), ("report", text.report))
        for held in data.validation.values()
    }
    return {
        "attends": attends,
        "seed": seed,
        "learning_rate": learning_rate,
        "parameters": parameters,
        "trained": sum(p.numel() for p in model.parameters()),
        "text_tokens": steps * training.tokens_per_step,
        "seconds": time.perf_counter() - began,
        **{f"{purpose}_bits_per_byte": score for purpose, score in scores.items()},
    }


def best_rate(lines: list[dict[str, Any]], rates: list[float], *, attends: bool) -> float:
    """Return the learning rate that tunes best, by the first seed."""
    found = {r["learning_rate"]: r["tuning_bits_per_byte"] for r in lines if r["attends"] == attends and not r["seed"]}
    return min(rates, key=lambda rate: found[rate])


def main() -> None:
    """Run what is missing: every rate with the first seed, then the best with the others."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    quiet_libraries()
    recipe = load_compare_recipe(RECIPE)
    torch.set_num_threads(recipe.training.threads or torch.get_num_threads())
    folder = ROOT / "runs" / "attending"
    folder.mkdir(parents=True, exist_ok=True)
    text = load_text(recipe, folder)
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []

    def ensure(**case: Any) -> None:
        if not any(case.items() <= line.items() for line in lines):
            lines.append(run(recipe, text, **case))
            with RESULTS.open("a") as file:
                file.write(json.dumps(lines[-1]) + "\n")
            print(json.dumps(lines[-1]), flush=True)

    first, *others = recipe.seeds
    for attends in (False, True):
        for rate in recipe.learning_rates:
            ensure(attends=attends, seed=first, learning_rate=rate)
        best = best_rate(lines, recipe.learning_rates, attends=attends)
        for seed in others:
            ensure(attends=attends, seed=seed, learning_rate=best)


if __name__ == "__main__":
    main()
