"""What an export is beside the model that it was made from, and the card that says so, README.md in its folder."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from ..units import counted, looped
from .engines import ENGINES

_CARD = """\
# A {kind} for {engine}

A language model with {weights} weights, {depth} of width {width}{loops}, vocabulary {vocabulary:,}, context
{context:,} text tokens. `tokenformer export --to {to}` wrote it; `lineage.json` tells what it was made from.

## Run it

```sh
pip install 'tokenformer[{extra}]'
tokenformer generate . "To be"
```

```python
from transformers import AutoTokenizer
from tokenformer import ExportedForCausalLM

model, tokenizer = ExportedForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
model.generate(**tokenizer("To be", return_tensors="pt"), max_new_tokens=20)
```

## Checked when it was written

{text_tokens:,} text tokens of `{text}`, beside the model in PyTorch in float32:

| | PyTorch | here |
|---|--:|--:|
| bits per byte | {before:.4f} | {after:.4f} |
| megabytes | {model_mb:.1f} | {exported_mb:.1f} |

The logits differ by at most {difference:.2g}; the largest is {largest:.3g}.
"""


@dataclass(frozen=True)
class Exported:
    """What `export` wrote, and how it compares with the model in PyTorch.

    Attributes:
        engine: what it runs on.
        weights: "float32", "int8" or "int4".
        text: what both read.
        text_tokens: how many they predicted.
        logits_difference: largest of all logits, in nats.
        largest_logit: for comparison.
        bits_per_byte: of the model in PyTorch.
        exported_bits_per_byte: of what was written, on its engine.
        model_bytes: of the model's weights in float32.
        exported_bytes: of the files that were written for the engine.
    """

    engine: str
    weights: str
    text: str
    text_tokens: int
    logits_difference: float
    largest_logit: float
    bits_per_byte: float
    exported_bits_per_byte: float
    model_bytes: int
    exported_bytes: int


def export_card(config: PreTrainedConfig, written: Exported) -> str:
    """Write the card as Markdown: what it is, how it is run, how it compares with its model."""
    engine = ENGINES[written.engine]
    return _CARD.format(
        kind="TokenFormer" if config.model_type == "tokenformer" else config.model_type,
        engine=engine.title,
        weights=written.weights,
        depth=counted(config.num_hidden_layers, "block"),
        loops=looped(getattr(config, "num_loops", 1)),
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        context=config.max_position_embeddings,
        to=written.engine,
        extra=engine.extra,
        text_tokens=written.text_tokens,
        text=written.text,
        before=written.bits_per_byte,
        after=written.exported_bits_per_byte,
        model_mb=written.model_bytes / 1e6,
        exported_mb=written.exported_bytes / 1e6,
        difference=written.logits_difference,
        largest=written.largest_logit,
    )
