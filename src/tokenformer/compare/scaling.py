"""What size and text are worth in a comparison: the law of its largest family, where there is enough of both."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import EvaluationError
from ..law import Law
from .findings import Findings
from .law import SIZES, fit
from .page import Element, Heading, Paragraph, Table, scientific
from .transfer import family, points


def scaling(findings: Findings) -> Iterator[Element]:
    """Fit the law to the largest family of sizes, and say what more size or text would bring."""
    arms = family(findings)
    if len(arms) < SIZES:
        return
    yield Heading("What size and text are worth")
    yield Paragraph(
        "Bits per byte as a law of both, E + A / N^α + B / D^β, with N parameters outside the embedding and D text "
        f"tokens, fitted to all runs of {', '.join(arms)}: the most arms that never grow and differ in size alone. "
        "Huber loss of the logarithm, as in approach 3 of arXiv 2203.15556; intervals from refits to resampled seeds."
    )
    try:
        law = fit(points(findings, arms), confidence=findings.recipe.rules.confidence)
    except EvaluationError as error:
        yield Paragraph(f"It cannot be fitted: {error}.")
        return
    yield Table(
        ["constant", "value", "from", "to"],
        [
            [symbol, *(f"{x:.4g}" for x in (getattr(law, name), *law.intervals[name]))]
            for symbol, name in (("E", "E"), ("A", "A"), ("α", "alpha"), ("B", "B"), ("β", "beta"))
        ],
    )
    yield Paragraph(_told(law))


def _told(law: Law) -> str:
    (smallest, size), (least, text) = law.parameters, law.text_tokens
    now = law.loss(size, text)
    return (
        f"It holds from {scientific(smallest)} to {scientific(size)} parameters and from {scientific(least)} to "
        f"{scientific(text)} text tokens, and single runs differ from it by {law.spread:.1%} (one standard deviation). "
        f"At the upper end of both, a doubling of the parameters would bring {now - law.loss(2 * size, text):.4f} bits "
        f"per byte, and one of the text {now - law.loss(size, 2 * text):.4f}; {now - law.E:.4f} are all that size and "
        "text can bring."
    )
