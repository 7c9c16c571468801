import itertools
import random
from collections import Counter

import numpy as np
import pytest
from pydantic import ValidationError

from tokenformer.data.order import Reading, cut
from tokenformer.data.section import DataSection, PartSection, TextSection, texts_in
from tokenformer.data.sources import load_documents
from tokenformer.data.text import prepare
from tokenformer.errors import DataError

SIZES = {"new": 700, "old": 90}


def write(folder, name, count, **extra):
    """A text of `count` documents that name it."""
    (folder / name).mkdir(exist_ok=True)
    dice = random.Random(name)
    for i in range(count):
        words = " ".join(dice.choice(["to", "be", "or", "not"]) for _ in range(60))
        (folder / name / f"{i:03}.txt").write_text(f"{name} {i} {words}", encoding="utf-8")
    return str(folder / name)


def documents(blocks, tokenizer):
    """The first words of the documents in text blocks."""
    ids = [i for block in blocks for i in block["input_ids"][1:]]
    return {" ".join(text.split()[:2]) for text in tokenizer.decode(ids).split(tokenizer.eos_token) if text.strip()}


def messages(**data):
    with pytest.raises(ValidationError) as caught:
        DataSection(**data)
    return str(caught.value)


def test_a_number_is_a_weight_and_weights_are_proportions():
    section = DataSection(mixture={"new": 9, "old": {"source": ["a", "b"], "weight": 1, "split": "test"}})
    new, old = section.uses(section)
    assert section.shares(section) == {"new": 0.9, "old": 0.1}
    assert (new.source, new.split) == (("new",), "train") and (old.source, old.split) == (("a", "b"), "test")
    one = DataSection(source=["a", "b"])
    assert one.shares(one) == {"a, b": 1.0}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "name one text as source, or several with their weights as mixture"),
        ({"source": "a", "mixture": {"b": 1}}, "name one text as source, or several"),
        ({"mixture": {"a": 0}}, "greater than 0"),
        ({"mixture": {"a": -1.0}}, "greater than 0"),
        ({"mixture": {"a": float("nan")}}, "mixture.a.weight"),
        ({"mixture": {"a": float("inf")}}, "finite"),
        ({"mixture": {"a": True}}, "write a weight, such as 0.5, or fields"),
        ({"mixture": {"a": None}}, "write a weight, such as 0.5, or fields"),
        ({"mixture": {"a": {"wieght": 1}}}, "mixture.a.wieght"),
        ({"mixture": {"a": {"share": 0}}}, "share is 0.0; write one above 0"),
        ({"mixture": {"a": {"share": [0.5, 0.2]}}}, r"share is [0.5, 0.2]; write one above 0"),
        ({"mixture": {"a": {"share": [0.5]}}}, "share is [0.5]; write"),
        ({"mixture": {"a": {"sorted_by": "c"}}}, "sorted_by says how a share is counted"),
        ({"mixture": {"a": 1, "b": 1}, "validation_source": "c"}, "holds out documents of its own"),
    ],
)
def test_what_is_no_mixture(data, message):
    assert message in messages(**data)


@pytest.mark.parametrize(
    ("whole", "other", "message"),
    [
        ({"mixture": {"a": 1, "b": {"source": "a"}}}, {"source": "a"}, "'a' and 'b' have one source"),
        ({"source": "a"}, {"mixture": {"b": {"source": "a"}}}, "'a' and 'b' have one source"),
        ({"source": "a"}, {"mixture": {"a": {"source": "b"}}}, "'a' has two sources"),
        ({"source": "a", "streaming": True}, {"source": "b"}, "streaming goes with one text"),
        ({"mixture": {"a": 1}, "streaming": True}, {"source": "a"}, "streaming goes with one text"),
    ],
)
def test_one_name_means_one_text(whole, other, message):
    with pytest.raises(ValueError, match=message):
        texts_in(DataSection(**whole), [None, TextSection(**other)])


