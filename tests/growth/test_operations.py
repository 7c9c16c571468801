"""Grow, freeze, train, drop, merge and consolidate, in memory: what each one promises, in any order."""

import copy
import itertools

import pytest
import torch
from group_operations import KINDS, adapted, as_trained, child, facts, logits, same, train, train_only
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import close, tiny, two_groups
from transformers import AutoModelForCausalLM

from tokenformer import grow
from tokenformer.errors import GrowthError
from tokenformer.growth.architectures import frozen_names, group_names, token_groups
from tokenformer.growth.freeze import freeze, trainable_parts, unfreeze
from tokenformer.growth.groups import consolidate, drop, merge

# peft 0.21 still asks transformers 5.23 for the old name of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
every_kind = pytest.mark.parametrize("kind", KINDS)


class History:
    """A model, and for each group that can be dropped what the model was before it."""

    def __init__(self, kind):
        self.model, self.earlier, self.names = KINDS[kind](), [], (f"g{i}" for i in itertools.count())

    def grow(self, **growth):
        before, objects = facts(self.model), dict(self.model.named_parameters())
        name = next(self.names)
        grow(self.model, **growth, name=name)
        assert torch.equal(logits(self.model), before["logits"])
        kept = {id(p) for p in self.model.parameters()}
        assert all(id(p) in kept for p in objects.values())
        self.earlier.append((name, before))

    def tokens(self):
        self.grow(ffn_param_tokens="+7")

    def blocks(self):
        self.grow(num_hidden_layers="+1", ffn_param_tokens="+3")

    def loops(self):
        self.grow(ffn_param_tokens="+3", **({"num_loops": "+1"} if hasattr(self.model.config, "num_loops") else {}))

    def train(self):
        if self.earlier:
            train_only(self.model, self.earlier[-1][0], optimizer=torch.optim.SGD)

    def drop(self):
        if self.earlier:
            name, before = self.earlier.pop()
            drop(self.model, [name])
            assert same(facts(self.model), before)

    def consolidate(self):
        config = self.model.config
        names = [group.name for group in token_groups(config) if not group.brought]
        if len(names) > 1 and getattr(config, "token_group_norm", None) != "per_group":
            before, size = logits(self.model), self.model.num_parameters()
            consolidate(self.model, names)
            assert self.model.num_parameters() == size and len({*names} & {*group_names(config)}) == 1
            close(logits(self.model), before)
            self.earlier = []

    def merge(self):
        a, b = next(self.names), next(self.names)
        parent, first, second = facts(self.model), child(self.model, a), child(self.model, b)
        before, other = facts(first), facts(second)
        merge(first, second, norm=as_trained(first))
        assert same(facts(second), other)
        without = copy.deepcopy(first)
        drop(without, [a])
        assert same(facts(without), other)
        self.model = first
        self.earlier += [(a, parent), (b, before)]


STEPS = ["tokens", "blocks", "loops", "train", "drop", "consolidate", "merge"]


@every_kind
@settings(max_examples=6, deadline=None, derandomize=True)
@given(steps=st.lists(st.sampled_from(STEPS), min_size=3, max_size=7))
def test_any_sequence_keeps_its_promises(kind, steps):
    history = History(kind)
    for step in steps:
        getattr(history, step)()
    while history.earlier:
        history.drop()


@every_kind
def test_what_every_step_promises_once(kind):
    history = History(kind)
    for step in [
        "tokens",
        "train",
        "blocks",
        "train",
        "loops",
        "train",
        "merge",
        "drop",
        "drop",
        "drop",
        "drop",
        "consolidate",
        "tokens",
        "drop",
    ]:
        getattr(history, step)()


