"""Export a checkpoint to every engine that is installed, with every kind of weights that it has, and run it there.

Needs pip install 'tokenformer[openvino,onnx,executorch]', or some of them.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from record import arguments, record

from tokenformer import ExportedForCausalLM, export, load
from tokenformer.serve.engines import ENGINES

NEW = 24
# Of different lengths, so that padding is tried too.
PROMPTS = ["ROMEO", "First Citizen:\nBefore we go"]
WAYS: dict[str, dict[str, Any]] = {
    "greedily": {"do_sample": False},
    "by 3 beams": {"do_sample": False, "num_beams": 3},
    "sampled": {"do_sample": True, "top_k": 20},
}
ROWS = {"openvino": "OpenVINO", "onnx": "ONNX, ONNX Runtime", "executorch": "ExecuTorch, XNNPACK"}
LIMITS = {
    "openvino": "holds one text at a time, so no assisted decoding. optimum-intel not tried: 2.2 wants transformers "
    "below 5.6",
    "onnx": "each step gives the cache back and takes it again. optimum-onnx 0.1 not tried: it wants transformers "
    "below 4.58",
    "executorch": "memory is planned at export, here for 8 rows and the model's context; each step copies the cache in "
    "and out. Not run on a phone; optimum-executorch 1.1 not tried: it wants transformers 5.0.0rc1",
}


def texts(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """Continue the prompts, padded on the left, in every way."""
    model.generation_config.eos_token_id = None
    prompt = tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    found = []
    for ways in WAYS.values():
        torch.manual_seed(0)
        found.append(model.generate(**prompt, max_new_tokens=NEW, pad_token_id=0, **ways))
    return found


def genai_agrees(folder: Path, model: Any, tokenizer: Any) -> bool:
    """Whether OpenVINO GenAI's own pipeline continues a prompt as the model does."""
    import openvino_genai

    pipeline = openvino_genai.LLMPipeline(folder, "CPU")
    (prompt,) = tokenizer(PROMPTS[:1], return_tensors="pt")["input_ids"].unsqueeze(0)
    ids = model.generate(prompt, max_new_tokens=NEW, do_sample=False)[0, prompt.shape[1] :]
    written = str(pipeline.generate(PROMPTS[0], max_new_tokens=NEW, do_sample=False, ignore_eos=True))
    return written == tokenizer.decode(ids)


def main() -> None:
    """Export, compare and leave a row for each engine."""
    args = arguments(__doc__ or "")
    model, tokenizer, lineage = load(args.checkpoint)
    assert tokenizer is not None and lineage.last_recipe is not None
    source = lineage.last_recipe["data"]["source"]
    expected = texts(model, tokenizer)
    for name, engine in ENGINES.items():
        if not all(map(find_spec, engine.packages)):
            continue
        figures, told = {}, []
        for weights in (None, *engine.weights):
            with tempfile.TemporaryDirectory() as temporary:
                folder = Path(temporary) / "export"
                written = export(model, tokenizer, folder, to=name, weights=weights, text=source, lineage=lineage)
                found = texts(ExportedForCausalLM.from_pretrained(folder), tokenizer)
                rise = written.exported_bits_per_byte - written.bits_per_byte
                size = f"{written.exported_bytes / 1e6:.1f} MB"
                if weights is None:
                    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
                    told.append(
                        f"float32: {size} for weights of {written.model_bytes / 1e6:.1f} MB, logits within "
                        f"{written.logits_difference:.1e} of PyTorch's; {NEW} text tokens for each of {len(PROMPTS)} "
                        f"left-padded prompts, {', '.join(WAYS)}, equal model.generate's"
                    )
                    if name == "openvino" and find_spec("openvino_genai"):
                        assert genai_agrees(folder, model, tokenizer)
                        told.append("OpenVINO GenAI's pipeline writes the same from the same folder")
                else:
                    told.append(f"{weights}: {size}, bits per byte {rise:+.5f} on {written.bits_per_byte:.4f}")
            figures[weights or "float32"] = asdict(written) | {"text": str(source)}
        record(
            args.results,
            ROWS[name],
            packages=["transformers", "torch", *(package.replace("_", "-") for package in engine.packages)],
            ran="tokenformer export and generate, on a CPU",
            result="; ".join(told),
            limits=LIMITS[name],
            figures=figures,
        )


if __name__ == "__main__":
    main()
