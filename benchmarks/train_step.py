"""Compare TokenFormer with transformers' GPT-NeoX at equal parameters: a training step, and greedy decoding.

Run from the repository root (about four minutes):

    python benchmarks/train_step.py                            # both, float32
    python benchmarks/train_step.py --only decode --seconds 60
    python benchmarks/train_step.py --dtype bfloat16           # training under autocast, decoding with bfloat16 weights

Both of our families take part: `paper` (every projection is Pattention) and `ffn` (plain linear attention, all
parameter tokens in the feed-forward). GPT-NeoX's intermediate_size is chosen so that the parameters outside the
embedding agree within 1 %. Rounds are interleaved and figures are medians of the rounds' ratios, see layer.py.

    train    forward, backward and AdamW step on 4 × 256 text tokens, ~14M parameters; time ours / GPT-NeoX's
    decode   `generate` with a key-value cache, batch 1, ~60M parameters (far larger than the L3 cache); text tokens per
             second ours / GPT-NeoX's, and bytes of weights read per second as a fraction of the memory bandwidth that
             reading 512 MiB (the better of a sum and a matrix-vector product) reached in the same rounds

Every run adds a line per case to benchmarks/results/train_step.jsonl, with `asked`, `reached` and `met` for each goal.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from layer import RESULTS, arguments, goal, how, interleaved, machine, ratio, write
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedModel

from tokenformer import TokenformerConfig, TokenformerForCausalLM

TRAIN = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "vocab_size": 4096}
DECODE = {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "vocab_size": 4096}
BATCH, TEXT_TOKENS = 4, 256
PROMPT, NEW = 32, 64
BUFFER_BYTES = 512 * 2**20
GOALS = {"train time/gpt_neox": 1.10, "decode speed/gpt_neox": 1.0}


def ours(sizes: dict[str, int]) -> dict[str, PreTrainedModel]:
    """Make one model of each family; their parameter counts are the same."""
    d = sizes["hidden_size"]
    paper = {"qkv_param_tokens": d, "output_param_tokens": d, "ffn_param_tokens": 4 * d}
    ffn = {"qkv_param_tokens": 0, "output_param_tokens": 0, "ffn_param_tokens": 4 * d + 4 * d - 2 * d}
    return {
        name: TokenformerForCausalLM(TokenformerConfig(**sizes, **tokens))
        for name, tokens in (("paper", paper), ("ffn", ffn))
    }


def gpt_neox(sizes: dict[str, int], body: int) -> PreTrainedModel:
    """Make the GPT-NeoX whose count outside the embedding is nearest to `body`."""
    d, layers = sizes["hidden_size"], sizes["num_hidden_layers"]
    attention = 4 * d * d
    intermediate = round((body / layers - attention) / (2 * d) / 8) * 8
    config = GPTNeoXConfig(
        **sizes,
        intermediate_size=intermediate,
        use_parallel_residual=False,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
    )
    return GPTNeoXForCausalLM(config)


def make_models(sizes: dict[str, int]) -> tuple[dict[str, PreTrainedModel], dict[str, int]]:
    """Return the three models and their parameters outside the embedding, which agree within 1 %."""
    torch.manual_seed(0)
    models = ours(sizes)
    body = models["paper"].num_parameters() - sizes["vocab_size"] * sizes["hidden_size"]
    models["gpt_neox"] = gpt_neox(sizes, body)
    counts = {name: m.num_parameters() - sizes["vocab_size"] * sizes["hidden_size"] for name, m in models.items()}
    assert max(counts.values()) <= 1.01 * min(counts.values()), counts
    return models, counts


def measure_train(dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    """Time one optimizer step of each model."""
    models, counts = make_models(TRAIN)
    ids = torch.randint(1, TRAIN["vocab_size"], (BATCH, TEXT_TOKENS))

    def step(model: PreTrainedModel) -> Callable[[], object]:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4, fused=True)

        def run() -> None:
            context: AbstractContextManager = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
            with context:
                loss = model(ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    times = interleaved({name: step(m) for name, m in models.items()}, seconds=seconds, max_rounds=100)
    results = []
    for family in ("paper", "ffn"):
        reached, quartiles = ratio(times, family, "gpt_neox")
        results.append(
            {
                "case": {"what": "train", "family": family, **how(dtype)},
                "sizes": TRAIN | {"batch": BATCH, "text_tokens": TEXT_TOKENS},
                "non_embedding_parameters": {k: counts[k] for k in (family, "gpt_neox")},
                "rounds": len(times[family]),
                "train time/gpt_neox": goal(GOALS["train time/gpt_neox"], reached) | {"quartiles": quartiles},
                "machine": machine(),
            }
        )
    return results


def measure_decode(dtype: torch.dtype, seconds: float) -> list[dict[str, Any]]:
    """Time `generate`, and reading memory, in the same rounds."""
    models, counts = make_models(DECODE)
    prompt = torch.randint(1, DECODE["vocab_size"], (1, PROMPT))

    def decode(model: PreTrainedModel) -> Callable[[], object]:
        model.eval().to(dtype)
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = 0

        def run() -> None:
            ids: Tensor = model.generate(prompt, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW)
            assert ids.shape[1] == PROMPT + NEW

        return run

    buffer = torch.ones(4096, BUFFER_BYTES // 4096 // 4)
    vector = torch.ones(buffer.shape[1])
    arms: dict[str, Callable[[], object]] = {name: decode(m) for name, m in models.items()}
    arms |= {"read: sum": buffer.sum, "read: matrix-vector": lambda: buffer @ vector}
    with torch.no_grad():
        times = interleaved(arms, seconds=seconds, max_rounds=100)
    # Bytes a second of the fastest reading of each round; a decoding's fraction is taken round by round.
    bandwidth = [
        BUFFER_BYTES / min(reads) for reads in zip(times["read: sum"], times["read: matrix-vector"], strict=True)
    ]
    weights = {name: sum(p.numel() * p.element_size() for p in m.parameters()) for name, m in models.items()}
    fractions = {
        name: statistics.median(NEW * weights[name] / t / b for t, b in zip(times[name], bandwidth, strict=True))
        for name in models
    }
    results = []
    for family in ("paper", "ffn"):
        reached, quartiles = ratio(times, "gpt_neox", family)
        results.append(
            {
                "case": {"what": "decode", "family": family, **how(dtype)},
                "sizes": DECODE | {"batch": 1, "prompt": PROMPT, "new_text_tokens": NEW},
                "non_embedding_parameters": {k: counts[k] for k in (family, "gpt_neox")},
                "rounds": len(times[family]),
                "decode speed/gpt_neox": goal(GOALS["decode speed/gpt_neox"], reached, at_least=True)
                | {"quartiles": quartiles},
                "fraction_of_memory_bandwidth": {k: round(fractions[k], 3) for k in (family, "gpt_neox")},
                "machine": machine(),
            }
        )
    return results


def main() -> None:
    """Measure what was asked for."""
    parser = arguments("Compare a training step and decoding with GPT-NeoX.", dtypes=["float32"], seconds=50)
    parser.add_argument("--only", choices=["train", "decode"])
    args = parser.parse_args()
    kinds = {"train": measure_train, "decode": measure_decode}
    results = []
    for threads in args.threads:
        torch.set_num_threads(threads)
        for dtype in args.dtype:
            for kind, measure in kinds.items():
                if args.only in (None, kind):
                    results += measure(getattr(torch, dtype), args.seconds)
    write(results, RESULTS / "train_step.jsonl", list(GOALS))


if __name__ == "__main__":
    main()
