"""Tables of what a text and a prompt use of a model."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..explain import PROJECTION_ORDER, Explanation, heading, map_label, word
from ..growth.importance import GroupUse, Importance
from ..units import short
from .tables import Row, tabulate


def activity_table(importance: Importance) -> Table:
    """Tabulate how text uses parameter tokens: a row for each projection, block and token group.

    Of query, key and value maps together: the tokens of one of them, and means over all three. "active" is the mean of
    `GroupUse.active`, "never" the share of tokens that are active nowhere; the most important token comes with its
    share of its map's importance.
    """
    by_place: dict[tuple[int, int, str], dict[str, GroupUse]] = {}
    for (block, name), uses in importance.uses.items():
        for group, use in uses.items():
            order = PROJECTION_ORDER.index(importance.projections[name])
            by_place.setdefault((order, block, group), {})[name] = use
    rows: list[Row | None] = []
    last: tuple[int, int] | None = None
    # Stable: groups stay in the order in which they were added.
    for (projection, block, group), by_map in sorted(by_place.items(), key=lambda item: item[0][:2]):
        is_new = last is None or last[0] != projection
        if is_new and last is not None:
            rows.append(None)
        found = list(by_map.values())
        rows.append(
            (
                PROJECTION_ORDER[projection] if is_new else "",
                "" if last == (projection, block) else str(block),
                group,
                short(len(found[0].active)),
                f"{_mean(use.key_norm for use in found):.3g}",
                f"{_mean(use.value_norm for use in found):.3g}",
                f"{_mean(use.active for use in found):.1%}",
                f"{_mean((use.active == 0).float() for use in found):.1%}",
                _most_important(importance, block, by_map),
            )
        )
        last = projection, block
    numbers = ("tokens", "‖key‖", "‖value‖", "active", "never", "most important")
    title = f"Use of parameter tokens on {importance.text_tokens:,} text tokens"
    return tabulate(("maps", "block", "group"), numbers, rows, title)


def contribution_table(explanation: Explanation, tokenizer: PreTrainedTokenizerBase) -> Table:
    """Tabulate the parameter tokens that mattered most for the next word.

    For each: the text token at which it contributed most, the text tokens whose logits it raised most, its weight, and
    its contribution to the logit.
    """
    rows = [
        (
            str(c),
            word(tokenizer, explanation.prompt[c.position]),
            " ".join(word(tokenizer, token) for token in c.promotes) or "–",
            f"{c.weight:.3f}",
            f"{c.contribution:+.4f}",
        )
        for c in explanation.top
    ]
    words = ("parameter token", "most at", "raises most")
    return tabulate(words, ("weight", "logit"), rows, heading(explanation, tokenizer))


def _most_important(importance: Importance, block: int, by_map: dict[str, GroupUse]) -> str:
    best, label = 0.0, "–"
    for name, use in by_map.items():
        whole = sum(float(other.importance.sum()) for other in importance.uses[block, name].values())
        if whole and float(use.importance.max()) / whole > best:
            best = float(use.importance.max()) / whole
            projection = importance.projections[name]
            which = map_label(name, projection) if projection == "qkv" else ""
            label = f"{which}[{int(use.importance.argmax())}] {best:.1%}"
    return label


def _mean(tensors: Iterable[Tensor]) -> float:
    return float(torch.cat(list(tensors)).mean())
