"""Which linear maps of a model can have token groups beside them, and where these are kept.

A **site** is a linear map `L: D → E` of any PyTorch model that has token groups beside it: y = L(x) + Σ_g tokens_g(x).
They are a `Pattention` without a linear map of its own, `L.param_tokens`, whose output a forward hook of `L` adds. So
the map stays the object that it was, under its name, whatever it is or becomes (int8, wrapped by LoRA), and its tensors
keep their names in the state dict. Every group has a norm and a τ of its own: with values of zero it adds exact zeros,
and what it learns does not depend on which groups there are beside it.

Where a model is tokenised, an `AbsentMap` stands at the site, y = b + Σ_g tokens_g(x), and its groups share one norm
and one τ as a TokenFormer's do: with keys of zero a new one adds exact zeros.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import GrowthError
from ..models.names import BESIDE as CHILD
from ..models.pattention import Pattention

ALL_LINEAR = "all-linear"


class AbsentMap(nn.Module):
    """What stands for a linear map `[*, D] → [*, E]` that only token groups make up: its sizes, and its bias `[E]`.

    Args:
        linear: the map; its bias stays the parameter that it is.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        sizes = sizes_of(linear)
        assert sizes is not None
        self.in_features, self.out_features = sizes
        self.register_parameter("bias", linear._parameters.get("bias"))
        # For code that asks a map for the type of its weight before it calls it, as T5's does.
        empty = next(linear.parameters()).new_empty(0, self.in_features)
        self.register_buffer("weight", empty, persistent=False)

    def forward(self, x: Tensor) -> Tensor | None:
        """Return the bias; the site's hook adds what its tokens give."""
        return self.bias

    def extra_repr(self) -> str:
        """Show the sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def sites(model: nn.Module) -> dict[str, Pattention]:
    """Return the token groups beside each linear map of a model, by the map's name; empty where there are none."""
    ending = f".{CHILD}"
    return {
        name.removesuffix(ending): module
        for name, module in model.named_modules()
        if name.endswith(ending) and isinstance(module, Pattention)
    }


def make_site(linear: nn.Module, *, device: torch.device, dtype: torch.dtype) -> Pattention:
    """Return the token groups beside a linear map, after making room for them where there are none yet."""
    found = linear._modules.get(CHILD)
    if isinstance(found, Pattention):
        return found
    sizes = sizes_of(linear)
    assert sizes is not None
    norm = "joint" if isinstance(linear, AbsentMap) else "per_group"
    layer = Pattention(*sizes, {}, linear=False, token_group_norm=norm, device=device, dtype=dtype)
    place_tokens(linear, layer.train(linear.training))
    return layer


def clear_site(linear: nn.Module) -> None:
    """Make a linear map what it was before it had token groups beside it."""
    del linear._modules[CHILD]
    for key in [key for key, hook in linear._forward_hooks.items() if hook is _add_tokens]:
        del linear._forward_hooks[key], linear._forward_hooks_with_kwargs[key]


def move_tokens(old: nn.Module, new: nn.Module) -> None:
    """Put the token groups beside a linear map beside the one that takes its place."""
    layer = old._modules.get(CHILD)
    if isinstance(layer, Pattention):
        place_tokens(new, layer)


def place_tokens(linear: nn.Module, layer: Pattention) -> None:
    """Add what a layer gives to what a map gives, from now on."""
    linear.add_module(CHILD, layer)
    linear.register_forward_hook(_add_tokens, with_kwargs=True)


def _add_tokens(
    linear: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor | None
) -> Tensor:
    """Forward hook of a site: add what its token groups give."""
    x = arguments[0] if arguments else next(iter(keywords.values()))
    layer: Any = linear._modules[CHILD]
    if output is not None and _is_shut(layer):
        return output
    dtype = next(layer.parameters()).dtype
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):  # a quantised map reads what it likes
        x = x.to(dtype)
    return layer(x) if output is None else output + layer(x).to(output.dtype)


def _is_shut(layer: Any) -> bool:
    """Whether gates of whole sequences have left out all groups of a site, which then cost nothing."""
    gates = layer.gates
    if torch.compiler.is_compiling():  # a graph cannot ask
        return False
    return len(gates) == len(layer.groups) and all(getattr(gate, "is_shut", False) for gate in gates.values())


