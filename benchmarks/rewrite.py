"""Memory and time of operations on the files of a 1.5B checkpoint, against copying those files durably.

Each operation runs in a process of its own, alternately with the copy; the weights are random: what is measured does
not depend on them. Appends a line an operation to results/rewrite.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from tokenformer import TokenformerConfig
from tokenformer.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.checkpoints.rewrite import open_checkpoint
from tokenformer.growth.grow import grow_operation
from tokenformer.growth.operations import apply

RESULTS = Path(__file__).parent / "results" / "rewrite.jsonl"
ASKED = {"peak": 1.2e9, "ratio": 1.5}
LLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
GROWTH: dict[str, Any] = {"ffn_param_tokens": "+10%", "name": "more"}
# What each operation reads: "parent" has one token group, "grown" two.
SOURCES = {"grow": "parent", "drop": "grown", "consolidate": "grown", "split": "grown", "attach": "parent"}
# VmHWM, in KiB: getrusage's figure starts from that of the process which started this one.
PROGRAM = f"""
import json, re, sys, time
from pathlib import Path
from tokenformer.growth.groups import consolidate_operation, drop_operation
from tokenformer.growth.grow import grow_operation
from tokenformer.checkpoints.addons import attach_operation, split_state
from tokenformer.checkpoints.rewrite import open_checkpoint, rewrite
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
operation, source, output = sys.argv[1:]
imports, began, cpu = peak(), time.perf_counter(), time.process_time()
stored = open_checkpoint(source)
if operation == "grow":
    rewrite(stored, output, grow_operation(stored.config, seed=0, dtype=stored.dtype, **{GROWTH}))
elif operation == "drop":
    rewrite(stored, output, drop_operation(stored.config, ["more"]))
elif operation == "consolidate":
    rewrite(stored, output, consolidate_operation(stored.config))
elif operation == "split":
    split_state(stored.config, stored.tensors, "more", "more.safetensors", force=True)
else:
    rewrite(stored, output, attach_operation(stored.config, stored.tensors, "more.safetensors"))
took = {{"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}}
print(json.dumps({{"imports": imports, "peak": peak(), **took}}))
"""


def config_of(kind: str, *, small: bool) -> Any:
    """Return the configuration of the model of this kind: about 1.5B parameters, or 1 % of it."""
    if kind == "tokenformer":
        return TokenformerConfig.from_preset("4m" if small else "1.5b")
    sizes = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 4}
    return LlamaConfig(**(sizes if small else LLAMA), num_hidden_layers=8 if small else 32)


def write_model(folder: Path, config: Any, dtype: torch.dtype) -> None:
    """Write a checkpoint of random weights without holding them all."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = model.state_dict()
    generator = torch.Generator().manual_seed(0)

    def draw(names: Sequence[str]) -> dict[str, Tensor]:
        return {n: torch.empty(state[n].shape, dtype=dtype).normal_(std=0.02, generator=generator) for n in names}

    save_checkpoint(folder, model, None, Lineage(), weights=draw)


def copy_durably(source: Path, target: Path) -> float:
    """Copy a checkpoint's files, flush each to the disk, and return the seconds."""
    began = time.perf_counter()
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with (target / file.name).open("rb") as stream:
            os.fsync(stream)
    return time.perf_counter() - began


def run(operation: str, folder: Path) -> dict[str, Any]:
    """Carry out one operation in a process of its own, on the checkpoints in `folder`."""
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, operation, SOURCES[operation], "output"]
    done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def is_identical(folder: Path) -> bool:
    """Compare what `grow` has written to `folder`/output with growing the parent in memory."""
    model, _, _ = load_checkpoint(folder / "parent")
    apply(model, grow_operation(model.config, seed=0, dtype=model.dtype, **GROWTH))
    written, state = open_checkpoint(folder / "output"), model.state_dict()
    same_config = AutoConfig.from_pretrained(folder / "output").token_groups == model.config.token_groups
    tied = set(model.all_tied_weights_keys)
    return same_config and all(torch.equal(written.tensors[n], t) for n, t in state.items() if n not in tied)


def measure(kind: str, folder: Path, *, dtype: torch.dtype, rounds: int, small: bool) -> None:
    """Run every operation on one kind of model, and leave what it took."""
    config = config_of(kind, small=small)
    write_model(folder / "parent", config, dtype)
    for operation, source in SOURCES.items():
        took, copies = [], []
        for _ in range(rounds):
            shutil.rmtree(folder / "output", ignore_errors=True)
            copies.append(copy_durably(folder / source, folder / "copy"))
            shutil.rmtree(folder / "copy")
            took.append(run(operation, folder))
        line = {
            "operation": operation,
            "model": kind,
            "dtype": str(dtype).removeprefix("torch."),
            "source_bytes": sum(file.stat().st_size for file in (folder / source).iterdir()),
            "imports": max(t["imports"] for t in took),
            "peak": max(t["peak"] for t in took),
            "seconds": [round(t["seconds"], 2) for t in took],
            "cpu_seconds": [round(t["cpu"], 2) for t in took],
            "copy_seconds": [round(seconds, 2) for seconds in copies],
            "ratio": round(statistics.median(t["seconds"] for t in took) / statistics.median(copies), 3),
            "asked": ASKED,
        }
        if operation == "grow":
            if small:
                line["identical_to_memory"] = is_identical(folder)
            (folder / "output").rename(folder / "grown")
        with RESULTS.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        print(line, flush=True)


def main() -> None:
    """Measure a TokenFormer and a Llama, each first small, where the result is compared with that in memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where there is room for four copies of the model (25 GB)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=["tokenformer", "llama"])
    arguments = parser.parse_args()
    for kind in arguments.kinds:
        for small in (True, False):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                dtype = getattr(torch, arguments.dtype)
                measure(kind, Path(folder), dtype=dtype, rounds=arguments.rounds, small=small)


if __name__ == "__main__":
    main()
