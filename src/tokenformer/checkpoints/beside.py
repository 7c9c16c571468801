"""Add-on folders: a token group beside linear maps or MLPs, without its parent, in the manner of peft's adapters.

legal/addon_config.json         parent, sites, τ
legal/addon_model.safetensors   keys, values, gates; in its metadata digests of the parent's tensors and its own
legal/README.md                 the card
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import torch
import transformers
from huggingface_hub import ModelCardData
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import CheckpointError, GrowthError
from ..growth.architectures import group_names
from ..growth.beside import SiteTokens, has_row, names_beside, own_state, put_tokens, take_tokens
from ..growth.groups import drop
from ..growth.sequence import SequenceGate, sequence_gates
from ..growth.state import check_finite, tensors_digest
from ..growth.tokenise import load_with_sites
from ..units import counted
from .files import replacing_folder
from .lineage import Lineage
from .verify import (
    ADDON_CONFIG,
    ADDON_WEIGHTS,
    CARD_FILE,
    LINEAGE_FILE,
    is_addon_folder,
    other_digests,
    stored_dtype,
    weights_digest,
)

_GATE = ("gate.weight", "gate.bias")
_SEQUENCE_GATE = ("sequence_gate.weight", "sequence_gate.bias")
_PARENT, _OWN = "parent_sha256", "tensors_sha256"
_CARD = """\
---
{metadata}
---

# Token group `{name}` for {parent}

{tokens} beside {sites} of a {kind}, {parameters:,} parameters. Without them the model is its parent to the last bit.

