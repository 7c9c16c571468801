"""CPU time to the loss of nanoGPT's README recipe for CPUs, nanoGPT beside recipes/race.yaml, on the same text.

nanoGPT (https://github.com/karpathy/nanoGPT) is cloned into runs/race and run as it is, by the command of its README; a
clone that is there already, or that --nanogpt names, is used. Both train in a process of one thread each, turn by turn.
CPU time is that of the whole process: starting, reading, training and its own validations. The loss is nats a character
over all held-out text in windows of 64 characters, measured alike for both afterwards. A line a run is written to
benchmarks/results/race.jsonl; about ten minutes:

    python benchmarks/race.py --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from layer import RESULTS, machine
from torch import Tensor

import tokenformer
from tokenformer.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "runs" / "race"
RECIPE = ROOT / "recipes" / "race.yaml"
CONTEXT = 64
NANOGPT_URL = "https://github.com/karpathy/nanoGPT"
# Of the README, section "I only have a macbook", without its log of every step.
NANOGPT = (
    "train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=100 "
    "--block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
    "--dropout=0.0"
)
# Runs in nanoGPT's folder, for a checkpoint needs its code; leaves the loss of every held-out window.
EVALUATE = """
import pickle, sys, torch
from model import GPT, GPTConfig
saved = torch.load("out-shakespeare-char/ckpt.pt", weights_only=False)
model = GPT(GPTConfig(**saved["model_args"]))
model.load_state_dict(saved["model"])
ids = torch.load(sys.argv[1])
stoi = pickle.load(open("data/shakespeare_char/meta.pkl", "rb"))["stoi"]
table = torch.tensor([stoi.get(chr(byte), 0) for byte in range(256)])
total = 0.0
with torch.no_grad():
    for part in table[ids].split(64):
        total += model.eval()(part[:, :-1].contiguous(), part[:, 1:].contiguous())[1].item() * len(part)
print(total / len(ids))
"""


def cpu_seconds(command: list[str], folder: Path) -> float:
    """Run a command on one thread and return the CPU time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def prepare(nanogpt: Path) -> Tensor:
    """Fetch nanoGPT and its text where they are missing, split the text as nanoGPT does, and return the windows."""
    if not nanogpt.exists():
        subprocess.run(["git", "clone", "--depth", "1", NANOGPT_URL, str(nanogpt)], check=True)
    subprocess.run([sys.executable, "data/shakespeare_char/prepare.py"], cwd=nanogpt, check=True)
    text = (nanogpt / "data" / "shakespeare_char" / "input.txt").read_text(encoding="utf-8")
    split = int(len(text) * 0.9)
    (FOLDER / "train.txt").write_text(text[:split], encoding="utf-8")
    (FOLDER / "val.txt").write_text(text[split:], encoding="utf-8")
    held_out = torch.tensor(list(text[split:].encode()))
    windows = held_out.unfold(0, CONTEXT + 1, CONTEXT).clone()
    torch.save(windows, FOLDER / "windows.pt")
    return windows


def race_nanogpt(nanogpt: Path, windows: Tensor, seed: int) -> dict[str, Any]:
    """Train nanoGPT, whose seed cannot be chosen."""
    seconds = cpu_seconds([sys.executable, *NANOGPT.split()], nanogpt)
    command = [sys.executable, "-c", EVALUATE, str(FOLDER / "windows.pt")]
    found = subprocess.run(command, cwd=nanogpt, check=True, capture_output=True, text=True)
    return {"who": "nanoGPT", "cpu_seconds": seconds, "loss": float(found.stdout.split()[-1])}


@torch.no_grad()
def race_ours(nanogpt: Path, windows: Tensor, seed: int) -> dict[str, Any]:
    """Train the recipe with a seed."""
    output = FOLDER / f"seed-{seed}"
    shutil.rmtree(output, ignore_errors=True)
    recipe = FOLDER / "recipe.json"  # which is YAML too
    recipe.write_text(json.dumps(load_recipe(RECIPE).model_dump(exclude_unset=True) | {"seed": seed}), encoding="utf-8")
    seconds = cpu_seconds([sys.executable, "-m", "tokenformer", "train", str(recipe), "-o", str(output)], ROOT)
    model, tokenizer, _ = tokenformer.load(output / "stage1")
    assert tokenizer is not None
    table = torch.tensor([tokenizer.convert_tokens_to_ids(tokenizer.tokenize(chr(byte)))[0] for byte in range(128)])
    total = 0.0
    for part in table[windows].split(64):
        logits = model.eval()(part[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").item()
    return {"who": "tokenformer", "seed": seed, "cpu_seconds": seconds, "loss": total / windows[:, 1:].numel()}


def main() -> None:
    """Race, turn by turn."""
    parser = argparse.ArgumentParser(description="nanoGPT's README recipe for CPUs beside recipes/race.yaml")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each")
    parser.add_argument("--nanogpt", type=Path, default=FOLDER / "nanoGPT", help="a clone of nanoGPT")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    windows = prepare(arguments.nanogpt)
    entrants: list[Callable[[Path, Tensor, int], dict[str, Any]]] = [race_nanogpt, race_ours]
    lines: list[dict[str, Any]] = []
    for seed in range(arguments.rounds):
        for entrant in entrants:
            lines.append(entrant(arguments.nanogpt, windows, seed) | {"machine": machine()})
            print(json.dumps(lines[-1]), flush=True)
            (RESULTS / "race.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    seconds = {w: [x["cpu_seconds"] for x in lines if x["who"] == w] for w in ("nanoGPT", "tokenformer")}
    ratios = [ours / theirs for ours, theirs in zip(seconds["tokenformer"], seconds["nanoGPT"], strict=True)]
    print(f"CPU time, ours / nanoGPT's: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
