"""What commands print at the end, within 80 columns: words fold, and no number is ever cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.markup import escape
from rich.table import Table

from ..units import amount, scientific, short

if TYPE_CHECKING:
    from ..advise import Advice
    from ..checkpoints.beside import Site
    from ..checkpoints.lineage import Lineage
    from ..plan import Plan
    from ..serve.card import Exported

Row = Sequence[str]


def tabulate(words: Sequence[str], numbers: Sequence[str], rows: Iterable[Row | None], title: str = "") -> Table:
    """Make a table whose first columns hold words, and the others numbers.

    Args:
        words: names of the columns that may fold.
        numbers: names of the columns that are as wide as their widest cell.
        rows: cells in the order of the columns, of which the last ones may be missing; None draws a line.
        title: what stands above, at the left.
    """
    listed = list(rows)
    table = Table(
        title=escape(title) or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for name in words:
        table.add_column(name, overflow="fold")
    for i, name in enumerate(numbers, len(words)):
        cells = [name, *(row[i] for row in listed if row is not None and i < len(row))]
        widest = max(len(line) for cell in cells for line in cell.split("\n"))
        table.add_column(name, justify="right", no_wrap=True, min_width=widest)
    for row in listed:
        if row is None:
            table.add_section()
        else:
            table.add_row(*map(escape, row))
    return table


def site_table(sites: Mapping[str, Site]) -> Table:
    """Tabulate the linear maps that have tokens beside them, those of one kind in one row."""
    kinds: dict[tuple[str, ...], int] = {}
    for name, site in sites.items():
        kind = (name.rpartition(".")[2], "yes" if site.routed else "no", f"{site.tokens:,}", f"{site.tau or 1:.4g}")
        kinds[kind] = kinds.get(kind, 0) + 1
    rows = [(name, routed, f"{count:,}", *numbers) for (name, routed, *numbers), count in kinds.items()]
    return tabulate(("linear map", "routed"), ("maps", "parameter tokens", "τ"), rows)


class StageRow(NamedTuple):
    """What a checkpoint is and has cost, and what its last number is of."""

    cells: Row
    score: str


def stage_table(rows: Iterable[StageRow]) -> Table:
    """Tabulate checkpoints, each as `stage_row` tells it.

    Parameters and what was read so far (text tokens or images), parameter tokens by group, cumulative training FLOPs
    and time, validation loss in nats for each of what was read.
    """
    listed = list(rows)
    numbers = ("params", "read", "FLOPs", "time", "loss", listed[-1].score)
    return tabulate(("stage", "token groups"), numbers, [row.cells for row in listed])


def stage_row(label: str, folder: Path) -> StageRow:
    """Say what a checkpoint or add-on is and has cost: sizes of its own, costs and losses from its lineage."""
    from .. import cost
    from ..checkpoints.beside import read_addon
    from ..checkpoints.checkpoint import read_config
    from ..checkpoints.verify import is_addon_folder, read_lineage
    from ..growth.architectures import row_of

    last, sees = read_lineage(folder).last, False
    if is_addon_folder(folder):
        addon, tensors, _ = read_addon(folder)
        groups = {addon.name: sum(site.tokens for site in addon.sites.values())}
        parameters = sum(tensor.numel() for tensor in tensors.values())
    else:
        config = read_config(folder)
        groups, parameters = cost.group_tokens(config), cost.parameters(config)
        row = row_of(config)
        sees = row is not None and row.auto != "AutoModelForCausalLM"
    read = short(last.text_tokens_seen or last.images_seen)
    spent = read, scientific(last.training_flops), f"{amount(last.training_seconds)} s"
    cells = (
        label,
        "\n".join(f"{name} {count:,}" for name, count in groups.items()),
        short(parameters),
        *(spent if last.training_flops else "–––"),  # nobody told what an ordinary checkpoint has cost
        _loss(last.loss),
        _share(last.accuracy) if sees else _loss(last.bits_per_byte),
    )
    return StageRow(cells, "top-1" if sees else "bits/byte")


def text_loss_table(checkpoints: Sequence[Path]) -> Table | None:
    """Tabulate the bits per byte of each text after each stage; None where there is only one text."""
    from ..checkpoints.verify import read_lineage

    rows: list[Row | None] = []
    for number, folder in enumerate(checkpoints, 1):
        texts = read_lineage(folder).last.bits_per_byte_of or {}
        rows += [(f"{number}", name, _loss(found)) for name, found in texts.items()] + [None]
    return tabulate(("stage", "held-out text"), ("bits/byte",), rows) if any(rows) else None


def lineage_table(lineage: Lineage) -> Table:
    """Tabulate what happened to a checkpoint, oldest first."""
    rows = [
        (
            event.operation,
            ", ".join(f"{k}: {v}" for k, v in event.arguments.items() if v is not None),
            event.date[:10],
            (event.parent or "–")[:8],
            short(event.text_tokens_seen or event.images_seen),
            scientific(event.training_flops),
            _loss(event.loss),
        )
        for event in lineage.history
    ]
    return tabulate(("operation", "arguments"), ("date", "from", "read", "FLOPs", "loss"), rows, "Lineage")


def group_table(groups: Sequence[dict[str, Any]], rest: dict[str, Any]) -> Table:
    """Tabulate token groups as `inspect --json` lists them, and everything else: sizes, and bytes as stored."""
    projections = list(dict.fromkeys(name for group in groups for name in group["counts"]))

    def counts(group: dict[str, Any]) -> Iterable[str]:
        for low, high in (group["counts"].get(name, (0, 0)) for name in projections):
            yield f"{low}–{high}" if low < high else str(high)

    rows = [
        (g["name"], ", ".join(g["notes"]), *counts(g), short(g["tokens"]), short(g["parameters"]), _megabytes(g))
        for g in groups
    ]
    other = ("everything else", "", *("" for _ in projections), "", short(rest["parameters"]), _megabytes(rest))
    return tabulate(
        ("group", ""), (*projections, "tokens", "params", "MB"), [*rows, other], "Token groups (parameter tokens)"
    )


def text_table(found: Sequence[dict[str, Any]], block_length: int) -> Table:
    """Tabulate evaluations of text as `evaluate --json` lists them."""
    rows = [(e["source"], short(e["text_tokens"]), f"{e['loss']:.4f}", f"{e['bits_per_byte']:.4f}") for e in found]
    title = f"Text, in text blocks of {block_length:,} text tokens"
    return tabulate(("source",), ("text tokens", "loss", "bits/byte"), rows, title)


def export_table(written: Exported) -> Table:
    """Tabulate what an export is beside the model that it was made from."""
    rows = [
        ("PyTorch", "float32", f"{written.model_bytes / 1e6:,.1f}", f"{written.bits_per_byte:.4f}", ""),
        (
            written.engine,
            written.weights,
            f"{written.exported_bytes / 1e6:,.1f}",
            f"{written.exported_bits_per_byte:.4f}",
            f"{written.logits_difference:.2g}",
        ),
    ]
    title = f"{written.text_tokens:,} text tokens of {written.text}; largest logit {written.largest_logit:.3g}"
    return tabulate(("engine", "weights"), ("MB", "bits/byte", "logits differ by"), rows, title)


def image_table(found: Sequence[dict[str, Any]]) -> Table:
    """Tabulate evaluations of images as `evaluate --json` lists them."""
    rows = [
        (e["source"], f"{e['images']:,}", f"{e['loss']:.4f}", _share(e["accuracy"]), _share(e["top5_accuracy"]))
        for e in found
    ]
    return tabulate(("source",), ("images", "loss", "top-1", "top-5"), rows, "Images")


def task_table(results: dict[str, Any]) -> Table:
    """Tabulate what `evaluate_tasks` returns: a row for each metric of each task, with its standard error."""
    rows = []
    for task, metrics in results["results"].items():
        documents = results["n-samples"].get(task, {}).get("effective", "")
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            spread = f"{error:.4f}" if isinstance(error, float) else "–"
            rows.append((task, name, str(documents), f"{value:.4f}", spread))
    return tabulate(("task", "metric"), ("documents", "value", "± s.e."), rows, "Tasks")


def cost_table(plan: Plan) -> Table:
    """Tabulate each run alone: memory, FLOPs, hours of all devices at once, price."""
    rows: list[Row | None] = [("grown",)]
    for i, c in enumerate((*plan.grown_costs, *plan.scratch_costs)):
        if i == len(plan.grown_costs):
            rows += [None, ("from scratch",)]
        sizes = short(c.parameters), amount(c.memory_bytes / 1e9)
        rows.append((c.label, *sizes, *_spent(plan, c.text_tokens, c.training_flops)))
    return tabulate(("model",), ("params", "GB/device", *_spending(plan)), rows, "Each run alone")


def total_table(plan: Plan) -> Table:
    """Tabulate each stage of growth with the stages before it: FLOPs, hours of all devices at once, price."""
    rows = [(c.label, *_spent(plan, c.total_text_tokens, c.total_flops)) for c in plan.grown_costs]
    return tabulate(("model",), _spending(plan), rows, "Grown, with the stages before")


def published_table(plan: Plan) -> Table:
    """Tabulate device hours, computed and published, of the runs that have published ones."""
    rows: list[Row | None] = []
    for costs in (plan.grown_costs, plan.scratch_costs):
        rows.append(None)
        for c in costs:
            if c.total_published_hours is not None:
                own, so_far = (amount(plan.hardware.device_hours(f)) for f in (c.training_flops, c.total_flops))
                published = "–" if c.published_hours is None else amount(c.published_hours)
                implied = "–" if c.implied_utilisation is None else f"{c.implied_utilisation:.3f}"
                rows.append((c.label, own, published, so_far, amount(c.total_published_hours), implied))
    numbers = ("computed", "published", "computed\nso far", "published\nso far", "implied\nutilisation")
    return tabulate(("model",), numbers, rows, "Device hours")


def advice_table(advice: Advice) -> Table:
    """Tabulate what could be done with a budget; `?` marks what lies beyond the comparisons."""
    rows = [
        (
            option.what + ("?" if option.beyond else ""),
            ", ".join(f"{name.removesuffix('_param_tokens')} +{percent}%" for name, percent in option.grown.items()),
            f"{option.after:.0%}" if option.what == "grow" else "",
            short(option.parameters),
            short(option.text_tokens),
            f"{option.bits_per_byte:.3f}",
            "{:.3f}–{:.3f}".format(*option.interval),
        )
        for option in advice.options
    ]
    heads = ("after", "params", "text", "bits/byte", "interval")
    note = "; ? beyond the comparisons" if any(option.beyond for option in advice.options) else ""
    return tabulate(("do", "add"), heads, rows, f"What the budget should come to{note}")


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.2%}"


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _megabytes(part: dict[str, Any]) -> str:
    megabytes = part["bytes"] / 1e6
    return f"{megabytes:,.1f}" if megabytes >= 9.95 else f"{megabytes:.3g}"


def _spending(plan: Plan) -> list[str]:
    return ["text", "FLOPs", "hours", *([] if plan.hardware.price_per_hour is None else ["price"])]


def _spent(plan: Plan, text_tokens: float, flops: float) -> list[str]:
    hardware = plan.hardware
    hours = hardware.device_hours(flops)
    price = [] if hardware.price_per_hour is None else [amount(hours * hardware.price_per_hour)]
    return [short(text_tokens), scientific(flops), amount(hours / hardware.count), *price]
