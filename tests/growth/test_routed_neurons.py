"""Gates for neurons of ordinary transformers: moved beside the MLPs, closed to the last bit, kept as an add-on."""

import copy

import datasets
import pytest
import torch
from test_ordinary import TOLERANCE, whole
from tiny_models import close

from tokenformer import attach, drop, freeze, grow, load, merge, route, save, split, using
from tokenformer.errors import GrowthError
from tokenformer.growth.architectures import group_names
from tokenformer.growth.beside import names_beside, put_tokens, take_tokens
from tokenformer.growth.freeze import freeze_only, trainable_parts
from tokenformer.growth.route import move_beside
from tokenformer.growth.sites import sites

LOW, HIGH = (3, 64), (66, 128)  # the ids of two kinds of text
LAYOUTS = ["llama-biases", "phi3", "gpt2", "gemma2"]


def ids(kind, rows=2, length=9, seed=0):
    return torch.randint(*kind, (rows, length), generator=torch.Generator().manual_seed(seed))


def blocks(kind, seed):
    return datasets.Dataset.from_dict({"input_ids": ids(kind, rows=16, length=32, seed=seed).tolist()})


@torch.no_grad()
def taught(name="llama-biases", group="low"):
    """The model without the group, and with neurons that take part always."""
    always = whole(name)
    grow(always, ffn_param_tokens="+25%", name=group)
    freeze_only(always, [part for part in trainable_parts(always) if part != group])
    for parameter in always.parameters():
        if parameter.requires_grad:
            parameter.normal_(std=0.3)
    parent = copy.deepcopy(always)
    drop(parent, [group])
    return parent, always


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_moved_neurons_compute_as_before_and_closed_ones_nothing(name):
    parent, always = taught(name)
    low, high = ids(LOW), ids(HIGH)
    moved = copy.deepcopy(always)
    grown = {p for p in moved.parameters() if p.requires_grad}
    move_beside(moved, "low")
    assert names_beside(moved) == ["low"] and group_names(moved.config) == ["base"]
    if name != "phi3":  # which holds two in one
        assert {p for p in moved.parameters() if p.requires_grad} == grown
    close(moved(low).logits, always(low).logits, TOLERANCE * 4)
    found = route(moved, "low", blocks(LOW, 1), blocks(HIGH, 2), per="sequence")
    assert found.open_on_own > 0.9 and found.open_on_other < 0.1
    assert torch.equal(moved(high).logits, parent(high).logits)
    mixed = torch.cat([high[:1], low[:1]])
    assert torch.equal(moved(mixed).logits[0], parent(mixed).logits[0])
    close(moved(mixed).logits[1], always(mixed).logits[1], TOLERANCE * 4)
    before = moved(mixed).logits
    grow(moved, num_hidden_layers="+1", name="deeper")
    assert torch.equal(moved(mixed).logits, before)
    drop(moved, ["low", "deeper"])
    assert torch.equal(moved(low).logits, parent(low).logits) and not sites(moved)


@torch.no_grad()
def test_gates_of_text_tokens():
    parent, routed = taught()
    found = route(routed, "low", blocks(LOW, 1), blocks(HIGH, 2))
    assert found.open_on_own > 0.9 and found.open_on_other < 0.1
    for layer in sites(routed).values():
        x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
        masked = layer._masked_output(x, dict(layer.groups.items()))  # as torch.compile and exporters compute it
        close(masked, layer(x))
        layer.gates["low"].weight.zero_()
        layer.gates["low"].bias.fill_(-1)
    assert torch.equal(routed(ids(LOW)).logits, parent(ids(LOW)).logits)


@torch.no_grad()
def test_generation_in_a_mixed_padded_batch():
    parent, always = taught()
    routed = copy.deepcopy(always)
    route(routed, "low", blocks(LOW, 1), blocks(HIGH, 2), per="sequence")
    prompts = torch.cat([ids(HIGH)[:1], ids(LOW)[:1]])
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), prompts], 1)
    for beams in (1, 3):
        asked = {"do_sample": False, "max_new_tokens": 6, "eos_token_id": None, "pad_token_id": 0, "num_beams": beams}
        wanted = [m.generate(p[None], **asked)[0] for m, p in zip((parent, always), prompts, strict=True)]
        assert not torch.equal(wanted[1], parent.generate(prompts[1:], **asked)[0])
        found = routed.generate(padded, attention_mask=(padded != 0).long(), **asked)
        assert torch.equal(found[:, 3:], torch.stack(wanted))
        with using(routed, low=False):
            assert torch.equal(routed.generate(prompts[1:], **asked), parent.generate(prompts[1:], **asked))


@torch.no_grad()
def test_kept_as_an_add_on_and_merged(tmp_path):
    _, routed = taught()
    route(routed, "low", blocks(LOW, 1), blocks(HIGH, 2), per="sequence")
    split(routed, "low", tmp_path / "low")
    again, merged = whole("llama-biases"), whole("llama-biases")
    attach(again, tmp_path / "low")
    merge(merged, routed)
    for model in (again, merged):
        assert torch.equal(model(ids(LOW)).logits, routed(ids(LOW)).logits)
        assert torch.equal(model(ids(HIGH)).logits, whole("llama-biases")(ids(HIGH)).logits)
    with pytest.raises(GrowthError, match=r"neurons beside model.layers.0.mlp, with maps gate_.*no such MLP"):
        put_tokens(whole("gpt2"), "low", take_tokens(routed, "low"))


@torch.no_grad()
def test_the_parent_of_neurons_moved_out_of_a_checkpoint_is_that_without_them(tmp_path):
    parent, always = taught()
    save(tmp_path / "grown", always)
    routed, _, _ = load(tmp_path / "grown")
    route(routed, "low", blocks(LOW, 1), blocks(HIGH, 2), per="sequence")
    split(routed, "low", tmp_path / "low")
    found, _, _ = load(tmp_path / "low")
    assert torch.equal(found(ids(LOW)).logits, routed(ids(LOW)).logits)
    assert torch.equal(found(ids(HIGH)).logits, parent(ids(HIGH)).logits)


def test_only_the_neurons_train_and_a_second_group_stands_beside():
    _, routed = taught()
    move_beside(routed, "low")
    grow(routed, ffn_param_tokens="+8", name="more")
    move_beside(routed, "more")
    assert names_beside(routed) == ["low", "more"]
    freeze(routed, all_but=["more"])
    routed(input_ids=ids(LOW), labels=ids(LOW)).loss.backward()
    assert {n for n, p in routed.named_parameters() if p.grad is not None} == {
        n for n, _ in routed.named_parameters() if ".mlp.param_tokens.groups.more." in n
    }


def test_refusals():
    _, opt = taught("opt")
    before = opt(ids(LOW)).logits
    with pytest.raises(GrowthError, match=r"blocks of a 'opt' model have no module for their MLP"):
        route(opt, "low", blocks(LOW, 1), blocks(HIGH, 2))
    assert torch.equal(opt(ids(LOW)).logits, before)
    model = whole("llama-biases")
    grow(model, ffn_param_tokens="+8", num_hidden_layers="+1", name="deep")
    for name, message in (("base", "nothing would be left"), ("deep", "came with blocks"), ("other", "no token group")):
        if name == "base":
            drop(model, ["deep"])
        with pytest.raises(GrowthError, match=message):
            route(model, name, blocks(LOW, 1), blocks(HIGH, 2))
        if name == "base":
            grow(model, ffn_param_tokens="+8", num_hidden_layers="+1", name="deep")
    assert not sites(model)
