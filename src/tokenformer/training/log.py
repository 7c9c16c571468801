"""The events of a run: log.jsonl, a line each."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.files import disk_errors

OnEvent = Callable[[dict[str, Any]], None]


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """Return the events of a run; a last line cut short by a kill is left out."""
    events = []
    for line in (Path(run) / "log.jsonl").read_text().splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


@dataclass
class Log:
    """The events of a run, in a file and to whoever watches; `enabled` in the one process that writes."""

    path: Path
    on_event: OnEvent
    enabled: bool

    def write(self, event: dict[str, Any]) -> None:
        """Append one event."""
        if self.enabled:
            with disk_errors(self.path), self.path.open("a") as stream:
                stream.write(json.dumps(event) + "\n")
        self.on_event(event)

    def rewind(self, stage: int, step: int) -> dict[str, Any]:
        """Drop what was logged after `step` of `stage`, to be logged again; return the newest event that is left."""
        if not self.path.exists():
            return {}
        kept = [e for e in read_log(self.path.parent) if (e.get("stage", 0), e.get("step", 0)) <= (stage, step)]
        if step == 0:
            kept = [e for e in kept if e.get("stage", 0) < stage]
        if self.enabled:
            temporary = self.path.with_suffix(".tmp")
            with disk_errors(self.path):
                temporary.write_text("".join(json.dumps(e) + "\n" for e in kept))
                temporary.replace(self.path)
        return next((e for e in reversed(kept) if "seconds" in e), {})
