"""Gates that decide once for a whole sequence, from its first text tokens: `route(model, group, …, per="sequence")`.

One gate for the model, a linear threshold of the mean embedding of what a sequence begins with, opens a token group at
all its sites or at none. It decides before the first block runs, and keeps to it while the sequence is continued from a
cache. `using` gives the decision instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import GrowthError
from .sites import sites

_CHILD = "sequence_gates"
# Text tokens of a sequence that a gate reads: a question tells its subject within a few dozen.
READS = 128


class SequenceGate(nn.Module):
    """Decides for each sequence of a batch: open where `weight · mean embedding + bias` is positive.

    Attributes:
        weight, bias: `[1, D]` and `[1]`.
        is_open: `[B]`, the last decision; None before the first.
        given: what the caller has decided, for all sequences or for each; None: the gate decides.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.is_open: Tensor | None = None
        self.given: bool | Sequence[bool] | None = None

    @property
    def is_shut(self) -> bool:
        """Whether the group takes part in no sequence."""
        return self.is_open is not None and not self.is_open.any()

    def keep_to(self, rows: int) -> bool:
        """Keep to the last decision for `rows` sequences, several of each that there were in beam search, if it can."""
        if self.is_open is None or rows % len(self.is_open):
            return False
        self.is_open = self.is_open.repeat_interleave(rows // len(self.is_open))
        return True

    def decide(self, means: Tensor) -> None:
        """Decide from mean embeddings `[B, D]`."""
        if self.given is not None:
            given = torch.tensor([self.given] if isinstance(self.given, bool) else list(self.given))
            if not len(given) or len(means) % len(given):
                raise GrowthError(f"using(…) decides for {len(given)} sequences, and the batch has {len(means)}")
            self.is_open = given.to(means.device).repeat_interleave(len(means) // len(given))
            return
        self.is_open = (F.linear(means, self.weight.to(means.dtype), self.bias.to(means.dtype)) > 0)[:, 0]


class Follower(nn.Module):
    """The gate of one site that does what the model's gate of the whole sequence has decided."""

    def __init__(self, gate: SequenceGate) -> None:
        super().__init__()
        self.follows = [gate]  # in a list, so that it is no submodule and is saved once

    @property
    def is_shut(self) -> bool:
        """Whether the group takes part in no sequence."""
        return self.follows[0].is_shut

    def forward(self, x: Tensor) -> Tensor:
        """Return for `x` `[B, *, D]`, or `[B · T, D]`, a score `[*, 1]` that is positive where the sequence is open."""
        is_open = self.follows[0].is_open
        if is_open is None or x.shape[0] % len(is_open):
            raise GrowthError(
                "the gate of a sequence decides when the whole model is called on input_ids or inputs_embeds; here a "
                f"map was called on {list(x.shape)} without that"
            )
        rows = is_open.repeat_interleave(x.shape[0] // len(is_open)).to(x.dtype) - 0.5
        return rows.view(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:-1], 1)


def sequence_gates(model: nn.Module) -> dict[str, SequenceGate]:
    """Return the gates of whole sequences by token group."""
    found: Any = model._modules.get(_CHILD)
    return {} if found is None else dict(found.items())


def add_sequence_gate(model: nn.Module, name: str, weight: Tensor, bias: Tensor) -> None:
    """Let one gate open a token group beside linear maps for whole sequences, instead of what gates it had."""
    if _CHILD not in model._modules:
        model.add_module(_CHILD, nn.ModuleDict())
        model.register_forward_pre_hook(_decide, with_kwargs=True)
    gate = SequenceGate(weight.detach().clone(), bias.detach().clone())
    model.get_submodule(_CHILD)[name] = gate  # type: ignore[operator]
    for layer in sites(model).values():
        if name in layer.groups:
            layer.gates[name] = Follower(gate)


def drop_sequence_gates(model: nn.Module, names: Sequence[str]) -> None:
    """Remove the gates of these token groups, and with the last one what calls them."""
    gates: Any = model._modules.get(_CHILD)
    if gates is None:
        return
    for name in names:
        if name in gates:
            del gates[name]
    if not gates:
        del model._modules[_CHILD]
        for key in [key for key, hook in model._forward_pre_hooks.items() if hook is _decide]:
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]


@contextmanager
def using(model: nn.Module, **groups: bool | Sequence[bool]) -> Iterator[None]:
    """Within the context, decide for token groups whose gates decide for whole sequences.

    Args:
        model: with such groups.
        groups: by name whether each takes part, for every sequence or for each of a batch: `using(model, legal=True)`.

    Raises:
        GrowthError: a group without such a gate.
    """
    gates = sequence_gates(model)
    unknown = [name for name in groups if name not in gates]
    if unknown:
        raise GrowthError(
            f"token group {', '.join(unknown)} has no gate that decides for whole sequences; these have: "
            f'{", ".join(gates) or "none"}. route(…, per="sequence") gives one'
        )
    before = {name: gates[name].given for name in groups}
    try:
        for name, decision in groups.items():
            gates[name].given = decision
        yield
    finally:
        for name in before:
            gates[name].given = before[name]


def mean_embeddings(model: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Return the mean embedding `[B, D]` of the first text tokens of each sequence, padding left out."""
    return _means(model.get_input_embeddings()(input_ids), attention_mask)


def _means(embeddings: Tensor, mask: Tensor | None) -> Tensor:
    """Average `[B, T, D]` over the first text tokens that a mask `[B, T]` lets through."""
    if mask is None or mask.shape != embeddings.shape[:2]:
        return embeddings[:, :READS].mean(1)
    read = (mask != 0) & (mask.cumsum(1) <= READS)
    weights = read.to(embeddings.dtype).unsqueeze(-1)
    return (embeddings * weights).sum(1) / weights.sum(1).clamp(min=1)


@torch.no_grad()
def _decide(model: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    """Forward pre-hook of the model: decide for new sequences, and keep to it for those that a cache continues."""
    ids: Any = keywords.get("input_ids", arguments[0] if arguments else None)
    embeddings: Any = keywords.get("inputs_embeds")
    gates = sequence_gates(model).values()
    rows = len(ids if embeddings is None else embeddings)
    if _continues(keywords) and all(gate.keep_to(rows) for gate in gates):
        return
    embeddings = model.get_input_embeddings()(ids) if embeddings is None else embeddings
    means = _means(embeddings, keywords.get("attention_mask"))
    for gate in gates:
        gate.decide(means)


def _continues(keywords: Mapping[str, Any]) -> bool:
    """Whether a cache holds the beginning of the sequences: keys of attention, or the state of a recurrent block."""
    cache = next((found for name in ("past_key_values", "cache_params") if (found := keywords.get(name))), None)
    for layer in getattr(cache, "layers", ()):
        states = getattr(layer, "has_previous_state", None)
        if any(states.values()) if states is not None else layer.get_seq_length():
            return True
    return bool(getattr(cache, "seqlen_offset", 0))  # xLSTM's own kind
