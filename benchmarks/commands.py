"""Time how long commands take to answer: help, version, a usage mistake, `inspect`.

    python benchmarks/commands.py

Each command runs in a process of its own, once to warm the caches of files and then five times; a line of
benchmarks/results/commands.jsonl holds the first time, and the median of the five. `bare` is Python alone, to judge
the machine by; `load` is how many processes wanted a core during the last minute.
"""

from __future__ import annotations

import json
import os
import platform
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


def seconds(command: list[str]) -> float:
    """Run a command, and return how long it took."""
    began = time.perf_counter()
    subprocess.run(command, capture_output=True, check=False)
    return time.perf_counter() - began


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
                "first_seconds": round(first, 3),
                "median_seconds": round(statistics.median(times), 3),
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
