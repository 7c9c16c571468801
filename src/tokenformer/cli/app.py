"""The command line: parse, call one function, print."""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from ..quiet import quiet_libraries
from ..units import counted
from .arguments import Checkpoint, Force, Json, Keep, Model, Output, Runnable, check_checkpoint, check_recipe
from .compare import comparisons
from .console import make_console
from .export import exports, load_to_run
from .groups import groups, rewriting
from .inspect import inspection

if TYPE_CHECKING:
    from transformers import PreTrainedModel

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # what draws boxes takes longer to import than all else
    context_settings={"help_option_names": ["-h", "--help"]},
)
converters = typer.Typer(
    help="Other formats' checkpoints into ours, and back.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(converters, name="convert")
app.add_typer(groups)
app.add_typer(inspection)
app.add_typer(comparisons)
app.add_typer(exports)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"tokenformer {version('tokenformer')}")
        raise typer.Exit


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Transformers whose parameters are tokens: train one, then make it bigger without losing what it knows."""
    quiet_libraries()


@app.command()
def train(
    recipe: Annotated[
        Path,
        typer.Argument(help="YAML file; see `tokenformer recipe --explain`.", metavar="RECIPE", callback=check_recipe),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Run folder.  [default: runs/NAME of the recipe]")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run to the same weights.")] = False,
    force: Force = False,
) -> None:
    """Train a recipe: stage after stage, growing in between."""
    from ..training.recipe import load_recipe
    from ..training.train import train as run
    from .displays import TrainingDisplay
    from .tables import stage_row, stage_table, text_loss_table

    quiet = os.environ.get("RANK", "0") != "0"  # under torchrun, one process speaks
    console = make_console(quiet=quiet)
    folder = output or Path("runs") / recipe.stem
    content = load_recipe(recipe)
    try:
        with TrainingDisplay(console) as display:
            checkpoints = run(content, folder, resume=resume, force=force, on_event=display)
    except KeyboardInterrupt:
        where = f" -o {quote(str(output))}" if output else ""
        command = f"tokenformer train {quote(str(recipe))}{where} --resume"
        began = (folder / "log.jsonl").exists()
        hint = f"Continue with: {command}" if began else "Nothing had begun."
        make_console(stderr=True, quiet=quiet).print(f"Interrupted. {hint}", markup=False, soft_wrap=True)
        raise typer.Exit(130) from None
    console.print(stage_table(stage_row(f"{i + 1}", c) for i, c in enumerate(checkpoints)))
    if texts := text_loss_table(checkpoints):
        console.print(texts)
    console.print(f"Final checkpoint: {checkpoints[-1]}", markup=False, soft_wrap=True)


@app.command()
def generate(
    checkpoint: Runnable,
    prompt: Annotated[str, typer.Argument(help="Text to continue; empty starts a document.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Text tokens to write.", min=1)] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest; higher is wilder.", min=0)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Sample among this many likeliest; 0 is all.", min=0)] = 50,
    seed: Annotated[int | None, typer.Option(help="For the same text again.")] = None,
    keep: Keep = 1.0,
) -> None:
    """Continue a text, streaming it as it is written."""
    import torch
    from transformers import TextStreamer

    from ..checkpoints.checkpoint import need_tokenizer
    from ..errors import TokenizerError

    model, tokenizer, _ = load_to_run(checkpoint, keep=keep)
    tokenizer = need_tokenizer(checkpoint, model.config, tokenizer)
    if seed is not None:
        torch.manual_seed(seed)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    ids = [start, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
    room = model.config.max_position_embeddings - len(ids)
    if room < 1:
        raise TokenizerError(
            f"the prompt is {len(ids)} text tokens long; the model reads at most {model.config.max_position_embeddings}"
        )
    if max_new_tokens > room:
        make_console(stderr=True).print(f"The model's context leaves room for {room} of {max_new_tokens} text tokens.")
    sampling = {"do_sample": True, "temperature": temperature, "top_k": top_k} if temperature else {"do_sample": False}
    model.generate(
        torch.tensor([ids], device=model.device),
        attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=model.device),
        max_new_tokens=min(max_new_tokens, room),
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        **sampling,
    )


@app.command()
def evaluate(
    checkpoint: Runnable,
    text: Annotated[
        list[str] | None, typer.Option(help="File, folder, glob or dataset to read; may be repeated.", metavar="SOURCE")
    ] = None,
    images: Annotated[
        str | None, typer.Option(help="Images to classify, as images.source of a recipe.", metavar="SOURCE")
    ] = None,
    split: Annotated[str, typer.Option(help="Part of the images' source.")] = "test",
    tasks: Annotated[
        str | None, typer.Option(help="lm-eval's tasks, or task files, separated by commas.", metavar="TASKS")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task.  [default: all]", min=1)] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Text tokens in a text block.  [default: as trained, or 2,048]", min=2)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Text blocks or requests at a time.  [default: as memory allows]", min=1)
    ] = None,
    keep: Keep = 1.0,
    as_json: Json = False,
) -> None:
    """Measure how well a model predicts text or labels images. It runs lm-eval's tasks, too."""
    from ..checkpoints.checkpoint import need_tokenizer
    from ..errors import EvaluationError
    from ..evaluation import default_block_length, evaluate_tasks, evaluate_text
    from ..sections import parse_sections
    from ..training.recipe import TrainingSection
    from .tables import task_table, text_table

    if not text and not tasks and not images:
        raise EvaluationError("nothing to evaluate on: give --text SOURCE, --tasks TASKS, or both, or --images SOURCE")
    model, tokenizer, lineage = load_to_run(checkpoint, keep=keep)
    if images:
        _evaluate_images(checkpoint, model, images, split, batch_size=batch_size, as_json=as_json)
        return
    tokenizer = need_tokenizer(checkpoint, model.config, tokenizer)
    length, texts, measured = 0, [], {}
    if text:
        recipe = lineage.last_recipe  # may be of an earlier version, whose stages had other fields
        training = parse_sections(TrainingSection, recipe.get("training", {}), where="lineage.json") if recipe else None
        trained = training.sequence_length if training else None
        length = sequence_length or trained or default_block_length(model.config)
        for source in text:
            found = evaluate_text(model, tokenizer, source, block_length=length, batch_size=batch_size)
            texts.append({"source": source, **asdict(found)})
    if tasks:
        measured = evaluate_tasks(model, tokenizer, tasks.split(","), limit=limit, batch_size=batch_size or 16)
    if as_json:
        facts = {"checkpoint": str(checkpoint), "text": texts, "tasks": measured.get("results", {})}
        typer.echo(json.dumps(facts, ensure_ascii=False, default=str))
        return
    console = make_console()
    if texts:
        console.print(text_table(texts, length))
    if measured:
        console.print(task_table(measured))


