"""The commands on token groups: parse, call one function, print."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .arguments import Checkpoint, Force, Model, Output, Parts, Text, check_checkpoint
from .beside import grow_beside, rewrite_whole, route_beside
from .console import make_console

if TYPE_CHECKING:
    from rich.console import Console

    from ..checkpoints.lineage import Lineage
    from .tables import StageRow

groups = typer.Typer()


@groups.command()
def grow(
    checkpoint: Checkpoint,
    output: Output,
    at: Annotated[
        list[str] | None,
        typer.Option(
            help='Beside which linear maps of any model: "q_proj|v_proj", "all-linear", or REGEX=TOKENS, repeated. '
            "Writes an add-on.",
            metavar="REGEX",
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Parameter tokens beside each of them.", min=1)] = None,
    preset: Annotated[str | None, typer.Option(help="Grow to the sizes of this preset, such as 354m.")] = None,
    qkv_param_tokens: Annotated[
        str | None, typer.Option(help='Query, key, value: a total, or what to add: "+256", "+50%".', metavar="AMOUNT")
    ] = None,
    output_param_tokens: Annotated[
        str | None, typer.Option(help="Attention output, likewise.", metavar="AMOUNT")
    ] = None,
    ffn_param_tokens: Annotated[
        str | None,
        typer.Option(
            "--ffn-param-tokens", "--ffn", help="Feed-forward (an MLP's neurons), likewise.", metavar="AMOUNT"
        ),
    ] = None,
    num_hidden_layers: Annotated[str | None, typer.Option(help="Depth, likewise.", metavar="AMOUNT")] = None,
    num_loops: Annotated[
        str | None, typer.Option(help="Times that the blocks run, likewise.", metavar="AMOUNT")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the new token group.  [default: grown1, grown2, …]")] = None,
    norm: Annotated[
        Literal["joint", "per-group"] | None,
        typer.Option(help="One norm for all token groups or one each; to choose while there is one group."),
    ] = None,
    weights: Annotated[
        Literal["float", "ternary"] | None,
        typer.Option(help="How the new keys and values are kept.  [default: as the model's maps are]"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the new random values.")] = 0,
    force: Force = False,
) -> None:
    """Make a model bigger without changing its outputs. It may be a TokenFormer or an ordinary transformer."""
    from ..growth.grow import grow_operation

    if at or tokens is not None:
        counts = (qkv_param_tokens, output_param_tokens, ffn_param_tokens, num_hidden_layers, num_loops)
        sizes = (preset, *counts, norm, weights)
        grow_beside(checkpoint, output, at or [], tokens, name=name, seed=seed, force=force, alone=not any(sizes))
        return

    def operation(source: Any) -> Any:
        return grow_operation(
            source.config,
            preset=preset,
            qkv_param_tokens=qkv_param_tokens,
            output_param_tokens=output_param_tokens,
            ffn_param_tokens=ffn_param_tokens,
            num_hidden_layers=num_hidden_layers,
            num_loops=num_loops,
            name=name,
            norm=norm.replace("-", "_") if norm else None,
            weights=weights,
            seed=seed,
            dtype=source.dtype,
        )

    _rewrite(checkpoint, output, operation, force=force, seed=seed)


@groups.command()
def freeze(checkpoint: Checkpoint, parts: Parts, output: Output, force: Force = False) -> None:
    """Mark parts of a checkpoint that training must not move."""
    from ..growth import freeze as verbs

    _change(checkpoint, output, verbs.freeze, verbs.freeze_operation, force=force, names=parts)


@groups.command()
def unfreeze(checkpoint: Checkpoint, parts: Parts, output: Output, force: Force = False) -> None:
    """Let parts of a checkpoint train again."""
    from ..growth import freeze as verbs

    _change(checkpoint, output, verbs.unfreeze, verbs.unfreeze_operation, force=force, names=parts)


@groups.command()
def drop(
    checkpoint: Checkpoint,
    names: Annotated[list[str], typer.Argument(help="Token groups.", metavar="GROUP…")],
    output: Output,
    force: Force = False,
) -> None:
    """Remove token groups. If the others were frozen meanwhile, exactly the earlier model is left."""
    from ..growth import groups as verbs

    _change(checkpoint, output, verbs.drop, verbs.drop_operation, force=force, names=names)


@groups.command()
def consolidate(
    checkpoint: Checkpoint,
    output: Output,
    names: Annotated[list[str] | None, typer.Argument(help="Token groups.  [default: all]", metavar="GROUP…")] = None,
    name: Annotated[str | None, typer.Option(help="Of the one they become.  [default: that of the first]")] = None,
    force: Force = False,
) -> None:
    """Make one token group of several. The outputs stay the same to rounding, at the speed of one group."""
    from ..growth import groups as verbs

    arguments = {"names": names or None, "name": name}
    _change(checkpoint, output, verbs.consolidate, verbs.consolidate_operation, force=force, **arguments)


@groups.command()
def merge(
    checkpoint: Checkpoint,
    other: Annotated[
        Path,
        typer.Argument(
            help="Another child of the same parent, or a model that sees.", metavar="OTHER", callback=check_checkpoint
        ),
    ],
    output: Output,
    by: Annotated[
        Literal["modality"] | None,
        typer.Option(help="Unite a language model with OTHER, which reads images; they need no parent in common."),
    ] = None,
    bridge: Annotated[
        int | None, typer.Option(help="By modality: parameter tokens in each map between them.  [default: 16]")
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(help="New name of a group of OTHER, OLD=NEW; may be repeated.", metavar="OLD=NEW"),
    ] = None,
    norm: Annotated[
        Literal["joint", "per-group"] | None,
        typer.Option(help="One norm for all token groups or one each.  [default: per-group]"),
    ] = None,
    force: Force = False,
) -> None:
    """Unite two children of one parent, or two modalities."""
    from ..checkpoints.rewrite import merge_checkpoints, open_checkpoint
    from ..errors import GrowthError
    from .tables import stage_row

    if by is not None and (rename or norm):
        raise GrowthError("--rename and --norm are for two children of one parent; leave them out with --by modality")
    if by is None and bridge is not None:
        raise GrowthError("--bridge goes with --by modality")
    pairs = [pair.partition("=") for pair in rename or []]
    if not all(old and new for old, _, new in pairs):
        raise GrowthError(f"--rename takes OLD=NEW, such as grown1=python; found {', '.join(rename or [])}")
    sources, console = (open_checkpoint(checkpoint), open_checkpoint(other)), make_console()
    rows = [stage_row("one", checkpoint), stage_row("other", other)]
    if by is not None:
        from ..checkpoints.modality import merge_modality_checkpoints
        from ..models.names import BRIDGE_TOKENS

        tokens = BRIDGE_TOKENS if bridge is None else bridge
        with rewriting(console) as on_progress:
            merge_modality_checkpoints(*sources, output, bridge=tokens, force=force, on_progress=on_progress)
        _report(console, *rows, stage_row("merged", output), output=output)
        return
    with rewriting(console) as on_progress:
        merge_checkpoints(
            *sources,
            output,
            rename={old: new for old, _, new in pairs},
            norm=norm.replace("-", "_") if norm else None,
            force=force,
            on_progress=on_progress,
        )
    _report(console, *rows, stage_row("merged", output), output=output)


@groups.command()
def split(
    checkpoint: Checkpoint,
    group: Annotated[str, typer.Argument(help="Token group.", metavar="GROUP")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The add-on file, *.safetensors.")],
    force: Force = False,
) -> None:
    """Save one token group alone, as an add-on for its parent."""
    from ..checkpoints.addons import split_state
    from ..checkpoints.rewrite import open_checkpoint

    source = open_checkpoint(checkpoint)
    source.verification.result()  # an add-on of damaged weights would fit no parent
    file = split_state(source.config, source.tensors, group, output, force=force)
    make_console().print(f"Written: {file} ({file.stat().st_size / 1e6:,.1f} MB)", markup=False, soft_wrap=True)


@groups.command()
def attach(
    checkpoint: Checkpoint,
    addon: Annotated[Path, typer.Argument(help="File that `tokenformer split` wrote.", metavar="ADDON")],
    output: Output,
    name: Annotated[str | None, typer.Option(help="Of the group there.  [default: as it was]")] = None,
    force: Force = False,
) -> None:
    """Put an add-on onto its parent; another parent is refused."""
    from ..checkpoints.addons import attach_operation
    from ..checkpoints.verify import is_addon_folder
    from ..errors import GrowthError

    if is_addon_folder(addon):
        raise GrowthError(
            f"{addon} goes beside linear maps, which no ordinary checkpoint can hold: `tokenformer generate {addon}` "
            "and evaluate load its parent and put it there; in Python tokenformer.attach(model, ADDON) stacks several"
        )
    operation = lambda source: attach_operation(source.config, source.tensors, addon, name=name)  # noqa: E731
    _rewrite(checkpoint, output, operation, force=force)


@groups.command()
def pack(checkpoint: Checkpoint, output: Output, force: Force = False) -> None:
    """Keep ternary maps in 2 bits a weight; they learn no more."""
    from ..checkpoints.files import check_target
    from ..checkpoints.packing import pack_checkpoint
    from .tables import stage_row

    check_target(output, force=force)
    before = stage_row("before", checkpoint)  # with --force the output may be the checkpoint itself
    pack_checkpoint(checkpoint, output, force=force)
    _report(make_console(), before, stage_row("after", output), output=output)


@groups.command()
def prune(
    checkpoint: Checkpoint,
    output: Output,
    keep: Annotated[float, typer.Option(help="Share of the parameter tokens to keep.")],
    text: Text,
    scope: Annotated[
        Literal["layer", "global"],
        typer.Option(help="That share of every group in every map, or wherever they matter."),
    ] = "layer",
    force: Force = False,
) -> None:
    """Keep the parameter tokens that matter most for a text."""
    from ..growth.importance import check_kept
    from ..growth.select import prune_operation

    check_kept(keep, scope)
    _select(checkpoint, output, text, lambda m, blocks: prune_operation(m, blocks, keep=keep, scope=scope), force=force)


@groups.command()
def sort(checkpoint: Checkpoint, output: Output, text: Text, force: Force = False) -> None:
    """Sort parameter tokens by importance. Then any prefix is a model, which `shrink` or --keep takes."""
    from ..growth.select import sort_operation

    _select(checkpoint, output, text, sort_operation, force=force)


@groups.command()
def slice(checkpoint: Checkpoint, output: Output, text: Text, force: Force = False) -> None:
    """Sort, under the name that it had until this release."""
    make_console(stderr=True).print("`tokenformer slice` is called `tokenformer sort` now.")
    sort(checkpoint, output, text, force)


@groups.command()
def shrink(
    checkpoint: Checkpoint,
    output: Output,
    keep: Annotated[float, typer.Option(help="Share of each token group to keep.")],
    force: Force = False,
) -> None:
    """Keep the first share of each token group. The checkpoint should be one that `sort` has sorted."""
    from ..checkpoints.verify import read_lineage
    from ..growth.select import shrink_operation

    lineage = read_lineage(checkpoint)  # with --force the output may be the checkpoint itself
    _rewrite(checkpoint, output, lambda source: shrink_operation(source.config, keep), force=force)
    note_order(lineage, keep)


@groups.command()
def route(
    checkpoint: Model,
    group: Annotated[str, typer.Argument(help="Token group.", metavar="GROUP")],
    output: Output,
    own: Annotated[list[str], typer.Option(help="Text it is for; may be repeated.", metavar="SOURCE")],
    other: Annotated[list[str], typer.Option(help="Text it is not for; may be repeated.", metavar="SOURCE")],
    per: Annotated[
        Literal["text-token", "sequence"], typer.Option(help="What a gate decides for; not sequences in a TokenFormer.")
    ] = "text-token",
    force: Force = False,
) -> None:
    """Let a token group take part only for text of its kind. Of an ordinary transformer it becomes an add-on."""
    from dataclasses import replace

    import datasets

    from ..checkpoints.files import check_target
    from ..checkpoints.verify import is_addon_folder
    from ..errors import GrowthError
    from ..growth.architectures import architecture_of
    from ..growth.route import route_operation

    check_target(output, force=force)
    model, _, sample = judged(checkpoint)
    own_blocks, other_blocks = (datasets.concatenate_datasets([sample(s) for s in kind]) for kind in (own, other))
    if is_addon_folder(checkpoint) or not architecture_of(model.config).has_pattention:
        routing = route_beside(model, group, own_blocks, other_blocks, output, per=per, force=force)
    elif per == "sequence":
        raise GrowthError(
            f"--per sequence is for add-ons and for neurons of ordinary transformers; {checkpoint} is a TokenFormer"
        )
    else:
        found, routing = route_operation(model, group, own_blocks, other_blocks)
        operation = replace(found, arguments={"group": group, "own": own, "other": other})
        _rewrite(checkpoint, output, lambda source: operation, force=force)
    make_console().print(
        f"{group} takes part for {routing.open_on_own:.1%} of its own text and {routing.open_on_other:.1%} of the "
        "other, mean over its gates",
        highlight=False,
        soft_wrap=True,
    )


@contextmanager
def rewriting(console: "Console") -> Iterator[Callable[[int, int], None]]:
    """Show a bar while a checkpoint is written; gives the function to call with bytes done and in all."""
    from rich.progress import Progress

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("writing", total=None)
        try:
            yield lambda done, total: bar.update(task, completed=done, total=total)
        except KeyboardInterrupt:
            bar.stop()
            make_console(stderr=True).print("Interrupted. Nothing was written.")
            raise typer.Exit(130) from None


def _change(checkpoint: Path, output: Path, verb: Any, operation: Any, *, force: bool, **arguments: Any) -> None:
    """Do `operation` to the files of a checkpoint, or where it has token groups at linear maps the verb in memory."""
    from ..checkpoints.files import check_target
    from ..checkpoints.whole import has_sites

    check_target(output, force=force)
    if has_sites(checkpoint):
        rewrite_whole(checkpoint, output, partial(verb, **arguments), force=force)
    else:
        _rewrite(checkpoint, output, lambda source: operation(source.config, **arguments), force=force)


def _rewrite(checkpoint: Path, output: Path, operation: Callable[[Any], Any], *, force: bool, **event: Any) -> None:
    """Do to the files of a checkpoint what `operation` says of it."""
    from ..checkpoints.files import check_target
    from ..checkpoints.rewrite import open_checkpoint, rewrite
    from .tables import stage_row

    check_target(output, force=force)
    source, console = open_checkpoint(checkpoint), make_console()
    before = stage_row("before", checkpoint)  # with --force the output may be the checkpoint itself
    with rewriting(console) as on_progress:
        rewrite(source, output, operation(source), force=force, on_progress=on_progress, **event)
    _report(console, before, stage_row("after", output), output=output)


def _select(checkpoint: Path, output: Path, text: str, operation: Callable[[Any, Any], Any], *, force: bool) -> None:
    """Judge parameter tokens by a text, and write the checkpoint that `operation` makes of them."""
    from dataclasses import replace

    from ..checkpoints.files import check_target

    check_target(output, force=force)
    model, _, sample = judged(checkpoint)
    found = operation(model, sample(text))
    _rewrite(
        checkpoint, output, lambda source: replace(found, arguments={**found.arguments, "text": text}), force=force
    )


def judged(checkpoint: Path) -> tuple[Any, Any, Callable[[str], Any]]:
    """Load a checkpoint's model and tokenizer, and give a function that reads text for them."""
    from ..checkpoints.checkpoint import load_checkpoint, need_tokenizer
    from ..data.blocks import text_blocks
    from ..training.processes import processes

    model, tokenizer, _ = load_checkpoint(checkpoint)
    tokenizer = need_tokenizer(checkpoint, model.config, tokenizer)
    model.to(processes().device)
    length = min(getattr(model.config, "max_position_embeddings", None) or 512, 512)
    return model, tokenizer, lambda source: text_blocks(source, tokenizer, block_length=length)


def note_order(lineage: "Lineage", keep: float) -> None:
    """Say where the first share of the parameter tokens is taken of a model that nobody has put in order."""
    if keep < 1 and not lineage.ordered:
        make_console(stderr=True).print(
            "note: the checkpoint's lineage tells of no sort and no nested_dropout, so its first parameter tokens may "
            "be any; `tokenformer sort` puts those that matter first",
            soft_wrap=True,
            highlight=False,
        )


def _report(console: "Console", *rows: "StageRow", output: Path) -> None:
    from .tables import stage_table

    console.print(stage_table(rows))
    console.print(f"Written: {output}", markup=False, soft_wrap=True)
