"""What ternary, int8 and float32 maps cost in bits per byte, and take in bytes: recipes/compare/ternary.yaml, weighed.

    python benchmarks/ternary.py                    after `tokenformer compare recipes/compare/ternary.yaml`

Every final model of the largest budget is measured on the text that the comparison reports on: as it is; float ones
also with int8 maps (torchao, weights only, a scale a row), ternary ones also packed. The embedding, the head and the
norms stay float32 in all of them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torchao.quantization import Int8Tensor, Int8WeightOnlyConfig, quantize_

from tokenformer.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.compare.findings import Findings
from tokenformer.compare.results import Line, read_results
from tokenformer.compare.run import load_text
from tokenformer.evaluation import evaluate
from tokenformer.growth.pack import pack
from tokenformer.models.ternary import PackedLinear

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "ternary.jsonl"


def kept(model: Any, kind: str) -> Any:
    """Return the model with its maps kept as `kind` says, changed in place."""
    if kind == "int8":
        quantize_(model.model.layers, Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, nn.Linear))
    if kind == "packed":
        pack(model)
    return model


def tensors(module: nn.Module) -> Iterator[Tensor]:
    """Yield what a module's weights consist of."""
    for tensor in (*module.parameters(), *module.buffers()):
        yield from (tensor.qdata, tensor.scale) if isinstance(tensor, Int8Tensor) else (tensor,)


def measured(run: Line, folder: Path, text: Any, kind: str) -> Line:
    """Measure one model kept in one way."""
    checkpoint = folder / "segments" / run["segments"][-1] / "checkpoint"
    model, tokenizer, _ = load_checkpoint(checkpoint, dtype=torch.float32)
    model = kept(model, kind)
    maps = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear | PackedLinear)]
    (held,) = text.report.validation.values()
    line = {
        "arm": run["arm"],
        "seed": run["seed"],
        "kept": kind,
        "bits_per_byte": evaluate(model, held.blocks, num_bytes=held.num_bytes).bits_per_byte,
        "parameters": run["parameters"],
        "bytes_of_maps": sum(t.nbytes for m in maps for t in tensors(m)),
        "bytes_in_memory": sum(t.nbytes for t in tensors(model)),
    }
    if kind != "int8":
        with tempfile.TemporaryDirectory() as place:
            save_checkpoint(Path(place) / "saved", model, tokenizer)
            line["bytes_of_file"] = (Path(place) / "saved" / "model.safetensors").stat().st_size
    return line


def table(found: list[Line]) -> str:
    """Tabulate the means over seeds, smallest first, as Markdown."""
    rows = [
        "| model | maps kept as | parameters | bytes of maps | bytes in memory | bytes of the file | bits per byte |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in found:
        groups.setdefault((line["arm"], line["kept"]), []).append(line)
    for (arm, kind), of in sorted(groups.items(), key=lambda item: item[1][0]["bytes_in_memory"]):
        first, file = of[0], of[0].get("bytes_of_file")
        bits = [line["bits_per_byte"] for line in of]
        rows.append(
            f"| {arm} | {kind} | {first['parameters']:,} | {first['bytes_of_maps']:,} | {first['bytes_in_memory']:,} "
            f"| {f'{file:,}' if file else '–'} | {fmean(bits):.4f} ({min(bits):.4f} to {max(bits):.4f}) |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--compared", type=Path, default=ROOT / "runs" / "compare" / "ternary")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    findings = Findings.of(read_results(args.compared / "results.jsonl"))
    text, found = load_text(findings.recipe, args.compared), []
    for arm in findings.arms:
        is_ternary = findings.recipe.arms[arm].model.weights == "ternary"
        for run in findings.runs(arm):
            if run["budget"] == findings.last:
                kinds = ("ternary", "packed") if is_ternary else ("float32", "int8")
                found += [measured(run, args.compared, text, kind) for kind in kinds]
    args.results.write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    print(table(found))


if __name__ == "__main__":
    main()
