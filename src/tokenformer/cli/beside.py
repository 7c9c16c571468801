"""What the commands do with tokens beside linear maps, which are kept as add-ons."""

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .console import make_console

if TYPE_CHECKING:
    from rich.console import Console


def grow_beside(
    checkpoint: Path,
    output: Path,
    at: list[str],
    tokens: int | None,
    *,
    name: str | None,
    seed: int,
    force: bool,
    alone: bool,
) -> None:
    """Write what `tokenformer grow --at` asks for; `alone`: no other growth was asked for.

    That is an add-on; of a checkpoint that has token groups at linear maps already, a checkpoint.
    """
    from ..checkpoints.beside import load_any, split_beside
    from ..checkpoints.files import check_target
    from ..checkpoints.whole import has_sites
    from ..errors import GrowthError
    from ..growth.beside import names_beside
    from ..growth.grow import grow

    if not at or not alone:
        raise GrowthError(
            "--at and --tokens go together, and alone: they put parameter tokens beside linear maps, as in "
            '--at "q_proj|v_proj" --tokens 64'
        )
    check_target(output, force=force)
    where = dict(_tokens_at(pattern, tokens) for pattern in at)
    if has_sites(checkpoint):
        rewrite_whole(checkpoint, output, partial(grow, at=where, name=name), force=force, seed=seed)
        return
    model, _ = load_any(checkpoint)
    grow(model, at=where, name=name, seed=seed)
    split_beside(model, names_beside(model)[-1], output, force=force)
    print_addon(make_console(), output)
    make_console().print(f"Written: {output}", markup=False, soft_wrap=True)


def rewrite_whole(
    checkpoint: Path, output: Path, change: "partial[Any]", *, force: bool, seed: int | None = None
) -> None:
    """Change a checkpoint that has token groups at linear maps, and show what it was and is."""
    from ..checkpoints.whole import change_whole
    from .tables import stage_row, stage_table

    before = stage_row("before", checkpoint)
    change_whole(checkpoint, output, change, force=force, seed=seed)
    console = make_console()
    console.print(stage_table([before, stage_row("after", output)]))
    console.print(f"Written: {output}", markup=False, soft_wrap=True)


def route_beside(model: Any, group: str, own: Any, other: Any, output: Path, *, per: str, force: bool) -> Any:
    """Write the add-on of a token group with gates, and return how well these tell the texts apart."""
    from ..checkpoints.beside import split_beside
    from ..growth.route import route

    routing = route(model, group, own, other, per="sequence" if per == "sequence" else "text_token")
    split_beside(model, group, output, force=force)
    make_console().print(f"Written: {output}", markup=False, soft_wrap=True)
    return routing


def print_addon(console: "Console", path: Path, *, as_json: bool = False) -> None:
    """Show what an add-on holds, and beside which maps of which parent it belongs."""
    from ..checkpoints.beside import places, read_addon
    from ..checkpoints.verify import read_lineage
    from .tables import lineage_table, site_table

    config, tensors, _ = read_addon(path)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    if as_json:
        typer.echo(json.dumps({**config.model_dump(), "parameters": parameters}, ensure_ascii=False))
        return
    console.print(
        f"{path}: token group {config.name}, {parameters:,} parameters beside {places(config)}\n"
        f"Parent: {config.base_model_name_or_path or 'not recorded'}, {config.base_model_class}",
        markup=False,
        soft_wrap=True,
    )
    console.print(site_table(config.sites))
    lineage = read_lineage(path)
    if lineage.history:
        console.print(lineage_table(lineage))
    if config.sequence_gate:
        console.print("One gate decides for each sequence whether the group takes part.")


def _tokens_at(pattern: str, tokens: int | None) -> tuple[str, int | None]:
    """Read REGEX or REGEX=TOKENS."""
    before, equals, count = pattern.rpartition("=")
    return (before, int(count)) if equals and count.isdigit() else (pattern, tokens)
