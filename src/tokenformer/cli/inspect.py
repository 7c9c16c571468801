"""What a checkpoint is, and what a text or a prompt uses of it: `tokenformer inspect`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..units import amount, counted, looped
from .arguments import Json, Model
from .beside import print_addon
from .console import make_console
from .groups import judged

if TYPE_CHECKING:
    from rich.console import Console

inspection = typer.Typer()


@inspection.command()
def inspect(
    checkpoint: Model,
    text: Annotated[
        str | None, typer.Option(help="Show how much this text uses each token group.", metavar="SOURCE")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Show which parameter tokens decide its next word.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Draw that into this file (PNG, PDF, SVG).", metavar="FILE")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a checkpoint holds and where it came from. With --text or --prompt, also what that uses of it."""
    from ..checkpoints.facts import checkpoint_facts
    from ..checkpoints.verify import code_note, is_addon_folder, read_lineage
    from ..errors import EvaluationError
    from .tables import group_table, lineage_table

    if is_addon_folder(checkpoint):
        if text is not None or prompt is not None or picture is not None:
            raise EvaluationError(f"{checkpoint} is an add-on; --text, --prompt and --picture look into checkpoints")
        print_addon(make_console(), checkpoint, as_json=as_json)
        return
    if picture is not None and prompt is None:
        raise EvaluationError("--picture shows what a prompt's next word came from; give --prompt as well")
    if as_json and (text is not None or prompt is not None):
        raise EvaluationError("--json tells what a checkpoint is, not what a text or a prompt uses: leave one out")
    facts, lineage = checkpoint_facts(checkpoint), read_lineage(checkpoint)
    if as_json:
        typer.echo(json.dumps({**facts, **lineage.model_dump(mode="json", exclude_none=True)}, ensure_ascii=False))
        return
    sees = facts["labels"] is not None
    chooses = counted(facts["labels"], "label") if sees else f"vocabulary {facts['vocab_size']:,}"
    use = "classifying images" if sees else "generating a text token"
    console, loops = make_console(), facts["num_loops"]
    again = f", its blocks {loops} times" if loops > 1 else ""
    console.print(
        f"{checkpoint}: {facts['parameters']:,} parameters, {counted(facts['num_hidden_layers'], 'block')} of width "
        f"{facts['hidden_size']}{looped(loops)},\n{facts['kind']}, {chooses}\n"
        f"Training needs {amount(facts['training_bytes'] / 1e6)} MB beside activations (float32, AdamW);\n{use} "
        f"reads {amount(facts['bytes'] / 1e6)} MB{again}.",
        markup=False,
        soft_wrap=True,
    )
    console.print(group_table(facts["groups"], facts["everything_else"]))
    console.print(lineage_table(lineage))
    if lineage.weights_sha256 is not None:
        console.print(f"Loading verifies that the weights have this sha256:\n{lineage.weights_sha256}", soft_wrap=True)
    if note := code_note(checkpoint):
        console.print(f"Note: {note}.", markup=False, soft_wrap=True)
    if text is not None or prompt is not None:
        _inspect_use(console, checkpoint, text, prompt, picture)


def _inspect_use(
    console: "Console", checkpoint: Path, text: str | None, prompt: str | None, picture: Path | None
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
