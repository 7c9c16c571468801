"""A checkpoint in SGLang's server, through its Transformers backend and the code in the checkpoint, on a CPU.

SGLang supports CPUs by kernels (sgl_kernel) that have to be built from source for AVX-512 and AMX, and pins torch with
CUDA. What runs here is SGLang without kernels: `pip install --no-deps sglang==0.5.23`, a CPU build of torch,
transformers 5.19 and what else SGLang imports, openai too, in an environment of its own; tokenformer is not needed.
Whatever SGLang imports from torchvision and sgl_kernel is replaced by stand-ins that raise when they are called, so an
answer comes from SGLang's own scheduler, cache and PyTorch paths.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import torch
from openai import OpenAI
from record import arguments, record
from server import running
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ["ROMEO", "First Citizen:\n", "To be, or not to be", "Good morrow, my lord"]
NEW = 24
ENGINE = [
    *("--device", "cpu", "--model-impl", "transformers", "--dtype", "float32", "--trust-remote-code"),
    *("--attention-backend", "torch_native", "--sampling-backend", "pytorch", "--grammar-backend", "none"),
    *("--disable-cuda-graph", "--disable-overlap-schedule", "--skip-server-warmup"),
    *("--max-total-tokens", "512", "--max-running-requests", "4"),
]
# Only for SGLang: transformers, asking whether torchvision is installed, must go on hearing no.
STAND_INS = """
import importlib.machinery, sys, types

class Refuse(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return cls
    def __call__(cls, *args, **kwargs):
        raise RuntimeError("a stand-in for a missing package was called")

class StandIn(metaclass=Refuse):
    pass

class Module(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return StandIn

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torchvision", "sgl_kernel"):
            frame = sys._getframe(1)
            while frame and "importlib" in frame.f_code.co_filename:
                frame = frame.f_back
            if frame and "/site-packages/sglang/" in frame.f_code.co_filename:
                return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Module(spec.name)
    def exec_module(self, module):
        pass

sys.meta_path.append(Finder())
"""


@torch.no_grad()
def greedy(model: Any, ids: list[int]) -> list[int]:
    """The next text tokens by whole forward passes without a cache."""
    new: list[int] = []
    while len(new) < NEW and model.config.eos_token_id not in new:
        new.append(int(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax()))
    return new


args = arguments(__doc__)
start = time.monotonic()
tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(args.checkpoint, trust_remote_code=True, dtype=torch.float32).eval()
prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
expected = [greedy(model, ids) for ids in prompts]
assert len(set(map(tuple, expected))) > 1, "every prompt continues alike: this checkpoint shows nothing"

scratch = tempfile.TemporaryDirectory()
folder = Path(scratch.name)
(folder / "sitecustomize.py").write_text(STAND_INS)  # which every process of the server imports first
environment = {**os.environ, "PYTHONPATH": str(folder), "SGLANG_USE_CPU_ENGINE": "1"}
command: list[str | Path] = [sys.executable, "-m", "sglang.launch_server", "--model-path", args.checkpoint, *ENGINE]
with scratch, running(command, log=folder / "log", environment=environment) as (address, _):
    settings = {"temperature": 0, "max_new_tokens": NEW}
    body = json.dumps({"input_ids": prompts, "sampling_params": settings}).encode()
    with urlopen(Request(f"{address}/generate", body, {"Content-Type": "application/json"}), timeout=300) as answer:
        got = [one["output_ids"] for one in json.load(answer)]
    for prompt, theirs, ours in zip(PROMPTS, got, expected, strict=True):
        assert theirs == ours, f"{prompt!r}: SGLang {theirs}, transformers {ours}"
    client = OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300, max_retries=0)
    stream = client.completions.create(
        model=str(args.checkpoint), prompt=PROMPTS[0], max_tokens=NEW, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert "".join(pieces) == tokenizer.decode(expected[0], skip_special_tokens=True) and len(pieces) > 1, pieces

record(
    args.results,
    "SGLang",
    packages=["sglang", "transformers", "torch", "openai"],
    ran="sglang.launch_server on a CPU, asked for text tokens and by an OpenAI client; without the package",
    result=f"the greedy text tokens of uncached transformers, {sum(map(len, expected))} after {len(PROMPTS)} prompts "
    f"in one batch; the same text streamed in {len(pieces)} pieces",
    limits="its Transformers backend in PyTorch, float32: SGLang's kernels, CUDA and its pinned torch were not there, "
    "and stand-ins took the place of torchvision and sgl_kernel; tensor parallel was not tried",
    seconds=round(time.monotonic() - start),
)
