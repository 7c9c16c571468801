"""What commands print at the end."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from .. import cost
from ..checkpoints.checkpoint import read_config
from ..checkpoints.lineage import Lineage
from ..checkpoints.verify import read_lineage


def stage_table(rows: Iterable[tuple[str, Path]], title: str | None = None) -> Table:
    """Tabulate checkpoints, (label, folder) each: sizes from configurations, costs and losses from lineage.

    Parameters and text tokens (seen so far) in millions, parameter tokens by group, cumulative training FLOPs and time,
    validation loss in nats per text token.
    """
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("stage")
    for name in ("params", "token groups", "text", "FLOPs", "time", "loss", "bits/byte"):
        table.add_column(name, justify="right")
    for label, folder in rows:
        table.add_row(label, *_cells(read_config(folder), read_lineage(folder)))
    return table


def lineage_table(lineage: Lineage) -> Table:
    """Tabulate what happened to a checkpoint, oldest first."""
    table = Table(title="Lineage", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("date", "operation", "arguments", "from", "text tokens", "FLOPs", "val. loss"):
        table.add_column(column, justify="right" if column in ("text tokens", "FLOPs", "val. loss") else "left")
    for event in lineage.history:
        table.add_row(
            event.date[:10],
            event.operation,
            ", ".join(f"{k}={v}" for k, v in event.arguments.items() if v is not None),
            (event.parent or "–")[:8],
            f"{event.text_tokens_seen:,}",
            f"{event.training_flops:.2e}",
            "–" if event.loss is None else f"{event.loss:.4f}",
        )
    return table


def task_table(results: dict[str, Any]) -> Table:
    """Tabulate what `evaluate_tasks` returns: a row for each metric of each task, with its standard error."""
    table = Table(title="Tasks", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("task", "documents", "metric", "value", "± s.e."):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for task, metrics in results["results"].items():
        documents = results["n-samples"].get(task, {}).get("effective", "")
        for key, value in metrics.items():
            metric, _, filtered = key.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filtered}")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            spread = f"{error:.4f}" if isinstance(error, float) else "–"
            table.add_row(task, str(documents), name, f"{value:.4f}", spread)
    return table


def _millions(number: int) -> str:
    return f"{number / 1e6:,.2f} M"


def _cells(config: Any, lineage: Lineage) -> list[str]:
    last = lineage.last
    groups = cost.group_tokens(config)
    return [
        _millions(cost.parameters(config)),
        "\n".join(f"{name} {count:,}" for name, count in groups.items()),
        _millions(last.text_tokens_seen),
        f"{last.training_flops:.2e}".replace("e+", "e"),
        f"{last.training_seconds:.0f} s",
        "–" if last.loss is None else f"{last.loss:.4f}",
        "–" if last.bits_per_byte is None else f"{last.bits_per_byte:.4f}",
    ]
