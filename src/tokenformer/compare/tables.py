"""The numbers of a comparison: all results, savings, growths, attention, what was equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import AutoConfig

from .. import cost
from ..growth.architectures import row_of
from .accounting import Account, counted, owned, saving, scratch_twin
from .findings import Contrast, Findings
from .page import Bullets, Element, Folded, Heading, Paragraph, Picture, Table, scientific
from .pictures import draw_attention
from .results import Line
from .statistics import crossing

_CONTEXTS = [1024 * 2**i for i in range(8)]


def results(findings: Findings) -> Iterator[Element]:
    """Every number at every budget, largest first."""
    reference = findings.recipe.rules.reference
    yield Heading("All results")
    for budget in reversed(findings.budgets):
        ranking = findings.ranking(budget)
        against, best = findings.contrasts(budget, reference), findings.contrasts(budget, ranking[0])
        table = Table(
            [
                "arm",
                "bits per byte",
                "less the reference's",
                "p (Holm)",
                "verdict",
                "less the best's",
                "p (Holm)",
                "verdict",
                "parameters",
                "learning rate",
                "text tokens",
                "seconds",
            ],
            [
                [
                    arm,
                    str(findings.score(arm, budget)),
                    *_contrast(against.get(arm), "the reference" if arm == reference else "–"),
                    *_contrast(best.get(arm), "the best"),
                    f"{findings.mean(arm, budget, 'parameters'):,.0f}",
                    f"{findings.mean(arm, budget, 'learning_rate'):g}",
                    f"{findings.mean(arm, budget, 'text_tokens'):,.0f}",
                    f"{findings.mean(arm, budget, 'seconds'):,.0f}",
                ]
                for arm in ranking
            ],
            marked=[reference],
        )
        yield Folded(f"Results at {findings.at(budget)}", [table])


def savings(findings: Findings) -> Iterator[Element]:
    """FLOPs to become as good as the reference, the two accounts of growing, and where curves cross."""
    reference, plain = findings.recipe.rules.reference, findings.best(findings.last, grown=False)
    grown = [arm for arm in findings.arms if findings.grown(arm)]
    if grown:
        yield Heading("Does growing pay?")
        yield Paragraph(
            "Two accounts of the same results. Counted: the training FLOPs that an arm needs, with its first model and "
            "every growth, to become as good as the best arm that never grows is in the end, and their ratio to what "
            "that one spends. Owned: the first model is there already and its cost is sunk. The account is of what the "
            "arm needs after its first growth to become as good as an arm that trains its last size (within 3 %) from "
            "scratch, and the ratio to what that one spends. Growing pays where the ratio is below 1."
        )
        yield Table(
            ["arm", f"counted, to {plain or 'an arm that never grows'}", "owned", "to its last size from scratch"],
            [
                [arm, _spent(counted(findings, arm)), *((_spent(owned(findings, arm)), twin) if twin else ("–", "–"))]
                for arm in grown
                for twin in [scratch_twin(findings, arm)]
            ],
        )
    yield Heading("Savings")
    yield Paragraph(
        "The training FLOPs that an arm needs to become as good as the reference is at the end of the budget that "
        "decides, and their ratio to the reference's FLOPs. Here and above, the range over seeds, or how many of them "
        "get there, stands in brackets. Between budgets, bits per byte are interpolated in the logarithm of FLOPs; "
        "nothing is extrapolated."
    )
    yield Table(
        ["arm", f"to {reference}"],
        [[arm, _spent(saving(findings, arm, reference))] for arm in findings.arms],
        marked=[reference],
    )
    if not grown or not plain:
        return
    yield Heading("Where growing begins to pay")
    yield Paragraph(
        "The training FLOPs from which on an arm's mean stays below the mean of its own first model, trained on "
        f"without growing, and below that of {plain}, the best arm that never grows. These are crossings of means: "
        "read them with the intervals."
    )
    yield Table(
        ["arm", "its first model, never grown", "passes it from", f"passes {plain} from"],
        [
            [
                arm,
                findings.own_base(arm) or "not among the arms",
                _crossing(findings, arm, findings.own_base(arm)),
                _crossing(findings, arm, plain),
            ]
            for arm in grown
        ],
    )


def growths(findings: Findings) -> Iterator[Element]:
    """Loss just before and after each growth of the longest runs."""
    rows = [
        [arm, str(number), *_growth(several)]
        for arm in findings.arms
        for number, several in enumerate(zip(*(run["growths"] for run in findings.runs(arm)), strict=False), 1)
    ]
    if rows:
        yield Heading("Just before and after each growth")
        yield Paragraph(
            "Means over seeds, measured at the learning rate of that moment. Logits count as equal where they are "
            "equal bit for bit."
        )
        head = ["method", "training FLOPs", "parameters", "bits per byte before", "after", "jump", "logits equal"]
        yield Table(["arm", "growth", *head], rows)


def attention(findings: Findings) -> Iterator[Element]:
    """What attention between text tokens costs at longer contexts, for each arm's last model."""
    alike: dict[tuple[tuple[int, float, float], ...], list[str]] = {}
    others: list[str] = []
    for arm in findings.arms:
        config = AutoConfig.for_model(**findings.runs(arm)[0]["config"])
        if row_of(config) is None:
            others.append(arm)
            continue
        rest = cost.forward_flops(config, 0)
        costs = tuple((c, whole := cost.forward_flops(config, c), whole - rest) for c in _CONTEXTS)
        alike.setdefault(costs, []).append(arm)
    if not alike:
        return
    yield Heading("Attention between text tokens")
    yield Paragraph(
        "The forward FLOPs per text token that each arm's last model spends on attention between text tokens, and "
        "their share of all, by context length; computed from its configuration. Arms that cost the same share a row."
        + (f" Left out, since how they mix text tokens is not known: {', '.join(others)}." if others else "")
    )
    yield Table(
        ["last model of", *(f"{context // 1024}k" for context in _CONTEXTS)],
        [
            [", ".join(arms), *(f"{scientific(part)} ({part / whole:.0%})" for _, whole, part in costs)]
            for costs, arms in alike.items()
        ],
    )
    yield Picture(
        "report-attention",
        "Forward FLOPs per text token against context length: all (solid), and those of attention between text tokens "
        "(dotted).",
        *draw_attention({_shortened(arms): costs for costs, arms in alike.items()}),
    )


