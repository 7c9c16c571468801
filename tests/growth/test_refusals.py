"""What operations on token groups refuse in memory, in which words, and that the model is then untouched."""

import pytest
import torch
from group_operations import KINDS, adapted, child, facts, logits, ordinary, quantised, same
from tiny_models import close, make, tiny, two_groups
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, OPTConfig

from tokenformer import grow
from tokenformer.errors import GrowthError
from tokenformer.growth.architectures import group_names
from tokenformer.growth.freeze import freeze, freeze_only, unfreeze
from tokenformer.growth.groups import consolidate, drop, merge
from tokenformer.growth.neurons import group_neurons

# peft 0.21 still asks transformers 5.23 for the old name of activation checkpointing.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("operation", [drop, consolidate, freeze, unfreeze, freeze_only])
@every_kind
def test_an_unknown_group_is_named_beside_those_there_are(kind, operation):
    model = KINDS[kind]()
    before = facts(model)
    with pytest.raises(GrowthError, match=r"'nope'.* has base|no token group 'nope'; there are base"):
        operation(model, ["base", "nope"])
    assert same(facts(model), before) and all(p.requires_grad for p in model.parameters())


def routed():
    model = tiny()
    grow(model, ffn_param_tokens="+8", name="new")
    model.config.token_groups[-1]["routed"] = True
    return model


def frozen_base():
    model = with_groups_of()
    freeze(model, ["base"])
    return model


def with_groups_of(**growth):
    model = tiny(**growth.pop("changes", {}))
    grow(model, **{"ffn_param_tokens": "+8", "name": "new", **growth})
    return model


CONSOLIDATIONS = {
    "routed": (routed, {}, "token group new is routed: .*drop it"),
    "one group": (with_groups_of, {"names": ["new"]}, "at least two token groups; asked for new"),
    "twice the same": (with_groups_of, {"names": ["new", "new"]}, "at least two token groups; asked for new, new"),
    "per_group": (lambda: with_groups_of(norm="per_group"), {}, "has a norm of its own"),
    "blocks": (lambda: with_groups_of(num_hidden_layers="+1"), {}, "token group new came with blocks 3 and goes"),
    "loops": (lambda: with_groups_of(num_loops=2), {}, "token group new came with loops 1"),
    "a bad name": (with_groups_of, {"name": "values"}, "'values' cannot be used"),
    "frozen and not": (frozen_base, {"name": "both"}, "token group base is frozen and new is not; one group can only"),
    "a taken name": (lambda: two_and("third"), {"names": ["base", "more"], "name": "third"}, "'third' exists already"),
}


def two_and(name):
    model = two_groups("paper")
    grow(model, ffn_param_tokens="+8", name=name)
    return model


@pytest.mark.parametrize("case", CONSOLIDATIONS)
def test_consolidations_that_are_refused(case):
    build, arguments, message = CONSOLIDATIONS[case]
    model = build()
    before = facts(model)
    with pytest.raises(GrowthError, match=message):
        consolidate(model, **arguments)
    assert same(facts(model), before)


def test_nothing_may_be_left_empty():
    for model, names in ((tiny(), ["base"]), (ordinary(), ["base"]), (two_groups("ffn"), ["base", "more"])):
        before = facts(model)
        with pytest.raises(
            GrowthError, match=r"nothing would be left in the (qkv|ffn) projection: its token groups are b"
        ):
            drop(model, names)
        assert same(facts(model), before)
    grown = make("grown")
    drop(grown, ["grown1"])
    assert grown.config.qkv_param_tokens == 0 and logits(grown).isfinite().all()
    with pytest.raises(GrowthError, match="freezing base, embedding, final_norm, linear_maps leaves nothing to train"):
        freeze_only(tiny("ffn"), ["base", "embedding", "final_norm", "linear_maps"])


def trained_parent(model):
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    return model


def a(**changes):
    return with_groups_of(name="a", **changes)


def b(**changes):
    return with_groups_of(name="b", **changes)


MERGES = {
    "trained elders": (a, lambda: trained_parent(b()), {}, r"differ in 2 tensors, such as lm_head.weight"),
    "another depth": (
        a,
        lambda: b(changes={"num_hidden_layers": 2}),
        {},
        r"not children .* num_hidden_layers \(3, 2\)",
    ),
    "blocks": (
        lambda: a(num_hidden_layers="+1"),
        lambda: b(num_hidden_layers="+1"),
        {},
        "token group b came with bl",
    ),
    "renamed blocks": (
        lambda: b(num_hidden_layers="+1"),
        lambda: b(num_hidden_layers="+1"),
        {"rename": {"b": "c"}},
        "token group b came with bl",
    ),
    "another kind": (a, ordinary, {}, r"not children .* model_type \(tokenformer, llama\)"),
    "another dtype": (a, lambda: b().to(torch.bfloat16), {}, "do not share a parent's weights"),
    "nothing new": (tiny, tiny, {}, "nothing to merge: both models have the token groups base"),
    "an unknown name": (a, b, {"rename": {"c": "d"}}, "no token group 'c'; there are base, b"),
    "a taken name": (a, b, {"rename": {"b": "a"}}, "'a' exists already, beside base, a"),
    "one name twice": (
        a,
        lambda: and_more(b(), "c"),
        {"rename": {"b": "c"}},
        "would have one name: c, c; choose another",
    ),
    "a bad name": (a, b, {"rename": {"b": "keys"}}, "'keys' cannot be used"),
    "a bad norm": (a, b, {"norm": "per-group"}, "norm is 'per-group'; it must be joint or per_group"),
    "no norm": (
        lambda: a(changes={"norm_activation_type": "gelu"}),
        lambda: b(changes={"norm_activation_type": "gelu"}),
        {"norm": "joint"},
        "norm 'joint' was asked; this model's parameter tokens are not normalised",
    ),
    "two taus": (
        lambda: child(tiny("ffn"), "a", qkv_param_tokens=4),
        lambda: child(tiny("ffn"), "b", qkv_param_tokens=9),
        {},
        r"different qkv_tau, 2\.0 and 3\.0, because each was the first to grow there",
    ),
}


