"""The report of a comparison, from the lines of its results alone: an HTML page, Markdown and PNGs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from ..checkpoints.disk import disk_errors
from ..units import counted
from .chart import interactive_curves
from .conclusions import answer, limits, verdicts
from .conditions import conditions
from .findings import Findings
from .forgetting import forgetting
from .page import Bullets, Code, Element, Folded, Heading, Picture, html_page, markdown_page
from .pictures import draw_curves, draw_differences
from .results import MAY_GAIN, Line
from .scaling import scaling
from .tables import attention, equality, growths, results, savings


def write_report(lines: Sequence[Line], folder: Path) -> Path:
    """Write report.html, report.md and the pictures report-*.png; return the page's path.

    Args:
        lines: of results.jsonl, complete or not; the same lines give the same bytes.
        folder: where to, made if it is not there; an earlier report is replaced.

    Raises:
        RecipeError: no recipe among the lines, or runs that do not belong to it.
        EvaluationError: no final run has ended yet.
        CheckpointError: the disk refuses.
    """
    findings = Findings.of(lines)
    title, elements = findings.recipe.question, list(report(findings))
    files = {f"{picture.name}.png": picture.png for picture in _pictures(elements)}
    files["report.md"] = markdown_page(title, elements).encode()
    files["report.html"] = html_page(title, elements).encode()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            temporary = folder / f".{name}.{os.getpid()}.new"
            temporary.write_bytes(content)
            os.replace(temporary, folder / name)
    return folder / "report.html"


def report(findings: Findings) -> Iterator[Element]:
    """Say everything, in the order of what a reader wants to know."""
    yield curves(findings)
    yield from answer(findings)
    yield from limits(findings)
    yield from conditions(findings)
    yield from verdicts(findings)
    yield from more_pictures(findings)
    yield from results(findings)
    yield from scaling(findings)
    yield from forgetting(findings)
    yield from savings(findings)
    yield from growths(findings)
    yield from attention(findings)
    yield from equality(findings)
    yield from rules(findings)


def curves(findings: Findings) -> Picture:
    """Draw bits per byte against cost, which is the whole comparison in a picture."""
    return Picture(
        "report-training-flops",
        "Bits per byte against cumulative training FLOPs, the base and all stages included: a lower curve needs fewer "
        "bits for the same text. Solid and filled: arms that grow, ▲ where they do (at the bottom if before the first "
        "budget). Dashed and hollow: arms that never grow. Black: the reference. Points are whole runs to the end of "
        "their schedule, means over seeds with intervals.",
        *draw_curves(findings, "training_flops"),
        chart=interactive_curves(findings),
    )


def more_pictures(findings: Findings) -> Iterator[Element]:
    """All differences at the budget that decides, and curves against the other costs."""
    last, rules = findings.last, findings.recipe.rules
    yield Heading("Pictures")
    if findings.contrasts(last, rules.reference) and rules.reference in findings.ranking(last):
        yield Picture(
            "report-differences",
            f"Differences to {rules.reference} at {findings.at(last)}, with intervals. Shaded: less than the "
            f"{rules.threshold:g} bits per byte that matter.",
            *draw_differences(findings, last),
        )
    for field, cost in (("text_tokens", "text tokens"), ("seconds", "seconds of training")):
        name = f"report-{field.replace('_', '-')}"
        picture = Picture(name, f"Bits per byte against {cost}.", *draw_curves(findings, field))
        yield Folded(f"Bits per byte against {cost}", [picture])


def _pictures(elements: Sequence[Element]) -> Iterator[Picture]:
    for element in elements:
        if isinstance(element, Folded):
            yield from _pictures(element.elements)
        elif isinstance(element, Picture):
            yield element


def rules(findings: Findings) -> Iterator[Element]:
    """The recipe as it stood before any run; when, where and with what."""
    first, last = findings.begun[0], findings.begun[-1]
    places = list(dict.fromkeys(map(_place, findings.begun)))
    yield Heading("The rules, stated before the first run")
    yield Bullets(
        [
            f"Comparison {first['name']}, begun {first['date']}.",
            *(
                f"Added {after['date']}: {added}."
                for before, after in pairwise(findings.begun)
                if (added := _added(before["recipe"], after["recipe"]))
            ),
            *places,
            *(["Seconds of different machines cannot be compared."] if len(places) > 1 else []),
        ]
    )
    recipe = yaml.safe_dump(last["recipe"], sort_keys=False, allow_unicode=True, width=100)
    yield Folded("The whole recipe", [Code(recipe)])


def _place(line: Line) -> str:
    machine, versions = (
        ", ".join(f"{name} {value}" for name, value in line[facts].items() if value is not None)
        for facts in ("machine", "versions")
    )
    return f"Machine: {machine}; {counted(line['threads'], 'thread')} a run; {versions}."


def _added(before: Line, after: Line) -> str:
    gained = {
        field: [str(one) for one in after[field] if one not in before[field]] for field in MAY_GAIN if field in before
    }
    return "; ".join(f"{field} {', '.join(new)}" for field, new in gained.items() if new)
