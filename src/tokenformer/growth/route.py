"""Let token groups take part only for text of their kind: `route(model, group, …)` = `tokenformer route`.

Every Pattention that has the group gets a gate, one linear map of the layer's input, which opens the group for a text
token or not. With every gate closed the model is the one without the group, to the last bit.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..batches import batches
from ..errors import GrowthError
from ..models.pattention import Pattention
from .architectures import GroupEntry, Groups, architecture_of, check_known, places, token_groups, with_groups
from .beside import has_row, names_beside, set_gate
from .groups import drop_operation
from .layout import TokenMap
from .mlps import add_neurons
from .operations import Operation, apply, check_plain, read_groups, unchanged
from .sequence import READS, add_sequence_gate, drop_sequence_gates, mean_embeddings
from .sites import sites
from .tokenise import note_sites

# Rows a gate is fitted on, of each kind of text: logistic regression in a few hundred dimensions needs no more.
_ROWS = 16384
_PENALTY = 1e-4
# Text tokens of the pieces that gates of whole sequences are fitted on.
_PROMPTS = (8, 32, READS)


Place = TypeVar("Place", bound=Hashable)


@dataclass(frozen=True)
class Routing:
    """How well the gates of a group tell its text from other text, on the rows they were fitted on.

    Attributes:
        open_on_own, open_on_other: share of text tokens for which a gate is open, mean over the gates.
    """

    open_on_own: float
    open_on_other: float


def route(
    model: PreTrainedModel,
    name: str,
    own: Any,
    other: Any,
    *,
    per: Literal["text_token", "sequence"] = "text_token",
    batch_size: int = 8,
) -> Routing:
    """Give token group `name` gates, in place, fitted to open for text like `own` and to stay closed for `other`.

    Each gate is a logistic regression on what its layer sees: under the group for `own`, without it for `other`, as it
    will where the gates are right. A group that has gates already has them fitted anew.

    Neurons of an ordinary transformer are first moved out of its MLPs and beside them, so that the model's own maps are
    the parent's, which a gate can leave alone; `split` writes them as an add-on folder.

    Args:
        model: a TokenFormer, an ordinary transformer that has grown, or any language model of transformers if the group
            is beside its linear maps.
        name: of the token group.
        own, other: text blocks, as `text_blocks` gives them.
        per: "text_token": every layer decides for each text token. "sequence": one gate decides for a whole sequence,
            from the mean embedding of its first 128 text tokens, and keeps to it in generation; `using` decides
            instead. For groups beside linear maps, and neurons.
        batch_size: text blocks per forward pass.

    Raises:
        GrowthError: no such group, a group that came with blocks or loops, one without which some layer may have
            nothing left, or neurons that cannot be moved: quantised, adapted, or of a block that has no MLP. The model
            is then untouched.
    """
    if per not in ("text_token", "sequence"):
        raise GrowthError(f'per is {per!r}; it must be "text_token" or "sequence"')
    if name not in names_beside(model) and has_row(model) and not architecture_of(model.config).has_pattention:
        move_beside(model, name)
    if per == "sequence":
        return _route_sequences(model, name, own, other, batch_size)
    if name in names_beside(model):
        drop_sequence_gates(model, [name])
        layers = {site: layer for site, layer in sites(model).items() if name in layer.groups}
        alone = [site for site, layer in layers.items() if layer.token_group_norm == "joint" and len(layer.groups) == 1]
        if alone:
            raise GrowthError(
                f"token group {name!r} is all that there is in {alone[0]}: closed, it would leave nothing; route a "
                "group that was added to it"
            )
        gates, routing = _fit(model, layers, name, own, other, batch_size)
        for site, layer in layers.items():
            layer.add_gate(name)
            set_gate(layer, name, *gates[site])
        note_sites(model)
        return routing
    operation, routing = route_operation(model, name, own, other, batch_size=batch_size)
    apply(model, operation)
    return routing


@torch.no_grad()
def move_beside(model: PreTrainedModel, name: str) -> None:
    """Move a group of neurons out of an ordinary transformer's MLPs and beside them, in place.

    The model computes what it did, to rounding; without the group it is the one that `drop` leaves.

    Raises:
        GrowthError: no such group, or one that cannot be moved; as `route`. The model is then untouched.
    """
    config, row = model.config, architecture_of(model.config)
    operation = drop_operation(config, [name])
    group = next(g for g in token_groups(config) if g.name == name)
    if group.blocks:
        raise GrowthError(
            f"token group {name!r} came with blocks {', '.join(map(str, group.blocks))}, which gates cannot close; to "
            "route its neurons, grow neurons and blocks as two groups"
        )
    if group.weights != "float":
        raise GrowthError(
            f"token group {name!r} is ternary, and neurons that are moved beside an MLP, where a gate can close them, "
            "are float; grow float neurons, or ternary parameter tokens in a TokenFormer, whose gates are in place"
        )
    if any("." not in token_map.name for token_map in row.maps):
        raise GrowthError(
            f"the blocks of a {config.model_type!r} model have no module for their MLP, beside which neurons with a "
            'gate could be; tokens beside its linear maps can have gates: grow(model, at="all-linear", tokens=…)'
        )
    check_plain(model, [name])
    moved = []
    for block, token_map in places(config):
        tensors = read_groups(row.blocks_of(model)[block], token_map).get(name)
        if tensors:
            moved.append((block, token_map.name.rpartition(".")[0], _in_mlp(token_map, tensors)))
    apply(model, operation)
    for block, mlp, tensors in moved:
        add_neurons(row.blocks_of(model)[block].get_submodule(mlp), name, tensors)


def _in_mlp(token_map: TokenMap, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of one group of neurons by the names that they have in the MLP, fused ones together."""
    mlp = f"{token_map.name.rpartition('.')[0]}."
    found: dict[str, list[Tensor]] = {}
    for part in token_map.parts:
        if part.tensor in tensors:
            found.setdefault(part.stored.removeprefix(mlp), []).append(tensors[part.tensor])
    return {leaf: pieces[0] if len(pieces) == 1 else torch.cat(pieces) for leaf, pieces in found.items()}


