"""A run on the terminal: a progress bar per stage, a line per growth, a closing table."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers.utils import logging as transformers_logging

from .. import cost
from ..checkpoints.checkpoint import read_config, verify_checkpoint
from ..checkpoints.lineage import Lineage


def quiet_libraries() -> None:
    """Leave the terminal to us: transformers and datasets draw bars of their own, lm-eval explains what we know."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    datasets.disable_progress_bars()


class ComparisonDisplay:
    """Call it with the events of `compare`; use it as a context manager around the call."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bar = Progress(
            TextColumn("comparing"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task("", total=None)

    def __enter__(self) -> ComparisonDisplay:
        """Start drawing."""
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the last state on the screen."""
        self.bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if event["event"] == "progress":
            self.bar.update(self.task, completed=event["done"], total=event["total"])
        elif event["event"] == "run":
            found = event["bits_per_byte"]
            result = "diverged" if found is None else f"{found:.4f} bits/byte"
            self.console.print(
                f"{event['purpose']:6}  {event['arm']}, seed {event['seed']}, rate {event['learning_rate']:g}, "
                f"budget {event['budget']:g}: {result}",
                markup=False,
                highlight=False,
            )


class TrainingDisplay:
    """Call it with the events of `train`; use it as a context manager around the call."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.losses: dict[str, float] = {}
        self.task: TaskID | None = None
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
        )

    def __enter__(self) -> TrainingDisplay:
        """Start drawing."""
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the last state on the screen."""
        self.bar.stop()

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "data":
            self.console.print(
                f"text: {event['source']}, tokenizer {event['tokenizer']} ({event['vocabulary']:,} entries), "
                f"{event.get('training_text_tokens', 0):,} text tokens to train on; "
                f"{event['validation_documents']} documents ({event['validation_bytes']:,} bytes) held out",
                markup=False,
            )
        elif kind == "growth":
            self.console.print(growth_line(event))
        elif kind == "stage":
            self.losses = {}
            self.task = self.bar.add_task(
                f"stage {event['stage']} ({event['parameters'] / 1e6:.2f} M parameters)",
                total=event["steps"],
                completed=event["done"],
                losses="",
            )
        elif self.task is not None:
            if kind in ("train", "evaluation"):
                self.losses["training" if kind == "train" else "validation"] = event["loss"]
            losses = "  ".join(f"{name} {loss:.3f}" for name, loss in self.losses.items())
            self.bar.update(self.task, completed=event["step"], losses=f"loss: {losses}" if losses else "")


def growth_line(event: dict[str, Any]) -> str:
    """Say what a growth did to the loss and the logits."""
    equal = "bit for bit equal" if event["logits_equal"] else "NOT equal"
    return (
        f"grown before stage {event['stage']}: validation loss {event['loss_before']:.6f} before, "
        f"{event['loss_after']:.6f} after; logits {equal}"
    )


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
        table.add_row(label, *_cells(read_config(folder), verify_checkpoint(folder)))
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
