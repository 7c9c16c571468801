"""Fit what `tokenformer plan --run` knows to comparisons under benchmarks/results/compare, and test it on others.

    python benchmarks/law.py                    fit to COMPARISONS, and write src/tokenformer/law.json
    python benchmarks/law.py NAME …             to others

The law of size and text is fitted to arms that never grow and differ in size alone. What growing loses is measured on
arms that grow once, beside their last size from scratch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenformer.compare.findings import Findings
from tokenformer.compare.law import fit
from tokenformer.compare.results import read_results
from tokenformer.compare.transfer import family, grown_runs, points, transfers
from tokenformer.compare.trial import choices, lost, missed, right
from tokenformer.errors import EvaluationError
from tokenformer.law import SHIPPED, Knowledge

RESULTS = Path(__file__).parent / "results" / "compare"
COMPARISONS = ("pays",)


def learned(comparisons: dict[str, Findings]) -> Knowledge:
    """Fit everything to some comparisons of one text, by name."""
    several = list(comparisons.values())
    law = fit([point for findings in several for point in points(findings, family(findings))])
    grown = [run for findings in several for run in grown_runs(findings)]
    recipe = several[0].recipe
    return Knowledge(
        tuple(comparisons),
        str(recipe.data.source),
        str(recipe.data.tokenizer),
        recipe.training.sequence_length,
        law,
        tuple(transfers(grown, law)),
    )


def read(name: str) -> Findings:
    """Read a comparison that is kept."""
    return Findings.of(read_results(RESULTS / name / "results.jsonl"))


def tested() -> str:
    """Return how the advice does on comparisons that it was not fitted to, as Markdown.

    Of those that it was fitted to each is left out in turn, if the others suffice for a law.
    """
    shipped = Knowledge.read()
    fitted = {name: read(name) for name in shipped.comparisons}
    rows = [
        "| comparison, left out | choices | growing paid | advice right | lost by it | by always growing "
        "| by never growing | forecasts miss by | within their intervals |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for path in sorted(RESULTS.glob("*/results.jsonl")):
        name = path.parent.name
        try:
            known = learned({n: f for n, f in fitted.items() if n != name}) if name in fitted else shipped
        except EvaluationError:
            continue
        several = list(choices(read(name), known))
        if several:
            paid, held = sum(c.gain.mean > 0 for c in several), sum(c.held for c in several)
            losses = " | ".join(f"{lost(several, grow=grow):.4f}" for grow in (None, True, False))
            rows.append(
                f"| {name} | {len(several)} | {paid} | {right(several)} | {losses} | {missed(several):.4f} "
                f"| {held} of {2 * len(several)} |"
            )
    return "\n".join(rows)


def main() -> None:
    """Fit, and write."""
    names = sys.argv[1:] or COMPARISONS
    known = learned({name: read(name) for name in names})
    SHIPPED.write_text(known.json(), encoding="utf-8")
    for each in known.transfers:
        print(f"{' and '.join(each.grown)}, rate {each.rate}: {each.mean:.2f} of the text read before is lost")
    print(tested())


if __name__ == "__main__":
    main()