def test_shares_of_one_text_are_different_uses_of_it():
    whole = DataSection(source="a")
    easy = TextSection(mixture={"a": {"share": 0.5, "sorted_by": "c"}})
    assert list(texts_in(whole, [easy, easy])) == ["a", "a 0–0.5 by c"]


@pytest.mark.parametrize("sequences", [1, 7, 100, 3001])
@pytest.mark.parametrize("shares", [{"new": 1.0}, {"new": 0.9, "old": 0.1}, {"new": 1 / 3, "old": 2 / 3}])
@pytest.mark.parametrize("pieces", [1, 4])
def test_weights_hold_over_a_stage_and_over_any_part_of_it(sequences, shares, pieces):
    reading = Reading(sequences, shares, {}, pieces)
    order = reading.order(SIZES, seed=0)
    ends = np.cumsum([SIZES[text] * pieces for text in shares])
    texts = np.searchsorted(ends, order, side="right")
    assert len(order) == sequences == sum(reading.counts.values()) and order.max() < ends[-1]
    for number, (text, share) in enumerate(shares.items()):
        seen = np.cumsum(texts == number)
        assert seen[-1] == reading.counts[text]
        assert np.abs(seen - share * np.arange(1, sequences + 1)).max() <= 1.5


@pytest.mark.parametrize("pieces", [1, 4])
def test_every_text_goes_on_where_it_stopped_and_repeats_only_when_it_has_been_read(pieces):
    """Stages of different mixtures, one after the other, read each text block of a text once in every pass."""
    skipped, read = {}, {text: Counter() for text in SIZES}
    for stage, shares in enumerate([{"new": 1.0}, {"new": 0.75, "old": 0.25}, {"old": 1.0}, {"new": 0.5, "old": 0.5}]):
        reading = Reading(pieces * 40 * (stage + 1), shares, skipped, pieces)
        ends = np.cumsum([0, *(SIZES[text] * pieces for text in shares)])
        order = reading.order(SIZES, seed=3)
        assert (order == reading.order(SIZES, seed=3)).all()
        for (low, high), text in zip(itertools.pairwise(ends), shares, strict=True):
            read[text].update((order[(order >= low) & (order < high)] - low).tolist())
        skipped = reading.after()
    assert skipped == {"new": 180, "old": 220}
    assert set(read["new"].values()) == {1}
    assert set(read["old"].values()) == {2, 3} and len(read["old"]) == 90 * pieces
    assert reading.passes(SIZES) == {"new": 80 / 700, "old": 80 / 90}


def test_blocks_are_cut_into_pieces_that_hold_the_same_ids(tmp_path):
    section = DataSection(source=write(tmp_path, "text", 20), tokenizer="bytes")
    data = prepare(section, sequence_length=32, tokenizer_folder=tmp_path / "tokenizer")
    (blocks,) = data.train_blocks.values()
    pieces = cut(blocks, 4)
    assert cut(blocks, 1) is blocks and len(pieces) == 4 * len(blocks)
    assert {len(row["input_ids"]) for row in pieces} == {8}
    assert np.array(pieces["input_ids"]).flatten().tolist() == np.array(blocks["input_ids"]).flatten().tolist()


