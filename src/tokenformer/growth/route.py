"""Let token groups take part only for text of their kind: `route(model, group, …)` = `tokenformer route`.

Every Pattention that has the group gets a gate, one linear map of the layer's input, which opens the group for a text
token or not. With every gate closed the model is the one without the group, to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GrowthError
from ..models.pattention import Pattention
from .architectures import check_known

# Rows a gate is fitted on, of each kind of text: logistic regression in a few hundred dimensions needs no more.
_ROWS = 16384
_PENALTY = 1e-4


@dataclass(frozen=True)
class Routing:
    """How well the gates of a group tell its text from other text, on the rows they were fitted on.

    Attributes:
        open_on_own, open_on_other: share of text tokens for which a gate is open, mean over the gates.
    """

    open_on_own: float
    open_on_other: float


def route(model: Any, group: str, own: Any, other: Any, *, batch_size: int = 8) -> Routing:
    """Give `group` gates, in place, fitted to open for text like `own` and to stay closed for text like `other`.

    Each gate is a logistic regression on what its layer sees: under the group for `own`, without it for `other`, as it
    will where the gates are right. A group that has gates already has them fitted anew.

    Args:
        model: a TokenFormer.
        group: the token group.
        own, other: text, as `data.pack` gives it.
        batch_size: blocks per forward pass.

    Raises:
        GrowthError: not a TokenFormer, no such group, or the only one.
    """
    if model.config.model_type != "tokenformer":
        raise GrowthError(f"only a TokenFormer's groups can have gates; this is a {model.config.model_type!r} model")
    check_known(model.config, [group])
    layers = [m for m in model.modules() if isinstance(m, Pattention) and group in m.groups]
    if any(len(layer.groups) == 1 and layer.linear is None for layer in layers):
        raise GrowthError(
            f"token group {group!r} is all that some layers have; with its gates closed nothing would be left"
        )
    for layer in layers:
        if group not in layer.gates:
            layer.add_gate(group)
    for entry in model.config.token_groups:
        if entry["name"] == group:
            entry["routed"] = True
    rows = []
    for text, is_open in ((own, True), (other, False)):
        for layer in layers:
            _set_gate(layer.gates[group], torch.zeros(layer.in_features), 1.0 if is_open else -1.0)
        rows.append(_inputs(model, layers, text, batch_size))
    shares = []
    for layer, positive, negative in zip(layers, *rows, strict=True):
        weight, bias = _logistic_regression(positive, negative)
        _set_gate(layer.gates[group], weight, bias)
        shares.append([(x @ weight + bias > 0).float().mean().item() for x in (positive, negative)])
    open_on_own, open_on_other = torch.tensor(shares).mean(0).tolist()
    return Routing(open_on_own, open_on_other)


@torch.no_grad()
def _inputs(model: Any, layers: list[Pattention], blocks: Any, batch_size: int) -> list[Tensor]:
    """Return rows `[≤ _ROWS, D]` of what each layer reads of the text, evenly spread over it."""
    seen: list[list[Tensor]] = [[] for _ in layers]
    per_batch = max(1, _ROWS // max(1, -(-len(blocks) // batch_size)))

    def keep(i: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2)
            seen[i].append(x[:: max(1, len(x) // per_batch)].float().cpu())

        return hook

    hooks = [layer.register_forward_pre_hook(keep(i)) for i, layer in enumerate(layers)]
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(blocks), batch_size):
            ids = torch.as_tensor(blocks[start : start + batch_size]["input_ids"], device=model.device)
            model(input_ids=ids, use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return [torch.cat(rows) for rows in seen]


def _logistic_regression(positive: Tensor, negative: Tensor) -> tuple[Tensor, float]:
    """Return weight `[D]` and bias of the classifier between two sets of rows, both counting the same."""
    x = torch.cat([positive, negative])
    mean, std = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / std
    target = torch.cat([torch.ones(len(positive)), torch.zeros(len(negative))])
    share = torch.where(target > 0, 0.5 / len(positive), 0.5 / len(negative))
    parameters = torch.zeros(x.shape[1] + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([parameters], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        scores = x @ parameters[:-1] + parameters[-1]
        fit = F.binary_cross_entropy_with_logits(scores, target, weight=share, reduction="sum")
        total = fit + _PENALTY * parameters[:-1].square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    weight = parameters.detach()[:-1] / std
    return weight, (parameters.detach()[-1] - weight @ mean).item()


@torch.no_grad()
def _set_gate(gate: Any, weight: Tensor, bias: float) -> None:
    gate.weight.copy_(weight.to(gate.weight).view_as(gate.weight))
    gate.bias.fill_(bias)