```python
import tokenformer

model, tokenizer, _ = tokenformer.load("{name}")  # this folder: its parent is loaded, and the group put beside it
tokenformer.attach(model, "another")              # on a model that is there already
```
"""


class Site(pydantic.BaseModel):
    """The parameter tokens beside one linear map, or the neurons beside one MLP."""

    tokens: int
    """How many."""
    tau: float | None = None
    """Their constant τ; neurons have none."""
    routed: bool = False
    """Whether it has a gate of its own."""
    maps: list[str] = ["keys", "values"]
    """What their tensors are called: a weight by its map, a bias in full. Of neurons as in the MLP, the values last."""


class AddonConfig(pydantic.BaseModel):
    """What addon_config.json says."""

    name: str
    """Of the token group."""
    base_model_name_or_path: str | None
    """Of the parent, as it was loaded."""
    base_model_class: str
    """Of the parent, such as LlamaForCausalLM."""
    sites: dict[str, Site]
    """By names of linear maps."""
    sequence_gate: bool = False
    """Whether one gate decides for whole sequences."""


def split_beside(
    model: nn.Module,
    name: str,
    output: str | Path,
    *,
    force: bool = False,
    base: str | None = None,
    among: Sequence[str] = (),
    extra: Callable[[Path], None] = lambda folder: None,
) -> Path:
    """Write a token group beside the linear maps of a model to an add-on folder; errors as `split`.

    Args:
        model, name, output, force: as for `split`.
        base: where its parent is, from the folder's place or in full. Default: from where the model was loaded.
        among: other groups beside the maps without which it is not what it was: they belong to its parent.
        extra: may write further files into the folder before it gets its name.
    """
    found = {_plain_name(site): tokens for site, tokens in take_tokens(model, name).items()}
    tensors = {f"{site}.{leaf}": t.contiguous() for site, of in found.items() for leaf, t in _leaves(of).items()}
    gate = sequence_gates(model).get(name)
    if gate is not None:
        tensors |= dict(zip(_SEQUENCE_GATE, (gate.weight, gate.bias), strict=True))
    check_finite(tensors, f"token group {name!r}")
    config = AddonConfig(
        name=name,
        base_model_name_or_path=base or _parent_name(model),
        base_model_class=type(model).__name__,
        sites={site: _site(tokens) for site, tokens in found.items()},
        sequence_gate=gate is not None,
    )
    facts = {_PARENT: json.dumps(_digests(model, among)), _OWN: tensors_digest(tensors)}
    with replacing_folder(Path(output), force=force) as folder:
        save_file(tensors, folder / ADDON_WEIGHTS, metadata={"format": "pt", **facts})
        (folder / ADDON_CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
        (folder / CARD_FILE).write_text(addon_card(config, sum(t.numel() for t in tensors.values())), encoding="utf-8")
        extra(folder)
    return Path(output)


def save_stage(
    target: Path, model: nn.Module, lineage: Lineage, *, parent: str | Path, extra: Callable[[Path], None]
) -> None:
    """Write the newest token group beside a model's maps as an add-on of what it was trained on, with its history.

    Args:
        target: the new folder.
        model: as it was trained.
        lineage: what happened up to here.
        parent: checkpoint or add-on folder that training began with; an add-on of the same group is replaced by it.
        extra: may write further files into the folder.

    Raises:
        CheckpointError: as `split`.
    """
    *among, name = names_beside(model)
    base = Path(parent)
    if is_addon_folder(base) and read_addon(base)[0].name == name:
        base = parent_of(base)
    beside = base.resolve().parent == target.resolve().parent

    def add_files(folder: Path) -> None:
        extra(folder)
        digests = {"weights_sha256": weights_digest(folder), "files_sha256": other_digests(folder)}
        written = lineage.model_copy(update={**digests, "dtype": stored_dtype(folder)})
        (folder / LINEAGE_FILE).write_text(written.model_dump_json(indent=2, exclude_none=True) + "\n", "utf-8")

    where = f"../{base.name}" if beside else str(base.resolve()) if base.exists() else str(base)
    split_beside(model, name, target, base=where, among=among, extra=add_files)


def parent_of(path: str | Path) -> Path:
    """Return where an add-on's parent is, which may be another add-on or a name on the Hub.

    Raises:
        CheckpointError: the add-on cannot be read, or names none.
    """
    config, _, _ = read_addon(path)
    parent = config.base_model_name_or_path
    if parent is None:
        raise CheckpointError(
            f"add-on {path} does not say where its parent, a {config.base_model_class}, can be loaded from; load that "
            f"yourself, and then tokenformer.attach(model, {str(path)!r})"
        )
    within = Path(path) / parent
    return within if within.is_dir() else Path(parent)


def attach_beside(model: nn.Module, path: str | Path, *, name: str | None = None) -> None:
    """Put the token group of an add-on folder beside the linear maps of its parent; errors as `attach`."""
    config, tensors, parent = read_addon(path)
    _check_parent(model, parent, config, Path(path))
    # Of a map in a map, as LoRA makes them, the outer one, which comes first.
    outer = {_plain_name(site): site for site, _ in reversed(list(model.named_modules()))}
    put_tokens(
        model,
        name or config.name,
        {outer.get(site, site): _tokens(site, facts, tensors) for site, facts in config.sites.items()},
        SequenceGate(*(tensors[leaf] for leaf in _SEQUENCE_GATE)) if config.sequence_gate else None,
    )


def read_addon(path: str | Path) -> tuple[AddonConfig, dict[str, Tensor], dict[str, str]]:
    """Return what an add-on folder says, its tensors, and the digest of each of its parent's tensors.

    Raises:
        CheckpointError: it is missing, incomplete or damaged.
    """
    folder = Path(path)
    try:
        config = AddonConfig.model_validate_json((folder / ADDON_CONFIG).read_bytes())
        with safe_open(folder / ADDON_WEIGHTS, framework="pt") as file:
            facts, tensors = file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        parent, own = json.loads(facts[_PARENT]), facts[_OWN]
        if not isinstance(parent, dict):
            raise TypeError(f"{_PARENT} holds a {type(parent).__name__}, not digests by name")
    except (OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"add-on {path} cannot be read: {error}; copy it again") from error
    wanted = {f"{site}.{leaf}" for site, found in config.sites.items() for leaf in _leaf_names(found)}
    wanted |= {*_SEQUENCE_GATE} if config.sequence_gate else set()
    if tensors_digest(tensors) != own or wanted != tensors.keys():
        raise CheckpointError(f"add-on {path} is damaged: its tensors are not those that were written; copy it again")
    return config, tensors, parent


def load_parent(
    path: str | Path, *, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load the parent of an add-on as transformers does, in eval mode, and its tokenizer where it has one.

    The parent may be another add-on, of an earlier stage of training. Neurons that were grown in an ordinary checkpoint
    and then routed are an add-on of that checkpoint without them.

    Raises:
        CheckpointError: no parent is named, or it is not where it was.
    """
    config, parent = read_addon(path)[0], parent_of(path)
    if is_addon_folder(parent):
        model, tokenizer = load_parent(parent, dtype=dtype)
        attach_beside(model, parent)
        return model, tokenizer
    try:
        model, tokenizer = load_any(parent, config.base_model_class, dtype=dtype)
    except Exception as error:  # whatever is wrong with it
        raise CheckpointError(
            f"the parent of add-on {path}, {parent}, cannot be loaded: {error}. If it is elsewhere now, load it "
            f"yourself, and then tokenformer.attach(model, {str(path)!r})"
        ) from error
    if has_row(model) and config.name in group_names(model.config):  # neurons that were grown there, and moved out
        drop(model, [config.name])
    return model, tokenizer