def and_more(model, name):
    grow(model, ffn_param_tokens="+8", name=name)
    return model


@pytest.mark.parametrize("case", MERGES)
def test_merges_that_are_refused(case):
    ours, theirs, arguments, message = MERGES[case]
    model, other = ours(), theirs()
    before = facts(model), facts(other)
    with pytest.raises(GrowthError, match=message):
        merge(model, other, **arguments)
    assert same(facts(model), before[0]) and same(facts(other), before[1])


OPT = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 56, "vocab_size": 128}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128}
GROWTHS = {
    "a preset": (ordinary, {"preset": "1m"}, "presets are sizes of TokenFormers; this is a 'llama' model"),
    "attention tokens": (ordinary, {"qkv_param_tokens": "+1"}, "'llama' model has no .* qkv_param_tokens: its are"),
    "a norm": (ordinary, {"ffn_param_tokens": "+1", "norm": "joint"}, "a 'llama' model has no such norm"),
    "post-norm depth": (
        lambda: ordinary(OPTConfig(**OPT, do_layer_norm_before=False, word_embed_proj_dim=64)),
        {"num_hidden_layers": "+1"},
        "cannot add blocks to this 'opt' model: its blocks normalise what they pass on",
    ),
    "numbered depth": (
        lambda: ordinary(GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True)),
        {"num_hidden_layers": "+1"},
        "cannot add blocks to this 'gpt2' model: it scales attention by the number of the block",
    ),
}


@pytest.mark.parametrize("case", GROWTHS)
def test_growths_of_ordinary_models_that_are_refused(case):
    build, arguments, message = GROWTHS[case]
    model = build()
    before = facts(model)
    with pytest.raises(GrowthError, match=message):
        grow(model, **arguments)
    assert same(facts(model), before)


def test_a_model_type_without_a_row():
    model = AutoModelForCausalLM.from_config(GPTJConfig(n_embd=32, n_layer=1, n_head=2, rotary_dim=4, vocab_size=9))
    for operation in (grow, drop, consolidate, group_neurons):
        with pytest.raises(
            GrowthError,
            match=r"a 'gptj' model .* not in the table; these are: tokenformer, .*, llama, .*row",
        ):
            operation(model, **({"ffn_param_tokens": "+1"} if operation is grow else {}), **names_for(operation))
    with pytest.raises(GrowthError, match=r"there is no part 'embedding'; this model has base$"):
        freeze(model, ["embedding"])


def names_for(operation):
    return {"names": ["base"]} if operation is drop else {}


ODD = {"LoRA": (adapted, "peft.tuners.lora.layer.Linear"), "int8": (quantised, "torchao.quantization.*Int8Tensor")}


@pytest.mark.parametrize("change", ODD)
def test_maps_that_are_more_or_less_than_their_weight(change):
    make_odd, found = ODD[change]
    plain = ordinary()
    model = make_odd(AutoModelForCausalLM.from_config(plain.config), ["up_proj"])
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(
        GrowthError, match=f"cannot tell the neurons of token groups apart: .* is a {found}; merge adapters"
    ):
        grow(model, ffn_param_tokens="+8")
    assert names == [name for name, _ in model.named_parameters()] and not getattr(model.config, "token_groups", None)
    for model in (two_groups("ffn"), and_more(ordinary(), "more")):
        targets = "groups.more.keys" if model.config.model_type == "tokenformer" else "gate_proj.groups.more"
        model = make_odd(model, [targets])
        before = logits(model)
        with pytest.raises(GrowthError, match=f"cannot move .* of group 'more': .* is a {found}; merge adapt"):
            consolidate(model)
        grow(model, ffn_param_tokens="+8", name="most")
        close(logits(model), before, 1e-6)
        drop(model, ["more"])
        assert group_names(model.config) == ["base", "most"] and logits(model).isfinite().all()


def test_merging_refuses_an_adapter_that_it_would_lose():
    parent = tiny("ffn")
    other = adapted(child(parent, "b"), r".*groups\.b\.keys")
    model = child(parent, "a")
    before = facts(model)
    with pytest.raises(GrowthError, match=r"peft|do not share"):
        merge(model, other)
    assert same(facts(model), before)
