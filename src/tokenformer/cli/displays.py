"""A run on the terminal: a progress bar per stage, a line per growth, a closing table."""

from __future__ import annotations

from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from ..units import counted


class _TimeLeft(TimeRemainingColumn):
    """How long it will still take; nothing once it is done, as what stays of the bar is read then."""

    def render(self, task: Task) -> Text:
        return Text() if task.finished else Text("left ").append_text(super().render(task))


class _Display:
    """A progress bar, drawn within the context: a share and the time, `first` before them and `more` after."""

    def __init__(self, console: Console, first: TextColumn, *more: TextColumn) -> None:
        self.console = console
        self.bar = Progress(
            first,
            BarColumn(bar_width=12),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            _TimeLeft(),
            *more,
            console=console,
        )

    def __enter__(self) -> Self:
        """Start drawing."""
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the last state on the screen."""
        self.bar.stop()


class ComparisonDisplay(_Display):
    """Call it with the events of `compare`; use it as a context manager around the call."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, TextColumn("comparing"))
        self.task = self.bar.add_task("", total=None)

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        if event["event"] == "progress":
            self.bar.update(self.task, completed=event["done"], total=event["total"])
        elif event["event"] == "shared":
            self.console.print("Another process runs this comparison in the same folder; they share its runs.")
        elif event["event"] == "run":
            found = event["bits_per_byte"]
            result = "diverged" if found is None else f"{found:.4f} bits/byte"
            self.console.print(
                f"{event['purpose']:6}  {event['arm']}, seed {event['seed']}, rate {event['learning_rate']:g}, "
                f"budget {event['budget']:g}: {result}",
                markup=False,
                highlight=False,
            )


class TrainingDisplay(_Display):
    """Call it with the events of `train`; use it as a context manager around the call."""

    def __init__(self, console: Console) -> None:
        super().__init__(console, TextColumn("{task.description}"), TextColumn("{task.fields[losses]}"))
        self.losses: dict[str, float | None] = {}
        self.task: TaskID | None = None

    def __call__(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "data" and "training_images" in event:
            self.console.print(
                f"images: {event['source']}, {event['labels']} labels, {event['training_images']:,} to train on, "
                f"{event['validation_images']:,} held out",
                markup=False,
            )
        elif kind == "data":
            texts = event.get("texts", {"": event})
            sizes = ", ".join(f"{n} {t.get('training_text_tokens', 0):,}".strip() for n, t in texts.items())
            source = "" if "texts" in event else f"{event['source']}, "
            self.console.print(
                f"text: {source}tokenizer {event['tokenizer']} ({event['vocabulary']:,} entries), "
                f"{sizes} text tokens to train on; "
                f"{counted(event['validation_documents'], 'document')} ({event['validation_bytes']:,} bytes) held out",
                markup=False,
            )
        elif kind == "growth":
            self.console.print(growth_line(event))
        elif kind == "damaged":
            self.console.print(
                f"stage {event['stage']}: a saved state is damaged and was left out ({event['problem']}); continuing "
                f"from step {event['step']}",
                markup=False,
                highlight=False,
            )
        elif kind == "skipped":
            self.console.print(
                f"stage {event['stage']}: step {event['step']} is left out: {event['problem']}",
                markup=False,
                highlight=False,
            )
        elif kind == "diverged":
            self.console.print(
                f"stage {event['stage']} has diverged at step {event['step']}: its loss is no number any more. Stop "
                "it, and try a smaller learning rate",
                highlight=False,
            )
        elif kind == "stage":
            self.losses = {}
            for text, read in event["reads"].items():
                if read.get("passes", 0) > 1:
                    self.console.print(
                        f"stage {event['stage']} reads {text} {read['passes']:.1f} times over: there is no more of it",
                        markup=False,
                        highlight=False,
                    )
            self.task = self.bar.add_task(
                f"stage {event['stage']}, {event['parameters'] / 1e6:.2f} M",
                total=event["steps"],
                completed=event["done"],
                losses="",
            )
        elif self.task is not None:
            if kind in ("train", "evaluation"):
                self.losses["loss" if kind == "train" else "val."] = event["loss"]
            losses = "  ".join(f"{name} {_loss(loss, 3)}" for name, loss in self.losses.items())
            self.bar.update(self.task, completed=event["step"], losses=losses)


def growth_line(event: dict[str, Any]) -> str:
    """Say what a growth did to the loss and the logits."""
    equal = "bit for bit equal" if event["logits_equal"] else "NOT equal"
    return (
        f"grown before stage {event['stage']}: validation loss {_loss(event['loss_before'], 6)} before, "
        f"{_loss(event['loss_after'], 6)} after; logits {equal}"
    )


def _loss(loss: float | None, digits: int) -> str:
    return "diverged" if loss is None else f"{loss:.{digits}f}"
