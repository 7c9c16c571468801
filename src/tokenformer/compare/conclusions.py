"""What a comparison concludes, in words: the answer, who beats whom, and what cannot be said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from .arms import segments, tuning_runs
from .findings import Contrast, Findings
from .page import Bullets, Element, Heading, Paragraph, Table
from .recipe import CompareRecipe

# Kinds of verdict in the order they are told, and how they are said of several arms at once.
_SAID = {
    "better": "Better than {0}",
    "slightly better": "Better than {0}, but by less than matters",
    "equivalent": "No difference to {0} that matters",
    "same": "The same as {0} to the last bit",
    "perhaps better": "Perhaps better than {0}: alone it would count, as one of several comparisons it does not",
    "cannot tell": "Cannot be told from {0}",
    "perhaps worse": "Perhaps worse than {0}: alone it would count, as one of several comparisons it does not",
    "slightly worse": "Worse than {0}, but by less than matters",
    "worse": "Worse than {0}",
    "no interval": "Fewer than two seeds in common with {0}, so no interval",
}


def answer(findings: Findings) -> Iterator[Element]:
    """Answer, ranking, and verdicts at every budget against the reference and the best."""
    budgets, reference = findings.budgets, findings.recipe.rules.reference
    yield Paragraph(headline(findings), lead=True)
    yield Heading("Ranking")
    yield Paragraph("Bits per byte on held-out documents, mean over seeds, and the rank; less is better.")
    ranks = {budget: findings.ranking(budget) for budget in budgets}
    yield Table(
        ["arm", *map(findings.at, budgets)],
        [[arm, *(_ranked(findings, arm, budget, ranks[budget]) for budget in budgets)] for arm in _by_rank(findings)],
        marked=[reference],
    )
    yield from _growing(findings)
    yield Heading("Verdicts")
    for budget in reversed(budgets):
        best, numbers = ranks[budget][0], budget == findings.last
        verdicts = []
        if best != reference:
            verdicts = _grouped(findings.contrasts(budget, reference), f"the reference, {reference}", numbers=numbers)
        role = "the best" if best != reference else "the best, which is the reference"
        verdicts += _grouped(findings.contrasts(budget, best), f"{role}, {best}", numbers=numbers)
        yield Heading(f"At {findings.at(budget)}", level=3)
        yield Bullets(verdicts or [f"{best} is the only arm with results."])


def limits(findings: Findings) -> Iterator[Element]:
    """What the results do not show."""
    yield Heading("What can be concluded, and what cannot")
    yield Bullets([*findings.missing(), *_statistics(findings), *_tuning(findings), _scope(findings)])


def headline(findings: Findings) -> str:
    """Return the answer in a few sentences."""
    return " ".join(_sentences(findings))


def _sentences(findings: Findings) -> Iterator[str]:
    budget, reference = findings.last, findings.recipe.rules.reference
    ranking = findings.ranking(budget)
    best, against = ranking[0], findings.contrasts(budget, reference)
    if findings.missing():
        yield "Not all runs are there: what lacks or diverged is listed below."
    some = any(findings.grown(arm) for arm in findings.arms)
    grows = f", which {'grows' if findings.grown(best) else 'never grows'}," if some else ""
    which = "the largest budget" if budget == findings.budgets[-1] else "the largest budget that all arms have reached"
    yield (
        f"At {findings.at(budget)}, {which}, {best}{grows} comes out best of "
        f"{counted(len(ranking), 'arm')}: {findings.score(best, budget)} bits per byte "
        f"({counted(len(findings.values(best, budget)), 'seed')})."
    )
    if best in against and against[best].difference.seeds:
        yield f"Against the reference: {against[best].verdict.sentence}."
    rival = findings.best(budget, grown=not findings.grown(best))
    if rival and rival != reference:
        kind = "never grows" if findings.grown(best) else "grows"
        yield f"The best that {kind}: {findings.contrasts(budget, best)[rival].verdict.sentence}."
    plain = findings.best(budget, grown=False)
    savings = {
        arm: saving.ratio
        for arm in findings.arms
        if plain and findings.grown(arm) and (saving := findings.saving(arm, plain)) is not None
    }
    if savings:
        least = min(savings, key=savings.__getitem__)
        yield f"{least} reaches the final bits per byte of {plain} with {savings[least]:.2f} × its training FLOPs."
    elif plain and rival:
        yield f"No arm that grows reaches the final bits per byte of {plain}."


def _growing(findings: Findings) -> Iterator[Element]:
    rows = []
    for budget in findings.budgets:
        best = findings.ranking(budget)[0]
        rival = findings.best(budget, grown=not findings.grown(best))
        if rival:
            rows.append([findings.at(budget), findings.contrasts(budget, best)[rival].verdict.sentence])
    if rows:
        yield Heading("The best arm that grows, and the best that never does", level=3)
        yield Table(["budget", "verdict"], rows)


def _ranked(findings: Findings, arm: str, budget: float, ranking: list[str]) -> str:
    if arm not in ranking:
        return "–"
    return f"{findings.score(arm, budget).mean:.4f} ({ranking.index(arm) + 1})"


def _by_rank(findings: Findings) -> list[str]:
    """Return all arms, by rank at the largest budget, then those that only smaller ones have."""
    return list(dict.fromkeys(arm for budget in reversed(findings.budgets) for arm in findings.ranking(budget)))


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
            f"Intervals hold the truth with {rules.confidence:.0%} confidence each, by Student's t over "
            f"{counted(len(findings.recipe.seeds), 'seed')}. Those of differences to the reference at the largest "
            f"budget are typically ± {median(widths):.4f} bits per byte: much smaller differences cannot be seen here."
        )
    else:
        yield "There are too few seeds for intervals: no difference here can be told from chance."
    yield (
        "Differences are paired: the same seed reads the same text in the same order. A difference counts if the p "
        "value of the paired t test, corrected by Holm's method for all comparisons with the same arm at the same "
        f"budget, is below {1 - rules.confidence:.2g}; it matters from {rules.threshold:g} bits per byte on."
    )
    yield "The best arm is picked by these same results, which flatters its lead over the others."


def _tuning(findings: Findings) -> Iterator[str]:
    recipe = findings.recipe
    if len(recipe.learning_rates) == 1:
        yield f"No learning rate was tuned: every arm has {recipe.learning_rates[0]:g}."
        return
    yield f"Learning rates were tuned at {findings.at(recipe.tuning_budget)} with one seed, and kept for all budgets."
    late = [arm for arm in findings.arms if _grows_after_tuning(recipe, arm)]
    if late:
        yield f"They were tuned before these arms had grown for the last time: {', '.join(late)}."
    for end, beyond in ((min(recipe.learning_rates), "smaller"), (max(recipe.learning_rates), "larger")):
        arms = [arm for arm in findings.arms if findings.runs(arm)[0]["learning_rate"] == end]
        if arms:
            yield (
                f"The learning rate lies at the end of the grid, {end:g}, for {', '.join(arms)}: a {beyond} one may "
                "be better still."
            )


def _grows_after_tuning(recipe: CompareRecipe, arm: str) -> bool:
    stages, (first, *_) = recipe.arms[arm].stages, tuning_runs(recipe, arm)
    return len([s for s in segments(recipe, first) if s.growth]) < len(stages)


def _scope(findings: Findings) -> str:
    recipe = findings.recipe
    sizes = [run["parameters"] for arm in findings.arms for run in findings.runs(arm)]
    return (
        f"Nothing is said beyond {findings.at(findings.budgets[-1])}, models of {min(sizes):,} to {max(sizes):,} "
        f"parameters, contexts of {recipe.training.sequence_length:,} text tokens, and this text: {recipe.data.source}."
    )


def counted(n: int, thing: str) -> str:
    """Write a number of things."""
    return f"{n} {thing}{'' if n == 1 else 's'}"
