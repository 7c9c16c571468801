"""Text tokens: as the tokenizer gives them, the same for any number of processes, and none of them made twice."""

import os
import re
import resource
import signal
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.data import sources, tokens
from tokenformer.data.blocks import pack
from tokenformer.data.cache import cached
from tokenformer.data.order import cut
from tokenformer.data.sources import ranges
from tokenformer.data.text import _hashes, _without, hold_out, text_sha256
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.data.tokens import token_type, tokenised
from tokenformer.errors import DataError

TEXTS = [f"document {i} says é " * (i * 7 % 11) for i in range(60)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("bpe:300", datasets.Dataset.from_dict({"text": ["the cat and the hat document says " * 9]}))


@pytest.fixture
def documents():
    return datasets.Dataset.from_dict({"text": TEXTS})


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(tokens, "SHARD_BYTES", 700)
    monkeypatch.setattr(tokens, "FEW_SHARDS", 2)
    monkeypatch.setattr(sources, "BATCH_BYTES", 300)


def wanted(tokenizer, texts=TEXTS):
    return [t for text in texts if text for t in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 40))
def test_ranges_hold_every_row_once_and_not_much_more_than_their_size(sizes, size):
    found = ranges(np.array(sizes, dtype=np.int64), size)
    assert [row for rows in found for row in rows] == list(range(len(sizes)))
    assert all(rows and sum(sizes[row] for row in rows[:-1]) < size + max(sizes) for rows in found)


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_any_number_of_processes_gives_the_same_tokenised(documents, tokenizer, tmp_path, small_shards, workers):
    chosen = documents.select([*range(59, 0, -2), *range(0, 60, 2)])
    for rows in (documents, chosen):
        found = list(tokenised(rows, tokenizer, shards=tmp_path / rows._fingerprint, workers=workers))
        assert len(found) > 5 and {ids.dtype for ids in found} == {np.dtype(np.uint16)}
        assert np.concatenate(found).tolist() == wanted(tokenizer, rows["text"])


def test_blocks_of_shards_are_those_of_one_stream(documents, tokenizer, cache, small_shards, monkeypatch):
    sharded = pack(documents, tokenizer, block_length=16, keep_tail=True)[:]
    assert not list(cache.rglob("*.shards")) and not list(cache.rglob("*.tmp"))
    monkeypatch.undo()
    assert sharded == pack(datasets.Dataset.from_dict({"text": TEXTS}), tokenizer, block_length=16, keep_tail=True)[:]


def test_truncation_and_padding_of_a_tokenizer_do_not_reach_text(documents, tokenizer, tmp_path):
    want = wanted(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=100)
    assert np.concatenate(list(tokenised(documents, tokenizer, shards=tmp_path))).tolist() == want


@pytest.mark.parametrize(("largest", "kind"), [(255, "uint8"), (256, "uint16"), (65_535, "uint16"), (65_536, "uint32")])
def test_a_text_token_takes_no_more_bytes_than_the_vocabulary_asks_for(
    tokenizer, monkeypatch, largest, kind, documents
):
    monkeypatch.setattr(type(tokenizer), "get_vocab", lambda self: {"a": largest, "b": 0})
    assert token_type(tokenizer) == kind
    if largest > 300:
        blocks = pack(documents, tokenizer, block_length=17)
        for rows in (blocks, cut(blocks, 2)):
            assert rows.features["input_ids"].feature.dtype == kind and rows[0]["input_ids"]
            values = rows.data.column("input_ids").chunk(0).values
            assert values.type == kind and rows.cache_files
        (file,) = blocks.cache_files
        assert os.path.getsize(file["filename"]) < len(blocks) * (17 * np.dtype(kind).itemsize + 4) + 4096


def test_a_kill_leaves_no_process_and_finished_shards_are_not_made_again(
    documents, tokenizer, cache, small_shards, monkeypatch
):
    monkeypatch.setattr(tokens, "_cores", lambda: 2)
    monkeypatch.setattr(tokens, "_make", _make_or_kill)
    killed = get_context("fork").Process(target=pack, args=(documents, tokenizer), kwargs={"block_length": 16})
    killed.start()
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    for worker in set(map(int, (cache / "workers").read_text().split())):
        ends = time.monotonic() + 20
        while os.path.exists(f"/proc/{worker}") and time.monotonic() < ends:
            time.sleep(0.05)
        assert not os.path.exists(f"/proc/{worker}")
    finished = {file.name for file in cache.rglob("*.npy")}
    assert len(finished) >= 4
    monkeypatch.setattr(tokens, "_make", _make_and_tell)
    blocks = pack(documents, tokenizer, block_length=16)
    made = (cache / "made").read_text().split()
    assert made and not finished & {*made} and len(made) == len({*made})
    ids = [blocks[0]["input_ids"][0], *(t for row in blocks for t in row["input_ids"][1:])]
    assert ids == [tokenizer.eos_token_id, *wanted(tokenizer)][: len(ids)] and len(ids) > 700
    assert not list(cache.rglob("*.npy"))


def test_a_killed_process_is_told(documents, tokenizer, small_shards, monkeypatch):
    monkeypatch.setattr(tokens, "_make", _die)
    monkeypatch.setattr(tokens, "_cores", lambda: 2)
    with pytest.raises(DataError, match=r"process that prepares text was killed, .*the same command goes on"):
        pack(documents, tokenizer, block_length=16)


_make = tokens._make


def _note(name, what):
    with open(datasets.config.HF_DATASETS_CACHE / name, "a", encoding="utf-8") as notes:
        notes.write(f"{what}\n")


def _make_or_kill(file, rows):
    _note("workers", os.getpid())
    if len(list(file.parent.glob("*.npy"))) >= 4:
        os.kill(os.getppid(), signal.SIGKILL)
        signal.pause()
    _make(file, rows)


def _make_and_tell(file, rows):
    _make(file, rows)
    _note("made", file.name)


@pytest.mark.slow
def test_a_text_larger_than_memory_is_held_out_and_identified(cache):
    """160 MB of text and room for 64: what reads it all at once fails, and what prepare does with it does not."""
    megabyte = "the cat and the hat " * 50_000
    features = datasets.Features({"text": datasets.Value("string")})
    large = cached(lambda: ({"text": [f"{i} {megabyte}"]} for i in range(160)), features, key="planted")
    assert _in_little_memory(_prepare, large, cache) == 0
    assert _in_little_memory(_read_all, large, cache) == OUT_OF_MEMORY


OUT_OF_MEMORY = 3


def _prepare(large):
    train, held = hold_out(large, fraction=0.05, max_bytes=None)
    assert len(train) + len(held) == 160 and len(held) == 7
    assert len(_without(large, set(_hashes(held).tolist()))) == len(train)
    assert len(text_sha256(train, held)) == 64


def _read_all(large):
    list(large["text"])


def _in_little_memory(work, *arguments):
    """The exit code of a new process with 64 MB for work: one forked from here could use what tests have freed."""
    process = get_context("spawn").Process(target=_limited, args=(work, *arguments))
    process.start()
    process.join(60)
    return process.exitcode


def _limited(work, large, cache):
    datasets.config.HF_DATASETS_CACHE = cache
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    used = 1024 * int(re.search(r"VmData:\s*(\d+) kB", status)[1])
    resource.setrlimit(resource.RLIMIT_DATA, (used + 2**26, used + 2**26))
    try:
        work(large)
    except MemoryError:
        sys.exit(OUT_OF_MEMORY)


def _die(file, rows):
    os.kill(os.getpid(), signal.SIGKILL)