@every_kind
def test_blocks_vanish_with_their_group_after_several_depth_growths(kind):
    model = KINDS[kind]()
    first = facts(model)
    grow(model, num_hidden_layers="+2", name="a")
    train_only(model, "a")
    second = facts(model)
    grow(model, num_hidden_layers="+100%", ffn_param_tokens="+4", name="b")
    train_only(model, "b")
    owned = {group.name: group.blocks for group in token_groups(model.config) if group.blocks}
    depth = model.config.num_hidden_layers
    assert not {*owned["a"]} & {*owned["b"]} and len(owned["a"]) == 2 and 2 * len(owned["b"]) == depth
    youngest = copy.deepcopy(model)
    drop(youngest, ["b"])
    assert same(facts(youngest), second)
    drop(youngest, ["a"])
    assert same(facts(youngest), first)
    # The elder alone: the younger's copies of its blocks stay, and the model still runs and says so.
    drop(model, ["a"])
    assert model.config.num_hidden_layers == depth - 2 == len(model.base_model.layers)
    assert [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")] == list(range(depth - 2))
    assert len(token_groups(model.config)[-1].blocks) == len(owned["b"]) and logits(model).isfinite().all()


@every_kind
def test_merging_in_either_order_is_the_same_to_rounding(kind):
    parent = KINDS[kind]()
    a, b = child(parent, "a"), child(parent, "b")
    ab, ba = copy.deepcopy(a), copy.deepcopy(b)
    merge(ab, b)
    merge(ba, a)
    close(logits(ab), logits(ba))
    assert (logits(ab) - logits(a)).abs().max() > 1e-4 < (logits(ab) - logits(b)).abs().max()


def test_three_children_with_two_groups_each_merge_one_after_the_other():
    parent = tiny()
    children = [child(child(parent, f"{n}1"), f"{n}2", qkv_param_tokens="+5") for n in "abc"]
    merged = copy.deepcopy(children[0])
    for other in children[1:]:
        merge(merged, other, norm="joint")
    assert group_names(merged.config) == ["base", "a1", "a2", "b1", "b2", "c1", "c2"]
    drop(merged, ["a1", "a2", "c2", "c1"])
    assert same(facts(merged), facts(children[1]))


def test_merging_under_another_norm_and_renaming_a_clash():
    parent = tiny()
    a, b = child(parent, "new"), child(parent, "new")
    with pytest.raises(GrowthError, match=r"do not share a parent's weights: .*If new is not the same .*, rename it"):
        merge(a, b)
    merge(a, b, rename={"new": "other"}, norm="per_group")
    assert a.config.token_group_norm == "per_group" == a.model.layers[0].mlp.token_group_norm
    # Under norms of their own the groups of both add up: what each adds to the parent, both add together.
    x = torch.randn(5, 64)
    layers = [m.model.layers[0].mlp for m in (parent, a, b)]
    alone = [copy.deepcopy(layers[2]) for _ in range(2)]
    del alone[0].groups["new"], alone[1].groups["base"]
    close(layers[1](x), _sum_of_groups(layers[1], x))


def _sum_of_groups(layer, x):
    total = 0
    for name in layer.groups:
        one = copy.deepcopy(layer)
        for other in [n for n in one.groups if n != name]:
            del one.groups[other]
        total = total + one(x)
    return total


def test_merged_groups_have_a_norm_each_unless_asked_otherwise():
    a, b = child(tiny(), "a"), child(tiny(), "b")
    merge(a, b)
    assert a.config.token_group_norm == "per_group"


def test_a_merged_model_shares_no_memory_with_the_other():
    parent = tiny()
    a, b = child(parent, "a"), child(parent, "b")
    before = facts(b)
    merge(a, b)
    unfreeze(a)
    train(a)
    assert same(facts(b), before)


def test_a_merge_keeps_what_the_other_has_frozen():
    parent = tiny()
    a, b = child(parent, "a"), child(parent, "b")
    freeze(b, ["b"])
    merge(a, b, rename={"b": "c"})
    assert "c" in frozen_names(a.config) and "a" not in frozen_names(a.config)
    trains = {name.partition("groups.")[2].partition(".")[0]: p.requires_grad for name, p in a.named_parameters()}
    assert trains["a"] and not trains["c"]


def test_a_merge_takes_the_tau_of_who_grew_first():
    parent = tiny("ffn")
    a, b = child(parent, "a"), child(parent, "b", qkv_param_tokens=9)
    merge(a, b)
    assert a.config.qkv_tau == 3.0 == a.model.layers[0].self_attn.q_proj.tau
    drop(a, ["b"])
    assert a.config.qkv_tau is None and a.model.layers[0].self_attn.q_proj.tau is None


def test_children_that_were_loaded_merge_with_those_in_memory(tmp_path):
    a, b = child(tiny(), "a"), child(tiny(), "b")
    b.save_pretrained(tmp_path)
    merge(a, AutoModelForCausalLM.from_pretrained(tmp_path))
    assert group_names(a.config) == ["base", "a", "b"]


@pytest.mark.parametrize("kind", ["paper", "ffn", "gelu", "vision", "llama"])
def test_consolidating_concatenates_in_the_order_of_the_groups(kind):
    model = KINDS[kind]()
    for name in ("a", "b"):
        grow(model, ffn_param_tokens="+5", name=name)
        train_only(model, name)
    before, groups = facts(model), trainable_parts(model)
    consolidate(model, ["b", "a"], name="both")
    assert group_names(model.config) == ["base", "both"]
    close(logits(model), before["logits"])
    assert sum(p.numel() for p in trainable_parts(model)["both"]) == sum(p.numel() for n in "ab" for p in groups[n])
    assert all(p is q for p, q in zip(trainable_parts(model)["base"], groups["base"], strict=True))
    consolidate(model)
    assert group_names(model.config) == ["base"]
    close(logits(model), before["logits"])


@every_kind
def test_freezing_and_back(kind):
    model = KINDS[kind]()
    grow(model, ffn_param_tokens="+8", num_hidden_layers="+1", name="new")
    inside = trainable_parts(model)
    assert {id(p) for ps in inside.values() for p in ps} == {id(p) for p in model.parameters()}
    assert sum(map(len, inside.values())) == len(list(model.parameters()))
    for name in inside:
        freeze(model, [name])
        assert {id(p) for p in model.parameters() if not p.requires_grad} == {id(p) for p in inside[name]}
        train(model)
        unfreeze(model, [name])
    freeze(model, ["base", "embedding"])
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_on_a_group_survives_growth_and_trains_on():
    model = adapted(two_groups("paper"), r".*groups\.more\.(keys|values)")
    before, adapters = logits(model), {n: p for n, p in model.named_parameters() if "lora_" in n}
    grow(model, qkv_param_tokens="+4", ffn_param_tokens="+4", name="most")
    assert torch.equal(logits(model), before) and len(adapters) == 12
    after = dict(model.named_parameters())
    assert all(after[name] is p for name, p in adapters.items())
    freeze(model, ["base", "most", "embedding", "final_norm"])
    train(model)
