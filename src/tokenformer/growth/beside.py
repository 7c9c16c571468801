"""Operations on token groups beside the linear maps of any PyTorch model: what `grow(model, at=…)` and the others do.

This is no tuner of peft, whose table of methods takes none from outside (docs/concepts.md).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GrowthError
from ..models.pattention import Pattention
from ..models.token_group import TokenGroup, check_group, default_tau
from ..units import counted
from .architectures import group_names, row_of
from .mlps import Neurons, add_neurons, fits
from .sequence import Follower, SequenceGate, add_sequence_gate, drop_sequence_gates, sequence_gates
from .sites import (
    CHILD,
    AbsentMap,
    check_whole,
    clear_site,
    factory_of,
    find_sites,
    make_site,
    sites,
    sizes_of,
)
from .tokenise import note_sites, value_std_beside


def names_beside(model: nn.Module) -> list[str]:
    """Return the names of the token groups beside linear maps, in the order in which they were added."""
    return list(dict.fromkeys(name for layer in sites(model).values() for name in layer.groups))


def has_row(model: nn.Module) -> bool:
    """Whether the table of architectures says where this model keeps parameter tokens of its own."""
    return row_of(getattr(model, "config", None)) is not None


def all_group_names(model: nn.Module) -> list[str]:
    """Return the names of all token groups: those that the configuration knows, and those beside linear maps."""
    config: Any = getattr(model, "config", None)
    return [*(group_names(config) if has_row(model) else []), *names_beside(model)]


def fresh_name(taken: Collection[str]) -> str:
    """Return the first of "grown1", "grown2", … that no token group has."""
    return next(f"grown{i}" for i in range(1, len(taken) + 2) if f"grown{i}" not in taken)


def check_new_beside(model: nn.Module, name: str) -> None:
    """Raise GrowthError unless a token group can get this name in a model."""
    taken = all_group_names(model)
    if name in taken:
        raise GrowthError(f"token group {name!r} exists already, beside {', '.join(taken)}; choose another name")
    try:
        check_group(name, 1)
    except ValueError as error:
        raise GrowthError(str(error)) from error


@torch.no_grad()
def grow_beside(
    model: nn.Module,
    at: str | Mapping[str, int | None],
    tokens: int | None,
    *,
    name: str | None,
    seed: int,
) -> None:
    """Do what `grow(model, at=…)` does; errors as there. New tokens are drawn from `seed` and their own place alone.

    On the meta device it rehearses: none are drawn.
    """
    counts, taken = find_sites(model, at, tokens), all_group_names(model)
    name = fresh_name(taken) if name is None else name
    check_new_beside(model, name)
    modules = dict(model.named_modules())
    for site, count in counts.items():
        factory = factory_of(modules[site], model)
        layer = make_site(modules[site], **factory)
        place = hashlib.blake2b(f"{seed} {site} {name}".encode(), digest_size=7).digest()
        if layer.groups and layer.token_group_norm == "joint":
            layer.stds["value_std"] = value_std_beside(layer)
        layer.add_group(name, count, torch.Generator().manual_seed(int.from_bytes(place)), **factory)
        if layer.token_group_norm == "per_group":
            layer.groups[name].tau = default_tau(count, layer.norm_activation_type)  # type: ignore[assignment]
    note_sites(model)


def parameters_beside(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each token group beside linear maps."""
    found: dict[str, list[nn.Parameter]] = {}
    for layer in sites(model).values():
        for name, group in layer.groups.items():
            found.setdefault(name, []).extend(group.parameters())
    return found


def drop_beside(model: nn.Module, names: Collection[str]) -> None:
    """Remove token groups beside linear maps; a map that has none left is what it was before the first.

    Raises:
        GrowthError: nothing would be left of a map that is tokens alone. The model is then untouched.
    """
    modules = dict(model.named_modules())
    for site, layer in sites(model).items():
        if isinstance(modules[site], AbsentMap) and not set(layer.groups) - set(names):
            raise GrowthError(
                f"nothing would be left of {site}, which is made of the token groups {', '.join(layer.groups)}; keep "
                "at least one"
            )
    for site, layer in sites(model).items():
        for name in [name for name in layer.groups if name in names]:
            del layer.groups[name]
            if name in layer.gates:
                del layer.gates[name]
        if not layer.groups:
            clear_site(modules[site])
    drop_sequence_gates(model, list(names))
    note_sites(model)


