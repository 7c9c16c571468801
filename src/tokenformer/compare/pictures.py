"""The pictures of a report: bits per byte against cost, arms side by side, attention against context."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import MissingExtraError
from .findings import Findings
from .page import scientific
from .statistics import Curve, value_at

try:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
except ImportError as error:
    raise MissingExtraError(
        "the pictures of a comparison need matplotlib: pip install 'tokenformer[compare]'"
    ) from error

# Legible on white and on black.
# fmt: off
_COLOURS = [
    "#1f83d8", "#e0701a", "#1d9c5b", "#d2396f", "#8a63d2", "#b08a00", "#0fa3b1", "#a0603a", "#d65fc1", "#71829b",
]
# fmt: on
_MARKERS = "osDPXp*hd"
_INK = "#20252b"
_LINE = 0.2  # inches
_SETTINGS: Any = {
    "svg.hashsalt": "tokenformer",  # the same lines give the same bytes
    "text.parse_math": False,  # names are not formulas
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK
    ),
}
AXES = {
    "training_flops": "cumulative training FLOPs, all stages",
    "text_tokens": "text tokens read",
    "seconds": "seconds of training",
}


def draw_curves(findings: Findings, field: str) -> tuple[bytes, bytes]:
    """Draw every arm's decayed ends against a cost with intervals and growth points (paper, figure 1), as SVG and PNG.

    Args:
        findings: what to draw.
        field: "training_flops", "text_tokens" or "seconds".
    """
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(10, 6), layout="constrained")
        axes = figure.subplots()
        ends, chosen = {}, looks(findings)
        for arm, look in chosen.items():
            curve = findings.curve(arm, field)
            bars = [findings.score(arm, budget).half_width or 0.0 for budget in findings.budgets_of(arm)]
            costs, means = zip(*curve, strict=True)
            axes.errorbar(costs, means, yerr=bars, capsize=2, elinewidth=0.8, **look)
            ends[arm] = curve[-1]
            for x in growth_points(findings, arm, field):
                _mark_growth(axes, x, curve, look["color"])
        axes.set_xscale("log")
        _cost_axis(axes, [x for arm in ends for x, _ in findings.curve(arm, field)], field)
        axes.set_ylabel("bits per byte on held-out documents")
        _label_ends(axes, ends, chosen)
        return _rendered(figure)


def draw_differences(findings: Findings, budget: float) -> tuple[bytes, bytes]:
    """Draw each arm's difference to the reference at a budget with its interval, best on top, as SVG and PNG."""
    rules = findings.recipe.rules
    contrasts = findings.contrasts(budget, rules.reference)
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(10, 1.2 + 0.28 * len(contrasts)), layout="constrained")
        axes = figure.subplots()
        axes.axvspan(-rules.threshold, rules.threshold, color=_INK, alpha=0.1, linewidth=0)
        axes.axvline(0, color=_INK, linewidth=1)
        chosen = looks(findings)
        for row, (arm, contrast) in enumerate(contrasts.items()):
            look = {**chosen[arm], "linestyle": "none"}
            axes.errorbar(contrast.difference.mean, row, xerr=contrast.difference.half_width or 0.0, capsize=3, **look)
        axes.set_yticks(range(len(contrasts)), [short(arm) for arm in contrasts])
        axes.set_ylim(len(contrasts) - 0.5, -0.5)
        axes.set_xlabel(
            f"bits per byte less those of {short(rules.reference)} at {scientific(budget)}; left: fewer bits"
        )
        return _rendered(figure)