def equality(findings: Findings) -> Iterator[Element]:
    """What was equal, and what was not."""
    recipe, last, reference = findings.recipe, findings.last, findings.recipe.rules.reference
    missed = [
        abs(run[recipe.equal] / budget - 1) for (_, budget), runs in findings.finals.items() for run in runs.values()
    ]
    text = {arm: findings.mean(arm, last, "text_tokens") for arm in findings.ranking(last)}
    least, most = min(text, key=text.__getitem__), max(text, key=text.__getitem__)
    yield Heading("What was equal, and what was not")
    yield Bullets(
        [
            f"{findings.unit[0].upper()}{findings.unit[1:]} are equal, with the base and every stage counted: runs "
            f"missed their budget by at most {max(missed):.2%}.",
            "The text, its order for each seed, tokenizer, batch, context and schedule are equal, except where the "
            "rules below say that an arm differs.",
            f"Not equal, at {findings.at(last)}: text tokens, from {text[least]:,.0f} ({least}) to {text[most]:,.0f} "
            f"({most}), and the other columns of this table.",
            "Tuning is not part of a budget. A common start is trained once and charged to every arm, in tuning too.",
        ]
    )
    yield Table(
        [
            "arm",
            "last parameters",
            "text tokens",
            "× the reference's",
            "training FLOPs",
            "seconds",
            "learning rates tried",
            "chosen",
            "FLOPs of tuning",
        ],
        [
            [
                arm,
                f"{findings.mean(arm, last, 'parameters'):,.0f}",
                f"{text[arm]:,.0f}",
                f"{text[arm] / text[reference]:.2f}" if reference in text else "–",
                scientific(findings.mean(arm, last, "training_flops")),
                f"{findings.mean(arm, last, 'seconds'):,.0f}",
                ", ".join(f"{rate:g}" for rate in sorted({run["learning_rate"] for run in findings.tunings[arm]}))
                or "–",
                f"{findings.mean(arm, last, 'learning_rate'):g}",
                scientific(sum(run["training_flops"] for run in findings.tunings[arm])),
            ]
            for arm in text
        ],
        marked=[reference],
    )


def _contrast(contrast: Contrast | None, itself: str) -> list[str]:
    if contrast is None:
        return ["–", "–", itself]
    return [str(contrast), _p(contrast.p), contrast.verdict.kind]


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" if value >= 0.0001 else "< 0.0001"


def _spent(account: Account | None) -> str:
    if account is None:
        return "not reached"
    told = f"{'≤ ' if account.at_once else ''}{scientific(account.flops)}: {account.share:.2f} ×"
    if account.arm == account.target or account.seeds == 1:
        return told
    if len(account.by_seed) < account.seeds:
        return f"{told} ({len(account.by_seed)} of {account.seeds} seeds)"
    return f"{told} ({min(account.by_seed):.2f}–{max(account.by_seed):.2f})"


def _crossing(findings: Findings, arm: str, other: str | None) -> str:
    if other is None:
        return "–"
    curve, rival = findings.curve(arm), findings.curve(other)
    passed = crossing(curve, rival)
    if passed is None:
        return "none up to the largest budget"
    return f"{'≤ ' if passed <= max(curve[0][0], rival[0][0]) else ''}{scientific(passed)}"


def _growth(several: Sequence[Line]) -> list[str]:
    """Describe one growth of an arm, one line a seed."""

    def mean(field: str) -> float:
        return sum(growth[field] for growth in several) / len(several)

    first, equal = several[0], sum(growth["logits_equal"] for growth in several)
    before, after = mean("bits_per_byte_before"), mean("bits_per_byte_after")
    return [
        first["method"],
        scientific(mean("training_flops")),
        f"{first['parameters_before']:,} → {first['parameters_after']:,}",
        f"{before:.4f}",
        f"{after:.4f}",
        f"{after - before:+.4f}".replace("-", "−"),
        "yes" if equal == len(several) else f"with {equal} of {len(several)} seeds" if equal else "no",
    ]


def _shortened(arms: Sequence[str]) -> str:
    return arms[0] if len(arms) == 1 else f"{arms[0]} + {len(arms) - 1} more"
