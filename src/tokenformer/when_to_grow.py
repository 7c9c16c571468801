"""Grow now, or train on? Growing makes each text token dearer, so that the same FLOPs read less text. It pays when what
the new parameters are worth exceeds what that text would have been worth to the small model.

    worth of parameters · doublings of parameters gained  >  gain per doubling of text · doublings of text given up

The gain per doubling is the slope of the small model's own curve at constant learning rate. The worth of a doubling of
parameters is one number, fitted to comparisons in which both were tried (`tokenformer.compare.decision`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Bits per byte that a doubling of the parameters in the blocks' maps is worth, as benchmarks/compare.py fits it to the
# comparisons "when" and "seeds-prose"; docs/compare.md says how far to trust it.
WORTH_OF_PARAMETERS = 0.036


@dataclass(frozen=True)
class Bargain:
    """What growing gives and takes, at equal training FLOPs.

    Attributes:
        slope: bits per byte that the small model gains per doubling of its text, at constant learning rate.
        parameters: doublings of the parameters in the blocks' maps, without embedding and head.
        text: doublings of text given up: log2 of what the small model would read in all, trained on, to what is read
            in all if it grows.
    """

    slope: float
    parameters: float
    text: float

    @property
    def price(self) -> float:
        """Bits per byte of text given up for a doubling of parameters."""
        return self.slope * self.text / self.parameters

    def pays(self, worth: float = WORTH_OF_PARAMETERS) -> bool:
        """Tell whether to grow now, if a doubling of parameters is worth so many bits per byte."""
        return self.price < worth


def slope(curve: Sequence[tuple[float, float]], end: float) -> float | None:
    """Return the bits per byte gained per doubling of text over the last doubling up to `end`, by least squares.

    Args:
        curve: (text tokens, bits per byte), all at the same learning rate.
        end: in text tokens.

    Returns:
        A positive number where bits per byte fall; None unless the points there span half a doubling.
    """
    points = [point for point in curve if end / 2 * (1 - 1e-3) <= point[0] <= end * (1 + 1e-3)]
    doublings = [math.log2(text) for text, _ in points]
    if not points or max(doublings) - min(doublings) < 0.5:
        return None
    return -float(np.polyfit(doublings, [bits for _, bits in points], 1)[0])


def held_curve(events: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    """Return the evaluations (text tokens, bits per byte) of a run's last model at its full learning rate.

    Args:
        events: of its log.jsonl; what came before the last growth is left out, and warm-up and decay, too.
    """
    grown = [i for i, event in enumerate(events) if event["event"] == "growth"]
    later = events[grown[-1] :] if grown else events
    last = [event for event in later if event["event"] == "evaluation" and "learning_rate" in event]
    full = max((event["learning_rate"] for event in last), default=0.0)
    held = [(e["text_tokens_seen"], e["bits_per_byte"]) for e in last if e["learning_rate"] >= 0.99 * full]
    return [(text, bits) for text, bits in held if bits is not None and math.isfinite(bits)]
