"""The events of a run: log.jsonl, a line each."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoints.disk import disk_errors
from ..checkpoints.files import replacing_file

OnEvent = Callable[[dict[str, Any]], None]


def read_log(run: str | Path) -> list[dict[str, Any]]:
    """Return the events of a run; a last line cut short by a kill is left out."""
    events = []
    for line in (Path(run) / "log.jsonl").read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return events


def finite(value: float | None) -> float | None:
    """Return a measured value, or None where it has diverged: JSON has no number for that."""
    return value if value is not None and math.isfinite(value) else None


@dataclass
class Log:
    """The events of a run, in a file and to whoever watches; `enabled` in the one process that writes."""

    path: Path
    on_event: OnEvent
    enabled: bool

    def write(self, event: dict[str, Any]) -> None:
        """Append one event."""
        if self.enabled:
            with disk_errors(self.path), self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(event, allow_nan=False) + "\n")
        self.on_event(event)

    def rewind(self, stage: int, step: int) -> dict[str, Any]:
        """Drop what was logged after `step` of `stage`, to be logged again; return the newest event that is left."""
        if not self.path.exists():
            return {}
        kept = [e for e in read_log(self.path.parent) if (e.get("stage", 0), e.get("step", 0)) <= (stage, step)]
        # Its end was logged where a kill came before its checkpoint was whole.
        kept = [e for e in kept if e.get("stage", 0) < stage or (step > 0 and e["event"] != "end")]
        if self.enabled:
            with replacing_file(self.path, force=True) as file:
                file.write_text("".join(json.dumps(e, allow_nan=False) + "\n" for e in kept), encoding="utf-8")
        return next((e for e in reversed(kept) if "seconds" in e), {})
