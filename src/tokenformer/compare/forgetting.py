"""What each text's bits per byte are in the end, and the least on the way there: how much of it was forgotten."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from .findings import Findings
from .page import Element, Heading, Paragraph, Table
from .results import Line


def forgetting(findings: Findings) -> Iterator[Element]:
    """Bits per byte of each text at the budget that decides; nothing where there is only one text."""
    arms = findings.ranking(findings.last)
    runs = {arm: list(findings.finals[arm, findings.last].values()) for arm in arms}
    texts = list(next(iter(runs.values()))[0].get("bits_per_byte_of") or {})
    if not texts:
        return
    yield Heading("Each text by itself")
    yield Paragraph(
        "Bits per byte on the held-out documents of each text, means over seeds, and in brackets what was forgotten: "
        "how much less it was at the best validation on the way there. All other figures are of all texts together."
    )
    yield Table(
        ["arm", *texts],
        [[arm, *(_told([_of(run, text) for run in several]) for text in texts)] for arm, several in runs.items()],
        marked=[findings.recipe.rules.reference],
    )


def _of(run: Line, text: str) -> tuple[float, float]:
    """Return a run's bits per byte of a text at its end, and how much of it was forgotten by then."""
    end = run["bits_per_byte_of"][text]
    measured = (point.get("bits_per_byte_of", {}).get(text) for point in run["curve"])
    return end, end - min([end, *(found for found in measured if found is not None)])


def _told(found: list[tuple[float, float]]) -> str:
    ends, forgotten = zip(*found, strict=True)
    return f"{statistics.fmean(ends):.4f} ({statistics.fmean(forgotten):.4f})"
