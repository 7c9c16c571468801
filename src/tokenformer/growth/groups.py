"""Operations on whole token groups: drop, consolidate, merge, attach.

Each function changes a model in place; the `…_operation` beside it says the same for `checkpoints.rewrite`, which does
it to the files of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import GrowthError
from ..models.names import BRIDGE_TOKENS
from ..units import counted
from .architectures import (
    GroupEntry,
    Groups,
    architecture_of,
    check_known,
    check_new,
    frozen_names,
    group_names,
    token_groups,
    with_groups,
)
from .beside import all_group_names, consolidate_beside, drop_beside, has_row, merge_beside, names_beside
from .layout import TokenMap
from .neurons import group_neurons
from .operations import Operation, apply, check_plain, unchanged
from .state import read_map, shared_differences

ReadMap = Callable[[int, TokenMap], Groups]


def drop(model: nn.Module, names: Iterable[str]) -> None:
    """Remove token groups, and the blocks and loops that came with them.

    Where everything older was frozen while they trained, what is left is the earlier model to the last bit.

    Raises:
        GrowthError: an unknown group, or nothing would be left of a projection. The model is then untouched.
    """
    names, beside, there = list(names), names_beside(model), all_group_names(model)
    unknown = [name for name in names if name not in there]
    if unknown and (beside or not isinstance(model, PreTrainedModel)):
        raise GrowthError(f"there is no token group {', '.join(map(repr, unknown))}; there are {', '.join(there)}")
    own = [name for name in names if name not in beside]
    if own:
        kept: Any = model
        apply(kept, drop_operation(kept.config, own))
    drop_beside(model, names)


def drop_operation(config: PreTrainedConfig, names: Iterable[str]) -> Operation:
    """Return what `drop` does."""
    names = list(names)
    check_known(config, names)
    row, groups = architecture_of(config), token_groups(config)
    gone = {block for group in groups if group.name in names for block in group.blocks}
    blocks = [block for block in range(row.depth_of(config)) if block not in gone]
    left = [group for group in groups if group.name not in names]
    ended = {loop for group in groups if group.name in names for loop in group.loops}
    loops = [loop for loop in range(getattr(config, "num_loops", 1)) if loop not in ended]
    fewer = {}
    if ended:
        left = [replace(group, loops=tuple(loops.index(loop) for loop in group.loops)) for group in left]
        fewer = {"num_loops": len(loops)}
    taus = {
        f"{projection}_tau": None
        for projection in row.counts
        if hasattr(config, f"{projection}_tau") and not any(any(group.over(projection)) for group in left)
    }

    def change(block: int, token_map: TokenMap, old: Groups) -> Groups:
        return {name: tensors for name, tensors in old.items() if name not in names}

    changed = with_groups(config, left, blocks=blocks if gone else None, **taus, **fewer)
    return Operation("drop", changed, change, blocks, arguments={"groups": names})


def consolidate(model: PreTrainedModel, names: Iterable[str] | None = None, *, name: str | None = None) -> None:
    """Make one token group of several, by default of all: the same function to rounding, at the speed of one.

    Args:
        model: to change in place; one that is tokenised may be any model.
        names: the groups.
        name: of the one; default that of the first.

    Raises:
        GrowthError: an unknown group, fewer than two, groups that are routed, ternary or normalised each by itself
            (one group could not do what they do), or that came with blocks or loops. The model is then untouched.
    """
    if names_beside(model) and not has_row(model):
        consolidate_beside(model, names, name=name)
        return
    operation = consolidate_operation(model.config, names, name=name)
    check_plain(model, operation.arguments["groups"])
    apply(model, operation)


def consolidate_operation(
    config: PreTrainedConfig, names: Iterable[str] | None = None, *, name: str | None = None
) -> Operation:
    """Return what `consolidate` does."""
    groups = token_groups(config)
    wanted = group_names(config) if names is None else list(names)
    check_known(config, wanted)
    chosen = [group for group in groups if group.name in wanted]
    new = chosen[0].name if name is None else name
    routed = [group.name for group in chosen if group.routed]
    if routed:
        raise GrowthError(
            f"token group {', '.join(routed)} is routed: for some text it takes part and for some not, which one group "
            "cannot do; consolidate the others, or drop it"
        )
    scaled = [group.name for group in chosen if group.weights != "float"]
    if scaled:
        raise GrowthError(
            f"token group {', '.join(scaled)} is ternary, with scales of its own; one group has one scale for its keys "
            "and one for its values, so the outputs would change. Consolidate the others, or keep it as it is"
        )
    kinds = {(group.modality, tuple(sorted(group.tau.items()))) for group in chosen}
    if len(kinds) > 1:
        told = ", ".join(f"{group.name} ({group.modality or 'all'})" for group in chosen)
        raise GrowthError(
            f"these token groups take part at positions of different modalities, which one cannot: {told}"
        )
    if len(chosen) < 2:
        raise GrowthError(f"consolidating takes at least two token groups; asked for {', '.join(wanted)}")
    if getattr(config, "token_group_norm", "joint") == "per_group" and config.norm_activation_type != "gelu":
        raise GrowthError(
            "each token group has a norm of its own here; one group would have one norm and other outputs"
        )
    owned = next((group for group in chosen if group.brought), None)
    if owned is not None:
        raise GrowthError(
            f"token group {owned.name} came with {owned.brought} and goes with what it brought when it is dropped; "
            "leave it out"
        )
    check_new(config, new, besides=wanted)
    frozen = [group.name for group in chosen if group.name in frozen_names(config)]
    if 0 < len(frozen) < len(chosen):
        raise GrowthError(
            f"token group {', '.join(frozen)} is frozen and {', '.join(n for n in wanted if n not in frozen)} is not; "
            "one group can only be one of them: freeze the others as well, or unfreeze it"
        )
    row = architecture_of(config)
    blocks = range(row.depth_of(config))
    counts = {p: tuple(sum(group.count(p, block) for group in chosen) for block in blocks) for p in row.counts}
    united = GroupEntry(new, counts, modality=chosen[0].modality, tau=chosen[0].tau)
    left = [united if group is chosen[0] else group for group in groups if group is chosen[0] or group not in chosen]

    def change(block: int, token_map: TokenMap, old: Groups) -> Groups:
        parts = [old[name] for name in old if name in wanted]
        if not parts:
            return old
        axes = {part.tensor: part.axis for part in token_map.parts if part.axis is not None}
        whole = parts[0]  # the same objects where there is nothing to add
        if len(parts) > 1:
            whole = {part: torch.cat([tensors[part] for tensors in parts], dim=axes[part]) for part in whole}
        first = next(name for name in old if name in wanted)
        return {
            key: value
            for name, tensors in old.items()
            for key, value in ([(new, whole)] if name == first else [] if name in wanted else [(name, tensors)])
        }

    marks = [name for name in frozen_names(config) if name not in frozen] + ([new] if frozen else [])
    changed = with_groups(config, left)
    if frozen_names(config):
        changed.frozen = marks
    arguments = {"groups": wanted, "name": new}
    return Operation("consolidate", changed, change, blocks, keeps_outputs=True, arguments=arguments)


@overload
def merge(
    model: nn.Module, other: nn.Module, *, rename: Mapping[str, str] | None = None, norm: str | None = None
) -> None: ...


@overload
def merge(
    model: PreTrainedModel, other: PreTrainedModel, *, by: Literal["modality"], bridge: int = ..., seed: int = ...
) -> PreTrainedModel: ...


def merge(
    model: Any,
    other: Any,
    *,
    by: Literal["modality"] | None = None,
    rename: Mapping[str, str] | None = None,
    norm: str | None = None,
    bridge: int = BRIDGE_TOKENS,
    seed: int = 0,
) -> PreTrainedModel | None:
    """Give `model` the token groups that `other`, another child of the same parent, has beside it.

    By modality, unite instead a TokenFormer that reads text with one that reads images, which need no parent in common:
    both are left as they are, and the union is returned. There a group takes part where a position is of its modality,
    so that text alone, and an image alone, give what they gave, to the last bit. A new group "bridge" takes part at
    images and at text after them, and is all that is not frozen.

    Args:
        model: changed in place; by modality, the language model.
        other: left as it is.
        by: "modality": unite what reads text and what reads images.
        rename: new names for groups of `other`, where both have given one name to two things.
        norm: "joint" or "per_group" for the result. Default: per_group, for groups that were trained apart drown each
            other under one norm, even if each was trained under one (docs/results/knowledge.md).
        bridge: by modality, parameter tokens of the bridge in each map.
        seed: by modality, of their random values.

    Raises:
        GrowthError: they are not children of one parent with its weights frozen: other sizes, other weights outside the
            groups that differ, clashing names, blocks of their own. By modality: no TokenFormer for text and one for
            images, or they differ in what they would share: width, heads, depth, norms. The model is then untouched.
    """
    if by not in (None, "modality"):
        raise GrowthError(f'by is {by!r}; it must be "modality", or be left out for two children of one parent')
    if by is not None:
        if rename or norm is not None:
            raise GrowthError("rename and norm are for two children of one parent; leave them out by modality")
        from .modality import merge_modalities

        return merge_modalities(model, other, bridge=bridge, seed=seed)
    if names_beside(other) or names_beside(model):
        if norm is not None:
            raise GrowthError(f"norm {norm!r} was asked; every group beside a linear map has a norm of its own")
        merge_beside(model, other, rename=rename or {})
        return None
    _merge_own(model, other, rename=rename, norm=norm)
    return None


def _merge_own(model: Any, other: Any, *, rename: Mapping[str, str] | None, norm: str | None) -> None:
    """Unite the token groups that configurations know."""
    group_neurons(model)
    group_neurons(other)
    state, other_state = model.state_dict(), other.state_dict()
    check_siblings(model.config, state, other.config, other_state, rename=rename)

    def read(block: int, token_map: TokenMap) -> Groups:
        groups = read_map(other.config, other_state, block, token_map)
        # Copies: the state dict shares its memory with `other`.
        return {group: {part: _copy(t) for part, t in tensors.items()} for group, tensors in groups.items()}

    operation = merge_operation(model.config, other.config, read, rename=rename, norm=norm)
    check_plain(other, group_names(other.config))
    apply(model, operation)


def is_normalised(config: PreTrainedConfig) -> bool:
    """Whether the scores of a model's parameter tokens are normalised, jointly or by group."""
    return getattr(config, "norm_activation_type", "gelu") != "gelu"


