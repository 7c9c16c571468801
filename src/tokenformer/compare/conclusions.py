"""What a comparison concludes, in words: the answer, who beats whom, and what cannot be said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from transformers import AutoConfig

from ..data.section import texts_in
from ..units import counted
from .accounting import accounts
from .arms import Run, segments
from .conditions import warnings
from .findings import Contrast, Findings
from .page import Bullets, Element, Folded, Heading, Paragraph, Table, scientific
from .recipe import CompareRecipe

# Kinds of verdict in the order they are told, and how they are said of several arms at once.
_SAID = {
    "better": "Better than {0}",
    "ahead": "Ahead of {0} in this first look",
    "slightly better": "Better than {0}, but by less than matters",
    "slightly ahead": "Ahead of {0} in this first look, but by less than matters",
    "equivalent": "No difference to {0} that matters",
    "same": "The same as {0} to the last bit",
    "perhaps better": "Perhaps better than {0}, but not significant after Holm's correction",
    "perhaps ahead": "Perhaps ahead of {0} in this first look, but not significant after Holm's correction",
    "cannot tell": "Cannot be told from {0}",
    "perhaps worse": "Perhaps worse than {0}, but not significant after Holm's correction",
    "perhaps behind": "Perhaps behind {0} in this first look, but not significant after Holm's correction",
    "slightly worse": "Worse than {0}, but by less than matters",
    "slightly behind": "Behind {0} in this first look, but by less than matters",
    "worse": "Worse than {0}",
    "behind": "Behind {0} in this first look",
    "no interval": "Fewer than two seeds in common with {0}, so no interval",
}
# Dropout of heads that a language model does not have.
_HEADS = ("classifier_dropout", "summary_first_dropout")


def answer(findings: Findings) -> Iterator[Element]:
    """Rank all arms at the budget that decides, and say what that shows."""
    last, reference = findings.last, findings.recipe.rules.reference
    others = [budget for budget in reversed(findings.budgets) if budget != last]
    against = findings.contrasts(last, reference)
    yield Table(
        [
            "arm",
            f"bits per byte at {scientific(last)}",
            "less the reference's",
            "verdict",
            *(f"at {scientific(budget)} (rank)" for budget in others),
        ],
        [
            [
                arm,
                str(findings.score(arm, last)),
                *((str(against[arm]), against[arm].verdict.kind) if arm in against else ("–", _place(arm, reference))),
                *(_ranked(findings, arm, budget) for budget in others),
            ]
            for arm in findings.by_rank()
        ],
        marked=[reference],
    )
    yield Paragraph(headline(findings), lead=True)


def verdicts(findings: Findings) -> Iterator[Element]:
    """Say at every budget how arms stand to the reference and to the best, and whether growing helps."""
    yield Heading("Verdicts")
    yield from _growing(findings)
    reference = findings.recipe.rules.reference
    for budget in reversed(findings.budgets):
        best, numbers = findings.ranking(budget)[0], budget == findings.last
        said = []
        if best != reference:
            said = _grouped(findings.contrasts(budget, reference), f"the reference, {reference}", numbers=numbers)
        role = "the best" if best != reference else "the best, which is the reference"
        said += _grouped(findings.contrasts(budget, best), f"{role}, {best}", numbers=numbers)
        yield Folded(f"All arms at {findings.at(budget)}", [Bullets(said or [f"{best} is the only arm with results."])])


def limits(findings: Findings) -> Iterator[Element]:
    """What the results do not show."""
    yield Heading("What can be concluded, and what cannot")
    yield Bullets(
        [
            *findings.missing(),
            *_statistics(findings),
            *_tuning(findings),
            *warnings(findings),
            *_dropout(findings),
            _scope(findings),
        ]
    )


def headline(findings: Findings) -> str:
    """Return the answer in a few sentences."""
    return " ".join(_sentences(findings))


def _sentences(findings: Findings) -> Iterator[str]:
    budget, reference = findings.last, findings.recipe.rules.reference
    ranking = findings.ranking(budget)
    best, against, doubts = ranking[0], findings.contrasts(budget, reference), findings.doubts(budget)
    if findings.missing():
        yield "Some runs are missing or diverged; they are listed below."
    some = any(findings.grown(arm) for arm in findings.arms)
    grows = f", which {'grows' if findings.grown(best) else 'never grows'}," if some else ""
    which = "the largest budget" if budget == findings.budgets[-1] else "the largest budget that all arms have reached"
    yield (
        f"At {findings.at(budget)}, {which}, {best}{grows} {'comes out first' if doubts else 'is the best'} of "
        f"{counted(len(ranking), 'arm')}: {findings.score(best, budget)} bits per byte "
        f"({counted(len(findings.values(best, budget)), 'seed')})."
    )
    if best in against and against[best].difference.seeds:
        yield f"Against the reference: {against[best].verdict.sentence}."
    rival = findings.best(budget, grown=not findings.grown(best))
    if rival and rival != reference:
        kind = "never grows" if findings.grown(best) else "grows"
        yield f"The best arm that {kind}: {findings.contrasts(budget, best)[rival].verdict.sentence}."
    yield from accounts(findings)
    if doubts:
        yield f"This is a first look: {', and '.join(doubts)}."


def _growing(findings: Findings) -> Iterator[Element]:
    rows = []
    for budget in findings.budgets:
        best = findings.ranking(budget)[0]
        rival = findings.best(budget, grown=not findings.grown(best))
        if rival:
            rows.append([findings.at(budget), findings.contrasts(budget, best)[rival].verdict.sentence])
    if rows:
        yield Table(["budget", "the best arm that grows, and the best that never does"], rows)


def _place(arm: str, reference: str) -> str:
    return "the reference" if arm == reference else "–"


def _ranked(findings: Findings, arm: str, budget: float) -> str:
    """Write an arm's mean at a budget, and its rank there."""
    ranking = findings.ranking(budget)
    if arm not in ranking:
        return "–"
    return f"{findings.score(arm, budget).mean:.4f} ({ranking.index(arm) + 1})"


