"""Parameter tokens in place of linear maps: `tokenise(model, at, tokens)` makes any architecture a TokenFormer.

A configuration says of every site which token groups there are and whether their linear map is there, so that the whole
model can be built again. It is no class of transformers: `build` makes it from its class and the configuration.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import GrowthError
from ..models.fused import why_not_plain
from ..models.names import BASE_GROUP
from ..models.pattention import Pattention
from ..models.token_group import default_tau
from .architectures import auto_class, row_of
from .sites import CHILD, AbsentMap, check_whole, factory_of, find_sites, linear_maps, make_site, sites, sizes_of

# Mean of gelu(z)² for z of N(0, 1), which normalised scores times τ are like.
_MEAN_SQUARE = 0.425
_KEY_STD = 0.02


def tokenise(
    model: nn.Module | PreTrainedConfig,
    at: str | Mapping[str, int | None] = "all-linear",
    tokens: int | None = None,
) -> Any:
    """Put parameter tokens in place of linear maps, to train any architecture from scratch as a TokenFormer.

    Every chosen map L: D → E becomes Pattention with one token group, "base", and keeps its bias. Its keys are random,
    and so are its values, as large as they must be for the outputs to begin as large as those of L for inputs of root
    mean square 1. What L has learned is gone. From then on, `grow` with the same `at` adds groups exactly, and `drop`,
    `freeze`, `consolidate` and `route` take these as any TokenFormer's. `tokenformer.save` and `load` keep the model:
    its configuration lists the sites in `token_sites`.

    Args:
        model: any PyTorch model, which is changed in place, or a configuration, of which a causal language model is
            made.
        at: which linear maps, as for `grow`: a regular expression that matches their whole name or the end of it after
            a dot; "all-linear": all but the output head; or several of these with the number of tokens of each map.
        tokens: parameter tokens of each of these maps. Default: as many as have its parameters, D · E / (D + E).

    Returns:
        The model.

    Raises:
        GrowthError: no linear map is named so (the nearest names are shown), or what is named is none, such as a
            convolution; a map that is tied to another, quantised, wrapped, compiled, sharded or on the meta device, or
            has tokens already. The model is then untouched.
    """
    if isinstance(model, PreTrainedConfig):
        model = build(copy.deepcopy(model))
    check_whole(model)
    put_in_place(model, at, tokens)
    return model


def put_in_place(model: nn.Module, at: str | Mapping[str, int | None], tokens: int | None) -> None:
    """Do what `tokenise` does to a model, which may be without numbers, on the meta device."""
    counts = find_sites(model, at, tokens, default=_equal_tokens)
    maps = linear_maps(model)
    for name in counts:
        linear = maps[name]
        if isinstance(linear, AbsentMap):
            raise GrowthError(f"{name} is parameter tokens already: grow adds more of them")
        if CHILD in linear._modules:
            raise GrowthError(f"{name} has token groups beside it already; tokenise first, then grow")
        reason = why_not_plain(linear, kinds=(nn.Linear, Conv1D))
        if reason is not None:
            raise GrowthError(f"tokens cannot take the place of {name}: {reason}; tokenise the plain model first")
    for name, count in counts.items():
        _put(model, name, {BASE_GROUP: {"tokens": count, "tau": default_tau(count, "l2_norm_gelu")}}, linear=False)
    note_sites(model)


def build(config: PreTrainedConfig, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Make the whole model of a configuration, of random weights, with the token groups that it lists by linear maps.

    Raises:
        GrowthError: transformers has no class for it.
    """
    model = auto_class(config).from_config(config, dtype=dtype)
    put_back_sites(model)
    return model


