"""Files as users have them: compressed, damaged, linked, laid out by others; every row's other columns are its own."""

import bz2
import gzip
import itertools
import json
import lzma
import os

import datasets
import pytest
from fsspec.compression import compr

from tokenformer.data.blocks import pack
from tokenformer.data.section import DataSection
from tokenformer.data.sources import load_documents
from tokenformer.data.stream import BlockStream
from tokenformer.data.text import prepare
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def write_rows(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_table(file, **columns):
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(file)


def load(source, **options):
    return [row["text"] for row in load_documents(str(source), **options)]


@pytest.mark.parametrize("streaming", [False, True])
def test_of_a_row_only_the_text_is_read(tmp_path, streaming):
    write_rows(tmp_path / "a.jsonl", {"text": "a", "n": 1}, {"n": "one", "text": "b"}, {"n": [{}], "text": "c"})
    write_rows(tmp_path / "b.jsonl", {"text": "d", "other": None}, {"text": "e"})
    write_table(tmp_path / "c.parquet", n=[1.5], text=["f"])
    write_table(tmp_path / "d.parquet", text=["g"], n=["x"])
    assert load(tmp_path, streaming=streaming) == list("abcdefg")


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_without_text_are_left_out_and_counted(tmp_path, streaming):
    rows = [{"text": "one text"}, {"text": None}, {}, {"text": "another text"}, {"text": ""}, {"text": "a third one"}]
    write_rows(tmp_path / "a.jsonl", *rows)
    write_table(tmp_path / "b.parquet", text=["a fourth", None])
    section = DataSection(source=str(tmp_path), tokenizer="bytes", validation_fraction=0.4, streaming=streaming)
    data = prepare(section, sequence_length=4, tokenizer_folder=tmp_path / "tokenizer")
    (blocks,) = data.train_blocks.values()
    ids = [i for block in itertools.islice(blocks, 6) for i in block["input_ids"][1:]]  # a stream begins again
    assert ids.count(data.tokenizer.eos_token_id) <= 4 - data.facts["validation_documents"]
    if not streaming:
        assert data.facts["rows_without_text"] == 4
        assert data.facts["training_documents"] + data.facts["validation_documents"] == 4


COMPRESSED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_text_and_rows_may_be_compressed(tmp_path, suffix):
    (tmp_path / f"a.txt{suffix}").write_bytes(COMPRESSED[suffix]("é".encode()))
    (tmp_path / f"b.JSONL{suffix}").write_bytes(COMPRESSED[suffix](b'{"text": "b"}\n{"text": "c"}\n'))
    assert load(tmp_path) == load(tmp_path, streaming=True) == ["é", "b", "c"]


def test_zstandard_is_read_or_its_package_named(tmp_path):
    file = tmp_path / "a.jsonl.zst"
    if "zstd" not in compr:
        file.touch()
        with pytest.raises(DataError, match=r"a.jsonl.zst is compressed by zstd, .*pip install zstandard"):
            load(file)
        return
    with open(file, "wb") as packed, compr["zstd"](packed, mode="wb") as stream:
        stream.write(b'{"text": "a"}\n{"text": "b"}\n')
    assert load(file) == ["a", "b"]


def damage(folder, kind):
    whole = b'{"text": "x"}\n' * 5000
    content = {
        "jsonl.gz": whole,
        "txt.gz": gzip.compress(whole)[:-20],
        "txt.xz": lzma.compress(whole)[:-20],
        "jsonl.bz2": bz2.compress(whole)[:50],
        "jsonl": whole + b'{"text": "cut of',
        "parquet": b"PAR1" + whole,
    }[kind]
    (folder / f"b.{kind}").write_bytes(content)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl.gz", "txt.gz", "txt.xz", "jsonl.bz2", "jsonl", "parquet"])
def test_a_damaged_file_is_named_wherever_it_stands(tmp_path, kind, streaming):
    write_rows(tmp_path / "a.jsonl", {"text": "fine"})
    damage(tmp_path, kind)
    row = {"jsonl.gz": ", row 1,", "jsonl.bz2": ", row 1,", "jsonl": ", row 5001,"}.get(kind, "")
    with pytest.raises(DataError, match=rf"^{tmp_path}/b.{kind}{row} cannot be read as .*; mend it or leave it out"):
        load(tmp_path, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_table_without_rows_is_no_document(tmp_path, streaming):
    write_table(tmp_path / "a.parquet", text=[])
    write_table(tmp_path / "b.parquet", text=["b"])
    assert load(tmp_path, streaming=streaming) == ["b"]
    with pytest.raises(DataError, match=r"holds no documents|shorter than one text block"):
        documents = load_documents(str(tmp_path / "a.parquet"), streaming=streaming)
        list((BlockStream if streaming else pack)(documents, make_tokenizer("bytes", None), block_length=4))


def test_json_is_read_where_it_is_asked_for(tmp_path):
    (tmp_path / "package.json").write_text('{"name": "x"}')
    with pytest.raises(DataError, match=r"holds no text; .*\.json is read where it is asked for, as FOLDER/\*\.json"):
        load(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    assert load(tmp_path) == ["a"]
    (tmp_path / "rows.json").write_text('[\n {"text": "b"},\n {"text": "c"}\n]\n')
    assert load(tmp_path / "r*.json") == load(tmp_path / "rows.json") == ["b", "c"]


@pytest.mark.parametrize("source", ["", "**/*.txt", "**", "*/../**/*.txt"])
def test_links_are_followed_and_every_file_read_once(tmp_path, source):
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    elsewhere.mkdir()
    for file in (elsewhere / "a.txt", folder / "b.txt", folder / "deep" / "c.txt"):
        file.write_text(file.stem)
    (folder / "linked").symlink_to(elsewhere)
    (folder / "again.txt").symlink_to(folder / "b.txt")
    (folder / "nowhere.txt").symlink_to(folder / "missing.txt")
    for name in ("loop", "deep/loop", "deep/second"):
        (folder / name).symlink_to(folder)
    assert sorted(load(folder / source)) == ["a", "b", "c"]


def test_a_file_that_changes_and_keeps_its_size_and_time_is_read_anew(tmp_path):
    files = [tmp_path / name for name in ("a.txt", "a.jsonl", "a.txt.gz")]
    seen = []
    for text in ("abc", "xyz"):
        contents = [text.encode(), json.dumps({"text": text}).encode(), gzip.compress(text.encode(), mtime=0)]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
            os.utime(file, ns=(10**18, 10**18))
        seen.append(load(tmp_path))
    assert seen == [["abc"] * 3, ["xyz"] * 3]


def test_of_a_snapshot_only_the_asked_split_is_read(tmp_path):
    for split in ("train", "test"):
        write_table(tmp_path / "data" / f"{split}-00000-of-00001.parquet", text=[split], n=[1])
    assert load(tmp_path) == ["train"] and load(tmp_path, split="test") == ["test"]
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A dataset\n")
    assert load(tmp_path) == load(tmp_path, streaming=True) == ["train"]
    with pytest.raises(DataError, match=r"laid out as a dataset.*Unknown split"):
        load(tmp_path, split="other")


def test_a_card_beside_one_table_is_not_text(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A dataset\n")
    write_rows(tmp_path / "rows.jsonl", {"text": "a"})
    assert load(tmp_path) == ["a"]
    (tmp_path / "README.md").write_text("# Only a text\n")
    assert sorted(load(tmp_path)) == ["# Only a text\n", "a"]


@pytest.mark.parametrize("streaming", [False, True])
def test_what_datasets_saved_is_read(tmp_path, streaming):
    saved = datasets.Dataset.from_dict({"text": ["a", None, "b"], "n": [1, 2, 3]})
    saved.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=saved, test=saved.select([2])).save_to_disk(tmp_path / "split")
    assert load(tmp_path / "one", streaming=streaming) == ["a", "", "b"]
    assert load(tmp_path / "split", streaming=streaming) == ["a", "", "b"]
    assert load(tmp_path / "split", split="test", streaming=streaming) == ["b"]
    with pytest.raises(DataError, match=r"split has no split 'validation', only train, test"):
        load(tmp_path / "split", split="validation", streaming=streaming)
    with pytest.raises(DataError, match=r"has no column 'txt', only text, n; did you mean 'text'"):
        load(tmp_path / "one", text_column="txt", streaming=streaming)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "taken").touch()
    documents = load_documents(str(tmp_path / "a.txt"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "taken")
    tokenizer = make_tokenizer("bytes", None)
    for use in (lambda: load(tmp_path / "a.txt"), lambda: pack(documents, tokenizer, block_length=4)):
        with pytest.raises(DataError, match=rf"could not keep text in {tmp_path}/taken/.*HF_DATASETS_CACHE"):
            use()
