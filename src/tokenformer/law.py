"""What size and text are worth, and what growing keeps of the text read before it: fitted elsewhere, used here.

    L(N, D) = E + A / N^α + B / D^β                                      bits per byte of a model trained from scratch
    L(N, D) + lost · (L(N, D_after) − L(N, D)),   D = D_before + D_after          of one grown to N after D_before

N: parameters of the maps in the blocks, without embedding and output head (`cost.block_parameters`); D: text tokens
read. Where `lost` is 0, a grown model is as good as one from scratch that has read as much; where it is 1, as one that
has read only what came after growing.

`tokenformer.compare.law` fits the first, `tokenformer.compare.transfer` the second.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import EvaluationError

SHIPPED = Path(__file__).with_name("law.json")
# Of what is drawn in order to say how unsure a number is.
_DRAWS = 100

# What becomes of the learning rate as a model grows.
KEPT, AFTER_DECAY = "kept", "warmed up again after a decay"

Values = Any  # a number, or an array of them
Constants = tuple[float, float, float, float, float]


@dataclass(frozen=True)
class Law:
    """A fitted law.

    Attributes:
        E: bits per byte that neither size nor text takes away.
        A, alpha: of the parameters.
        B, beta: of the text tokens.
        intervals: of each of these by name, from refits to resampled seeds.
        parameters, text_tokens: smallest and largest that it was fitted to; beyond them it is an extrapolation.
        refits: the constants E, A, alpha, B, beta of each refit.
        spread: standard deviation of what single runs differ by from the law, in the logarithm of their loss.
        confidence: of all intervals.
        tail: share of the refits that lies beyond either end of an interval.
    """

    E: float
    A: float
    alpha: float
    B: float
    beta: float
    intervals: dict[str, tuple[float, float]]
    parameters: tuple[float, float]
    text_tokens: tuple[float, float]
    refits: tuple[Constants, ...]
    spread: float
    confidence: float
    tail: float

    def loss(self, parameters: float, text_tokens: float) -> float:
        """Return the bits per byte to expect of a model of this size after this text."""
        return float(loss_of((self.E, self.A, self.alpha, self.B, self.beta), parameters, text_tokens))

    def refitted(self, parameters: float, text_tokens: float) -> np.ndarray:
        """Return what each refit expects, `[refits]`: how unsure the law is."""
        return loss_of(np.array(self.refits).T, parameters, text_tokens)

    def interval(self, parameters: float, text_tokens: float) -> tuple[float, float]:
        """Return the bits per byte between which one more run should come out, by chance and what is unsure here."""
        return middle(self.refitted(parameters, text_tokens)[:, None] * self.chance(0), self.tail)

    def chance(self, seed: int) -> np.ndarray:
        """Draw factors `[draws]` by which single runs differ from the law; each `seed` gives others."""
        return np.exp(self.spread * np.random.default_rng(seed).standard_normal(_DRAWS))

    def knows(self, parameters: float, text_tokens: float) -> bool:
        """Tell whether a size and a text lie within those that the law was fitted to."""
        return all(
            low <= value <= high
            for value, (low, high) in ((parameters, self.parameters), (text_tokens, self.text_tokens))
        )


def loss_of(constants: Any, parameters: Values, text_tokens: Values) -> Values:
    """Return bits per byte by the constants E, A, alpha, B, beta, each a number or an array."""
    E, A, alpha, B, beta = constants
    return E + A / parameters**alpha + B / text_tokens**beta


def middle(values: np.ndarray, tail: float) -> tuple[float, float]:
    """Return the interval of what is drawn, with a share `tail` beyond either end."""
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Transfer:
    """How much of the text read before it one way of growing loses.

    Attributes:
        grown: what grows, as fields of a configuration: ffn_param_tokens, num_hidden_layers …
        rate: what becomes of the learning rate: it is kept, or warms up again, after a decay or not.
        lost: share of that text's worth, one estimate for each arm and seed.
        factors: smallest and largest by which the blocks' parameters grew.
        shares: smallest and largest share of all text that was read before.
    """

    grown: tuple[str, ...]
    rate: str
    lost: tuple[float, ...]
    factors: tuple[float, float]
    shares: tuple[float, float]

    @property
    def mean(self) -> float:
        """The share to expect."""
        return math.fsum(self.lost) / len(self.lost)

    def drawn(self, count: int) -> np.ndarray:
        """Draw `[count]` shares as another run could have them, by Student's t over the estimates."""
        n = len(self.lost)
        if n < 2:
            return np.full(count, self.mean)
        spread = float(np.std(self.lost, ddof=1)) * math.sqrt(1 + 1 / n)
        return self.mean + spread * np.random.default_rng(n).standard_t(n - 1, count)

    def knows(self, factor: float, share: float) -> bool:
        """Tell whether growth by a factor after a share of the text lies within what was measured."""
        slack = 1 + 1e-6
        return all(
            low / slack <= value <= high * slack
            for value, (low, high) in ((factor, self.factors), (share, self.shares))
        )