def draw_attention(costs: Mapping[str, Sequence[tuple[int, float, float]]]) -> tuple[bytes, bytes]:
    """Draw forward FLOPs per text token against context length, as SVG and PNG.

    Args:
        costs: by name, (context, all FLOPs, FLOPs of attention between text tokens) by rising context.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axes = figure.subplots()
        chosen = {name: _look(i, dashed=False) for i, name in enumerate(costs)}
        for name, points in costs.items():
            contexts, whole, attention = zip(*points, strict=True)
            axes.plot(contexts, whole, **chosen[name])
            axes.plot(contexts, attention, color=chosen[name]["color"], linestyle=":", linewidth=1.2)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(contexts, [f"{context // 1024}k" for context in contexts])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: scientific(y)))
        axes.set_xlabel("context in text tokens")
        axes.set_ylabel("forward FLOPs per text token")
        _label_ends(axes, {name: points[-1][:2] for name, points in costs.items()}, chosen)
        return _rendered(figure)


def looks(findings: Findings) -> dict[str, dict[str, Any]]:
    """Choose colour, marker and line: solid and filled grows, dashed and hollow never does, ink is the reference."""
    chosen, counts = {}, {True: 0, False: 0}
    for arm in findings.arms:
        grown = findings.grown(arm)
        if arm == findings.recipe.rules.reference:
            chosen[arm] = {**_look(0, dashed=not grown), "color": _INK, "linewidth": 2.2}
            continue
        chosen[arm] = _look(counts[grown], dashed=not grown)
        counts[grown] += 1
    return chosen


def _look(i: int, *, dashed: bool) -> dict[str, Any]:
    return {
        "color": _COLOURS[i % len(_COLOURS)],
        "marker": _MARKERS[i % len(_MARKERS)],
        "markersize": 5,
        "linewidth": 1.4,
        "linestyle": "--" if dashed else "-",
        "markerfacecolor": "none" if dashed else None,
    }


def growth_points(findings: Findings, arm: str, field: str) -> list[float]:
    """Return where an arm grew in its longest runs, means over seeds."""
    by_growth = zip(*([growth[field] for growth in line["growths"]] for line in findings.runs(arm)), strict=False)
    return [sum(values) / len(values) for values in by_growth]


def _mark_growth(axes: Any, x: float, curve: Curve, colour: str) -> None:
    """Mark a growth on the curve; before the first decayed end, where there is none, at the bottom."""
    look = {"marker": 6, "color": colour, "markersize": 7, "linestyle": "none", "clip_on": False, "zorder": 5}
    if curve[0][0] <= x <= curve[-1][0]:
        axes.plot(x, value_at(curve, x), **look)
    else:
        axes.plot(x, 0, transform=axes.get_xaxis_transform(), **look)


def _cost_axis(axes: Any, costs: Sequence[float], field: str) -> None:
    """Label round numbers, also where the axis spans less than a power of ten."""
    axes.set_xlabel(AXES[field])
    decades = math.log10(max(costs) / min(costs))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: scientific(x)))


def _label_ends(axes: Any, ends: Mapping[str, tuple[float, float]], looks: Mapping[str, Mapping[str, Any]]) -> None:
    """Write each name beside its curve's last point, spread so that none covers another."""
    axes.autoscale_view()
    order = sorted(ends, key=lambda name: -ends[name][1])
    heights = [float((axes.transScale + axes.transLimits).transform(ends[name])[1]) for name in order]
    gap = min(_LINE / axes.figure.get_figheight(), 1 / len(order))
    for name, height in zip(order, _spread(heights, gap=gap), strict=True):
        colour = looks[name]["color"]
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.7, "relpos": (0, 0.5), "shrinkA": 0}
        axes.annotate(
            short(name),
            xy=ends[name],
            xytext=(1.07, height),
            textcoords="axes fraction",
            va="center",
            color=colour,
            annotation_clip=False,
            arrowprops=line,
        )


def short(name: str) -> str:
    return name if len(name) <= 40 else f"{name[:39]}…"


def _spread(wanted: Sequence[float], *, gap: float) -> list[float]:
    """Move falling heights apart to at least `gap`, staying between 0 and 1 if they fit."""
    placed: list[float] = []
    for height in wanted:
        placed.append(min(height, placed[-1] - gap) if placed else height)
    lowest = 0.0
    for i in reversed(range(len(placed))):
        placed[i] = max(placed[i], lowest)
        lowest = placed[i] + gap
    return placed


def _rendered(figure: Figure) -> tuple[bytes, bytes]:
    svg, png = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # names of any script
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        figure.set_layout_engine("none")  # found once for both: finding it takes a third of the time
        figure.savefig(png, format="png", dpi=100)
    return svg.getvalue(), png.getvalue()