@torch.no_grad()
def consolidate_beside(model: nn.Module, names: Iterable[str] | None, *, name: str | None) -> None:
    """Do what `consolidate` does for the groups of a tokenised model; errors as there."""
    there = names_beside(model)
    wanted = there if names is None else [each for each in there if each in set(names)]
    unknown = [each for each in names or () if each not in there]
    if unknown or len(wanted) < 2:
        asked = ", ".join(there if names is None else names)
        raise GrowthError(
            f"consolidating takes at least two token groups; asked for {asked}, and there are {', '.join(there)}"
        )
    new = wanted[0] if name is None else name
    if new not in wanted:
        check_new_beside(model, new)
    for site, layer in sites(model).items():
        inside = [each for each in layer.groups if each in wanted]
        if len(inside) > 1 and layer.token_group_norm == "per_group":
            raise GrowthError(
                f"each token group beside {site} has a norm of its own; one group would have one norm and other outputs"
            )
        routed = [each for each in inside if each in layer.gates]
        if routed:
            raise GrowthError(
                f"token group {', '.join(routed)} is routed: for some text it takes part and for some not, which one "
                "group cannot do; consolidate the others, or drop it"
            )
        if len({layer.groups[each].keys.weight.requires_grad for each in inside}) > 1:  # type: ignore[union-attr]
            raise GrowthError(
                f"some of {', '.join(inside)} are frozen and some are not; one group can only be one of them: freeze "
                "the others as well, or unfreeze them"
            )
    for layer in sites(model).values():
        _unite(layer, [each for each in layer.groups if each in wanted], new)
    note_sites(model)


def _unite(layer: Pattention, names: list[str], new: str) -> None:
    """Make one token group, where the first of them stands, of several of a layer."""
    if not names:
        return
    parts: list[Any] = [layer.groups[name] for name in names]
    whole = parts[0]
    if len(parts) > 1:
        keys, values = torch.cat([p.keys.weight for p in parts]), torch.cat([p.values.weight for p in parts], dim=1)
        whole = TokenGroup(layer.in_features, layer.out_features, len(keys), **layer.stds, device="meta")
        trains = parts[0].keys.weight.requires_grad
        whole.keys.weight, whole.values.weight = (nn.Parameter(t, requires_grad=trains) for t in (keys, values))
        whole.train(layer.training)
    kept = [(name, group) for name, group in layer.groups.items() if name == names[0] or name not in names]
    layer.groups = nn.ModuleDict({new if n == names[0] else n: whole if n == names[0] else g for n, g in kept})


@dataclass(frozen=True)
class SiteTokens:
    """The parameter tokens of one token group beside one linear map, or its neurons beside one MLP.

    Attributes:
        tau: its constant τ; None of neurons, which have none.
        tensors: "keys.weight" `[n, D]` and "values.weight" `[E, n]`; of neurons those of an MLP's maps, by its names,
            the values last.
        gate: weight `[1, D]` and bias `[1]`, where it has a gate of its own.
    """

    tau: float | None
    tensors: dict[str, Tensor]
    gate: tuple[Tensor, Tensor] | None = None

    @property
    def count(self) -> int:
        """The number n of parameter tokens."""
        return [tensor for leaf, tensor in self.tensors.items() if leaf.endswith(".weight")][-1].shape[1]


def take_tokens(model: nn.Module, name: str) -> dict[str, SiteTokens]:
    """Return a token group beside linear maps, by the names of the maps; it shares its memory with the model.

    Raises:
        GrowthError: there is none of this name.
    """
    found = {}
    for site, layer in sites(model).items():
        if name in layer.groups:
            group: Any = layer.groups[name]
            gate: Any = dict(layer.gates.items()).get(name)
            own = None if gate is None or isinstance(gate, Follower) else (gate.weight, gate.bias)
            if layer.token_group_norm == "joint":
                raise GrowthError(
                    f"{site} is made of token groups that share a norm, so that {name!r} does nothing of its own "
                    "there; keep the whole model: tokenformer.save"
                )
            tau = None if isinstance(layer, Neurons) else group.tau
            found[site] = SiteTokens(tau, dict(group.named_parameters()), own)
    if not found:
        raise GrowthError(f"there is no token group {name!r}; there are {', '.join(all_group_names(model)) or 'none'}")
    return found


@torch.no_grad()
def put_tokens(
    model: nn.Module, name: str, tokens: Mapping[str, SiteTokens], sequence_gate: SequenceGate | None = None
) -> None:
    """Put a copy of a token group beside the linear maps of a model, in the type of each map.

    Args:
        model: to change in place.
        name: of the group there.
        tokens: by names of maps, or of MLPs where they are neurons.
        sequence_gate: that decides for whole sequences.

    Raises:
        GrowthError: the name is taken, or a map is missing or of other sizes. The model is then untouched.
    """
    check_new_beside(model, name)
    check_whole(model)
    places = dict(model.named_modules())
    for site, found in tokens.items():
        _check_place(model, places.get(site), site, name, found)
    for site, found in tokens.items():
        _put(places[site], name, found, factory_of(places[site], model))
    if sequence_gate is not None:
        add_sequence_gate(model, name, sequence_gate.weight, sequence_gate.bias)
    note_sites(model)