def _evaluate_images(
    checkpoint: Path, model: "PreTrainedModel", source: str, split: str, *, batch_size: int | None, as_json: bool
) -> None:
    from ..checkpoints.checkpoint import load_image_processor
    from ..errors import EvaluationError
    from ..evaluation import evaluate_images
    from .tables import image_table

    if hasattr(model.config, "image_token_id"):
        raise EvaluationError(
            f"checkpoint {checkpoint} describes images in words and labels none; training on images.captions measures "
            "how well, and transformers' pipeline writes them"
        )
    processor = load_image_processor(checkpoint)
    if model.main_input_name != "pixel_values" or processor is None:
        raise EvaluationError(
            f"checkpoint {checkpoint} reads no images, or has no preprocessor_config.json that says how; give --text "
            "for a model that reads text"
        )
    found = evaluate_images(model, processor, source, split=split, batch_size=batch_size or 64)
    facts = [{"source": source, "split": split, **asdict(found)}]
    if as_json:
        typer.echo(json.dumps({"checkpoint": str(checkpoint), "images": facts}, ensure_ascii=False))
    else:
        make_console().print(image_table(facts))


@app.command()
def push(
    checkpoint: Model,
    repository: Annotated[str, typer.Argument(help="On the Hub: USER/NAME.", metavar="REPOSITORY")],
    license: Annotated[str | None, typer.Option(help="Of the weights, for the model card: apache-2.0, …")] = None,
    private: Annotated[bool, typer.Option("--private", help="Only you can see it, if it is new.")] = False,
) -> None:
    """Publish a checkpoint on the Hugging Face Hub. Its model card goes with it."""
    from ..checkpoints.hub import push_to_hub

    address = push_to_hub(checkpoint, repository, private=private, license=license)
    make_console().print(f"Published: {address}", markup=False, soft_wrap=True)