@torch.no_grad()
def _route_sequences(model: PreTrainedModel, name: str, own: Any, other: Any, batch_size: int) -> Routing:
    """Fit one gate on mean embeddings of pieces of text, short ones as prompts are and long ones."""
    if name not in names_beside(model):
        raise GrowthError(
            f"token group {name!r} is a TokenFormer's own; gates that decide for whole sequences are for groups beside "
            f"linear maps and for neurons of ordinary transformers"
        )
    rows = []
    for text in (own, other):
        pieces = [
            mean_embeddings(model, part.to(model.device)).float().cpu()
            for ids in batches(text, batch_size)
            for length in _PROMPTS
            for part in ids.split(length, dim=1)
            if part.shape[1] == length or ids.shape[1] < length
        ]
        rows.append(torch.cat(pieces)[:_ROWS])
    with torch.enable_grad():
        weight, bias = _logistic_regression(*rows)
    add_sequence_gate(model, name, weight[None], torch.tensor([bias]).to(weight))
    return Routing(*((found @ weight + bias > 0).float().mean().item() for found in rows))


def route_operation(
    model: PreTrainedModel, name: str, own: Any, other: Any, *, batch_size: int = 8
) -> tuple[Operation, Routing]:
    """Return what `route` does to this model, which is left as it is, and how well its gates tell the texts apart."""
    groups = _check(model.config, name)
    blocks = architecture_of(model.config).blocks_of(model)
    maps: dict[tuple[int, str], Any] = {(i, m.name): blocks[i].get_submodule(m.name) for i, m in places(model.config)}
    layers = {place: layer for place, layer in maps.items() if name in layer.groups}
    gates, routing = _fit(model, layers, name, own, other, batch_size)

    def change(block: int, token_map: TokenMap, old: Groups) -> Groups:
        if (block, token_map.name) not in gates:
            return old
        weight, bias = gates[block, token_map.name]
        prefix = f"{token_map.name}.gates.{{group}}"
        return {**old, name: {**old[name], f"{prefix}.weight": weight, f"{prefix}.bias": bias}}

    config = with_groups(model.config, [replace(g, routed=True) if g.name == name else g for g in groups])
    operation = Operation("route", config, change, range(len(blocks)), moments=unchanged, arguments={"group": name})
    return operation, routing


def _fit(
    model: PreTrainedModel, layers: Mapping[Place, Pattention], name: str, own: Any, other: Any, batch_size: int
) -> tuple[dict[Place, tuple[Tensor, Tensor]], Routing]:
    """Return weight `[1, D]` and bias `[1]` of each layer's gate, and how well the gates tell the texts apart."""
    rows = []
    for text, is_open in ((own, True), (other, False)):
        with _forced(list(layers.values()), name, is_open=is_open):
            rows.append(_inputs(model, list(layers.values()), text, batch_size))
    gates: dict[Place, tuple[Tensor, Tensor]] = {}
    shares = []
    for (place, layer), positive, negative in zip(layers.items(), *rows, strict=True):
        weight, bias = _logistic_regression(positive, negative)
        shares.append([(x @ weight + bias > 0).float().mean().item() for x in (positive, negative)])
        like = layer.like
        gates[place] = weight.to(like)[None], torch.tensor([bias]).to(like)
    return gates, Routing(*torch.tensor(shares).mean(0).tolist())


def _check(config: PreTrainedConfig, name: str) -> list[GroupEntry]:
    """Return the token groups of a TokenFormer in which group `name` can have gates."""
    check_known(config, [name])
    if config.model_type == "tokenformer_multimodal":
        raise GrowthError(f"the token groups of this model, {name!r} among them, take part by modality, not by gates")
    if config.model_type != "tokenformer":
        raise GrowthError(f"gates are fitted on text, which a {config.model_type!r} model does not read")
    groups = token_groups(config)
    group = next(g for g in groups if g.name == name)
    if group.brought:
        raise GrowthError(
            f"token group {name!r} came with {group.brought}, which gates cannot close; to route its parameter tokens, "
            "grow tokens alone as another group"
        )
    for block, token_map in places(config):
        projection = token_map.projection
        always = [g for g in groups if g.count(projection, block) and g.name != name and not (g.routed or g.loops)]
        if group.count(projection, block) and not always and projection not in config.linear_projections:
            raise GrowthError(
                f"token group {name!r} is all that {token_map.name} of block {block} has for text for which no other "
                "gate is open; with its gate closed nothing would be left"
            )
    return groups


@contextmanager
def _forced(layers: list[Pattention], name: str, *, is_open: bool) -> Iterator[None]:
    """Within the context, let a group take part for every text token, or for none."""
    had: list[Any] = [dict(layer.gates.items()).get(name) for layer in layers]
    try:
        for layer in layers:
            layer.add_gate(name)
            nn.init.constant_(layer.gates[name].bias, 1.0 if is_open else -1.0)  # type: ignore[arg-type]
        yield
    finally:
        for layer, gate in zip(layers, had, strict=True):
            if gate is None:
                del layer.gates[name]
            else:
                layer.gates[name] = gate


@torch.no_grad()
def _inputs(model: PreTrainedModel, layers: list[Pattention], blocks: Any, batch_size: int) -> list[Tensor]:
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
        for ids in batches(blocks, batch_size):
            model(input_ids=ids.to(model.device), use_cache=False)
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
