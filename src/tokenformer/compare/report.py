"""The report of a comparison, from the lines of its results alone: an HTML page, Markdown and PNGs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from ..checkpoints.files import disk_errors
from .conclusions import answer, counted, limits
from .decision import decision
from .findings import Findings
from .page import Bullets, Code, Element, Heading, Picture, html_page, markdown_page
from .pictures import draw_curves, draw_differences
from .results import MAY_GAIN, Line
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
    files = {f"{element.name}.png": element.png for element in elements if isinstance(element, Picture)}
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
    yield from answer(findings)
    yield from limits(findings)
    yield from figures(findings)
    yield from results(findings)
    yield from savings(findings)
    yield from decision(findings)
    yield from growths(findings)
    yield from attention(findings)
    yield from equality(findings)
    yield from rules(findings)


def figures(findings: Findings) -> Iterator[Element]:
    """Curves against each cost, and all differences at the largest budget."""
    last, recipe = findings.last, findings.recipe
    yield Heading("Bits per byte against cost")
    yield Picture(
        "report-training-flops",
        "Bits per byte against cumulative training FLOPs, the base and all stages included. Solid and filled: arms "
        "that grow, ▲ where they do (at the bottom if before the first budget); dashed and hollow: arms that never "
        "grow; black or white: the reference. Points are whole runs to the end of their schedule, mean over seeds with "
        "interval.",
        *draw_curves(findings, "training_flops"),
    )
    if findings.contrasts(last, recipe.rules.reference) and recipe.rules.reference in findings.ranking(last):
        yield Picture(
            "report-differences",
            f"Differences to {recipe.rules.reference} at {findings.at(last)}, with intervals; shaded: less than the "
            f"{recipe.rules.threshold:g} bits per byte that matter.",
            *draw_differences(findings, last),
        )
    yield Picture("report-text-tokens", "The same against text tokens.", *draw_curves(findings, "text_tokens"))
    yield Picture("report-seconds", "The same against seconds of training.", *draw_curves(findings, "seconds"))


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
            *(["Seconds of different machines do not compare."] if len(places) > 1 else []),
        ]
    )
    yield Code(yaml.safe_dump(last["recipe"], sort_keys=False, allow_unicode=True, width=100))


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
