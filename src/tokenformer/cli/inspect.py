"""What a checkpoint is, and what a text or a prompt uses of it: `tokenformer inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .arguments import Checkpoint, Json
from .groups import judged

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from ..growth.architectures import GroupEntry

inspection = typer.Typer()


@inspection.command()
def inspect(
    checkpoint: Checkpoint,
    text: Annotated[
        str | None, typer.Option(help="Show how much this text uses each token group.", metavar="SOURCE")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Show which parameter tokens decide its next word.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw that into this file (PNG, PDF, SVG).", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show a checkpoint's token groups, sizes, memory and lineage, and what a text or a prompt uses of them."""
    from ..checkpoints.verify import verify_checkpoint
    from ..errors import EvaluationError
    from .tables import group_table, lineage_table

    if picture is not None and prompt is None:
        raise EvaluationError("--picture shows what a prompt's next word came from; give --prompt as well")
    if as_json and (text is not None or prompt is not None):
        raise EvaluationError("--json tells what a checkpoint is, not what a text or a prompt uses: leave one out")
    facts, lineage = _facts(checkpoint), verify_checkpoint(checkpoint)
    if as_json:
        typer.echo(json.dumps({**facts, **lineage.model_dump(mode="json", exclude_none=True)}, ensure_ascii=False))
        return
    console = Console()
    console.print(
        f"{checkpoint}: {facts['parameters']:,} parameters, {facts['num_hidden_layers']} blocks of width "
        f"{facts['hidden_size']}, {facts['kind']}, vocabulary {facts['vocab_size']:,}\n"
        f"Training needs {facts['training_bytes'] / 1e6:,.0f} MB beside activations (float32, AdamW); generating reads "
        f"{facts['bytes'] / 1e6:,.1f} MB per text token.",
        markup=False,
        soft_wrap=True,
    )
    console.print(group_table(facts["groups"], facts["everything_else"]))
    console.print(lineage_table(lineage))
    console.print(f"weights sha256 {lineage.weights_sha256}", soft_wrap=True)
    if text is not None or prompt is not None:
        _inspect_use(console, checkpoint, text, prompt, picture)


def _inspect_use(
    console: Console, checkpoint: Path, text: str | None, prompt: str | None, picture: Path | None
) -> None:
    import torch

    from ..explain import explain
    from ..explain import picture as draw
    from ..growth.importance import measure
    from .use_tables import activity_table, contribution_table

    model, tokenizer, sample = judged(checkpoint)
    if text is not None:
        console.print(activity_table(measure(model, sample(text))))
    if prompt is not None:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        ids = [start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        explanation = explain(model, torch.tensor([ids], device=model.device))
        console.print(contribution_table(explanation, tokenizer))
        if picture is not None:
            draw(explanation, tokenizer, picture)
            console.print(f"Drawn: {picture}", markup=False, soft_wrap=True)


def _facts(checkpoint: Path) -> dict[str, Any]:
    """Say what a checkpoint is, in numbers: `inspect --json`, and what its tables are made from."""
    import torch

    from .. import cost
    from ..checkpoints.checkpoint import read_config
    from ..growth.architectures import architecture_of, token_groups

    config = read_config(checkpoint)
    width = (config.dtype or torch.float32).itemsize
    tokens, counts, whole = cost.group_tokens(config), cost.group_parameters(config), cost.parameters(config)
    groups = [
        {
            "name": group.name,
            "counts": {p: [min(group.over(p)), max(group.over(p))] for p in architecture_of(config).counts},
            "tokens": tokens[group.name],
            "parameters": counts[group.name],
            "bytes": counts[group.name] * width,
            "notes": _notes(config, group),
        }
        for group in token_groups(config)
    ]
    rest = whole - sum(counts.values())
    return {
        "checkpoint": str(checkpoint),
        "kind": getattr(config, "norm_activation_type", config.model_type),
        "parameters": whole,
        "bytes": whole * width,
        "training_bytes": cost.training_bytes(config),
        **{field: getattr(config, field) for field in ("num_hidden_layers", "hidden_size", "vocab_size")},
        "groups": groups,
        "everything_else": {"parameters": rest, "bytes": rest * width},
    }


def _notes(config: PreTrainedConfig, group: GroupEntry) -> list[str]:
    from ..growth.architectures import frozen_names

    notes = [f"with blocks {', '.join(map(str, group.blocks))}"] if group.blocks else []
    notes += ["routed"] if group.routed else []
    return [*notes, *(["frozen"] if group.name in frozen_names(config) else [])]
