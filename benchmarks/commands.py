"""Time how long commands take to answer: help, version, a usage mistake, `inspect`.

    python benchmarks/commands.py

Each command runs in a process of its own, once to warm the caches of files and then five times; a line of
benchmarks/results/commands.jsonl holds the first time, and the medians of the five: by the clock, and of the processor,
which counts no waiting for a core. `bare` is Python alone, to judge the machine by; `load` is how many processes wanted
a core during the last minute.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from tokenformer import TokenformerConfig, TokenformerForCausalLM, save
from tokenformer.checkpoints.lineage import Lineage

RESULTS = Path(__file__).parent / "results" / "commands.jsonl"
SIZES = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def seconds(command: list[str]) -> tuple[float, float]:
    """Run a command, and return how long it took by the clock, and how long processors worked for it."""
    began, worked = time.perf_counter(), sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    subprocess.run(command, capture_output=True, check=False)
    return time.perf_counter() - began, sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]) - worked


def main() -> None:
    """Time the commands and write the results."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        tokens = dict.fromkeys(("qkv_param_tokens", "output_param_tokens", "ffn_param_tokens"), 64)
        save(checkpoint, TokenformerForCausalLM(TokenformerConfig(**SIZES, **tokens)), None, Lineage())
        commands = {
            "--help": ["--help"],
            "--version": ["--version"],
            "a misspelt command": ["gro"],
            "a misspelt option": ["grow", "--hlp"],
            "a missing recipe": ["train", "none.yaml"],
            "a missing checkpoint": ["inspect", "none"],
            "inspect": ["inspect", str(checkpoint)],
        }
        lines = []
        for name, command in {"bare": ["-c", "pass"], **commands}.items():
            arguments = [sys.executable, *([] if name == "bare" else ["-m", "tokenformer"]), *command]
            first, *times = [seconds(arguments) for _ in range(6)]
            line = {
                "command": name,
                "first_seconds": round(first[0], 3),
                "median_seconds": round(statistics.median(wall for wall, _ in times), 3),
                "median_processor_seconds": round(statistics.median(processor for _, processor in times), 3),
                "load": round(os.getloadavg()[0], 1),
                "cores": os.cpu_count(),
                "python": platform.python_version(),
                "date": datetime.now(UTC).isoformat(timespec="seconds"),
            }
            print(line)
            lines.append(line)
    RESULTS.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