def check_siblings(
    config: PreTrainedConfig,
    state: Any,
    other_config: PreTrainedConfig,
    other: PreTrainedModel,
    *,
    rename: Mapping[str, str] | None = None,
) -> None:
    """Raise GrowthError unless two models are the same but for whole token groups."""
    _check_alike(config, other_config)
    ours, theirs = group_names(config), group_names(other_config)
    shared = [name for name in ours if name in theirs and name not in (rename or {})]
    different = list(shared_differences(config, state, other_config, other, shared))
    if different:
        clashes = [name for name in shared if any(d.endswith(f"token group {name}") for d in different)]
        hint = f" If {clashes[-1]} is not the same thing in both, rename it in one." if clashes else ""
        raise GrowthError(
            f"these models do not share a parent's weights: they differ in {counted(len(different), 'tensor')}, such "
            f"as {different[0]}. Only children that kept their parent frozen can be merged.{hint}"
        )


def merge_operation(
    config: PreTrainedConfig,
    other_config: PreTrainedConfig,
    read: ReadMap,
    *,
    rename: Mapping[str, str] | None = None,
    norm: str | None = None,
) -> Operation:
    """Return what `merge` does.

    Args:
        config, other_config: of the two models, which `check_siblings` has found alike.
        read: gives the other model's token groups of a map.
        rename, norm: as for `merge`.
    """
    renamed = dict(rename or {})
    check_known(other_config, list(renamed))
    ours = group_names(config)
    theirs = {group.name: group for group in token_groups(other_config)}
    new = {name: renamed.get(name, name) for name in theirs if name in renamed or name not in ours}
    for name in new.values():
        check_new(config, name)
    if len(set(new.values())) < len(new):
        raise GrowthError(f"two token groups would have one name: {', '.join(new.values())}; choose another in rename")
    if not new:
        raise GrowthError(f"there is nothing to merge: both models have the token groups {', '.join(ours)}")
    packed = [old for old in new if theirs[old].weights == "packed"]
    if packed:
        raise GrowthError(
            f"token group {', '.join(packed)} is packed in 2 bits, and a pack stays where it is; merge or attach what "
            "it was packed from"
        )
    for old in new:
        if theirs[old].brought:
            raise GrowthError(f"token group {old} came with {theirs[old].brought} of its own, which cannot be merged")
    fields = _taus(config, other_config)
    if norm not in (None, "joint", "per_group"):
        raise GrowthError(f"norm is {norm!r}; it must be joint or per_group")
    if is_normalised(config):
        fields["token_group_norm"] = norm or "per_group"
    elif norm is not None:
        raise GrowthError(f"norm {norm!r} was asked; this model's parameter tokens are not normalised")
    frozen = [new[old] for old in frozen_names(other_config) if old in new]
    if frozen:
        fields["frozen"] = [*frozen_names(config), *frozen]
    groups = [*token_groups(config), *(replace(theirs[old], name=name) for old, name in new.items())]

    def change(block: int, token_map: TokenMap, old: Groups) -> Groups:
        return {**old, **{new[name]: tensors for name, tensors in read(block, token_map).items() if name in new}}

    return Operation(
        "merge",
        with_groups(config, groups, **fields),
        change,
        range(architecture_of(config).depth_of(config)),
        moments=unchanged,
        arguments={"groups": list(new.values()), **({"norm": norm} if norm else {})},
    )


