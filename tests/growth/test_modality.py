"""A union by modality: text alone and an image alone give what they gave, to the bit, whatever the bridge learns."""

import copy
import functools

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import close, images, tiny, tiny_vision, tokens, two_groups

from tokenformer import consolidate, drop, grow, merge, prune, route
from tokenformer.errors import GrowthError
from tokenformer.explain import explain
from tokenformer.growth.freeze import trainable_parts


@functools.cache
def united(family, attention="sdpa", dtype=torch.float32):
    """A language model, a vision model and their union, whose bridge has learned something."""
    language, vision = (
        two_groups(family, dtype, functools.partial(make, attention=attention)) for make in (tiny, tiny_vision)
    )
    return language, vision, loud(merge(language, vision, by="modality", bridge=3))


@torch.no_grad()
def loud(both):
    for name, parameter in both.named_parameters():
        if ".bridge." in name:
            parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(4))
    return both


def hidden(vision, pixels):
    return vision.model(pixel_values=pixels).last_hidden_state


def same(a, b):
    """Equal to the bit; in float64 eager attention makes what it pads nan."""
    assert torch.equal(a.nan_to_num(), b.nan_to_num())


def prompt(both, text, count=1):
    """Placeholders of so many images, and text after them."""
    ids = torch.full((len(text), count * both.config.image_positions), both.config.image_token_id)
    return torch.cat([ids, text], dim=1)


