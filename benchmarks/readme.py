"""Put the figures of benchmarks/results/ into the README, between their markers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def lines(name: str) -> list[dict[str, Any]]:
    """Read one results file."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text().splitlines()]


def demo() -> str:
    """Return the demo's table and its growth lines."""
    rows = [
        "| stage | parameters | parameter tokens | text tokens | training FLOPs | seconds | val. loss | bits/byte |"
    ]
    rows.append("|---|--:|---|--:|--:|--:|--:|--:|")
    growths = []
    for r in lines("demo"):
        if "row" not in r:
            equal = "bit for bit equal" if r["logits_equal"] else "NOT equal"
            growths.append(
                f"- grown before stage {r['stage']}: validation loss {r['loss_before']:.6f} before, "
                f"{r['loss_after']:.6f} after; logits {equal}"
            )
            continue
        groups = ", ".join(f"{name} {count:,}" for name, count in r["parameter_tokens"].items())
        rows.append(
            f"| {r['row']} | {r['parameters']:,} | {groups} | {r['text_tokens_seen']:,} | {r['training_flops']:.3g} "
            f"| {r['training_seconds']:.0f} | {r['loss']:.4f} | {r['bits_per_byte']:.4f} |"
        )
    return "\n".join([*rows, "", *growths])


def benchmarks() -> str:
    """Return a row per measured case and goal, the newest measurement of each."""
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for line in lines("layer") + lines("train_step"):
        case = line["case"]
        what = case.get("what", "layer")
        if what == "layer":
            label = f"{case['text_tokens']} × {case['width']} × {case['param_tokens']}"
        else:
            label = f"{case['family']} family"
        for name, figure in line.items():
            if isinstance(figure, dict) and "asked" in figure:
                newest[what, name, label, case["dtype"], str(case["threads"])] = figure
    rows = ["| | case | type | threads | asked | reached (quartiles) | met |", "|---|---|---|--:|--:|--:|:-:|"]
    for (what, name, label, dtype, threads), figure in newest.items():
        spread = " ({:.2f}–{:.2f})".format(*figure["quartiles"]) if "quartiles" in figure else ""
        sign = "≥" if "speed" in name else "≤"
        met = "yes" if figure["met"] else "**no**"
        rows.append(
            f"| {what}: {name} | {label} | {dtype} | {threads} | {sign} {figure['asked']:.2f} "
            f"| {figure['reached']:.2f}{spread} | {met} |"
        )
    return "\n".join(rows)


def filled(text: str) -> str:
    """Return `text` with every marked section rewritten from the results."""
    for section in (demo, benchmarks):
        pattern = rf"(<!-- results: {section.__name__} -->\n).*?(<!-- end -->)"
        content = section()
        text, found = re.subn(pattern, rf"\g<1>{content}\n\g<2>", text, flags=re.DOTALL)
        if found != 1:
            raise SystemExit(f"README.md has {found} sections marked {section.__name__!r}; it needs one")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
