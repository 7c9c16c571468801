"""What parameter tokens do: which of them mattered for a prompt's next word, and a picture of it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .errors import EvaluationError, GrowthError, MissingExtraError
from .growth.architectures import architecture_of, token_groups
from .growth.importance import watched_weights
from .growth.layout import TokenMap
from .growth.neurons import group_neurons
from .growth.operations import read_groups
from .models.names import TEXT
from .models.ternary import ternary
from .units import counted

PROJECTION_ORDER = ("qkv", "output", "ffn")
_Place = tuple[int, TokenMap, str]


@dataclass(frozen=True)
class Contribution:
    """What one parameter token did for the next word.

    Attributes:
        block: its block's number.
        map_name: the name of its map in the block.
        projection: "qkv", "output" or "ffn".
        group: its token group.
        index: its number in the group.
        position: number of the text token at which it contributed most.
        weight: what its value was multiplied with there.
        contribution: by how much its removal would lower the target's logit, to first order.
        promotes: the text tokens whose logits its value raised most with this weight, as `promotes` finds them; of
            query, key and value maps none, whose outputs are not in the residual stream.
    """

    block: int
    map_name: str
    projection: str
    group: str
    index: int
    position: int
    weight: float
    contribution: float
    promotes: tuple[int, ...]

    def __str__(self) -> str:
        """Name the parameter token, for example `block 3 ffn base[17]`."""
        return f"block {self.block} {map_label(self.map_name, self.projection)} {self.group}[{self.index}]"


@dataclass(frozen=True)
class Explanation:
    """Why a model expects a word.

    Attributes:
        prompt: text tokens that it read.
        target: text token explained.
        logit: the target's.
        probability: the target's.
        total: Σ|contribution| of all parameter tokens by (block, projection, group).
        top: those that contributed most for or against, largest magnitude first.
    """

    prompt: tuple[int, ...]
    target: int
    logit: float
    probability: float
    total: dict[tuple[int, str, str], float]
    top: tuple[Contribution, ...]


def explain(model: PreTrainedModel, input_ids: Tensor, *, target: int | None = None, top: int = 20) -> Explanation:
    """Find the parameter tokens that mattered most for the text token after a prompt.

    A contribution is weight × gradient of the target's logit by that weight, summed over the prompt's text tokens; it
    equals value · gradient by the value. That is how much the logit would fall, to first order, if this one value were
    zero: later blocks and the final norm are taken as linear. It is not the effect of removing several together, which
    can replace each other; nor of removing the key, whose score also takes part in the norm of all scores; nor how the
    probability changes, which depends on all logits. The tests compare it with real removal.

    Args:
        model: a TokenFormer, or an ordinary transformer with a row in the table of architectures, whose neurons are
            kept by token group from then on.
        input_ids: prompt `[1, T]`.
        target: text token to explain. Default: the likeliest.
        top: how many contributions to list.

    Raises:
        GrowthError: no row in the table.
        EvaluationError: the prompt is empty or longer than the model's context, or the target is not in its vocabulary.
    """
    length, context = input_ids.shape[-1], getattr(model.config, "max_position_embeddings", None)
    if not length or (context and length > context):
        raise EvaluationError(f"the prompt has {length} text tokens; the model reads 1 to {context}")
    seen: list[tuple[_Place, Tensor]] = []  # a place several times where the blocks are looped

    def see(block: int, token_map: TokenMap, weights: dict[str, Tensor]) -> None:
        seen.extend(((block, token_map, group), w) for group, w in weights.items())

    was_training = model.training
    model.eval()
    try:
        with torch.enable_grad(), watched_weights(model, see):
            # Gradients reach the weights even where every parameter is frozen.
            embedded = model.get_input_embeddings()(input_ids).detach().requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0, -1].float()
            target = int(logits.argmax()) if target is None else target
            if not 0 <= target < len(logits):
                raise EvaluationError(f"text token {target} is not in the vocabulary of {len(logits)}")
            gradients = torch.autograd.grad(logits[target], [weight for _, weight in seen])
    finally:
        model.train(was_training)
    logits = logits.detach()
    # By place: what each parameter token `[n]` had to do with each text token of the prompt, loop after loop `[L · T]`.
    weights: dict[_Place, Tensor] = {}
    products: dict[_Place, Tensor] = {}
    for (place, weight), gradient in zip(seen, gradients, strict=True):
        rows = weight.detach().float().reshape(length, -1)
        for found, part in ((weights, rows), (products, rows * gradient.float().reshape(length, -1))):
            found[place] = torch.cat([found[place], part]) if place in found else part
    sums = {place: product.sum(0) for place, product in products.items()}
    total: dict[tuple[int, str, str], float] = {}
    for (block, token_map, group), contribution in sums.items():
        at = block, token_map.projection, group
        total[at] = total.get(at, 0.0) + float(contribution.abs().sum())
    contributions = []
    for place, i in _largest(sums, top):
        block, token_map, group = place
        row = int(products[place][:, i].abs().argmax())
        strength = float(weights[place][row, i])
        contributions.append(
            Contribution(
                block=block,
                map_name=token_map.name,
                projection=token_map.projection,
                group=group,
                index=i,
                position=row % length,
                weight=strength,
                contribution=float(sums[place][i]),
                promotes=()
                if token_map.projection == "qkv"
                else promotes(model, block, token_map.name, group, i, weight=strength),
            )
        )
    return Explanation(
        prompt=tuple(input_ids[0].tolist()),
        target=target,
        logit=float(logits[target]),
        probability=float(logits.softmax(-1)[target]),
        total=total,
        top=tuple(contributions),
    )


@torch.no_grad()
def promotes(
    model: PreTrainedModel, block: int, map_name: str, group: str, index: int, *, weight: float = 1.0, top: int = 5
) -> tuple[int, ...]:
    """Return the text tokens whose logits a value raises most, read through the final norm and the head alone.

    What later blocks make of the value is left out.

    Args:
        model: as for `explain`.
        block, map_name, group, index: of the parameter token; the map must write into the residual stream.
        weight: what the value is multiplied with; only its sign matters.
        top: how many text tokens, the most raised first.

    Raises:
        GrowthError: no such parameter token, or one of a query, key or value map.
    """
    group_neurons(model)
    row = architecture_of(model.config)
    token_map = next((m for m in row.maps if m.name == map_name and m.projection != "qkv"), None)
    blocks = row.blocks_of(model)
    groups = read_groups(blocks[block], token_map) if token_map is not None and 0 <= block < len(blocks) else {}
    part = next(part.tensor for part in (token_map or row.maps[0]).parts if part.axis == 1)
    if group not in groups or not 0 <= index < groups[group][part].shape[1]:
        raise GrowthError(
            f"there is no parameter token {group}[{index}] in {map_name} of block {block} that writes into the "
            f"residual stream; the model has {counted(len(blocks), 'block')}"
        )
    values = groups[group][part]
    if {g.name: g.weights for g in token_groups(model.config)}[group] == "ternary":
        values = ternary(values)
    value = values[:, index] * math.copysign(1.0, weight)
    norm: Any = row.final_norm_of(model)
    norm = getattr(norm, TEXT, norm)  # of a model that reads images, too
    if norm is not None:
        value = norm(value) - norm(torch.zeros_like(value))
    logits = nn.functional.linear(value, model.get_output_embeddings().weight)
    return tuple(logits.topk(min(top, len(logits))).indices.tolist())


def picture(explanation: Explanation, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Draw an explanation: blocks × projections (Σ|contribution|), beside the parameter tokens that mattered most.

    Args:
        explanation: as `explain` gives it.
        tokenizer: of the model.
        path: image to write; its ending says the format, as matplotlib knows them (.png, .svg, .pdf).

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("a picture needs matplotlib: pip install 'tokenformer[demo]'") from error
    columns = sorted(
        dict.fromkeys((projection, group) for _, projection, group in explanation.total),
        key=lambda column: PROJECTION_ORDER.index(column[0]),
    )
    blocks = sorted({block for block, _, _ in explanation.total})
    shares = [[explanation.total.get((block, *column), 0.0) for column in columns] for block in blocks]
    bars = explanation.top[::-1]
    height = max(3.5, 0.26 * max(len(blocks), len(bars)) + 1.6)
    figure = Figure(figsize=(6.5 + 0.8 * len(columns), height), dpi=150, layout="constrained")
    layout: Any = figure.get_layout_engine()
    layout.set(wspace=0.06)
    figure.suptitle(heading(explanation, tokenizer), parse_math=False, fontsize=10)
    left, right = figure.subplots(1, 2, width_ratios=[0.8 * len(columns) + 0.6, 4.5])
    image = left.imshow(shares, aspect="auto", cmap="Blues", vmin=0)
    left.set_xticks(range(len(columns)), [f"{projection}\n{group}" for projection, group in columns], fontsize=8)
    left.set_yticks(range(len(blocks)), [str(block) for block in blocks], fontsize=8)
    left.set_ylabel("block")
    left.set_title("Σ |contribution|", fontsize=9)
    figure.colorbar(image, ax=left).ax.tick_params(labelsize=8)
    values = [c.contribution for c in bars]
    right.barh(range(len(bars)), values, color=["#2a6fb0" if v > 0 else "#c0562f" for v in values])
    right.axvline(0, color="black", linewidth=0.8)
    right.set_yticks(range(len(bars)), [str(c) for c in bars], fontsize=8)
    right.set_ylim(-0.6, len(bars) - 0.4)
    right.tick_params(axis="x", labelsize=8)
    right.set_title("contribution to the logit", fontsize=9)
    right.spines[["top", "right"]].set_visible(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # text of any script
        figure.savefig(path)


def _largest(sums: dict[_Place, Tensor], top: int) -> list[tuple[_Place, int]]:
    best = [
        (float(s[i].abs()), place, int(i)) for place, s in sums.items() for i in s.abs().topk(min(top, len(s))).indices
    ]
    return [(place, i) for _, place, i in sorted(best, key=lambda item: -item[0])[:top]]


def heading(explanation: Explanation, tokenizer: PreTrainedTokenizerBase) -> str:
    """Say in one line what is explained: the end of the prompt, the next word, its logit and probability."""
    text = str(tokenizer.decode(list(explanation.prompt)))
    end = repr(text if len(text) <= 40 else "…" + text[-40:])
    target = word(tokenizer, explanation.target)
    return f"{end} → {target}: logit {explanation.logit:.2f}, probability {explanation.probability:.1%}"


def word(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """Write a text token between quotes."""
    return repr(str(tokenizer.decode([token])))


def map_label(map_name: str, projection: str) -> str:
    """Name a map in a few letters: q, k or v, or its projection."""
    return map_name.rpartition(".")[2].removesuffix("_proj") if projection == "qkv" else projection