def load_any(
    name: str | Path, kind: str | None = None, *, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load a model of any class of transformers, in eval mode, and its tokenizer where it has one; errors as there.

    Args:
        name: folder, or name on the Hub.
        kind: its class. Default: the one that its configuration names.
        dtype: default as stored.
    """
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    kind = kind or (config.architectures or [""])[0]
    found: Any = getattr(transformers, kind, None)
    known = isinstance(found, type) and issubclass(found, PreTrainedModel)
    options: Any = {"dtype": dtype or "auto", "trust_remote_code": False}
    model = load_with_sites(found if known else AutoModelForCausalLM, name, config, **options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):  # a model of something else than text
        tokenizer = None
    return model.eval(), tokenizer


def places(config: AddonConfig) -> str:
    """Say beside what an add-on belongs, as in "30 linear maps"."""
    kinds = ["MLP" if site.tau is None else "linear map" for site in config.sites.values()]
    return " and ".join(counted(kinds.count(kind), kind) for kind in dict.fromkeys(kinds))


def _parent_name(model: nn.Module) -> str | None:
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name or None


def _plain_name(site: str) -> str:
    """Return a map's name without what peft puts around and in front of it."""
    return site.replace(".base_layer", "").removeprefix("base_model.model.")


def _site(tokens: SiteTokens) -> Site:
    maps = [leaf.removesuffix(".weight") for leaf in tokens.tensors]
    return Site(tokens=tokens.count, tau=tokens.tau, routed=tokens.gate is not None, maps=maps)


def _leaf_names(site: Site) -> list[str]:
    return [*site.maps, *(_GATE if site.routed else [])]


def _leaves(tokens: SiteTokens) -> dict[str, Tensor]:
    gate = {} if tokens.gate is None else dict(zip(_GATE, tokens.gate, strict=True))
    return {**{leaf.removesuffix(".weight"): tensor.detach() for leaf, tensor in tokens.tensors.items()}, **gate}


def _tokens(site: str, facts: Site, tensors: Mapping[str, Tensor]) -> SiteTokens:
    maps = {m if m.endswith(".bias") else f"{m}.weight": tensors[f"{site}.{m}"] for m in facts.maps}
    gate = [tensors[f"{site}.{leaf}"] for leaf in _GATE] if facts.routed else []
    return SiteTokens(facts.tau, maps, (gate[0], gate[1]) if gate else None)


def _digests(model: nn.Module, among: Iterable[str] = ()) -> dict[str, str]:
    """Return a short digest of each of a model's own tensors, but of those that are quantised, and of these groups."""
    plain = {_plain_name(name): t for name, t in own_state(model).items() if type(t) in (Tensor, nn.Parameter)}
    floating = {name: t for name, t in plain.items() if t.is_floating_point() and t.itemsize > 1}
    digests = {name: tensors_digest({"": tensor.cpu()})[:16] for name, tensor in sorted(floating.items())}
    return {**digests, **{f"token group {name}": _group_digest(model, name)[:16] for name in among}}


def _group_digest(model: nn.Module, name: str) -> str:
    sites = take_tokens(model, name).items()
    return tensors_digest({f"{_plain_name(s)}.{leaf}": t.cpu() for s, of in sites for leaf, t in _leaves(of).items()})


def _check_parent(model: nn.Module, parent: Mapping[str, str], config: AddonConfig, path: Path) -> None:
    """Refuse another model: what both have unquantised must be the same. What one has quantised cannot be compared."""
    found = _digests(model, names_beside(model))
    quantised = {_plain_name(name) for name in own_state(model)} - found.keys()
    shared = found.keys() & parent.keys()
    different = sorted(name for name in shared if found[name] != parent[name])
    missing = sorted(parent.keys() - found.keys() - quantised)
    if shared and not different and not missing:
        return
    where = f"{different[0]} differs" if different else f"{missing[0]} is missing" if missing else "nothing is alike"
    counts = f"{counted(len(different), 'tensor')} differ and {len(missing)} are missing of {len(parent)}"
    raise GrowthError(
        f"{path} belongs to another parent, {config.base_model_name_or_path or config.base_model_class}: in this "
        f"{type(model).__name__} {where} ({counts}). Load that parent in the type in which the group was trained"
    )


def addon_card(config: AddonConfig, parameters: int, *, license: str | None = None) -> str:
    """Write the card of an add-on of so many parameters; `license` is its own, such as "apache-2.0"."""
    parent = config.base_model_name_or_path
    named = None if parent is None or is_local(parent) else parent
    data = ModelCardData(library_name="tokenformer", base_model=named, tags=["tokenformer"], license=license)
    return _CARD.format(
        metadata=data.to_yaml(),
        name=config.name,
        parent=named or f"a {config.base_model_class}",
        tokens=counted(sum(site.tokens for site in config.sites.values()), "parameter token"),
        sites=places(config),
        kind=config.base_model_class,
        parameters=parameters,
    )


def is_local(parent: str) -> bool:
    """Whether a parent's name is a path, which means something on one machine only."""
    return Path(parent).is_absolute() or parent.startswith(".")