@converters.command("official")
def convert_official(
    weights: Annotated[Path, typer.Argument(help="pytorch_model.bin, or a folder of layer files.", metavar="WEIGHTS")],
    config: Annotated[Path, typer.Option(help="The official YAML, such as 150M_eval.yml.")],
    output: Output,
    tokenizer: Annotated[
        str | None, typer.Option(help="To keep beside it: tokenizer.json, folder or name (official: GPT-NeoX-20B's).")
    ] = None,
    force: Force = False,
) -> None:
    """Turn an official TokenFormer checkpoint into an ordinary Hugging Face model."""
    from ..convert.files import convert_official as run
    from .tables import stage_row, stage_table

    console = make_console()
    with rewriting(console) as on_progress:
        run(weights, config, output, tokenizer=tokenizer, force=force, on_progress=on_progress)
    console.print(stage_table([stage_row("converted", output)]))
    console.print(f"Written: {output}", markup=False, soft_wrap=True)
    if tokenizer is None:
        console.print("Without a tokenizer it reads and writes ids only; --tokenizer keeps GPT-NeoX-20B's beside it.")


@converters.command("transformer")
def convert_transformer(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="Folder of a GPT-NeoX checkpoint, such as Pythia's.", metavar="DIR", callback=check_checkpoint
        ),
    ],
    output: Output,
    force: Force = False,
) -> None:
    """Turn an ordinary GPT-NeoX into a TokenFormer that computes the same, and can grow everywhere."""
    from ..convert.transformer import convert_transformer as run
    from .tables import stage_row, stage_table

    console = make_console()
    with rewriting(console) as on_progress:
        run(checkpoint, output, force=force, on_progress=on_progress)
    console.print(stage_table([stage_row("converted", output)]))
    console.print(f"Written: {output}", markup=False, soft_wrap=True)


@converters.command("to-official")
def convert_to_official(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file, such as pytorch_model.bin.")],
    force: Force = False,
) -> None:
    """Write a checkpoint as the official code reads it: one file, and its YAML beside it."""
    from ..checkpoints.checkpoint import read_config
    from ..convert.files import convert_to_official as run
    from ..convert.official import expressed_tokens

    described = run(checkpoint, output, force=force)
    config, console = read_config(checkpoint), make_console()
    for projection, count in expressed_tokens(config).items():
        extra = count - getattr(config, f"{projection}_param_tokens")
        if extra:
            console.print(
                f"{projection}: each map was given {counted(extra, 'parameter token')} without value, "
                "because the official code would take another τ"
            )
    console.print(f"Written: {output} and {described}", markup=False, soft_wrap=True)


@app.command()
def recipe(
    explain: Annotated[bool, typer.Option("--explain", help="Every field with its type, default and meaning.")] = False,
) -> None:
    """Print a recipe to start from, and the presets it may name."""
    from rich.markup import escape
    from rich.padding import Padding

    from ..models.configuration_tokenformer import PRESETS
    from ..sections import fields
    from ..training.recipe import EXAMPLE, Recipe

    if not explain:
        typer.echo(EXAMPLE + "# presets: " + ", ".join(PRESETS))
        return
    console = make_console()
    for key, kind, default, meaning in fields(Recipe):
        facts = f"{kind}; {default}" if default == "required" else f"{kind}; default {default}" if default else kind
        console.print(f"[bold]{escape(key)}[/bold]  [dim]{escape(facts)}[/dim]", highlight=False, soft_wrap=True)
        console.print(Padding(escape(meaning), (0, 0, 0, 4)), highlight=False)


def main() -> None:
    """Run the command line; a user's mistake gives a message and exit code 2, never a traceback."""
    from ..errors import TokenformerError

    try:
        app(prog_name="tokenformer")
    except TokenformerError as error:
        colour = False if os.environ.get("NO_COLOR") else None
        if not error.said:
            typer.echo(f"{typer.style('error:', fg='red', bold=True)} {error}", err=True, color=colour)
        sys.exit(2)


if __name__ == "__main__":
    main()
