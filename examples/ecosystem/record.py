"""What every script here shares: its arguments, and the line it leaves for the table in docs/ecosystem.md."""

from __future__ import annotations

import argparse
import json
import platform
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path


def arguments(description: str) -> argparse.Namespace:
    """Read the command line: `checkpoint`, a folder that `tokenformer train` wrote, and `results`, a file or None."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder of a checkpoint, such as runs/quick/stage2")
    parser.add_argument("--results", type=Path, help="JSONL file to append the outcome to")
    return parser.parse_args()


def record(
    results: Path | None, tool: str, *, packages: list[str], ran: str, result: str, limits: str = "", **figures: object
) -> None:
    """Print one outcome as a line of JSON and append it to `results`; of several lines of a tool the last counts.

    Args:
        results: file to append to; None prints only.
        tool: name of the row in docs/ecosystem.md.
        packages: distributions whose installed versions belong to the outcome.
        ran: what was run.
        result: what came out, in words.
        limits: what does not work or was not tried.
        figures: what was measured, by name.
    """
    line = json.dumps(
        {
            "tool": tool,
            "versions": {package: metadata.version(package) for package in packages},
            "ran": ran,
            "result": result,
            "limits": limits,
            **figures,
            "date": datetime.now(UTC).date().isoformat(),
            "python": platform.python_version(),
        },
        ensure_ascii=False,
    )
    print(line)
    if results is not None:
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
