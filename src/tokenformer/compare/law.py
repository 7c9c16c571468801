"""What size and text are worth: bits per byte as a law of both, fitted to runs of several sizes and budgets.

    L(N, D) = E + A / N^α + B / D^β

N: parameters outside the embedding and the output head; D: text tokens read. Hoffmann et al., Training compute-optimal
large language models (arXiv 2203.15556), approach 3: the Huber loss of the logarithm, which outliers cannot bend.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import EvaluationError, MissingExtraError
from ..law import Constants, Law, loss_of, middle
from ..units import counted

try:
    from scipy import optimize, stats
except ImportError as error:
    raise MissingExtraError("fitting a law of size and text needs scipy: pip install 'tokenformer[compare]'") from error

# The law has five constants: with fewer sizes, or fewer budgets at each, it would fit anything.
SIZES, BUDGETS, SEEDS = 4, 3, 2
# A residual of the logarithm from which on it counts linearly: what seeds differ by (the paper's 0.001 is that of large
# models) is ordinary noise below it.
_HUBER = 0.01
_EXPONENTS = (0.01, 2.0)
_GRID = np.geomspace(0.05, 1.0, 9)
_RESAMPLES = 200


@dataclass(frozen=True)
class Point:
    """The end of one run.

    Attributes:
        parameters: outside the embedding and the output head.
        text_tokens: read.
        loss: in bits per byte.
        seed: of the run.
    """

    parameters: float
    text_tokens: float
    loss: float
    seed: int


def fit(points: Sequence[Point], *, confidence: float = 0.95) -> Law:
    """Fit the law to the ends of runs of one family, each to the end of its learning-rate schedule.

    Intervals come from refits to fewer seeds: of every size, one less than there are is drawn with replacement, each
    with all its budgets, which makes the variance unbiased (Rao and Wu, Resampling inference with complex survey data,
    1988). Their quantiles are set for few seeds as Student's t is (Hesterberg, What teachers should know about the
    bootstrap, arXiv 1411.5279). The same points give the same law.

    Args:
        points: of at least 4 sizes with 3 budgets and 2 seeds each.
        confidence: of the intervals.

    Raises:
        EvaluationError: there are fewer.
    """
    sizes: dict[float, dict[int, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        sizes[point.parameters][point.seed].append(point)
    _check(sizes)
    constants = _fitted(points)
    random = np.random.default_rng(0)
    refits = []
    for _ in range(_RESAMPLES):
        drawn = [
            curves[int(seed)]
            for curves in sizes.values()
            for seed in random.choice(sorted(curves), size=len(curves) - 1)
        ]
        refits.append(_fitted([point for curve in drawn for point in curve], start=constants))
    residuals = [math.log(p.loss / loss_of(constants, p.parameters, p.text_tokens)) for p in points]
    degrees = sum(len(curves) - 1 for curves in sizes.values())
    tail = float(stats.norm.cdf(-stats.t.ppf((1 + confidence) / 2, degrees)))
    names = ("E", "A", "alpha", "B", "beta")
    return Law(
        **dict(zip(names, constants, strict=True)),
        intervals={
            n: middle(np.array(values), tail) for n, values in zip(names, zip(*refits, strict=True), strict=True)
        },
        parameters=(min(sizes), max(sizes)),
        text_tokens=(min(p.text_tokens for p in points), max(p.text_tokens for p in points)),
        refits=tuple(refits),
        spread=math.sqrt(math.fsum(r * r for r in residuals) / (len(points) - len(names))),
        confidence=confidence,
        tail=tail,
    )


def _check(sizes: dict[float, dict[int, list[Point]]]) -> None:
    enough = [
        size
        for size, curves in sizes.items()
        if len(curves) >= SEEDS and min(len({p.text_tokens for p in curve}) for curve in curves.values()) >= BUDGETS
    ]
    if len(enough) < max(SIZES, len(sizes)):
        found = "; ".join(
            f"{size:,.0f} parameters: {counted(len(curves), 'seed')}, "
            f"{counted(min(map(len, curves.values())), 'budget')}"
            for size, curves in sorted(sizes.items())
        )
        raise EvaluationError(
            f"a law of size and text needs {SIZES} sizes, each with {BUDGETS} budgets and {SEEDS} seeds or more; found "
            f"{found or 'no runs'}. Run what is missing, or leave sizes with less out"
        )


def _fitted(points: Sequence[Point], *, start: Constants | None = None) -> Constants:
    """Return the constants that fit best, sought from `start` or from the best of a grid of exponents."""
    sizes, texts, losses = np.array([(p.parameters, p.text_tokens, p.loss) for p in points]).T
    # In units of their geometric middles, all constants are of one order.
    size, text = (float(np.exp(np.log(values).mean())) for values in (sizes, texts))
    sizes, texts = sizes / size, texts / text

    def residuals(constants: Constants) -> np.ndarray:
        return np.log(loss_of(constants, sizes, texts) / losses)

    if start is None:
        begin = min(
            (_linear(sizes, texts, losses, alpha, beta) for alpha in _GRID for beta in _GRID),
            key=lambda constants: float(np.abs(residuals(constants)).sum()),
        )
    else:
        E, A, alpha, B, beta = start
        begin = (E, A * size**-alpha, alpha, B * text**-beta, beta)
    low, high = _EXPONENTS
    found = optimize.least_squares(
        residuals,
        begin,
        bounds=([0, 0, low, 0, low], [np.inf, np.inf, high, np.inf, high]),
        loss="huber",
        f_scale=_HUBER,
    )
    E, A, alpha, B, beta = map(float, found.x)
    return E, A * size**alpha, alpha, B * text**beta, beta


def _linear(sizes: np.ndarray, texts: np.ndarray, losses: np.ndarray, alpha: float, beta: float) -> Constants:
    """Return the best constants for given exponents: a linear problem, without negative ones."""
    terms = np.stack([np.ones_like(sizes), sizes**-alpha, texts**-beta], axis=1)
    E, A, B = (max(float(x), 1e-3) for x in optimize.nnls(terms / losses[:, None], np.ones_like(losses))[0])
    return E, A, alpha, B, beta
