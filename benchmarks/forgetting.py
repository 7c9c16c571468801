"""Teach SmolLM2-135M-Instruct Shakespeare, then made-up facts, then Python, by seven means: what does each forget?

Run from the repository root; an interrupted experiment continues with the same command:

    python benchmarks/forgetting.py                                      # about 40 hours of a core: three seeds, tuned
    python benchmarks/forgetting.py --first-look --tokens 6144           # about an hour and a half of a core
    python benchmarks/forgetting.py --quick --results runs/quick.jsonl   # does it run? a few minutes

Needs what smollm2.py needs, which fetches the model and the speeches.

The rules, stated before the first result. Every method sees the same blocks of 128 text tokens in the same order.
Tokens, LoRA and PEANuT sit on the same maps, the MLP's, and train the same number of parameters to within a hundredth
in every domain; full fine-tuning trains everything. Each method's learning rate is the best of three on held-out text
of the first domain, with another seed and half the steps; one at the edge of its grid is called so. In a first look it
is the middle one, there is one seed, and texts and questions are half as many.

- gated: a token group for each domain, trained on the parent alone, behind a gate that decides once for a sequence. It
  is fitted on training text of its domain, on that of earlier domains, and on 5 kB each of two speeches, two C++
  headers and two descriptions of packages that are measured nowhere.
- tokens: a token group for each domain, everything older frozen, all taking part always.
- lora, peanut: peft's, merged after each domain.
- gated_lora: a LoRA for each domain, trained on the parent alone, behind the very gates of `gated`.
- full: everything trains. replay: the same, and every twentieth block is of the gates' other text and earlier domains.

What is learned: bits per byte on held-out text of each domain, and questions on facts that were stated but never asked.
What is forgotten: the change in bits per byte on five texts of other kinds, of which gates have seen two kinds, and
multiple choice (capitals; which sentence comes next in a speech). When gates open is measured by themselves first, on
32 kB of each text and on the questions.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from lesson import DOMAINS, FIRST_LOOK, QUICK, UNTOUCHED, Lesson, Settings
from smollm2 import MODEL, PACKAGES, fetch
from teach import (
    Line,
    append,
    arguments,
    bits_per_byte,
    lines,
    matching,
    mean_and_deviation,
    packed,
    run_case,
    table,
    teach,
    tuned,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from untold import Question

from tokenformer import attach, freeze, grow, route, split
from tokenformer.checkpoints.beside import read_addon
from tokenformer.growth.sequence import mean_embeddings, sequence_gates

RESULTS, RUNS = Path(__file__).parent / "results" / "forgetting.jsonl", Path("runs/forgetting")
METHODS = {
    "gated": "gated tokens",
    "tokens": "tokens",
    "gated_lora": "LoRA behind the same gates",
    "lora": "LoRA, merged",
    "peanut": "PEANuT, merged",
    "replay": "full, 5 % replay",
    "full": "full fine-tuning",
}
RATES: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("gated", "tokens", "gated_lora", "lora", "peanut"), (1e-3, 3e-3, 1e-2)),
    **dict.fromkeys(("replay", "full"), (3e-5, 1e-4, 3e-4)),
}
MAPS = ["gate_proj", "up_proj", "down_proj"]
TUNING_SEED = 100


class GatedAdapters(nn.Module):
    """A model with several LoRAs, each taking part in the sequences for which its gate is open.

    Args:
        model: of peft, with an adapter for each gate.
        gates: weight `[1, D]` and bias `[1]` by adapter; they read what the gates of token groups read.
    """

    def __init__(self, model: Any, gates: dict[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.model, self.gates = model, gates

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **asked: Any) -> Any:
        """Return logits `[B, T, vocabulary]`, rows with the same open gates computed together."""
        means = mean_embeddings(self.model, input_ids, attention_mask)
        is_open = torch.cat([means @ weight.t() + bias > 0 for weight, bias in self.gates.values()], dim=1)
        logits: Any = None
        for pattern in is_open.unique(dim=0):
            rows = (is_open == pattern).all(1)
            names = [name for name, taken in zip(self.gates, pattern.tolist(), strict=True) if taken]
            mask = None if attention_mask is None else attention_mask[rows]
            if names:
                self.model.base_model.set_adapter(names)
                found = self.model(input_ids=input_ids[rows], attention_mask=mask, **asked).logits
            else:
                with self.model.disable_adapter():
                    found = self.model(input_ids=input_ids[rows], attention_mask=mask, **asked).logits
            logits = found.new_empty(len(input_ids), *found.shape[1:]) if logits is None else logits
            logits[rows] = found
        return SimpleNamespace(logits=logits)


def parent() -> Any:
    """Load the model as it was."""
    return LlamaForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def with_adapter(model: Any, method: str, domain: str, settings: Settings) -> Any:
    """Put a new adapter of peft on a model."""
    from peft import LoraConfig, PeanutConfig, get_peft_model

    config = model.config
    asked: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": MAPS}
    if method == "peanut":  # whose two maps are both of the outputs' width
        one, two = config.hidden_size, config.intermediate_size
        rank = round(settings.param_tokens * 3 * (one + two) / (2 * (2 * two + one)))
        return get_peft_model(model, PeanutConfig(r=rank, **asked))
    rank = settings.param_tokens
    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, **asked), adapter_name=domain)


def learn(case: dict[str, Any], lesson: Lesson, folder: Path) -> tuple[Any, Line]:
    """Learn one domain after those that were learned before; returns the model to measure, and what learning took."""
    from peft import PeftModel

    method, domain = case["method"], case["domain"]
    earlier = DOMAINS[: DOMAINS.index(domain)]
    settings, kept = lesson.settings, folder / domain
    shutil.rmtree(kept, ignore_errors=True)
    take: dict[str, Any] = {
        "blocks": lesson.replaying(domain) if method == "replay" else lesson.blocks[domain],
        "steps": -(-case["tokens"] // (settings.batch_size * settings.block_length)),
        "batch_size": settings.batch_size,
        "learning_rate": case["learning_rate"],
        "seed": case["seed"],
    }
    model: Any = parent()
    if method in ("gated", "tokens"):
        for before in earlier if method == "tokens" else ():
            attach(model, folder / before)
        grow(model, at="|".join(MAPS), tokens=settings.param_tokens, name=domain, seed=case["seed"])
        freeze(model, all_but=[domain])
        took = teach(model, **take)
        if method == "gated":
            route(model, domain, lesson.some(domain), lesson.beyond(domain), per="sequence")
        split(model, domain, kept)
        for before in earlier if method == "gated" else ():
            attach(model, folder / before)
    elif method in ("lora", "peanut", "gated_lora"):
        if method != "gated_lora":
            for before in earlier:
                adapter = folder / before / adapter_of(method, before)
                model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        model = with_adapter(model, method, domain, settings)
        took = teach(model, **take)
        model.save_pretrained(kept)
        if method == "gated_lora":
            for before in earlier:
                model.load_adapter(folder / before / before, before)
            gates = {name: gate_of(folder.parent / "gated" / name) for name in (*earlier, domain)}
            model = GatedAdapters(model, gates)
    else:
        if earlier:
            model = LlamaForCausalLM.from_pretrained(folder / earlier[-1], dtype=torch.float32)
        took = teach(model, **take)
        model.save_pretrained(kept)
        for before in earlier:
            shutil.rmtree(folder / before, ignore_errors=True)
    return model.eval(), took


def adapter_of(method: str, domain: str) -> str:
    """Return the folder in which peft has put an adapter, which is one of its name but for the default's."""
    return "" if method == "peanut" else domain


