"""What a comparison's results rest on: text for each parameter, the output head's share, scales at initialisation."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import AutoConfig, PreTrainedConfig

from .. import cost
from .claims import LARGE_HEAD, LONG_CURVE
from .findings import Findings
from .page import Element, Folded, Heading, Paragraph, Table, rounded
from .results import Line
from .scales import DROWNS, PARTS, drowned, relative


def conditions(findings: Findings) -> Iterator[Element]:
    """Tabulate, at the budget that decides, what each arm's result rests on."""
    yield Heading("What the results rest on")
    yield Paragraph(
        "Parameters are those of the last model: all of them, a tied embedding counted once; and those outside the "
        "embedding, which are the weights of the maps in the blocks, without embedding, output head and norms. The "
        "head's share is that of the training FLOPs of the last model. Scales are root mean squares at initialisation, "
        "before any growth, of what a block's attention and feed-forward add to the residual stream, in multiples of "
        "the stream that enters the block: the largest of all blocks."
    )
    head = [
        "arm",
        "parameters",
        "outside the embedding",
        "text tokens a parameter",
        "a parameter outside the embedding",
        "head's share of FLOPs",
        "embedding",
        *(f"{_named(part)}, × the stream" for part in PARTS),
    ]
    yield Table(head, [_row(findings, arm) for arm in findings.ranking(findings.last)])
    blocks = [
        [arm, str(number), f"{scales['stream']:.3g}", *(f"{scales[part]:.3g}" for part in PARTS)]
        for arm in findings.arms
        for number, scales in enumerate(_blocks(findings, arm), 1)
    ]
    if blocks:
        table = Table(["arm", "block", "stream that enters", *map(_named, PARTS)], blocks)
        yield Folded("Root mean squares of every block at initialisation", [table])


def warnings(findings: Findings) -> Iterator[str]:
    """Say what in these conditions keeps the results from showing what blocks are worth."""
    shares = {arm: cost.head_share(_config(findings, arm), _context(findings)) for arm in findings.arms}
    large = [f"{arm} ({share:.0%})" for arm, share in shares.items() if share > LARGE_HEAD]
    if large:
        yield (
            f"The output head takes more than {LARGE_HEAD:.0%} of the training FLOPs of {', '.join(large)}: these "
            "results say little about blocks. A smaller vocabulary, or bytes, makes it smaller."
        )
    found = {arm: drowned(_blocks(findings, arm)) for arm in findings.arms}
    told = [f"{arm} ({parts[0]})" for arm, parts in found.items() if parts]
    if told:
        yield (
            f"At initialisation, parts that add more than {DROWNS:g} × the residual stream drown what was there: "
            f"{'; '.join(told)}. Short runs of these arms show how they get out of that, not what their layers are "
            "worth; normalised embeddings or smaller initial output maps avoid it."
        )
    span = findings.budgets[-1] / findings.budgets[0]
    if span < LONG_CURVE:
        yield (
            f"The curves are short: budgets span a factor of {span:.3g}, and trends need {LONG_CURVE} or more to show."
        )


def _row(findings: Findings, arm: str) -> list[str]:
    config, budget, blocks = _config(findings, arm), findings.last, _blocks(findings, arm)
    outside, text = cost.block_parameters(config), findings.mean(arm, budget, "text_tokens")
    return [
        arm,
        f"{findings.mean(arm, budget, 'parameters'):,.0f}",
        f"{outside:,}",
        rounded(findings.text_per_parameter(arm, budget)),
        rounded(text / outside) if outside else "–",
        f"{cost.head_share(config, _context(findings)):.1%}",
        f"{blocks[0]['stream']:.3g}" if blocks else "–",
        *(rounded(max(relative(scales, part) for scales in blocks)) if blocks else "–" for part in PARTS),
    ]


def _config(findings: Findings, arm: str) -> PreTrainedConfig:
    return AutoConfig.for_model(**findings.runs(arm)[0]["config"])


def _blocks(findings: Findings, arm: str) -> list[Line]:
    return findings.initial[arm]["blocks"] if arm in findings.initial else []


def _context(findings: Findings) -> int:
    return findings.recipe.training.sequence_length


def _named(part: str) -> str:
    return part.replace("_", "-")
