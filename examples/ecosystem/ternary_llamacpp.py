"""A ternary Llama that was grown, in llama.cpp: two bits a weight as GGUF TQ2_0, through its own converter.

The checkpoint is what `tokenformer pack` makes of one with `weights: ternary`. Needs what
grown_llamacpp.py needs.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grown_llamacpp import PROGRAM, VERSION, install, run
from record import arguments, record
from reference import NEW, PROMPTS, greedy, growth, silence_grown
from transformers import AutoModelForCausalLM, AutoTokenizer

# llama.cpp rounds what goes into such a map to 8 bits, 256 numbers at a time, so that close races end another way.
CLOSE = 0.1


def compared(file: Path, model: Any, source: Path) -> tuple[float, int, int]:
    """Compare the maps of a file with a model's: the largest relative error, how many there are, and their bytes."""
    sys.path.insert(0, str(source / "gguf-py"))
    from gguf import GGMLQuantizationType, GGUFReader, dequantize

    names = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    error, count, size = 0.0, 0, 0
    for tensor in GGUFReader(file).tensors:
        kind, _, leaf = tensor.name.removeprefix("blk.").partition(".")
        if tensor.tensor_type != GGMLQuantizationType.TQ2_0:
            continue
        count, size = count + 1, size + tensor.n_bytes
        part = leaf.removeprefix("ffn_").removesuffix(".weight")
        if part in names:  # the rows of queries and keys lie in another order
            ours = model.model.layers[int(kind)].mlp.get_submodule(names[part]).weight.detach().numpy()
            theirs = dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(np.sign(ours), np.sign(theirs)), f"{tensor.name} has other numbers"
            error = max(error, float(np.max(np.abs(theirs - ours) / np.abs(ours).max())))
    return error, count, size


def main() -> None:
    args = arguments(__doc__ or "")
    start = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
    expected = [greedy(model, tokenizer(prompt).input_ids) for prompt in PROMPTS]
    maps = sum(p.nbytes for layer in model.model.layers for p in layer.parameters() if p.dim() == 2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, release = install(folder)
        file, convert = folder / "ternary.gguf", source / "convert_hf_to_gguf.py"
        run(sys.executable, convert, args.checkpoint.resolve(), "--outtype", "tq2_0", "--outfile", file, cwd=source)
        error, count, size = compared(file, model, source)
        assert count == 7 * len(model.model.layers) and error < 2**-11, f"{count} ternary maps, error {error}"
        (program := folder / "generate.mjs").write_text(PROGRAM)
        answers = json.loads(run("node", program, file, json.dumps(PROMPTS), str(NEW), cwd=folder))
        total = file.stat().st_size
    assert "tokenformer" not in sys.modules
    same = 0
    for right, (prompt, new) in zip(expected, answers, strict=True):
        assert prompt == right.prompt, f"the prompt became {prompt}, in transformers {right.prompt}"
        agreed = next((i for i, (a, b) in enumerate(zip(new, right.new, strict=False)) if a != b), len(right.new))
        same += agreed
        if agreed < len(right.new):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + new[:agreed]]), use_cache=False).logits[0, -1]
            lost = float(logits.max() - logits[new[agreed]])
            assert lost < CLOSE, f"llama.cpp took another text token, {lost:.3f} below in the logits"
    silence_grown(model)
    assert any(greedy(model, c.prompt).new != c.new for c in expected), (
        "what was grown adds nothing: this shows nothing"
    )
    record(
        args.results,
        "llama.cpp, ternary Llama",
        packages=["transformers", "torch"],
        ran=f"{growth(args.checkpoint)}, ternary, packed: convert_hf_to_gguf.py --outtype tq2_0 of llama.cpp "
        f"{release}; then that release, built for CPUs, in node-llama-cpp {VERSION}; without the package",
        result=f"{count} maps of {size / 1e6:.2f} MB where float32 takes {maps / 1e6:.2f}, the same −1, 0 and 1, their "
        f"scales within {error:.1e}; of {sum(len(c.new) for c in expected)} greedy text tokens after {len(expected)} "
        f"prompts, {same} come before the first that differs, which lies less than {CLOSE} below in the logits; they "
        "are others when what was grown is silenced",
        limits="the embedding is float16; llama.cpp rounds what goes into a map to 8 bits, 256 numbers at a time, so "
        "that close races end another way; the model has read one page again and again",
        gguf_bytes=total,
        seconds=round(time.monotonic() - start),
    )


if __name__ == "__main__":
    main()
