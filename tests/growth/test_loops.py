"""Blocks that run again: what a loop computes, how it grows, and what is told of it."""

import copy

import pytest
import torch
from datasets import Dataset
from group_operations import facts, logits, ordinary, same, train_only
from huggingface_hub.errors import StrictDataclassError
from tiny_models import close, tiny, tiny_vision, tokens
from transformers import DynamicCache
from typer.testing import CliRunner

from tokenformer import TokenformerConfig, grow
from tokenformer.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.cli.app import app
from tokenformer.convert.official import check_expressible
from tokenformer.errors import ConversionError, GrowthError
from tokenformer.explain import explain
from tokenformer.growth.groups import drop, merge
from tokenformer.growth.importance import measure, watched_weights
from tokenformer.growth.route import route
from tokenformer.growth.select import prune
from tokenformer.plan import PlannedModel

KINDS = {
    "paper": tiny,
    "ffn": lambda **changes: tiny("ffn", **changes),
    "per_group": lambda **changes: tiny(token_group_norm="per_group", **changes),
    "softmax": lambda **changes: tiny(norm_activation_type="softmax", **changes),
    "biased": lambda **changes: tiny(norm_activation_type="gelu", pattention_bias=True, **changes),
    "vision": lambda **changes: tiny_vision(**changes),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def rows():
    return Dataset.from_dict({"input_ids": tokens().tolist()})


def looped():
    """Two loops, the second with parameter tokens of its own and nothing silent any more."""
    model = tiny("ffn", num_hidden_layers=2)
    grow(model, qkv_param_tokens=8, ffn_param_tokens="+16", num_loops=2, name="again")
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".again." in name:
                p.normal_(std=0.2)
    return model


@pytest.mark.parametrize(("kind", "dtype"), [("paper", dtype) for dtype in DTYPES] + [(k, DTYPES[0]) for k in KINDS])
def test_a_new_loop_changes_nothing_then_learns_and_goes_again(kind, dtype):
    model = KINDS[kind](dtype=dtype, num_hidden_layers=2)
    before, objects = facts(model), dict(model.named_parameters())
    grow(model, qkv_param_tokens="+6", ffn_param_tokens="+6", num_loops="+1", name="again")
    assert torch.equal(logits(model), before["logits"]) and model.config.num_loops == 2
    assert all(p is dict(model.named_parameters())[name] for name, p in objects.items())
    new = {name: p.detach().clone() for name, p in model.named_parameters() if ".again." in name}
    train_only(model, "again", steps=3)  # the scale moves in the first step, and then all that it lets through
    moved = dict(model.named_parameters())
    assert all(not torch.equal(moved[name], p) for name, p in new.items() if not name.endswith("keys.bias"))
    assert not torch.equal(logits(model), before["logits"])
    drop(model, ["again"])
    assert same(facts(model), before)


def test_a_looped_model_is_the_deep_one_whose_blocks_are_equal():
    model = tiny(num_loops=2, dtype=torch.float64)
    deep = tiny(num_hidden_layers=6, dtype=torch.float64, value_initializer_range=model.config.value_std)
    state = model.state_dict()
    for block in range(3):
        prefix = f"model.layers.{block}."
        inside = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        state |= {f"model.layers.{block + 3}.{name}": tensor for name, tensor in inside.items()}
    deep.load_state_dict(state)
    ids = tokens()
    caches = [DynamicCache(config=m.config) for m in (model, deep)]
    assert torch.equal(model(ids, past_key_values=caches[0]).logits, deep(ids, past_key_values=caches[1]).logits)
    assert len(caches[0].layers) == 6
    assert all(torch.equal(a.keys, b.keys) for a, b in zip(*(cache.layers for cache in caches), strict=True))
    assert len(model(ids, output_hidden_states=True).hidden_states) == 7


def test_a_model_may_begin_with_loops_and_groups_for_them(tmp_path):
    groups = [{"name": "base", "ffn": 160}, {"name": "second", "ffn": 16, "loops": [1]}]
    model = tiny("ffn", num_loops=2, token_groups=groups, ffn_param_tokens=None)
    assert model.config.ffn_tau == 160**0.5 and (model.model.layers[0].mlp.scales["second"].weight == 1).all()
    save_checkpoint(tmp_path / "c", model)
    assert torch.equal(logits(load_checkpoint(tmp_path / "c")[0]), logits(model))


def test_one_loop_goes_and_the_later_ones_move_up():
    model = looped()
    grow(model, num_loops="+2", name="more")
    train_only(model, "more")
    alone = copy.deepcopy(model)
    drop(alone, ["again"])
    assert alone.config.num_loops == 3 and alone.config.token_groups[-1]["loops"] == [1, 2]
    assert alone.model.layers[0].mlp.loops == {"more": (1, 2)} and logits(alone).isfinite().all()


def test_use_is_counted_over_all_loops():
    model = looped()
    seen = {}

    def see(block, token_map, weights):
        for group, w in weights.items():
            seen.setdefault((block, token_map.name, group), []).append(w.flatten(0, -2))

    with torch.no_grad(), watched_weights(model, see):
        model(tokens())
    assert {len(parts) for (_, _, group), parts in seen.items() if group == "base"} == {2}
    assert {len(parts) for (_, _, group), parts in seen.items() if group == "again"} == {1}
    uses = measure(model, rows()).uses
    for (block, name, group), parts in seen.items():
        close(uses[block, name][group].weight_std, torch.cat(parts).std(0, correction=0))


def test_a_contribution_is_that_of_all_loops_together():
    model = looped()
    found = explain(model, tokens(1), top=30)
    model.zero_grad()
    model(tokens(1)).logits[0, -1, found.target].backward()
    for c in found.top:
        values = model.model.layers[c.block].get_submodule(c.map_name).groups[c.group].values.weight
        close(torch.tensor(c.contribution), (values * values.grad)[:, c.index].sum())
        assert c.position < 20


def test_gradients_are_the_same_when_activations_are_computed_again():
    found = []
    for again in (False, True):
        model = looped().train()
        if again:
            model.activation_checkpointing_enable()
        model(tokens(), labels=tokens()).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(grad, found[1][name]) for name, grad in found[0].items())