@torch.no_grad()
@settings(deadline=None, max_examples=8)
@given(
    family=st.sampled_from(["paper", "ffn"]),
    attention=st.sampled_from(["sdpa", "eager"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    length=st.integers(1, 24),
    padding=st.integers(0, 3),
    cached=st.booleans(),
)
def test_each_modality_alone_is_what_it_was(family, attention, dtype, length, padding, cached):
    language, vision, both = united(family, attention, dtype)
    ids = tokens(2, length)
    mask = torch.ones_like(ids)
    mask[0, : min(padding, length - 1)] = 0
    given_both, given_language = (model(ids, attention_mask=mask, use_cache=cached) for model in (both, language))
    same(given_both.logits, given_language.logits)
    if cached:
        more = torch.cat([mask, mask[:, -1:]], dim=1)
        steps = [
            model(ids[:, :1], attention_mask=more, past_key_values=before.past_key_values).logits
            for model, before in ((both, given_both), (language, given_language))
        ]
        same(*steps)
    pixels = images().to(dtype)
    assert torch.equal(hidden(both, pixels), hidden(vision, pixels))


@torch.no_grad()
@pytest.mark.parametrize("family", ["paper", "ffn"])
def test_a_fresh_bridge_changes_nothing_and_is_all_that_trains(family):
    language, vision = tiny(family), tiny_vision(family)
    both, pixels = merge(language, vision, by="modality"), images()
    without = copy.deepcopy(both)
    drop(without, ["bridge"])
    ids = prompt(both, tokens())
    assert torch.equal(both(ids, pixel_values=pixels).logits, without(ids, pixel_values=pixels).logits)
    names = {name for name, parameter in both.named_parameters() if parameter.requires_grad}
    assert names == {name for name, _ in both.named_parameters() if ".bridge." in name}
    assert {name for name, found in trainable_parts(both).items() if any(p.requires_grad for p in found)} == {"bridge"}
    assert not torch.equal(loud(both)(ids, pixel_values=pixels).logits, without(ids, pixel_values=pixels).logits)


@torch.no_grad()
def test_operations_on_groups_keep_modalities_apart():
    language, vision, both = united("paper")
    ids, pixels = tokens(), images()

    def changed(operation, same=close):
        new = copy.deepcopy(both)
        operation(new)
        same(new(ids).logits, language(ids).logits)
        same(hidden(new, pixels), hidden(vision, pixels))
        return new

    def equal(a, b):
        assert torch.equal(a, b)

    changed(lambda model: drop(model, ["bridge"]), equal)
    changed(lambda model: grow(model, num_hidden_layers="+1", ffn_param_tokens="+8"), equal)
    changed(lambda model: consolidate(model, ["base", "more"]))
    one = changed(lambda model: consolidate(model, ["vision_base", "vision_more"], name="eyes"))
    assert [group["name"] for group in one.config.token_groups] == ["base", "more", "eyes", "bridge"]
    assert one.model.layers[0].mlp.groups["eyes"].tau == vision.config.ffn_tau
    pruned = copy.deepcopy(both)
    prune(pruned, datasets.Dataset.from_list([{"input_ids": ids[0].tolist()}]), keep=0.5)
    assert {gate.modality for gate in pruned.model.layers[0].mlp.gates.values()} == {"text", "image", "both"}
    assert pruned(prompt(both, ids), pixel_values=pixels).logits.isfinite().all()


def test_a_prompt_is_explained_by_what_takes_part():
    language, _, both = united("paper")
    ids = tokens(1, 5)
    found, expected = explain(both, ids), explain(language, ids)
    assert (found.target, found.logit) == (expected.target, expected.logit)
    assert {place: value for place, value in found.total.items() if value} == expected.total
    assert found.top == expected.top


@pytest.mark.parametrize(
    ("language", "vision", "message"),
    [
        ({"hidden_size": 32}, {}, r"differ in hidden_size \(32, 64\).*in the other's sizes"),
        ({}, {"num_attention_heads": 8}, r"differ in num_attention_heads \(4, 8\)"),
        ({"norm_activation_type": "gelu"}, {}, "differ in norm_activation_type"),
        ({"token_group_norm": "per_group"}, {}, "differ in token_group_norm"),
        ({"use_qk_norm": True}, {}, "differ in use_qk_norm"),
        ({}, {"num_hidden_layers": 4}, "grow the language model to --num-hidden-layers 4 first"),
        ({"qkv_param_tokens": 0}, {}, r"differ in linear_projections \(\['qkv'\], \[\]\)"),
        ({"pattention_bias": True}, {}, "pattention_bias is on"),
    ],
)
def test_models_that_cannot_share_blocks_are_refused(language, vision, message):
    with pytest.raises(GrowthError, match=message):
        merge(tiny(**language), tiny_vision(**vision), by="modality")


def test_other_pairs_and_wishes_are_refused():
    language, vision, both = united("paper")
    for pair in ((vision, language), (language, language), (both, vision)):
        with pytest.raises(
            GrowthError, match="a 'tokenformer' model, which reads text, takes up a 'tokenformer_vision'"
        ):
            merge(*pair, by="modality")
    with pytest.raises(GrowthError, match="by is 'sense'; it must be \"modality\""):
        merge(language, vision, by="sense")
    with pytest.raises(GrowthError, match="rename and norm are for two children of one parent"):
        merge(language, vision, by="modality", norm="joint")
    with pytest.raises(GrowthError, match="the bridge would have 0 parameter tokens"):
        merge(language, vision, by="modality", bridge=0)
    with pytest.raises(GrowthError, match=r"language is torch.float32 and vision torch.bfloat16"):
        merge(language, tiny_vision(dtype=torch.bfloat16), by="modality")
    grown = tiny("ffn")
    grow(grown, qkv_param_tokens=8)
    with pytest.raises(GrowthError, match="in block 0 the language model has parameter tokens in the qkv projection"):
        merge(grown, tiny_vision("ffn"), by="modality")
    with pytest.raises(GrowthError, match="take part at positions of different modalities"):
        consolidate(copy.deepcopy(both))
    with pytest.raises(GrowthError, match="nothing would be left in the qkv projection"):
        drop(copy.deepcopy(both), ["vision_base"])
    with pytest.raises(GrowthError, match="take part by modality"):
        route(copy.deepcopy(both), "base", [], [])


def test_depth_is_brought_to_one_by_growth():
    language, vision = tiny(num_hidden_layers=2), tiny_vision()
    grow(language, num_hidden_layers=3)
    both = merge(language, vision, by="modality")
    with torch.no_grad():
        assert torch.equal(both(tokens()).logits, tiny(num_hidden_layers=2)(tokens()).logits)