def sizes_of(module: nn.Module) -> tuple[int, int] | None:
    """Return D and E of a linear map `[*, D] → [*, E]`, of whatever library; None where a module is none."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    d, e = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (d, e) if type(d) is int and type(e) is int else None


def factory_of(linear: nn.Module, model: nn.Module) -> dict[str, Any]:
    """Return the device and the type that tokens beside a map should have: its own, or where it is quantised, the
    model's.
    """
    floating = [p for module in (linear, model) for p in module.parameters() if p.is_floating_point()]
    return {"device": next(linear.parameters()).device, "dtype": floating[0].dtype}


def linear_maps(model: nn.Module) -> dict[str, nn.Module]:
    """Return the linear maps of a model that can have tokens beside them, by name.

    Of a map in a map, as LoRA makes them, the outer one; none of a Pattention's, whose groups grow by themselves.
    """
    found: dict[str, nn.Module] = {}

    def visit(module: nn.Module, name: str) -> None:
        for key, child in module.named_children():
            inner = f"{name}.{key}" if name else key
            if isinstance(child, (Pattention, nn.MultiheadAttention)):
                continue  # the weights of torch's attention are read, its maps never called
            if sizes_of(child) is not None:
                found[inner] = child
            else:
                visit(child, inner)

    visit(model, "")
    first: dict[int, str] = {}
    for name, module in found.items():
        first.setdefault(id(module), name)
    return {name: module for name, module in found.items() if first[id(module)] == name}


def find_sites(
    model: nn.Module,
    at: str | Mapping[str, int | None],
    tokens: int | None,
    *,
    default: Callable[[nn.Module], int] | None = None,
) -> dict[str, int]:
    """Return the parameter tokens that each linear map asked for gets.

    Args:
        model: that has the maps.
        at, tokens: as for `grow`.
        default: how many a map gets where no number is given.

    Raises:
        GrowthError: as `grow`.
    """
    asked = dict(at) if isinstance(at, Mapping) else {at: tokens}
    if isinstance(at, Mapping) and tokens is not None:
        raise GrowthError(f"at says how many tokens each map gets, {dict(at)}; leave out tokens={tokens}")
    maps, counts = linear_maps(model), dict[str, int]()
    for pattern, given in asked.items():
        if (type(given) is not int or given < 1) and (given is not None or default is None):
            raise GrowthError(
                f"tokens is {given!r} for maps named {pattern!r}; say how many parameter tokens each gets, a whole "
                "number from 1 on, such as 64"
            )
        for name in _matches(model, maps, pattern):
            count = default(maps[name]) if given is None and default is not None else given
            assert count is not None
            if counts.setdefault(name, count) != count:
                raise GrowthError(f"{name} matches two patterns, which ask for {counts[name]} and {count} tokens")
    tied = {name: other for name, other in _tied(model, maps).items() if name in counts}
    if tied:
        name, other = next(iter(tied.items()))
        raise GrowthError(
            f"{name} shares its weight with {other}: tokens beside it would make the two different maps. Choose other "
            f"maps, or untie them first"
        )
    return counts


def _matches(model: nn.Module, maps: Mapping[str, nn.Module], pattern: str) -> list[str]:
    """Return the maps whose whole name, or the end of it after a dot, a regular expression matches."""
    if pattern == ALL_LINEAR:
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        found = [name for name, module in maps.items() if module is not head and name not in _tied(model, maps)]
        if not found:
            raise GrowthError(
                f"a {type(model).__name__} has no linear map that can have tokens beside it. A TokenFormer's maps take "
                "parameter tokens themselves: grow qkv_param_tokens, output_param_tokens or ffn_param_tokens"
            )
        return found
    try:
        expression = re.compile(rf"(?:.*\.)?(?:{pattern})")
    except re.error as error:
        raise GrowthError(f"at={pattern!r} is no regular expression: {error}") from error
    found = [name for name in maps if expression.fullmatch(name)]
    other = {
        name: module
        for name, module in model.named_modules()
        if expression.fullmatch(name)
        and name not in maps
        and "weight" in module._parameters
        and not any(name.startswith(f"{map_name}.") for map_name in maps)
    }
    if other:
        name, module = next(iter(other.items()))
        raise GrowthError(
            f"at={pattern!r} matches {name} ({type(module).__name__}), but tokens go beside linear maps. "
            + (
                f"Narrow it to the {len(found)} linear maps that it matches as well"
                if found
                else _nearest(maps, pattern)
            )
        )
    if not found:
        raise GrowthError(
            f"no linear map of this {type(model).__name__} is named {pattern!r}. {_nearest(maps, pattern)}"
        )
    return found


def _nearest(maps: Iterable[str], pattern: str) -> str:
    """Say which names there are: the nearest ends of names, or all."""
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in maps))
    words = [word for word in re.split(r"[^\w]+", pattern) if word]
    near = list(dict.fromkeys(m for word in words for m in difflib.get_close_matches(word, ends, n=3)))
    shown = near or ends[:12]
    return f"{'Near are' if near else 'There are'} {', '.join(shown) or 'none'}" + (
        "" if near else f"; or {ALL_LINEAR!r}"
    )


def _tied(model: nn.Module, maps: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return the maps whose weight is another module's as well, and that module."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    shared = [names for names in owners.values() if len(names) > 1]
    return {name: next(o for o in names if o != name) for names in shared for name in names if name in maps}


def check_whole(model: nn.Module) -> None:
    """Refuse models whose maps are compiled already, not there yet, or spread over processes."""
    for name, module in model.named_modules():
        if type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None:
            raise GrowthError(
                f"{name or 'the model'} is compiled already, and what torch.compile has made would not see new tokens: "
                "grow the model first, then compile it"
            )
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise GrowthError(
                f"{name} is on the meta device, without numbers: load the weights first, then put tokens beside them"
            )
        if isinstance(parameter, DTensor):
            raise GrowthError(
                f"{name} is sharded over processes: put tokens beside its map first, then shard the model"
            )