def test_inspect_card_and_plan_say_how_often_blocks_run(tmp_path):
    model = looped()
    save_checkpoint(tmp_path / "c", model)
    assert "2 blocks of width 64, run 2 times, 4 heads" in (tmp_path / "c" / "README.md").read_text()
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "c")]).output
    assert "2 blocks of width 64, run 2 times" in shown and "with loops 1" in shown
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_loops": 2}
    assert PlannedModel(model=sizes, text_tokens=1).label == "tokenformer 2 × 64, run 2 times"


def test_pruning_all_tokens_of_a_loop_leaves_the_loop():
    model = looped()
    prune(model, rows(), keep=0.5)
    assert model.config.num_loops == 2 and logits(model).isfinite().all()
    scales = [name for name, _ in model.named_parameters() if ".scales.again." in name]
    assert len(scales) == 4


def no_tokens():
    model = tiny("ffn", num_hidden_layers=2)
    grow(model, qkv_param_tokens=8, num_loops=2, name="again")
    return model


REFUSED = {
    "ordinary": (ordinary, lambda m: grow(m, num_loops=2), "the code of a 'llama' model runs each block once"),
    "beside": (no_tokens, lambda m: grow(m, qkv_param_tokens="+4"), "again has some that take part in its loops alone"),
    "merge": (
        looped,
        lambda m: merge(m, tiny("ffn", num_hidden_layers=2)),
        r"not children of one parent: they differ in num_loops \(2, 1\)",
    ),
    "route": (looped, lambda m: route(m, "again", [], []), "came with loops 1, which gates cannot close"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_untouched(case):
    make, act, message = REFUSED[case]
    model = make()
    before = facts(model)
    with pytest.raises(GrowthError, match=message):
        act(model)
    assert same(facts(model), before)


def test_what_cannot_hold_loops_says_so():
    with pytest.raises(ConversionError, match="its blocks run 2 times"):
        check_expressible(looped().config)
    model = looped()
    model.config._attn_implementation_internal = "vllm"
    with pytest.raises(ValueError, match="vllm caches one key and one value a block"):
        model(tokens())
    for loops, message in (([2], "each belong to one group"), ([0], "loops 1 to 1")):
        with pytest.raises(StrictDataclassError, match=message):
            TokenformerConfig(num_loops=2, token_groups=[{"name": "base", "ffn": 8}, {"name": "x", "loops": loops}])
    with pytest.raises(StrictDataclassError, match="num_loops is 0; the blocks run at least once"):
        TokenformerConfig(num_loops=0)
