"""Train on, grow, or start over? What each should come to for a trained model and a budget of further training FLOPs.

The law of size and text (`law`) says what text and parameters are worth, and comparisons say what growing loses. The
model's own loss is taken as it is: only differences come from the law, so that another text, which is harder or easier
by a constant, does no harm. Nothing here is a promise; what lies beyond the fitted sizes and texts is not advised.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from . import cost
from .checkpoints.files import find_checkpoint
from .checkpoints.verify import read_lineage
from .errors import GrowthError, RecipeError
from .growth.grow import grow
from .law import AFTER_DECAY, KEPT, Expectation, Knowledge, Seen, Transfer, expect, middle
from .sections import parse_sections
from .training.recipe import TrainingSection
from .units import short

# How much is grown, and after which share of the budget, that is tried.
PERCENT = (50, 100, 300, 700)
AFTER = (0.0, 0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class Trained:
    """A trained model, as its checkpoint says.

    Attributes:
        path: of the checkpoint.
        config: its configuration, and `context`: text tokens in a sequence of its training.
        text_tokens: that it has read.
        bits_per_byte: on held-out text; None if unknown.
        decayed: whether its learning rate had fallen by then.
        learning_rate: the peak.
    """

    path: Path
    config: PreTrainedConfig
    context: int
    text_tokens: int
    bits_per_byte: float | None
    decayed: bool
    learning_rate: float

    @classmethod
    def read(cls, path: str | Path) -> Trained:
        """Read what a checkpoint, or the last one of a run's folder, says of itself.

        Raises:
            RecipeError: there is none, or it does not say what it has read.
        """
        place = Path(path)
        stages = sorted(place.glob("stage*/config.json"), key=lambda file: (len(file.parent.name), file.parent.name))
        if not (place / "config.json").exists() and stages:
            place = stages[-1].parent
        find_checkpoint(place, hint="; give the folder of a training run, or of a checkpoint")
        history = [event for event in read_lineage(place).history if event.operation == "train" and event.recipe]
        if not history or history[-1].text_tokens_seen == 0:
            raise RecipeError(
                f"{place} does not say what text it has read: its lineage.json names no training. Advice is for models "
                "that `tokenformer train` trained"
            )
        last, config = history[-1], AutoConfig.from_pretrained(place, trust_remote_code=False)
        recipe: dict[str, Any] = last.recipe or {}
        training, planned = (
            parse_sections(TrainingSection, recipe.get("training", {}), where=str(place)),
            recipe["stages"],
        )
        number = last.arguments["stage"]
        return cls(
            place,
            config,
            training.sequence_length,
            last.text_tokens_seen,
            last.bits_per_byte,
            training.schedule == "cosine" or (training.schedule == "wsd" and number == len(planned)),
            planned[number - 1].get("learning_rate") or training.learning_rate,
        )


@dataclass(frozen=True)
class Option:
    """One thing to do with a budget.

    Attributes:
        what: "train on", "grow" or "start over".
        grown: what to add by field, in percent; of "start over", to the sizes of the trained model.
        rate: what becomes of the learning rate as it grows.
        after: share of the budget to train the small model on for, before growing.
        parameters: of the last model, all of them.
        text_tokens: to read in all; of "start over", by the new model.
        expected: what it should come to.
        beyond: what lies beyond the comparisons: the last "size" or all the "text" of the law, the "growth" (its
            factor, or the share of text before it), or the "start", which is the model as it is.
    """

    what: str
    grown: dict[str, int]
    rate: str
    after: float
    parameters: int
    text_tokens: float
    expected: Expectation
    beyond: tuple[str, ...]

    @property
    def bits_per_byte(self) -> float:
        """What to expect."""
        return self.expected.bits_per_byte

    @property
    def interval(self) -> tuple[float, float]:
        """Between which bits per byte one such run should come out."""
        return self.expected.interval


@dataclass(frozen=True)
class Advice:
    """What to do with a budget.

    Attributes:
        options: the best of each kind, lowest bits per byte first.
        best: the first of them that lies within what is known; None if nothing does.
        rivals: options of another kind that cannot be told from the best.
        off: bits per byte by which the model lies above what the law expects; None where that may be chance.
    """

    options: list[Option]
    best: Option | None
    rivals: list[Option]
    off: float | None


def advise(model: Trained, budget: float, knowledge: Knowledge) -> Advice:
    """Weigh training on, growing and starting over.

    Args:
        model: that is there.
        budget: training FLOPs to spend from now on.
        knowledge: what comparisons found.

    Raises:
        RecipeError: the budget is not positive.
    """
    if not budget > 0:
        raise RecipeError(f"the budget is {budget:g} training FLOPs; give what you want to spend from now on")
    law, size = knowledge.law, cost.block_parameters(model.config)
    best: dict[tuple[str, ...], Option] = {}
    for option in sorted(_options(model, budget, knowledge), key=lambda o: (bool(o.beyond), o.bits_per_byte)):
        best.setdefault((option.what, *((*option.grown, option.rate) if option.what == "grow" else ())), option)
    options = sorted(best.values(), key=lambda option: option.bits_per_byte)
    first = next((option for option in options if not option.beyond), None)
    rivals = [] if first is None else [o for o in options if o.what != first.what and not _told(o, first, knowledge)]
    off = None
    if model.bits_per_byte is not None:
        low, high = law.interval(size, model.text_tokens)
        off = None if low <= model.bits_per_byte <= high else model.bits_per_byte - law.loss(size, model.text_tokens)
    return Advice(options, first, rivals, off)


def sentences(model: Trained, advice: Advice, knowledge: Knowledge) -> Iterator[str]:
    """Say what to do, how, how sure that is, and what it rests on."""
    law, best = knowledge.law, advice.best
    if best is None:
        yield (
            "No advice: everything that these FLOPs could buy lies beyond the comparisons that the law was fitted to. "
            "The numbers above are extrapolated."
        )
    else:
        yield f"{_described(best)}: {_expected(best)}."
        for rival in advice.rivals:
            yield f"It cannot be told from this: {_described(rival, capital=False)}, {_expected(rival)}."
        yield from _how(model, best)
    if not any(option.what == "grow" for option in advice.options):
        yield "Growing was not weighed: no comparison measured a way of growing that this model can take."
    if advice.off is not None:
        yield (
            f"The model is {abs(advice.off):.3f} bits per byte {'above' if advice.off > 0 else 'below'} what the law "
            "expects, which is more than chance: its text or its training is another. Only differences are used, as if "
            "it were so for all."
        )
    if model.bits_per_byte is None:
        yield "The checkpoint does not say how good it is, so that all numbers are those of the law's text."
    elif not model.decayed:
        yield "The model's learning rate has not decayed yet; after a decay, all of these come out lower."
    yield (
        f"The law rests on {', '.join(knowledge.comparisons)}: {knowledge.text}, {knowledge.tokenizer}, context "
        f"{knowledge.context:,}; {_span(law.parameters)} parameters in the blocks, {_span(law.text_tokens)} text "
        f"tokens. Intervals have {law.confidence:.0%} confidence for one run."
    )


def _described(option: Option, *, capital: bool = True) -> str:
    added = " and ".join(f"{percent} % of {name}" for name, percent in option.grown.items())
    text = f"{short(option.text_tokens)} text tokens in all"
    if option.what == "train on":
        told = f"train on, to {text}"
    elif option.what == "start over":
        told = f"start over with {'a model of this size' if not added else f'{added} more'}, on {text}"
    else:
        when = f"after {option.after:.0%} of the budget" if option.after else "now"
        when += "" if option.rate == KEPT else f" (learning rate {option.rate})"
        told = f"grow {when} by {added}, to {text}"
    return told[0].upper() + told[1:] if capital else told


def _expected(option: Option) -> str:
    low, high = option.interval
    return f"{option.bits_per_byte:.3f} bits per byte ({low:.3f} to {high:.3f})"


def _how(model: Trained, best: Option) -> Iterator[str]:
    """Say which learning rate, and which command grows."""
    rate = f"{model.learning_rate:g}"
    if best.what == "start over":
        yield f"Warm up to the learning rate that suits the new size (this model's was {rate}), and decay at the end."
        return
    warm = f"Warm up again to {rate}, since it has decayed" if model.decayed else f"Go on at {rate}"
    yield f"{warm}; hold it{', through the growth' if best.what == 'grow' else ''}, and decay over the last fifth."
    if best.what == "grow":
        flags = " ".join(f"--{name.replace('_', '-')} +{percent}%" for name, percent in best.grown.items())
        yield f"tokenformer grow {model.path} -o GROWN {flags}"


def _span(values: tuple[float, float]) -> str:
    return f"{short(values[0])} to {short(values[1])}"


def _options(model: Trained, budget: float, knowledge: Knowledge) -> Iterator[Option]:
    now = _size(model.config, model.context, {})
    assert now is not None
    yield _option(model, knowledge, "train on", (now, now), 0.0, model.text_tokens + budget / now.per_token)
    sizes: dict[tuple[tuple[str, int], ...], _Size] = {(): now}
    alike = [transfer for transfer in knowledge.transfers if (transfer.rate == AFTER_DECAY) == model.decayed]
    for transfer in alike or knowledge.transfers:
        for percent in PERCENT:
            grown = dict.fromkeys(transfer.grown, percent)
            later = _size(model.config, model.context, grown)
            if later is None:
                continue
            sizes[tuple(grown.items())] = later
            for after in AFTER:
                before = model.text_tokens + after * budget / now.per_token
                text = before + (1 - after) * budget / later.per_token
                both = (now, later)
                yield _option(model, knowledge, "grow", both, before, text, grown=grown, transfer=transfer, after=after)
    for grown_items, size in sizes.items():
        yield _option(
            model, knowledge, "start over", (now, size), 0.0, budget / size.per_token, grown=dict(grown_items)
        )


def _option(
    model: Trained,
    knowledge: Knowledge,
    what: str,
    sizes: tuple[_Size, _Size],
    before: float,
    text: float,
    *,
    grown: dict[str, int] | None = None,
    transfer: Transfer | None = None,
    after: float = 0.0,
) -> Option:
    """Work out one option: `sizes` now and in the end, text read `before` growing, and in all."""
    law, old, size = knowledge.law, sizes[0].blocks, sizes[1].blocks
    known = {"size": law.knows(size, law.text_tokens[0]), "text": law.knows(law.parameters[0], text)}
    if transfer is not None:
        known["growth"] = transfer.knows(size / old, before / text)
    if what != "start over":
        known["start"] = law.knows(old, model.text_tokens)
    bits = model.bits_per_byte
    seen = None if bits is None else Seen(old, model.text_tokens, bits)
    return Option(
        what,
        grown or {},
        transfer.rate if transfer else KEPT,
        after,
        sizes[1].parameters,
        text,
        expect(law, size, text, before=before, transfer=transfer, seen=seen),
        tuple(fact for fact, yes in known.items() if not yes),
    )


class _Size(NamedTuple):
    """Parameters of a model, those of its blocks' maps, and training FLOPs for each text token."""

    parameters: int
    blocks: int
    per_token: float


def _size(config: PreTrainedConfig, context: int, percent: dict[str, int]) -> _Size | None:
    """Return the size after growing by so much, or None if the model cannot grow so."""
    return _measured(config.to_json_string(use_diff=False), context, tuple(percent.items()))


@lru_cache(maxsize=64)
def _measured(content: str, context: int, percent: tuple[tuple[str, int], ...]) -> _Size | None:
    config, amounts = AutoConfig.for_model(**json.loads(content)), {name: f"+{amount}%" for name, amount in percent}
    if amounts:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
            try:
                grow(model, **cast("dict[str, Any]", amounts))
            except GrowthError:
                return None
        config = model.config
    return _Size(cost.parameters(config), cost.block_parameters(config), cost.training_flops(config, context))


def _told(one: Option, other: Option, knowledge: Knowledge) -> bool:
    """Tell whether two options come out differently, whatever the refit and the chance of both."""
    law = knowledge.law
    apart = one.expected.drawn[:, None] * law.chance(0) - other.expected.drawn[:, None] * law.chance(2)
    low, high = middle(apart, law.tail)
    return low > 0 or high < 0
