"""The model card of a checkpoint, README.md in its folder: what a stranger needs to know before loading it."""

from __future__ import annotations

from huggingface_hub import ModelCardData

from . import cost
from .lineage import Event, Lineage
from .models.configuration_tokenformer import PROJECTIONS, TokenformerConfig

_LOADING = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # this folder, or the name it has on the Hub
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder)
```

`trust_remote_code=True` runs the model's code files in this folder; with the package `tokenformer` installed and
imported it is not needed."""


def model_card(config: TokenformerConfig, lineage: Lineage, *, license: str | None = None) -> str:
    """Write the card as Markdown with the Hub's metadata on top.

    Args:
        config: sizes.
        lineage: data, cost, growth history.
        license: identifier of the weights' licence, such as "apache-2.0"; None says that nobody stated one.
    """
    data = ModelCardData(
        library_name="transformers", pipeline_tag="text-generation", tags=["tokenformer"], license=license
    )
    tokens = cost.group_tokens(config)
    groups = [
        f"| {group['name']} | {' | '.join(f'{group[p]:,}' for p in PROJECTIONS)} | {tokens[group['name']]:,} |"
        for group in config.token_groups or []
    ]
    last = lineage.last
    texts = list(dict.fromkeys(str(event.data["source"]) for event in lineage.history if event.data))
    facts = {
        "Text": ", ".join(texts) or "not recorded",
        "Text tokens seen": f"{last.text_tokens_seen:,}" if last.text_tokens_seen else "not recorded",
        "Training FLOPs": f"{last.training_flops:.3g}" if last.training_flops else "not recorded",
        "Training time": f"{last.training_seconds:,.0f} s" if last.training_seconds else "not recorded",
        "Validation loss": _loss(last),
        "sha256 of the weights": f"`{lineage.weights_sha256}`",
        "Licence of the weights": license or "not stated",
        "Licence of the code files": "Apache-2.0",
    }
    lines = [
        f"---\n{data.to_yaml()}\n---",
        "# A TokenFormer",
        f"A language model whose parameters are tokens ([TokenFormer](https://arxiv.org/abs/2410.23168)): "
        f"{cost.parameters(config):,} parameters, {config.num_hidden_layers} blocks of width {config.hidden_size}, "
        f"{config.num_attention_heads} heads, vocabulary {config.vocab_size:,}, context "
        f"{config.max_position_embeddings:,} text tokens.",
        "## Load it",
        _LOADING,
        "## Token groups",
        "\n".join(
            [
                "| group | query, key, value: each | output | feed-forward | parameter tokens in all blocks |",
                "|---|--:|--:|--:|--:|",
                *groups,
            ]
        ),
        "## Facts",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]),
        "## What was done",
        "\n".join(f"{i}. {_sentence(event)}" for i, event in enumerate(lineage.history, 1)) or "Nothing is recorded.",
        "The whole story, with recipes, seeds, versions and parents' digests, is in `lineage.json`.",
    ]
    return "\n\n".join(lines) + "\n"


def _loss(event: Event) -> str:
    if event.loss is None:
        return "not recorded"
    bits = "" if event.bits_per_byte is None else f", {event.bits_per_byte:.4f} bits per byte"
    return f"{event.loss:.4f} nats per text token{bits}"


def _sentence(event: Event) -> str:
    arguments = ", ".join(f"{name} {value}" for name, value in event.arguments.items() if value is not None)
    seen = f"; {event.text_tokens_seen:,} text tokens seen so far" if event.operation == "train" else ""
    return f"{event.date[:10]}: {event.operation}{f' ({arguments})' if arguments else ''}{seen}"