def gate_of(addon: Path) -> tuple[Tensor, Tensor]:
    """Read the gate of a token group."""
    tensors = read_addon(addon)[1]
    return tensors["sequence_gate.weight"], tensors["sequence_gate.bias"]


@torch.no_grad()
def share_right(model: Any, tokenizer: Any, questions: Sequence[Question]) -> float:
    """Return for how many questions the right answer is the likeliest, its log-likelihood summed as lm-eval's acc."""
    right = 0
    for question in questions:
        prompt = tokenizer(question.prompt, add_special_tokens=False)["input_ids"]
        answers = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in question.answers]
        longest = max(map(len, answers))
        rows = torch.tensor([prompt + answer + [0] * (longest - len(answer)) for answer in answers])
        mask = torch.tensor([[1] * (len(prompt) + len(a)) + [0] * (longest - len(a)) for a in answers])
        scores = model(input_ids=rows, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
        chances = scores[:, len(prompt) - 1 : -1].gather(2, rows[:, len(prompt) :, None])[..., 0]
        right += int((chances * mask[:, len(prompt) :]).sum(1).argmax()) == question.right
    return right / len(questions)


@torch.no_grad()
def untouched_blocks(model: Any, lesson: Lesson) -> dict[str, Tensor]:
    """Return the logits of the first block of each text that nobody learns."""
    return {
        text: model(input_ids=torch.tensor(lesson.texts[text][0][:1]["input_ids"]), use_cache=False).logits
        for text in UNTOUCHED
    }


@torch.no_grad()
def open_shares(model: Any, texts: dict[str, list[list[int]]]) -> dict[str, dict[str, float]]:
    """Return for which share of the text tokens of each text, in sequences, each gate is open; empty without gates."""
    gates = {name: (gate.weight, gate.bias) for name, gate in sequence_gates(model).items()}
    found: dict[str, dict[str, float]] = {}
    for text, sequences in texts.items() if gates else ():
        rows = [torch.tensor([ids]) for ids in sequences]
        total = sum(ids.numel() for ids in rows)
        for name, (weight, bias) in gates.items():
            taken = [ids.numel() for ids in rows if (mean_embeddings(model, ids) @ weight.t() + bias).item() > 0]
            found.setdefault(text, {})[name] = sum(taken) / total
    return found


def measure(model: Any, lesson: Lesson, *, before: dict[str, Tensor] | None = None) -> Line:
    """Measure what a model knows; `before`: the parent's logits of the texts that nobody learns."""
    line: Line = {
        "bits_per_byte": bits_per_byte(model, lesson.texts, batch_size=4),
        "glossary_right": share_right(model, lesson.tokenizer, lesson.asked_of_facts),
        "tasks": {task: share_right(model, lesson.tokenizer, asked) for task, asked in lesson.questions.items()},
    }
    if before is not None:
        after = untouched_blocks(model, lesson)
        line["open"] = open_shares(model, {text: blocks["input_ids"] for text, (blocks, _) in lesson.texts.items()})
        line["same_logits"] = [text for text in UNTOUCHED if torch.equal(after[text], before[text])]
    return line


def measure_gates(lesson: Lesson) -> Line:
    """Fit the gates of all domains, one after the other, and see when they open: they read embeddings alone."""
    model, fitted = parent(), {}
    for domain in DOMAINS:
        grow(model, at="layers.0.mlp.up_proj", tokens=1, name=domain)
        found = route(model, domain, lesson.some(domain), lesson.beyond(domain), per="sequence")
        fitted[domain] = [found.open_on_own, found.open_on_other]
    longer = packed(lesson.longer, lesson.tokenizer, block_length=lesson.settings.block_length)
    texts = {text: blocks["input_ids"] for text, (blocks, _) in longer.items()}
    for task, questions in {"facts": lesson.facts.questions, **lesson.questions}.items():
        prompts = [question.prompt for question in questions]
        texts[f"questions: {task}"] = lesson.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    return {"fitted": fitted, "open": open_shares(model, texts)}


def run(case: dict[str, Any], settings: Settings, results: Path) -> None:
    """Do one case and append its line."""
    torch.manual_seed(case.get("seed", 0))
    lesson = Lesson(settings, tuning=case["purpose"] == "tuning")
    line: Line = {**case, "settings": asdict(settings)}
    if case["method"] == "before":
        line |= measure(parent(), lesson)
    elif case["method"] == "gates":
        line |= measure_gates(lesson)
    else:
        before = untouched_blocks(parent(), lesson)
        folder = RUNS / f"{case['purpose']}-{case['tokens']}-seed{case['seed']}"
        model, took = learn(case, lesson, folder / case["method"])
        line |= took
        if case["purpose"] == "tuning":
            line["bits_per_byte"] = bits_per_byte(model, lesson.texts, batch_size=4)
        else:
            line |= measure(model, lesson, before=before)
    append(results, [line], packages=PACKAGES)


def rate_of(given: argparse.Namespace, method: str) -> float:
    """Return a method's learning rate: the best of its grid, or in a first look the middle one."""
    alike = {"gated": "tokens", "gated_lora": "lora"}.get(method, method)  # the first domain is learned alike
    case = {"domain": DOMAINS[0], "seed": TUNING_SEED, "tokens": given.tokens // 2}
    return tuned(given, alike, RATES[alike], DOMAINS[0], field="method", **case)


def experiment(given: argparse.Namespace, settings: Settings) -> None:
    """Run every case that the results lack: all methods on one domain before the next."""
    look = {"purpose": "measurement", "first_look": given.first_look}
    for method in ("before",) if given.first_look else ("gates", "before"):
        run_case(given, method=method, **look)
    for seed in settings.seeds:
        for domain in DOMAINS:
            for method in METHODS:
                case = {"method": method, "domain": domain, "seed": seed, "tokens": given.tokens, **look}
                run_case(given, **case, learning_rate=rate_of(given, method))


def results_table(rows: list[Line], tokens: int, *, first_look: bool = False) -> str:
    """Return the Markdown table after the last domain that all methods have learned, of those that have begun."""
    rows = matching(rows, purpose="measurement", first_look=first_look)
    (start,) = matching(rows, method="before")
    rows = matching(rows, tokens=tokens)
    begun = {m: label for m, label in METHODS.items() if matching(rows, method=m)}
    learned = [d for d in DOMAINS if begun and all(matching(rows, method=m, domain=d) for m in begun)]
    if not learned:
        return "Nothing has been learned yet."
    known = ["shakespeare", "python"]
    head = [
        "after " + ", ".join(learned),
        *known,
        "facts, bits per byte",
        "facts answered, %",
        "forgotten, bits per byte",
    ]
    head += ["the worst text", "capitals, %", "next sentence, %", "gates open elsewhere, %", "same logits"]
    head += ["trained parameters", "peak, GB", "s a step"]
    body = [["SmolLM2-135M", *_known(start, [*known, "glossary"]), f"{100 * start['glossary_right']:.0f}"]]
    body[0] += ["", "", *(f"{100 * share:.0f}" for share in start["tasks"].values()), *[""] * 5]
    for method, label in begun.items():
        runs = matching(rows, method=method, domain=learned[-1])
        change = [{t: run["bits_per_byte"][t] - start["bits_per_byte"][t] for t in UNTOUCHED} for run in runs]
        shares = [statistics.mean(max(run["open"][t].values()) for t in UNTOUCHED) for run in runs if run.get("open")]
        peaks = [run["peak_bytes"] for run in runs]
        body.append(
            [
                f"{label}, lr {runs[0]['learning_rate']:g}",
                *(mean_and_deviation([run["bits_per_byte"][name] for run in runs]) for name in [*known, "glossary"]),
                mean_and_deviation([run["glossary_right"] for run in runs], 0, 100),
                mean_and_deviation([statistics.mean(c.values()) for c in change], 4, signed=True),
                mean_and_deviation([max(c.values()) for c in change], 4, signed=True),
                *(mean_and_deviation([run["tasks"][task] for run in runs], 0, 100) for task in start["tasks"]),
                mean_and_deviation(shares, 0, 100) if shares else "",
                f"{min(len(run['same_logits']) for run in runs)} of {len(UNTOUCHED)} texts",
                f"{runs[0]['trained_parameters']:,}",
                mean_and_deviation(peaks, 2, 1e-9),
                mean_and_deviation([run["seconds_per_step"] for run in runs], 2),
            ]
        )
    return table(head, body)


def gates_table(rows: list[Line]) -> str:
    """Return the Markdown table of what each gate lets through."""
    shares = matching(rows, method="gates")[-1]["open"]
    body = [[text, *(f"{100 * shares[text][domain]:.0f}" for domain in DOMAINS)] for text in shares]
    return table(["% of the text tokens of", *(f"the gate of {domain} opens for" for domain in DOMAINS)], body)


def report(rows: list[Line]) -> str:
    """Return the Markdown table of the gates, and one for each number of text tokens learned, first looks apart."""
    done = {(row["first_look"], row["tokens"]) for row in matching(rows, purpose="measurement") if "tokens" in row}
    tables = [
        f"{'A first look, ' if look else ''}{tokens:,} text tokens of each domain:\n\n"
        + results_table(rows, tokens, first_look=look)
        for look, tokens in sorted(done)
    ]
    gates = [gates_table(rows)] if matching(rows, method="gates") else []
    return "\n\n".join([*gates, *tables])


def _known(line: Line, texts: Sequence[str]) -> list[str]:
    return [f"{line['bits_per_byte'][text]:.3f}" for text in texts]


def main() -> None:
    """Do everything, or one case of it in this process."""
    given = arguments(__doc__, RESULTS, tokens=170_000)
    settings = QUICK if given.quick else FIRST_LOOK if given.first_look else Settings()
    if given.case:
        run(given.case, settings, given.results)
        return
    if given.quick:
        given.tokens = 128
    fetch()
    experiment(given, settings)
    print(report(lines(given.results)))


if __name__ == "__main__":
    main()
