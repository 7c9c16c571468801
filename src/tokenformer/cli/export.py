"""Exports: making one, and loading what `generate` and `evaluate` are given, an export or a checkpoint."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .arguments import Force, Model, Output
from .console import make_console
from .groups import note_order

if TYPE_CHECKING:
    from ..checkpoints.lineage import Lineage

exports = typer.Typer()


@exports.command()
def export(
    checkpoint: Model,
    output: Output,
    to: Annotated[str, typer.Option(help="openvino, onnx or executorch.", metavar="ENGINE")] = "openvino",
    weights: Annotated[
        str | None, typer.Option(help="int8 or int4, for fewer bits a weight.  [default: float32]", metavar="TYPE")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(help="Text to check on.  [default: as trained, or python-stdlib]", metavar="SOURCE"),
    ] = None,
    force: Force = False,
) -> None:
    """Write a checkpoint for a faster engine, and check it there."""
    from ..checkpoints.files import check_target
    from ..serve.engines import find_engine

    find_engine(to, weights)
    check_target(output, force=force)
    from ..checkpoints.checkpoint import load_checkpoint, need_tokenizer
    from ..serve.export import export as run
    from .tables import export_table

    console = make_console()
    with make_console(stderr=True).status("exporting and checking, which takes a minute or more"):
        model, tokenizer, lineage = load_checkpoint(checkpoint)
        tokenizer = need_tokenizer(checkpoint, model.config, tokenizer)
        source = text or (lineage.last_recipe or {}).get("data", {}).get("source") or "python-stdlib"
        written = run(model, tokenizer, output, to=to, weights=weights, text=source, lineage=lineage, force=force)
    console.print(export_table(written))
    console.print(f"Written: {output}", markup=False, soft_wrap=True)


def load_to_run(folder: Path, *, keep: float = 1.0) -> tuple[Any, Any, "Lineage"]:
    """Load a checkpoint, an add-on or an export: model, tokenizer, lineage."""
    from ..checkpoints.checkpoint import load_checkpoint, load_tokenizer, need_tokenizer
    from ..checkpoints.verify import exported_for, read_lineage
    from ..errors import GrowthError
    from ..training.processes import processes

    if exported_for(folder) is not None:
        from ..serve.exported import ExportedForCausalLM

        if keep != 1:
            raise GrowthError(f"keep is {keep}, but export {folder} is whole; shrink the checkpoint and export that")
        model: Any = ExportedForCausalLM.from_pretrained(folder)
        return model, need_tokenizer(folder, model.config, load_tokenizer(folder, model.config)), read_lineage(folder)
    model, tokenizer, lineage = load_checkpoint(folder, keep=keep)
    note_order(lineage, keep)
    model.to(processes().device)
    return model, tokenizer, lineage
