"""Seconds, packages and megabytes of installing from nothing, as `make demo` and `make test` do, and with pip alone.

Each way takes a fresh clone of the last commit, an environment of its own and no cache, so it downloads everything.
Writes a line a step to results/install.jsonl. Needs the package registry, and 7 GB below the temporary folder.

    python benchmarks/install.py
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "install.jsonl"
ASKED = {"demo": 90.0}
# `false` stands for a uv that cannot: the Makefile then lets pip resolve and install.
WAYS = {"uv": [], "pip alone": ["UV=false"]}
STEPS = {
    "environment": ".venv/bin/python",
    "uv": ".venv/bin/uv",
    "demo": ".venv/demo-installed",
    "test": ".venv/installed",
}


def packages(environment: Path) -> int:
    """Count the distributions of an environment."""
    return len(list(environment.glob("lib/python*/site-packages/*.dist-info")))


def megabytes(environment: Path) -> int:
    """Sum the files of an environment, links not followed."""
    return round(sum(f.lstat().st_size for f in environment.rglob("*")) / 1e6)


def install(way: str, clone: Path) -> list[dict[str, Any]]:
    """Make each step's target and say how long it took and what is there afterwards."""
    environment = {**os.environ, "PIP_NO_CACHE_DIR": "1"}
    made, total = [], 0.0
    for step, target in STEPS.items():
        load, began = os.getloadavg()[0], time.perf_counter()
        command = ["make", target, *WAYS[way], f"PYTHON={sys.executable}"]
        subprocess.run(command, cwd=clone, env=environment, check=True)
        seconds = time.perf_counter() - began
        total += seconds
        line = {"way": way, "step": step, "seconds": round(seconds, 1), "seconds_so_far": round(total, 1)}
        line |= {"packages": packages(clone / ".venv"), "megabytes": megabytes(clone / ".venv")}
        made.append(line | {"load_before": round(load, 1)} | ({"asked": ASKED[step]} if step in ASKED else {}))
    return made


def main() -> None:
    """Install in every way and write the results."""
    machine = {"cores": os.cpu_count(), "system": platform.platform(terse=True), "python": platform.python_version()}
    # Wheels that pip finds on a disk, PyTorch perhaps, cost no download.
    machine |= {"wheels_on_disk": "PIP_FIND_LINKS" in os.environ, "date": datetime.date.today().isoformat()}
    lines: list[dict[str, Any]] = []
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["git", "clone", "--quiet", str(ROOT), folder], check=True)
            lines += [line | {"machine": machine} for line in install(way, Path(folder))]
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
