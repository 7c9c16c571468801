"""The picture that a report opens with: bits per byte against cost, to hover over, to zoom, and to hide arms in."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from ..errors import MissingExtraError
from .findings import Findings
from .page import scientific
from .pictures import AXES, growth_points, looks, short
from .statistics import value_at

try:
    from plotly import graph_objects as go
except ImportError as error:
    raise MissingExtraError(
        "the page of a comparison needs plotly for its picture: pip install 'tokenformer[compare]'"
    ) from error

# Of matplotlib's markers, which the other pictures have.
_SYMBOLS = {
    "o": "circle",
    "s": "square",
    "D": "diamond",
    "P": "cross",
    "X": "x",
    "p": "pentagon",
    "*": "star",
    "h": "hexagon",
    "d": "diamond-tall",
}
_BUTTONS = {"training_flops": "training FLOPs", "text_tokens": "text tokens", "seconds": "seconds"}
# On a telephone the names of all arms would leave no room for their curves: there they stand below them.
_NARROW = """\
if (window.innerWidth < 700) Plotly.relayout('{plot_id}', {
  'legend.x': 0, 'legend.y': -0.2, 'legend.xanchor': 'left', 'legend.yanchor': 'top', 'margin.l': 45,
  height: 420 + 19 * document.querySelectorAll('#{plot_id} .legend .traces').length});"""


def interactive_curves(findings: Findings) -> str:
    """Draw every arm's decayed ends with intervals and growth points as HTML, plotly's script included.

    Buttons choose the cost on the horizontal axis. The same findings give the same characters.
    """
    traces = [trace for arm in findings.by_rank() for trace in _traces(findings, arm)]
    buttons = [
        {
            "label": label,
            "method": "update",
            "args": [
                {"x": [trace["places"][field][0] for trace in traces], "y": [t["places"][field][1] for t in traces]},
                {"xaxis.title.text": AXES[field], "xaxis.autorange": True, "yaxis.autorange": True},
            ],
        }
        for field, label in _BUTTONS.items()
    ]
    figure = go.Figure(
        [
            go.Scatter(x=t["places"]["training_flops"][0], y=t["places"]["training_flops"][1], **t["look"])
            for t in traces
        ],
        {
            "template": "plotly_white",
            "height": 600,
            "margin": {"l": 60, "r": 10, "t": 50, "b": 50},
            "font": {"color": "#1b1f24"},
            "hoverlabel": {"align": "left", "bgcolor": "white", "font": {"color": "#1b1f24"}},
            "xaxis": {
                "type": "log",
                "title": {"text": AXES["training_flops"]},
                "exponentformat": "power",
                "dtick": "D2",
            },
            "legend": {"tracegroupgap": 0},
            "yaxis": {"title": {"text": "bits per byte on held-out documents"}},
            "updatemenus": [
                {
                    "type": "buttons",
                    "direction": "right",
                    "buttons": buttons,
                    "x": 0,
                    "xanchor": "left",
                    "y": 1.02,
                    "yanchor": "bottom",
                }
            ],
        },
    )
    return figure.to_html(
        full_html=False,
        include_plotlyjs=True,
        div_id="chart",
        config={"displaylogo": False, "displayModeBar": False},
        default_height="auto",
        post_script=_NARROW,
    )


def _traces(findings: Findings, arm: str) -> Iterator[dict[str, Any]]:
    """Describe an arm's curve, and its growth points where it has any; they come and go together in the legend."""
    look, name = looks(findings)[arm], escape(short(arm), quote=False)
    grows = look["linestyle"] == "-"
    budgets, curves = findings.budgets_of(arm), {field: findings.curve(arm, field) for field in _BUTTONS}
    yield {
        "places": {field: tuple(map(list, zip(*curve, strict=True))) for field, curve in curves.items()},
        "look": {
            "name": name,
            "legendgroup": arm,
            "mode": "lines+markers",
            "line": {"color": look["color"], "dash": "solid" if grows else "dash", "width": look["linewidth"] * 1.2},
            "marker": {"symbol": _SYMBOLS[look["marker"]] + ("" if grows else "-open"), "size": 8},
            "error_y": {
                "array": [findings.score(arm, budget).half_width or 0.0 for budget in budgets],
                "thickness": 1,
                "width": 3,
            },
            "text": [_told(findings, arm, budget) for budget in budgets],
            "hovertemplate": "%{text}<extra></extra>",
        },
    }
    if growths := findings.runs(arm)[0]["growths"]:
        yield {
            "places": {field: _growth_places(findings, arm, field) for field in _BUTTONS},
            "look": {
                "name": f"{name} grows",
                "legendgroup": arm,
                "showlegend": False,
                "mode": "markers",
                "marker": {"symbol": "triangle-up", "size": 12, "color": look["color"]},
                "text": [
                    f"<b>{escape(arm, quote=False)}</b><br>grows by {escape(growth['method'])} "
                    f"after {scientific(growth['training_flops'])} training FLOPs:<br>"
                    f"{growth['parameters_before']:,} → {growth['parameters_after']:,} parameters,<br>"
                    f"{growth['bits_per_byte_before']:.4f} → {growth['bits_per_byte_after']:.4f} bits per byte"
                    for growth in growths
                ],
                "hovertemplate": "%{text}<extra></extra>",
            },
        }


def _growth_places(findings: Findings, arm: str, field: str) -> tuple[list[float], list[float]]:
    """Return where an arm grew: on its curve, or at the bottom if before the curve begins."""
    curve, places = findings.curve(arm, field), growth_points(findings, arm, field)
    bottom = min(bits for name in findings.arms for _, bits in findings.curve(name))
    return places, [value_at(curve, place) if place >= curve[0][0] else bottom for place in places]


def _told(findings: Findings, arm: str, budget: float) -> str:
    """Say what a point is."""
    growths = next(iter(findings.finals[arm, budget].values()))["growths"]
    mean = {field: findings.mean(arm, budget, field) for field in (*_BUTTONS, "parameters")}
    lines = [
        f"<b>{escape(arm, quote=False)}</b>",
        f"{findings.score(arm, budget)} bits per byte",
        f"{scientific(mean['training_flops'])} training FLOPs",
        f"{mean['text_tokens']:,.0f} text tokens, {mean['seconds']:,.0f} seconds",
        f"{mean['parameters']:,.0f} parameters",
        *(f"grown by {escape(growth['method'])} after {scientific(growth['training_flops'])}" for growth in growths),
    ]
    return "<br>".join(lines)