def _check_place(model: nn.Module, module: nn.Module | None, site: str, name: str, found: SiteTokens) -> None:
    """Refuse to put tokens beside what is not there, or is of another size."""
    if found.tau is None:
        if module is None or not fits(module, found.tensors):
            raise GrowthError(
                f"token group {name!r} is neurons beside {site}, with maps {', '.join(found.tensors)}; this "
                f"{type(model).__name__} has no such MLP there: it is another model"
            )
        return
    if isinstance(module, AbsentMap):
        raise GrowthError(
            f"token group {name!r} has a norm of its own, and those that make up {site} share one: they are of another "
            "kind of model"
        )
    wanted = (found.tensors["keys.weight"].shape[1], found.tensors["values.weight"].shape[0])
    sizes = None if module is None else sizes_of(module)
    if sizes != wanted:
        there = "is not there" if sizes is None else f"maps {sizes[0]} to {sizes[1]}"
        raise GrowthError(
            f"token group {name!r} belongs beside {site}, which maps {wanted[0]} to {wanted[1]}; in this "
            f"{type(model).__name__} it {there}: it is another model"
        )


def _put(module: nn.Module, name: str, found: SiteTokens, factory: dict[str, Any]) -> None:
    if found.tau is None:
        copies = {leaf: tensor.detach().to(copy=True, **factory) for leaf, tensor in found.tensors.items()}
        layer: Pattention = add_neurons(module, name, copies)
    else:
        layer = make_site(module, **factory)
        layer.add_group(name, found.count, **factory)
        group: Any = layer.groups[name]
        group.tau = found.tau
        for leaf, parameter in group.named_parameters():
            parameter.copy_(found.tensors[leaf])
    if found.gate is not None:
        layer.add_gate(name)
        set_gate(layer, name, *found.gate)


def set_gate(layer: Pattention, name: str, weight: Tensor, bias: Tensor) -> None:
    """Give the gate of a routed group its weight `[1, D]` and bias `[1]`."""
    gate: Any = layer.gates[name]
    gate.weight.copy_(weight)
    gate.bias.copy_(bias)


def merge_beside(model: nn.Module, other: nn.Module, *, rename: Mapping[str, str]) -> None:
    """Do what `merge` does for groups beside linear maps of two children of one parent; errors as there."""
    ours, theirs = names_beside(model), names_beside(other)
    unknown = [name for name in rename if name not in theirs]
    if unknown:
        raise GrowthError(f"there is no token group {', '.join(map(repr, unknown))}; there are {', '.join(theirs)}")
    new = {name: rename.get(name, name) for name in theirs if name in rename or name not in ours}
    if not new:
        raise GrowthError(f"there is nothing to merge: both models have the token groups {', '.join(ours)}")
    if len(set(new.values())) < len(new):
        raise GrowthError(f"two token groups would have one name: {', '.join(new.values())}; choose another in rename")
    for name in new.values():
        check_new_beside(model, name)
    different = _differences(model, other, shared=[name for name in theirs if name not in new])
    if different:
        raise GrowthError(
            f"these models do not share a parent's weights: they differ in {counted(len(different), 'tensor')}, such "
            f"as {different[0]}. Only children that kept their parent frozen can be merged. If a token group is not "
            "the same thing in both, rename it"
        )
    for old, name in new.items():
        put_tokens(model, name, take_tokens(other, old), sequence_gates(other).get(old))


def _differences(model: nn.Module, other: nn.Module, *, shared: Iterable[str]) -> list[str]:
    """Return the names of tensors that are not the same in two models, but for token groups that one alone has."""
    a, b = own_state(model), own_state(other)
    for state, of in ((a, model), (b, other)):
        for name in shared:
            for site, tokens in take_tokens(of, name).items():
                for leaf, tensor in tokens.tensors.items():
                    state[f"{site}, {leaf.removesuffix('.weight')} of token group {name}"] = tensor
    odd = sorted(a.keys() ^ b.keys())
    return [*odd, *(n for n in sorted(a.keys() & b.keys()) if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n]))]


def own_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict without what lies beside its linear maps."""
    return {name: tensor for name, tensor in model.state_dict().items() if f".{CHILD}." not in name}