def test_shares_by_document_are_the_same_everywhere_and_part_the_text(tmp_path):
    source = write(tmp_path, "text", 40)
    shares = {"low": [0, 0.3], "high": [0.3, 1], "third": 0.3}
    others = [TextSection(mixture={"text": {"source": source, "share": share}}) for share in shares.values()]
    whole = DataSection(mixture={"text": {"source": source}}, tokenizer="bytes", validation_fraction=0.2)
    data = prepare(whole, sequence_length=8, tokenizer_folder=tmp_path / "tokenizer", others=others)
    found = {key: documents(blocks, data.tokenizer) for key, blocks in data.train_blocks.items()}
    (held,) = data.validation.values()
    count = 40 - len(held.documents)
    assert list(found) == ["text", "text 0–0.3", "text 0.3–1"]
    assert found["text 0–0.3"] | found["text 0.3–1"] >= found["text"]
    assert len(found["text 0–0.3"] & found["text 0.3–1"]) <= 1  # what the last block leaves over is cut short
    kept = {" ".join(text.split()[:2]) for text in held.documents["text"]}
    assert not kept & found["text"] and data.facts["texts"]["text 0–0.3"]["training_documents"] == round(0.3 * count)
    alone = DataSection(mixture={"text": {"source": source, "share": 0.3}}, tokenizer="bytes", validation_fraction=0.2)
    again = prepare(alone, sequence_length=8, tokenizer_folder=tmp_path / "tokenizer")
    assert again.train_blocks["text 0–0.3"][:] == data.train_blocks["text 0–0.3"][:]
    assert again.validation["text"].documents[:] == held.documents[:]


def test_shares_that_a_checkpoint_sorts_take_the_easiest_first(tmp_path):
    source = write(tmp_path, "text", 20)

    def difficulty(checkpoint, rows):
        assert checkpoint == "judge"
        return np.array([int(text.split()[1]) for text in rows["text"]], dtype=float)

    part = PartSection(source=source, share=0.25, sorted_by="judge")
    section = DataSection(mixture={"text": part}, tokenizer="bytes", validation_fraction=0.2)
    data = prepare(section, sequence_length=8, tokenizer_folder=tmp_path / "t", difficulty=difficulty)
    (blocks,) = data.train_blocks.values()
    found = {int(name.split()[1]) for name in documents(blocks, data.tokenizer)}
    held = {int(text.split()[1]) for text in data.validation["text"].documents["text"]}
    rest = sorted(set(range(20)) - held)
    assert sorted(found) == rest[: round(0.25 * len(rest))]


def test_no_text_trains_on_what_another_holds_out(tmp_path):
    """One text lies within the other, and each holds out documents of its own."""
    inner = write(tmp_path, "inner", 12)
    write(tmp_path, "outer", 30)
    section = DataSection(source=str(tmp_path), tokenizer="bytes", validation_fraction=0.2)
    others = [TextSection(mixture={"inner": {"source": inner}})]
    data = prepare(section, sequence_length=8, tokenizer_folder=tmp_path / ".t" / "t", others=others)
    held = {" ".join(t.split()[:2]) for part in data.validation.values() for t in part.documents["text"]}
    assert set(data.validation) == {str(tmp_path), "inner"} and any(name.startswith("inner") for name in held)
    for blocks in data.train_blocks.values():
        assert not held & documents(blocks, data.tokenizer)
    assert len(load_documents(inner)) == 12
    everything = [TextSection(source=[inner, str(tmp_path / "outer")])]
    assert prepare(section, sequence_length=8, tokenizer_folder=tmp_path / ".t" / "t", others=everything)


def test_a_text_that_others_hold_out_altogether_is_refused(tmp_path):
    source, held = write(tmp_path, "text", 12), write(tmp_path, "held", 3)
    section = DataSection(source=source, validation_source=held, tokenizer="bytes")
    with pytest.raises(DataError, match=r"every document of data\.source is held out"):
        prepare(section, sequence_length=8, tokenizer_folder=tmp_path / "t", others=[TextSection(source=held)])


def test_the_tokenizer_is_made_from_the_text_of_data(tmp_path):
    section = DataSection(source=write(tmp_path, "aaaa", 20), tokenizer="bpe:300", validation_fraction=0.2)
    others = [TextSection(source=write(tmp_path, "zzzz", 20))]
    data = prepare(section, sequence_length=8, tokenizer_folder=tmp_path / "t", others=others)
    vocabulary = "".join(data.tokenizer.get_vocab())
    assert "aaaa" in vocabulary and "zzzz" not in vocabulary