class Seen(NamedTuple):
    """A model that is there, whose loss is known: its parameters in the blocks, text tokens read, and bits per byte."""

    parameters: float
    text_tokens: float
    bits_per_byte: float


@dataclass(frozen=True)
class Expectation:
    """What a run should come to.

    Attributes:
        bits_per_byte: to expect, and `interval`: between which one such run should come out.
        drawn: what each refit of the law expects, `[refits]`.
    """

    bits_per_byte: float
    interval: tuple[float, float]
    drawn: np.ndarray


def expect(
    law: Law,
    parameters: float,
    text_tokens: float,
    *,
    before: float = 0.0,
    transfer: Transfer | None = None,
    seen: Seen | None = None,
) -> Expectation:
    """Say what a model of a size should come to after so much text.

    Args:
        law: of models from scratch.
        parameters: in the blocks, in the end.
        text_tokens: read in all.
        before: of them, before growing to that size.
        transfer: how it grew; None: not at all.
        seen: a model on the same text. Its loss is taken as it is, and only the difference to it from the law.
    """
    expected, drawn = law.loss(parameters, text_tokens), law.refitted(parameters, text_tokens)
    if transfer is not None:
        after = text_tokens - before
        expected += transfer.mean * (law.loss(parameters, after) - expected)
        drawn = drawn + transfer.drawn(len(drawn)) * (law.refitted(parameters, after) - drawn)
    chance = law.chance(0)
    if seen is not None:
        expected += seen.bits_per_byte - law.loss(seen.parameters, seen.text_tokens)
        drawn = drawn + seen.bits_per_byte - law.refitted(seen.parameters, seen.text_tokens)
        chance = chance * law.chance(1)  # what is seen is one run's, too
    return Expectation(expected, middle(drawn[:, None] * chance, law.tail), drawn)


@dataclass(frozen=True)
class Knowledge:
    """What comparisons found, as a file says it.

    Attributes:
        comparisons: that it was fitted to, by name.
        text: their source, and `tokenizer`, `context` likewise.
        law: of models trained from scratch.
        transfers: of each way of growing that was tried.
    """

    comparisons: tuple[str, ...]
    text: str
    tokenizer: str
    context: int
    law: Law
    transfers: tuple[Transfer, ...]

    def json(self) -> str:
        """Write it as JSON, a line for each field or refit; six digits of each number are kept."""
        text = json.dumps(_rounded(dataclasses.asdict(self)), indent=1)
        return re.sub(r"\[[^][{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"

    @classmethod
    def read(cls, path: Path | None = None) -> Knowledge:
        """Read what was written; without a path, what this package ships.

        Raises:
            EvaluationError: there is no such file, or it holds something else.
        """
        try:
            content = json.loads((path or SHIPPED).read_text(encoding="utf-8"), object_hook=_with_tuples)
            law, transfers = Law(**content.pop("law")), tuple(Transfer(**each) for each in content.pop("transfers"))
            return cls(**content, law=law, transfers=transfers)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise EvaluationError(
                f"cannot read a fitted law from {path or SHIPPED}: {error}. `python benchmarks/law.py` fits one to "
                "comparisons"
            ) from error


def _rounded(content: Any) -> Any:
    if isinstance(content, float):
        return float(f"{content:.6g}")
    if isinstance(content, dict):
        return {name: _rounded(value) for name, value in content.items()}
    return [_rounded(value) for value in content] if isinstance(content, list | tuple) else content


def _with_tuples(content: dict[str, Any]) -> dict[str, Any]:
    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return {name: frozen(value) for name, value in content.items()}
