"""The model card of a checkpoint, README.md in its folder: what a stranger needs to know before loading it."""

from __future__ import annotations

from huggingface_hub import ModelCardData
from transformers import PreTrainedConfig

from .. import cost
from ..growth.architectures import GroupEntry, is_tokenised, row_of, token_groups, weights_of
from ..units import counted, looped
from .lineage import Event, Lineage

_LOADING = """\
```python
from transformers import {model}, {reader}

folder = "."  # this folder, or the name it has on the Hub
model = {model}.from_pretrained(folder{trust})
{variable} = {reader}.from_pretrained(folder{reader_trust})
```"""
_TRUST = """

`trust_remote_code=True` runs the model's code files in this folder; with the package `tokenformer` installed and
imported it is not needed."""
_SITES = """\
```python
import tokenformer

model, tokenizer, lineage = tokenformer.load(".")  # this folder
```

No class of transformers has parameter tokens in place of linear maps or beside them, as this model has."""
_TOKENFORMER = "{article} {what} whose parameters are tokens ([TokenFormer](https://arxiv.org/abs/2410.23168))"
_ORDINARY = """\
An ordinary {kind} {what}, which every tool loads; the neurons of its feed-forward are kept by token group"""
_TOKENISED = "{article} {kind} {what} whose linear maps are parameter tokens"
_OTHER = "{article} {kind} {what}"
_GROUPS = "| group | in each map of a block | parameter tokens in all blocks | parameters |"

_LATENT = """ Its maps are ternary: the package `tokenformer` rounds these weights to {-1, 0, 1} times a scale as it
computes, and other tools do not. Give them what `tokenformer pack` makes of this folder."""

# By its Auto class: what a model is, the pipeline it is for, and what makes its inputs.
_KINDS = {
    "AutoModelForCausalLM": ("A", "language model", "text-generation", "AutoTokenizer", "tokenizer"),
    "AutoModelForImageClassification": (
        "An",
        "image classifier",
        "image-classification",
        "AutoImageProcessor",
        "processor",
    ),
    "AutoModelForImageTextToText": (
        "A",
        "language model that sees",
        "image-text-to-text",
        "AutoProcessor",
        "processor",
    ),
}


def model_card(config: PreTrainedConfig, lineage: Lineage, *, license: str | None = None) -> str:
    """Write the card as Markdown with the Hub's metadata on top.

    Args:
        config: sizes.
        lineage: data, cost, growth history.
        license: identifier of the weights' licence, such as "apache-2.0"; None says that nobody stated one.
    """
    row, sites = row_of(config), bool(getattr(config, "token_sites", None))
    auto = row.auto if row else "AutoModelForCausalLM"
    ours, (article, what, task, reader, variable) = row is not None and row.has_pattention, _KINDS[auto]
    library = "tokenformer" if sites else "transformers"
    data = ModelCardData(library_name=library, pipeline_tag=task, tags=["tokenformer"], license=license)
    trust = ", trust_remote_code=True" if ours else ""
    loading = {"model": auto, "reader": reader, "variable": variable, "trust": trust}
    loading["reader_trust"] = trust if reader == "AutoProcessor" else ""  # tokenizers bring no code
    tokens, parameters = cost.group_tokens(config), cost.group_parameters(config)
    counts = {group.name: _counts(group) for group in token_groups(config)} if row else {}
    counts |= _site_counts(config)
    groups = [f"| {name} | {told} | {tokens[name]:,} | {parameters[name]:,} |" for name, told in counts.items()]
    last = lineage.last
    sources = list(dict.fromkeys(str(event.data["source"]) for event in lineage.history if event.data))
    unit, seen = _seen(config, last)
    facts = {
        unit.split()[0]: ", ".join(sources) or "not recorded",
        f"{unit} seen": f"{seen:,}" if seen else "not recorded",
        "Training FLOPs": f"{last.training_flops:.3g}" if last.training_flops else "not recorded",
        "Training time": f"{last.training_seconds:,.0f} s" if last.training_seconds else "not recorded",
        "Validation loss": _loss(last),
        "sha256 of the weights": f"`{lineage.weights_sha256}`",
        "Licence of the weights": license or "not stated",
        **({"Licence of the code files": "Apache-2.0"} if ours else {}),
    }
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# A {'TokenFormer' if ours else config.model_type}",
        f"{_kind(config).format(article=article, kind=config.model_type, what=what)}: "
        f"{cost.parameters(config):,} parameters, {counted(config.num_hidden_layers, 'block')} of width "
        f"{config.hidden_size}{looped(getattr(config, 'num_loops', 1))}, {_reads(config)}.{_ternary(config)}",
        "## Load it",
        _SITES if sites else _LOADING.format(**loading) + (_TRUST if ours else ""),
        *(["## Token groups", "\n".join([_GROUPS, "|---|---|--:|--:|", *groups])] if groups else []),
        "## Facts",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]),
        "## What was done",
        "\n".join(f"{i}. {_sentence(event)}" for i, event in enumerate(lineage.history, 1)) or "Nothing is recorded.",
        "The whole story, with recipes, seeds, versions and parents' digests, is in `lineage.json`.",
    ]
    return "\n\n".join(lines) + "\n"


