"""Tokenizers: made from the text, or opened; every one has an end-of-text token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..errors import TokenizerError
from .sources import Documents, texts_of

END_OF_TEXT = "<|endoftext|>"


def make_tokenizer(spec: str, documents: Documents) -> PreTrainedTokenizerBase:
    """Return the tokenizer that `spec` names; ours give every text back exactly, all have an end-of-text token.

    Args:
        spec: "bpe:N" (byte-level BPE of N entries trained on `documents`; fewer where the text has no more to merge),
            "bytes" (257 entries), or what `open_tokenizer` opens.
        documents: the training text.

    Raises:
        TokenizerError: a spec that is none of these, or a tokenizer without an end-of-text token.
    """
    kind, _, size = spec.partition(":")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if spec == "bytes" or (kind == "bpe" and size):
        if spec == "bytes":
            vocabulary = {token: i for i, token in enumerate([END_OF_TEXT, *alphabet])}
            tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        else:
            tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        if kind == "bpe":
            if not size.isdecimal() or int(size) <= len(alphabet):
                raise TokenizerError(
                    f'tokenizer {spec!r}: write "bpe:N" with N above {len(alphabet)}, such as bpe:4096'
                )
            trainer = trainers.BpeTrainer(
                vocab_size=int(size), special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
            )
            tokenizer.train_from_iterator(texts_of(documents), trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token=END_OF_TEXT,
            bos_token=END_OF_TEXT,
            pad_token=END_OF_TEXT,
            clean_up_tokenization_spaces=False,
        )
    return open_tokenizer(spec)


def open_tokenizer(spec: str | Path) -> PreTrainedTokenizerBase:
    """Open an existing tokenizer: a Hugging Face name, a folder, or a single tokenizer.json.

    A bare tokenizer.json does not say which entry ends a text; "<|endoftext|>" does, GPT-NeoX's name for it.

    Raises:
        TokenizerError: there is none, or it has no end-of-text token.
    """
    try:
        loaded: Any = read_tokenizer(spec)
    except TokenizerError as error:
        raise TokenizerError(
            f'tokenizer {str(spec)!r} is neither "bytes", "bpe:N", a tokenizer.json, a folder with a tokenizer nor a '
            f"name that could be downloaded: {error}"
        ) from error
    if Path(spec).is_file() and END_OF_TEXT in loaded.get_vocab():
        loaded.add_special_tokens({"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT})
    if loaded.eos_token_id is None:
        raise TokenizerError(
            f"tokenizer {str(spec)!r} has no end-of-text token, which separates documents; choose another"
        )
    return loaded


def read_tokenizer(spec: str | Path) -> PreTrainedTokenizerBase:
    """Read a tokenizer.json, a folder or a name on the Hub as transformers does, without code that it may bring.

    Raises:
        TokenizerError: that fails, for whatever reason.
    """
    try:
        if Path(spec).is_file():
            return PreTrainedTokenizerFast(tokenizer_file=str(spec))
        return AutoTokenizer.from_pretrained(spec, trust_remote_code=False)
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # a damaged file can fail in as many ways as a hub, and Rust's panics are no Exception
        raise TokenizerError(f"{type(error).__name__}: {error}".splitlines()[0]) from error


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many rows of an embedding the text tokens reach: one more than the largest id.

    `len(tokenizer)` counts entries, which are fewer where ids are left out.
    """
    return 1 + max(tokenizer.get_vocab().values())
