"""Streams of text blocks: shares of several processes, and going on by state."""

import itertools
import json
import shutil

import datasets
import numpy as np
import pytest

from tokenformer.data import sources, stream
from tokenformer.data.section import DataSection
from tokenformer.data.sources import load_documents
from tokenformer.data.stream import BlockStream
from tokenformer.data.text import prepare
from tokenformer.data.tokenizer import make_tokenizer

LENGTH = 16


@pytest.fixture(autouse=True)
def small_batches(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(sources, "BATCH_BYTES", 200)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("bytes", None)


def documents(folder, files, rows=30):
    folder.mkdir()
    for file in range(files):
        lines = [json.dumps({"text": f"<{file}:{row}>" + "x" * (row * 7 % 40)}) for row in range(rows)]
        (folder / f"{file}.jsonl").write_text("\n".join(lines))
    return load_documents(str(folder), streaming=True)


def take(blocks, count):
    return [row["input_ids"] for row in itertools.islice(blocks, count)]


def names(rows, tokenizer):
    """The documents of which text blocks hold the name."""
    ids = [*rows[0][:1], *(t for row in rows for t in row[1:])]
    text = tokenizer.decode(ids)
    return [part.split(">")[0] for part in text.split("<")[1:] if ">" in part and ":" in part]


@pytest.mark.parametrize("files", [4, 3], ids=["own files", "every other document"])
def test_processes_read_all_text_and_none_of_it_twice(tmp_path, tokenizer, files):
    whole = BlockStream(documents(tmp_path / "text", files), tokenizer, block_length=LENGTH, keep_tail=True)
    everything = names([row["input_ids"] for row in whole], tokenizer)
    assert len(everything) == 30 * files
    read = []
    for process in range(2):
        share = whole.share(process, 2)
        once = BlockStream(share._documents, tokenizer, block_length=LENGTH, keep_tail=True)
        rows = [row["input_ids"] for row in once]
        assert take(share, len(rows) - 1) == rows[:-1] == take(whole.share(process, 2), len(rows) - 1)
        read.append(names(rows, tokenizer))
    assert sorted(read[0] + read[1]) == sorted(everything) and not set(read[0]) & set(read[1])
    assert len({name.split(":")[0] for name in read[0]}) == (2 if files == 4 else 3)


@pytest.mark.parametrize("count", [1, 7, 40, 130, 260])
@pytest.mark.parametrize("saved", [False, True])
def test_a_stream_goes_on_from_a_state_without_tokenising_what_it_has_read(
    tmp_path, tokenizer, monkeypatch, count, saved
):
    """260 blocks are more than the text has: the last are of a second pass."""
    source = documents(tmp_path / "text", 4)
    if saved:  # which datasets streams, rows without text among them
        rows = [text for i, row in enumerate(source) for text in [row["text"], None][: 1 + (i % 3 == 0)]]
        shutil.rmtree(tmp_path / "text")
        datasets.Dataset.from_dict({"text": rows}).save_to_disk(tmp_path / "text")
        source = load_documents(str(tmp_path / "text"), streaming=True)
    whole = BlockStream(source, tokenizer, block_length=LENGTH).share(1, 2)
    want = take(whole, 300)
    rows = iter(whole)
    head = take(rows, count)
    state = json.loads(json.dumps(whole.state_dict()))
    again = BlockStream(load_documents(str(tmp_path / "text"), streaming=True), tokenizer, block_length=LENGTH).share(
        1, 2
    )
    encoded, encoder = [], stream.encoder

    def counted(tokenizer):
        encode = encoder(tokenizer)
        return lambda texts: (encoded.append(len(texts)), encode(texts))[1]

    monkeypatch.setattr(stream, "encoder", counted)
    again.load_state_dict(state)
    assert head + take(again, 300 - count) == want
    tokenised = sum(encoded)
    encoded.clear()
    again.begin_after(count)
    assert take(again, 300 - count) == want[count:]
    assert tokenised < sum(encoded) or count < 40  # what one batch holds is tokenised again
    assert len(np.unique(want)) > 10


def test_a_stage_goes_on_where_the_one_before_it_stopped(tmp_path, tokenizer, monkeypatch):
    blocks = BlockStream(documents(tmp_path / "text", 2), tokenizer, block_length=LENGTH).share(0, 1)
    want = take(blocks, 60)
    blocks.begin_after(0)
    assert take(blocks, 25) == want[:25]
    state = blocks.state_dict()
    blocks.begin_after(25)
    assert blocks.state_dict() is state and take(blocks, 35) == want[25:]


def test_a_share_of_prepare_is_that_of_its_process(tmp_path):
    documents(tmp_path / "text", 4)
    section = DataSection(source=str(tmp_path / "text"), tokenizer="bytes", validation_fraction=0.2, streaming=True)
    found = []
    for process in range(2):
        data = prepare(section, sequence_length=LENGTH, tokenizer_folder=tmp_path / "t", process=(process, 2))
        (blocks,) = data.train_blocks.values()
        found.append((data.facts, names(take(blocks, 60), data.tokenizer), data.validation))
    assert found[0][0] == found[1][0] and not set(found[0][1]) & set(found[1][1])
    (first,), (second,) = found[0][2].values(), found[1][2].values()
    held = {text.split(">")[0][1:] for text in first.documents["text"]}
    assert first.documents[:] == second.documents[:] and not held & {*found[0][1], *found[1][1]}