def _ternary(config: PreTrainedConfig) -> str:
    """Warn where the weights of an ordinary model are not yet what it computes with."""
    row = row_of(config)
    if row is None or row.has_pattention:
        return ""
    kept = {weights_of(config), *(group.weights for group in token_groups(config))}
    return _LATENT if "ternary" in kept else ""


def _kind(config: PreTrainedConfig) -> str:
    row = row_of(config)
    if row is None:
        return _TOKENISED if is_tokenised(config) else _OTHER
    return _TOKENFORMER if row.has_pattention else _ORDINARY


def _site_counts(config: PreTrainedConfig) -> dict[str, str]:
    """Say of each token group that lies at linear maps how many parameter tokens it has at one, and at how many."""
    found: dict[str, list[int]] = {}
    for site in (getattr(config, "token_sites", None) or {}).values():
        for name, group in site["groups"].items():
            found.setdefault(name, []).append(group["tokens"])
    return {
        name: f"{min(n):,} to {max(n):,} at {counted(len(n), 'linear map')}"
        if min(n) < max(n)
        else f"{n[0]:,} at {counted(len(n), 'linear map')}"
        for name, n in found.items()
    }


def _reads_text(config: PreTrainedConfig) -> bool:
    row = row_of(config)
    return row is None or row.auto == "AutoModelForCausalLM"


def _reads(config: PreTrainedConfig) -> str:
    """Say what a model takes and what it chooses from."""
    if _reads_text(config):
        heads = getattr(config, "num_attention_heads", None)
        context = getattr(config, "max_position_embeddings", None)
        told = [f"vocabulary {config.vocab_size:,}", *([f"context {context:,} text tokens"] if context else [])]
        return ", ".join([*([counted(heads, "head")] if heads else []), *told])
    height, width = config.image_height_width
    heads = counted(config.num_attention_heads, "head")
    size = f"{height} × {width} pixels in patches of {config.patch_size} × {config.patch_size}"
    if hasattr(config, "image_token_id"):
        return f"images of {size}, vocabulary {config.vocab_size:,}, context {config.max_position_embeddings:,}"
    return f"{heads}, images of {size}, {counted(config.num_labels, 'label')}"


def _counts(group: GroupEntry) -> str:
    """Write how many parameter tokens a group has in a query, key or value map, an output, a feed-forward."""
    counts = {projection: group.over(projection) for projection in group.counts if any(group.over(projection))}
    told = [f"{p} {min(n):,}" if min(n) == max(n) else f"{p} {min(n):,} to {max(n):,}" for p, n in counts.items()]
    kept = [] if group.weights == "float" else [group.weights]
    return ", ".join([*told, *filter(None, [group.brought]), *(["routed"] if group.routed else []), *kept])


def _seen(config: PreTrainedConfig, event: Event) -> tuple[str, int]:
    """Say what a model reads, and how much of it it has trained on."""
    return ("Text tokens", event.text_tokens_seen) if _reads_text(config) else ("Images", event.images_seen)


def _loss(event: Event) -> str:
    if event.loss is None:
        return "not recorded"
    if event.accuracy is not None:
        unit = "image" if event.top5_accuracy is not None else "text token of a caption"
        return f"{event.loss:.4f} nats per {unit}; {event.accuracy:.2%} of the labels found"
    texts = event.bits_per_byte_of or {}
    bits = "" if event.bits_per_byte is None else f", {event.bits_per_byte:.4f} bits per byte"
    each = "".join(f"; {name} {'–' if found is None else f'{found:.4f}'}" for name, found in texts.items())
    return f"{event.loss:.4f} nats per text token{bits}{each}"


def _sentence(event: Event) -> str:
    arguments = ", ".join(f"{name} {value}" for name, value in event.arguments.items() if value is not None)
    read = f"{event.images_seen:,} images" if event.images_seen else f"{event.text_tokens_seen:,} text tokens"
    seen = f"; {read} seen so far" if event.operation == "train" else ""
    return f"{event.date[:10]}: {event.operation}{f' ({arguments})' if arguments else ''}{seen}"
