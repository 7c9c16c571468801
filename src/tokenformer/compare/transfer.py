"""How much of the text that the small model read is lost by growing: measured on comparisons, for `tokenformer.law`.

A grown run is held against a run of its last size from scratch with the same seed and budget. The two read different
amounts of text; the law says what the difference is worth.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from transformers import AutoConfig

from .. import cost
from ..law import AFTER_DECAY, KEPT, Law, Transfer
from .accounting import scratch_twin
from .findings import Findings
from .law import Point
from .recipe import ArmStage
from .results import Line

# Fields of a model that say how large it is, and not of what kind.
_SIZES = (
    "preset",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "qkv_param_tokens",
    "output_param_tokens",
    "ffn_param_tokens",
)


@dataclass(frozen=True)
class Grown:
    """A run that grew once, and what it would have been.

    Attributes:
        arm, seed, budget: of the run.
        grown, rate: what grew, and what became of the learning rate, as in `Transfer`.
        before, after: parameters of the maps in the blocks before and after growing.
        read, text_tokens: text tokens read before growing, and in all.
        loss: bits per byte in the end.
        scratch: (text tokens, bits per byte) of its last size from scratch, with the same seed and budget.
    """

    arm: str
    seed: int
    budget: float
    grown: tuple[str, ...]
    rate: str
    before: int
    after: int
    read: float
    text_tokens: float
    loss: float
    scratch: tuple[float, float]


def family(findings: Findings) -> list[str]:
    """Return the largest set of arms that never grow and differ in size alone, in the recipe's order."""
    sets: dict[str, list[str]] = defaultdict(list)
    for arm in findings.arms:
        content = findings.recipe.arms[arm]
        if not content.stages and content.data is None:
            rest = {f: v for f, v in content.model.model_dump(exclude_unset=True).items() if f not in _SIZES}
            sets[repr((sorted(rest.items()), sorted(content.training.items()), content.data))].append(arm)
    return max(sets.values(), key=len, default=[])


def points(findings: Findings, arms: Sequence[str]) -> list[Point]:
    """Return the ends of all final runs of some arms that never grow, for a law."""
    return [
        Point(blocks(line), line["text_tokens"], line["bits_per_byte"], seed)
        for arm in arms
        for budget in findings.budgets_of(arm)
        for seed, line in sorted(findings.finals[arm, budget].items())
    ]


def grown_runs(findings: Findings) -> Iterator[Grown]:
    """Return the final runs that grew once, as `tokenformer train` can, to a size that was trained from scratch too."""
    for (arm, budget), runs in sorted(findings.finals.items()):
        stages = findings.recipe.arms[arm].stages
        twin = scratch_twin(findings, arm) if len(stages) == 1 else None
        if twin is None or stages[0].method != "exact" or stages[0].frozen or stages[0].rewarm_new or stages[0].reads:
            continue
        scratch = findings.finals.get((twin, budget), {})
        for seed in sorted(runs.keys() & scratch.keys()):
            line, other = runs[seed], scratch[seed]
            for growth in line["growths"]:
                after = blocks(line)
                yield Grown(
                    arm,
                    seed,
                    budget,
                    grown_fields(stages[0]),
                    rate_of(stages[0]),
                    after - (growth["parameters_after"] - growth["parameters_before"]),
                    after,
                    growth["text_tokens"],
                    line["text_tokens"],
                    line["bits_per_byte"],
                    (other["text_tokens"], other["bits_per_byte"]),
                )


def transfers(runs: Sequence[Grown], law: Law) -> list[Transfer]:
    """Estimate for each way of growing what it loses, once for each arm and seed over all its budgets."""
    ways: dict[tuple[tuple[str, ...], str], list[Grown]] = defaultdict(list)
    for run in runs:
        ways[run.grown, run.rate].append(run)
    found = []
    for (grown, rate), several in sorted(ways.items()):
        curves: dict[tuple[str, int], list[Grown]] = defaultdict(list)
        for run in several:
            curves[run.arm, run.seed].append(run)
        factors, shares = ([f(run) for run in several] for f in (_factor, _share))
        lost = tuple(_lost(curve, law) for _, curve in sorted(curves.items()))
        found.append(Transfer(grown, rate, lost, (min(factors), max(factors)), (min(shares), max(shares))))
    return found


def grown_fields(stage: ArmStage) -> tuple[str, ...]:
    """Return what a stage grows, as sorted fields of a configuration."""
    return tuple(sorted(stage.amounts))


def rate_of(stage: ArmStage) -> str:
    """Return what becomes of the learning rate as a stage grows."""
    return AFTER_DECAY if stage.after_decay else "warmed up again" if stage.rewarm else KEPT


def blocks(line: Line) -> int:
    """Return the parameters of the maps in the blocks of a run's last model."""
    return cost.block_parameters(AutoConfig.for_model(**line["config"]))


def _factor(run: Grown) -> float:
    return run.after / run.before


def _share(run: Grown) -> float:
    return run.read / run.text_tokens


def _lost(curve: Sequence[Grown], law: Law) -> float:
    """Return the share by least squares over the budgets of one arm and seed."""
    gaps, worths = [], []
    for run in curve:
        text, bits = run.scratch
        whole = law.loss(run.after, run.text_tokens)
        gaps.append(run.loss - (bits + whole - law.loss(run.after, text)))
        worths.append(law.loss(run.after, run.text_tokens - run.read) - whole)
    return math.fsum(g * w for g, w in zip(gaps, worths, strict=True)) / math.fsum(w * w for w in worths)