def _grouped(contrasts: Mapping[str, Contrast], other: str, *, numbers: bool) -> list[str]:
    """Say the verdicts of several arms against one, those of a kind together."""
    said = []
    for kind, words in _SAID.items():
        of_kind = {arm: contrast for arm, contrast in contrasts.items() if contrast.verdict.kind == kind}
        arms = [f"{arm} ({contrast})" if numbers else arm for arm, contrast in of_kind.items()]
        if arms:
            said.append(f"{words.format(other)}: {'; '.join(arms)}.")
    return said


def _statistics(findings: Findings) -> Iterator[str]:
    rules, last = findings.recipe.rules, findings.last
    against = findings.contrasts(last, rules.reference).values()
    widths = [c.difference.half_width for c in against if c.difference.half_width is not None]
    if widths:
        yield (
            f"Every interval has {rules.confidence:.0%} confidence, by Student's t over "
            f"{counted(len(findings.recipe.seeds), 'seed')}. Differences to the reference at {findings.at(last)} are "
            f"typically known to ± {median(widths):.4f} bits per byte: much smaller ones cannot be seen here."
        )
    else:
        yield "There are too few seeds for intervals: no difference here can be told from chance."
    yield (
        "Differences are paired: the same seed reads the same text in the same order. A difference counts if the p "
        "value of the paired t test, corrected by Holm's method for all comparisons with the same arm at the same "
        f"budget, is below {1 - rules.confidence:.2g}. It matters from {rules.threshold:g} bits per byte on."
    )
    yield "The best arm is picked by these same results, which flatters its lead over the others."


def _tuning(findings: Findings) -> Iterator[str]:
    recipe = findings.recipe
    if len(recipe.learning_rates) == 1:
        yield f"No learning rate was tuned: every arm trains with {recipe.learning_rates[0]:g}."
        return
    seeds = {line["seed"] for arm in findings.arms for line in findings.tunings[arm]}
    again = "; the best two again with the second seed where they were close" if len(seeds) > 1 else ""
    yield (
        f"Learning rates were tuned at {findings.at(recipe.tuning_budget)} with one seed{again}, and kept for all "
        "budgets."
    )
    late = [arm for arm in findings.arms if _grows_after_tuning(recipe, arm)]
    if late:
        yield f"They were tuned before these arms had grown for the last time: {', '.join(late)}."
    for end, beyond in (("smallest", "smaller"), ("largest", "larger")):
        arms = [f"{arm} ({search.rate:g})" for arm in findings.arms if (search := findings.searches[arm]).end == end]
        if arms:
            yield (
                f"The {end} learning rate that was tried is the best for {', '.join(arms)}: a {beyond} one may lead to "
                "less loss still."
            )
    unsettled = [arm for arm in findings.arms if not findings.searches[arm].settled]
    if unsettled:
        yield f"Tuning is not finished for {', '.join(unsettled)}; `tokenformer compare` goes on with it."


def _dropout(findings: Findings) -> Iterator[str]:
    """Say which arms train with dropout: transformers' GPT-2 and OPT do by default, the other architectures do not."""
    told = []
    for arm in findings.arms:
        config = AutoConfig.for_model(**findings.runs(arm)[0]["config"]).to_dict()
        rates = [f"{name} {rate:g}" for name, rate in config.items() if "drop" in name and name not in _HEADS and rate]
        told += [f"{arm} ({', '.join(rates)})"] if rates else []
    if told:
        yield (
            f"These arms train with dropout, which costs loss in short training: {'; '.join(told)}. Setting it to 0 in "
            "an arm's `model` makes another arm, without it."
        )


def _grows_after_tuning(recipe: CompareRecipe, arm: str) -> bool:
    run = Run(arm, recipe.seeds[0], recipe.learning_rates[0], recipe.tuning_budget)
    return sum(segment.growth is not None for segment in segments(recipe, run)) < len(recipe.arms[arm].growths)


def _scope(findings: Findings) -> str:
    recipe = findings.recipe
    sizes = [run["parameters"] for arm in findings.arms for run in findings.runs(arm)]
    return (
        f"The results say nothing about more than {findings.at(findings.budgets[-1])}, other models than these of "
        f"{min(sizes):,} to {max(sizes):,} parameters, other contexts than {recipe.training.sequence_length:,} text "
        f"tokens, or other text than {', '.join(texts_in(recipe.data, recipe.other_texts))}."
    )
