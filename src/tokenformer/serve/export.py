"""Write a checkpoint for another engine, checked on text before it gets its name."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..checkpoints.checkpoint import check_tokenizer
from ..checkpoints.files import check_target, replacing_folder
from ..checkpoints.lineage import Lineage
from ..checkpoints.verify import CARD_FILE, LINEAGE_FILE
from ..data.blocks import text_blocks
from ..errors import ConversionError, GrowthError, TokenformerError, first_line
from ..growth.architectures import ARCHITECTURES, architecture_of, auto_class, token_groups
from ..growth.beside import names_beside
from ..growth.groups import consolidate
from ..growth.sequence import sequence_gates
from ..quiet import without_bars, without_logs
from .card import Exported, export_card
from .engines import ENGINES, find_engine
from .exported import ExportedForCausalLM
from .trace import trace

# What is read to compare an export with its model: enough to show a thousandth of a bit per byte, in seconds.
_TEXT_TOKENS = 4096
_BLOCK_LENGTH = 256
# Of the largest logit: two engines add in different orders.
_TOLERANCE = 1e-3
# Rise of the bits per byte at which weights of fewer bits are no longer the model.
_MOST_LOST = 0.1


@without_bars()
def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | Path,
    *,
    to: str = "openvino",
    weights: str | None = None,
    text: str | Sequence[str] = "python-stdlib",
    lineage: Lineage | None = None,
    force: bool = False,
) -> Exported:
    """Write a language model for another engine, with its tokenizer, its history and a card, and check it on text.

    Token groups are united first, as far as that keeps the outputs. The text is read by the model and by what was
    written, half of each text block after the other half is in the cache. Only then does the folder get its name.

    Args:
        model: a TokenFormer or an ordinary language model; left as it is.
        tokenizer: its tokenizer.
        path: the new folder.
        to: "openvino" (the fastest on CPUs), "onnx" or "executorch".
        weights: "int8" or "int4", for weights of fewer bits; default: float32.
        text: to check on, as `data.source` of a recipe; best one that the model was made for.
        lineage: what happened up to here.
        force: replace what stands at `path`.

    Raises:
        ConversionError: there is no such engine, or it cannot run such a model or such weights, or what was written
            does something else.
        MissingExtraError: the engine is not installed.
        CheckpointError: `path` exists and not `force`, or it cannot be written.
        DataError, TokenizerError: there is no such text, or the tokenizer does not fit.
    """
    find_engine(to, weights)
    check_target(Path(path), force=force)
    row = ARCHITECTURES.get(model.config.model_type)
    if not model.can_generate() or (row is not None and row.auto != "AutoModelForCausalLM"):
        raise ConversionError(f"a {type(model).__name__} was given; export takes what reads text and continues it")
    if gates := sequence_gates(model):
        raise ConversionError(
            f"token group {', '.join(gates)} has a gate that decides for whole sequences, which no graph can; drop it, "
            "or run the model as it is"
        )
    check_tokenizer(tokenizer, model.config, where="that was given")
    length = min(_BLOCK_LENGTH, model.config.max_position_embeddings)
    blocks = text_blocks(text, tokenizer, block_length=length, text_tokens=_TEXT_TOKENS)["input_ids"]
    plain = _united(model)
    with _engine_errors(to, plain), without_logs(), redirect_stdout(io.StringIO()):  # which tell of every step
        graph = trace(plain, to, weights)
    with replacing_folder(Path(path), force=force) as folder:
        graph.save_pretrained(folder)
        del graph
        size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix not in (".py", ".json"))
        tokenizer.save_pretrained(folder)
        if to == "openvino":
            _save_for_genai(tokenizer, folder)
        with _engine_errors(to, plain):
            found = _compare(plain, ExportedForCausalLM.from_pretrained(folder), tokenizer, blocks)
        written = Exported(
            to,
            weights or "float32",
            text if isinstance(text, str) else ", ".join(text),
            model_bytes=sum(p.numel() * 4 for p in plain.parameters()),
            exported_bytes=size,
            **found,
        )
        _refuse_if_different(written)
        done = (lineage or Lineage()).then("export", arguments={"to": to, "weights": weights})
        done.dtype = written.weights
        (folder / LINEAGE_FILE).write_text(done.model_dump_json(indent=2, exclude_none=True) + "\n", encoding="utf-8")
        (folder / CARD_FILE).write_text(export_card(plain.config, written), encoding="utf-8")
    return written


@contextmanager
def _engine_errors(to: str, model: PreTrainedModel) -> Iterator[None]:
    """Say of what an exporter or an engine raises, which is of any kind, that it cannot take the model."""
    try:
        yield
    except TokenformerError:
        raise
    except Exception as error:
        raise ConversionError(
            f"{ENGINES[to].title} cannot take a {type(model).__name__}: {first_line(error)}; nothing was written: use "
            "another engine"
        ) from error


def _save_for_genai(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the tokenizer as OpenVINO GenAI reads it as well, unless it is of a kind that OpenVINO does not know."""
    import openvino
    from openvino_tokenizers import convert_tokenizer

    try:
        there, back = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception:  # it raises nothing more specific; nothing of ours reads these files
        return
    openvino.save_model(there, folder / "openvino_tokenizer.xml")
    openvino.save_model(back, folder / "openvino_detokenizer.xml")


