"""Gates that decide once for a whole sequence: right in batches, under padding, with a cache and with beams."""

import copy

import datasets
import pytest
import torch
import zoo
from tiny_models import tiny
from zoo import outputs

from tokenformer import attach, drop, grow, merge, route, split, using
from tokenformer.errors import GrowthError
from tokenformer.growth.sequence import sequence_gates
from tokenformer.growth.sites import sites

LOW, HIGH = (3, 32), (34, 64)  # the ids of two kinds of text


def ids(kind, rows=2, length=9, seed=0):
    return torch.randint(*kind, (rows, length), generator=torch.Generator().manual_seed(seed))


def blocks(kind, seed):
    return datasets.Dataset.from_dict({"input_ids": ids(kind, rows=24, length=40, seed=seed).tolist()})


def taught(kind="llama", name="low"):
    """The parent, the model with a group that takes part always, and the one whose gate is open for low ids."""
    parent = zoo.make(kind)
    always = copy.deepcopy(parent)
    grow(always, at="all-linear", tokens=4, name=name, seed=1)
    with torch.no_grad():
        for layer in sites(always).values():
            layer.groups[name].values.weight.normal_(std=0.3)
    routed = copy.deepcopy(always)
    found = route(routed, name, blocks(LOW, 1), blocks(HIGH, 2), per="sequence")
    assert found.open_on_own > 0.95 and found.open_on_other < 0.05
    return parent, always, routed


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "bert", "mamba2", "mixtral"])
def test_sequences_are_told_apart_and_closed_ones_are_the_parents_to_the_bit(kind):
    parent, always, routed = taught(kind)
    high, low = ids(HIGH), ids(LOW)
    assert torch.equal(routed(input_ids=high).logits, parent(input_ids=high).logits)
    torch.testing.assert_close(routed(input_ids=low).logits, always(input_ids=low).logits)
    assert not torch.equal(routed(input_ids=low).logits, parent(input_ids=low).logits)
    mixed = torch.cat([high[:1], low[:1]])
    found = routed(input_ids=mixed).logits
    if kind != "mixtral":  # whose experts multiply rows of all sequences together: the others change the rounding
        assert torch.equal(found[0], parent(input_ids=mixed).logits[0])
    torch.testing.assert_close(found[0], parent(input_ids=mixed).logits[0])
    torch.testing.assert_close(found[1], always(input_ids=mixed).logits[1])
    assert routed(input_ids=mixed, labels=mixed).loss.isfinite()


@torch.no_grad()
def test_where_gates_are_closed_the_groups_are_not_touched(monkeypatch):
    parent, _, routed = taught()
    for layer in sites(routed).values():
        monkeypatch.setattr(layer, "forward", None)
    assert torch.equal(routed(input_ids=ids(HIGH)).logits, parent(input_ids=ids(HIGH)).logits)
    with pytest.raises(TypeError):
        routed(input_ids=ids(LOW))


@torch.no_grad()
def test_generation_keeps_to_the_decision():
    parent, always, routed = taught()
    prompts = torch.cat([ids(HIGH)[:1], ids(LOW)[:1]])
    for asked in ({}, {"num_beams": 3}, {"use_cache": False}):
        asked = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": None, "pad_token_id": 0, **asked}
        wanted = [m.generate(p[None], **asked)[0] for m, p in zip((parent, always), prompts, strict=True)]
        alone = [routed.generate(p[None], **asked)[0] for p in prompts]
        if asked.get("use_cache", True):  # else the gate reads what has been written, too
            assert all(torch.equal(a, b) for a, b in zip(alone, wanted, strict=True))
            assert torch.equal(routed.generate(prompts, **asked), torch.stack(wanted))
        with using(routed, low=[False, True]):
            assert torch.equal(routed.generate(prompts, **asked), torch.stack(wanted))
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompts], 1)
    asked = {"do_sample": False, "max_new_tokens": 7, "eos_token_id": None, "pad_token_id": 0}
    found = routed.generate(padded, attention_mask=(padded != 0).long(), **asked)
    assert torch.equal(found[:, 3:], torch.stack([m.generate(p[None], **asked)[0] for m, p in
                                                  zip((parent, always), prompts, strict=True)]))  # fmt: skip


@torch.no_grad()
def test_the_caller_decides():
    parent, always, routed = taught()
    low = ids(LOW)
    with using(routed, low=False):
        assert torch.equal(routed(input_ids=low).logits, parent(input_ids=low).logits)
        with using(routed, low=True):
            torch.testing.assert_close(routed(inputs_embeds=routed.get_input_embeddings()(ids(HIGH))).logits,
                                       always(input_ids=ids(HIGH)).logits)  # fmt: skip
        with (
            pytest.raises(GrowthError, match=r"decides for 3 sequences, and the batch has 2"),
            using(routed, low=[True] * 3),
        ):
            routed(input_ids=low)
    with (
        pytest.raises(GrowthError, match=r"other has no gate that decides for whole sequences; these have: low"),
        using(routed, other=True),
    ):
        pass
    torch.testing.assert_close(routed(input_ids=low).logits, always(input_ids=low).logits)


@torch.no_grad()
def test_kept_copied_merged_and_dropped(tmp_path):
    parent, _, routed = taught()
    low, wanted = ids(LOW), routed(input_ids=ids(LOW)).logits
    assert torch.equal(copy.deepcopy(routed)(input_ids=low).logits, wanted)
    split(routed, "low", tmp_path / "low")
    again, merged = copy.deepcopy(parent), copy.deepcopy(parent)
    attach(again, tmp_path / "low")
    merge(merged, routed)
    for model in (again, merged):
        assert torch.equal(model(input_ids=low).logits, wanted)
        assert torch.equal(model(input_ids=ids(HIGH)).logits, parent(input_ids=ids(HIGH)).logits)
    drop(routed, ["low"])
    assert torch.equal(outputs(routed), outputs(parent)) and not sequence_gates(routed)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in routed.modules())
    assert list(routed.state_dict()) == list(parent.state_dict())


def test_refusals():
    model = tiny("ffn")
    with pytest.raises(GrowthError, match=r"'base' is a TokenFormer's own"):
        route(model, "base", blocks(LOW, 1), blocks(HIGH, 2), per="sequence")
    with pytest.raises(GrowthError, match=r"per is 'batch'"):
        route(model, "base", None, None, per="batch")
    _, _, routed = taught()
    fresh = copy.deepcopy(routed)
    sequence_gates(fresh)["low"].is_open = None
    with pytest.raises(GrowthError, match=r"decides when the whole model is called"):
        fresh.model(input_ids=ids(LOW))