def _check_alike(config: PreTrainedConfig, other: PreTrainedConfig) -> None:
    """Compare what must be the same in two children of one parent."""
    ignored = {"token_groups", "token_group_norm", "token_sites", "frozen", "use_cache"}
    ignored |= {"dtype", "architectures", "transformers_version", "_name_or_path"}  # files have them, models need not
    ignored |= {field for p, field in architecture_of(config).counts.items()} | {
        f"{p}_tau" for p in architecture_of(config).counts
    }
    a, b = config.to_dict(), other.to_dict()
    different = [f"{k} ({a.get(k)}, {b.get(k)})" for k in sorted({*a, *b} - ignored) if a.get(k) != b.get(k)]
    if different:
        raise GrowthError(f"these models are not children of one parent: they differ in {', '.join(different)}")


def _taus(config: PreTrainedConfig, other: PreTrainedConfig) -> dict[str, Any]:
    taus = {}
    for field in (f"{projection}_tau" for projection in architecture_of(config).counts):
        a, b = getattr(config, field, None), getattr(other, field, None)
        if a is not None and b is not None and a != b:
            raise GrowthError(
                f"these models have different {field}, {a} and {b}, because each was the first to grow there"
            )
        if a is None and b is not None:
            taus[field] = b
    return taus


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