def with_sites(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a class of transformers whose models have, as they are made, the token groups that `token_sites` lists.

    So `from_pretrained` finds a place for each tensor of a checkpoint.
    """
    base: Any = kind

    class WithSites(base):
        def __init__(self, config: PreTrainedConfig, *arguments: Any, **keywords: Any) -> None:
            super().__init__(config, *arguments, **keywords)
            put_back_sites(self)

    WithSites.__name__ = WithSites.__qualname__ = kind.__name__
    made: type[PreTrainedModel] = WithSites
    return made


def load_with_sites(kind: type[PreTrainedModel], name: str | Path, config: PreTrainedConfig, **options: Any) -> Any:
    """Do what `kind.from_pretrained` does, for a model whose configuration may list token groups by linear maps."""
    if not getattr(config, "token_sites", None):
        return kind.from_pretrained(name, **options)
    if not issubclass(kind, PreTrainedModel):
        raise GrowthError(f"its class is {config.architectures}, which this version of transformers does not have")
    found: Any = with_sites(kind).from_pretrained(name, **options)
    (found[0] if isinstance(found, tuple) else found).__class__ = kind
    return found


def put_back_sites(model: PreTrainedModel) -> None:
    """Give a model as its class makes it the token groups that its configuration lists by linear maps.

    Raises:
        GrowthError: it has no such map. The model is then untouched.
    """
    listed = getattr(model.config, "token_sites", None) or {}
    maps = linear_maps(model)
    missing = [site for site in listed if site not in maps]
    if missing:
        raise GrowthError(
            f"the configuration lists token groups at {missing[0]}, which is no linear map of this "
            f"{type(model).__name__}; its token_sites belong to another model"
        )
    for site, told in listed.items():
        _put(model, site, told["groups"], linear=told["linear"])


def note_sites(model: nn.Module) -> None:
    """Let the configuration of a model of transformers say which token groups there are by its linear maps."""
    if not isinstance(model, PreTrainedModel):
        return
    maps = linear_maps(model)
    found: dict[str, dict[str, Any]] = {}
    for site, layer in sites(model).items():
        if site not in maps:
            continue  # neurons beside an MLP
        groups = {}
        for name, group in layer.groups.items():
            tau = layer.tau if group.tau is None else group.tau
            groups[name] = {"tokens": group.keys.out_features, "tau": tau}  # type: ignore[union-attr]
            if name in layer.gates:
                groups[name]["routed"] = True
        found[site] = {"linear": not isinstance(maps[site], AbsentMap), "groups": groups}
    config: Any = model.config
    if found:
        config.token_sites = found
    elif hasattr(config, "token_sites"):
        del config.token_sites
    if getattr(config, "frozen", None) and row_of(config) is None:
        known = {BASE_GROUP, *(name for told in found.values() for name in told["groups"])}
        config.frozen = [name for name in config.frozen if name in known]


def _put(model: nn.Module, site: str, groups: Mapping[str, Mapping[str, Any]], *, linear: bool) -> None:
    """Put token groups beside a linear map, silent ones, or in its place, as many as it is large."""
    found = model.get_submodule(site)
    factory = factory_of(found, model)
    if not linear:
        absent = AbsentMap(found).train(found.training)
        for parent in list(model.modules()):
            for key in [key for key, child in parent._modules.items() if child is found]:
                parent._modules[key] = absent
        layer = make_site(absent, **factory)
        layer.stds = {"key_std": _KEY_STD, "value_std": _value_std(found, groups)}
    else:
        layer = make_site(found, **factory)
    for name, told in groups.items():
        first = not layer.groups
        layer.add_group(name, told["tokens"], **factory)
        group: Any = layer.groups[name]
        if linear:
            group.tau = told["tau"]
        elif first:
            layer.tau = told["tau"]
            nn.init.normal_(group.values.weight, std=layer.stds["value_std"])
        if told.get("routed"):
            layer.add_gate(name)


def _equal_tokens(linear: nn.Module) -> int:
    """Return how many parameter tokens have as many parameters as a linear map."""
    d, e = sizes_of(linear) or (1, 1)
    return max(1, round(d * e / (d + e)))


def _value_std(linear: Any, groups: Mapping[str, Mapping[str, Any]]) -> float:
    """Return the spread of values whose tokens give outputs as large as a map does for inputs of root mean square 1."""
    count = sum(told["tokens"] for told in groups.values())
    weight: Tensor = linear.weight
    if weight.is_meta or not count:
        return 0.0
    size = weight.detach().float().square().mean().sqrt().item()
    return size * math.sqrt((sizes_of(linear) or (1, 1))[0] / (_MEAN_SQUARE * count))


def value_std_beside(layer: Pattention) -> float:
    """Return the spread of the values that a layer has, for new ones beside them."""
    values = torch.cat([group.values.weight.detach().flatten() for group in layer.groups.values()])  # type: ignore[union-attr, operator]
    std = 0.0 if values.is_meta else values.float().square().mean().sqrt().item()
    return std or 0.02
