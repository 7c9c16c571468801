"""Export a checkpoint to ExecuTorch with transformers' own exporter and compare its XNNPACK runtime with PyTorch.

export_onnx.py says what is compared. Needs executorch.
"""

from __future__ import annotations

from export_onnx import MAX_BATCH, compare
from record import arguments, record


def main() -> None:
    """Compare and leave the outcome."""
    args = arguments(__doc__ or "")
    outcome = compare(args.checkpoint, "executorch", backend="xnnpack")
    record(
        args.results,
        "ExecuTorch, XNNPACK",
        packages=["transformers", "torch", "executorch"],
        ran="transformers.exporters: one graph with dynamic batch, length and cache length; float32, run on a CPU",
        limits=f"memory is planned at export, here for {MAX_BATCH} rows and the model's context; each step copies the "
        "cache in and out. Not run on a phone; optimum-executorch 1.1 not tried: it wants transformers 5.0.0rc1",
        **outcome,
    )


if __name__ == "__main__":
    main()