def _united(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy in float32 whose token groups are one wherever one does what several did."""
    if names_beside(model):
        return copy.deepcopy(model).float().eval()
    if not architecture_of(model.config).has_pattention:  # its own class reads one map of all neurons
        plain = auto_class(model.config).from_config(copy.deepcopy(model.config), dtype=torch.float32)
        plain.load_state_dict(model.state_dict())
        plain.generation_config = model.generation_config
        return plain.eval()
    united = copy.deepcopy(model).float().eval()
    united.config.frozen = []
    names = [group.name for group in token_groups(united.config) if not group.routed and not group.brought]
    with suppress(GrowthError):  # one cannot do what they do, or there is one: they are slower apart, and the same
        consolidate(united, names)
    return united


@torch.no_grad()
def _compare(
    model: PreTrainedModel, other: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, blocks: Iterable[list[int]]
) -> dict[str, Any]:
    """Let both read the text blocks."""
    nats, other_nats, count, num_bytes, difference, largest = 0.0, 0.0, 0, 0, 0.0, 0.0
    for block in blocks:
        ids = torch.tensor([block])
        want, got = model(ids, use_cache=False).logits, _logits_in_two_parts(other, ids)
        nats, other_nats = nats + _nats(want, ids), other_nats + _nats(got, ids)
        difference = max(difference, (got - want).abs().max().item())
        largest = max(largest, want.abs().max().item())
        count += len(block) - 1
        num_bytes += len(tokenizer.decode(block[1:], skip_special_tokens=True).encode())
    bits = 1 / math.log(2) / num_bytes
    return {
        "text_tokens": count,
        "logits_difference": difference,
        "largest_logit": largest,
        "bits_per_byte": nats * bits,
        "exported_bits_per_byte": other_nats * bits,
    }


def _logits_in_two_parts(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Read the first half, then the rest with that in the cache: logits `[1, T, V]`."""
    first, second = ids.chunk(2, dim=1)
    read = model(first)
    return torch.cat([read.logits, model(second, past_key_values=read.past_key_values).logits], dim=1)


def _nats(logits: Tensor, ids: Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").item()


def _refuse_if_different(written: Exported) -> None:
    """Raise ConversionError if an export is not the model that it was made from; NaN is not, either."""
    if written.weights == "float32":
        if not written.logits_difference <= _TOLERANCE * max(1.0, written.largest_logit):
            raise ConversionError(
                f"{written.engine} computes logits that differ from PyTorch's by {written.logits_difference:.2g} on "
                f"{written.text}, where rounding makes {_TOLERANCE:g} of the largest, {written.largest_logit:.3g}; "
                "nothing was written: use another engine, and report this"
            )
    elif not written.exported_bits_per_byte <= (1 + _MOST_LOST) * written.bits_per_byte:
        raise ConversionError(
            f"with {written.weights} weights the model takes {written.exported_bits_per_byte:.4f} bits per byte of "
            f"{written.text} instead of {written.bits_per_byte:.4f}; nothing was written: give it more bits a weight"
        )
