"""How much text uses each parameter token, against sums written out; and how many are kept."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make, tiny, tokens, two_groups
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig
from transformers.models.auto import AutoModelForCausalLM

from tokenformer.errors import GrowthError
from tokenformer.growth.importance import GroupUse, Importance, kept, measure, ranked, watched_weights
from tokenformer.growth.neurons import group_neurons
from tokenformer.models.fused import token_weights as weights_of

_SIZE = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ORDINARY = {
    "llama": LlamaConfig(**_SIZE, intermediate_size=48),
    "gpt_neox": GPTNeoXConfig(**_SIZE, intermediate_size=48),
    "gpt2": GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_inner=48),
    "opt": OPTConfig(**_SIZE, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64),
}
VALUES = {"llama": "mlp.down_proj", "gpt_neox": "mlp.dense_4h_to_h", "gpt2": "mlp.c_proj", "opt": "fc2"}
GROUPS = [{"name": "base", "ffn": 40}, {"name": "more", "ffn": 8}]


def ordinary(model_type):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ORDINARY[model_type], attn_implementation="eager").eval()


def blocks(rows=5, length=12):
    """Text blocks like those of `pack`, the last one shorter."""
    *whole, last = tokens(rows, length).tolist()
    return [{"input_ids": ids} for ids in [*whole, last[:5]]]


class Blocks(list):
    """A list that is cut as a dataset is: into columns."""

    def __getitem__(self, rows):
        return {"input_ids": [block["input_ids"] for block in list(self)[rows]]}


def text():
    return Blocks(blocks())


def inputs_of(model, module):
    """What a module reads while the model reads `text`."""
    seen = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for ids in text()[0:]["input_ids"]:
            model(torch.tensor([ids]))
    handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in seen])


def check(uses, weights, keys, values):
    """Compare what was measured with weights `[rows, n]`, keys `[n, D]` and values `[E, n]` of each group."""
    share = torch.cat(weights, dim=-1).square().mean(-1, keepdim=True)
    for use, w, k, v in zip(uses.values(), weights, keys, values, strict=True):
        torch.testing.assert_close(use.weight_std, w.std(0, correction=0), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(use.active, (w.square() > share).float().mean(0))
        torch.testing.assert_close(use.key_norm, k.norm(dim=1))
        torch.testing.assert_close(use.value_norm, v.norm(dim=0))
        torch.testing.assert_close(use.importance, use.weight_std * v.norm(dim=0))
        assert 0 < use.active.mean() < 0.6


@pytest.mark.parametrize("norm", ["l2_norm_gelu", "gelu_l2_norm", "softmax", "gelu"])
@pytest.mark.parametrize("family", ["paper", "two"])
def test_use_is_what_the_equations_say(family, norm):
    model = two_groups("ffn") if family == "two" else tiny("paper")
    for layers in model.pattention_layers.values():
        for layer in layers:
            layer.norm_activation_type = norm
    importance = measure(model, text(), batch_size=2)
    assert importance.text_tokens == 5 * 12 - 7
    for (block, name), uses in importance.uses.items():
        layer = model.model.layers[block].get_submodule(name)
        keys = [group.keys.weight.detach() for group in layer.groups.values()]
        values = [group.values.weight.detach() for group in layer.groups.values()]
        x = inputs_of(model, layer)
        w = weights_of([x @ k.t() for k in keys], tau=layer.tau, norm_activation_type=norm, eps=layer.eps)
        assert list(uses) == list(layer.groups)
        check(uses, w, keys, values)
    maps = 5 if model.config.qkv_param_tokens else 1
    assert len(importance.uses) == maps * model.config.num_hidden_layers


@pytest.mark.parametrize("model_type", ORDINARY)
def test_neurons_of_ordinary_models_are_parameter_tokens(model_type):
    model = ordinary(model_type)
    model.config.token_groups = GROUPS
    base = model.base_model.decoder if model_type == "opt" else model.base_model
    layers = base.h if model_type == "gpt2" else base.layers
    first = ["mlp.gate_proj", "mlp.up_proj"] if model_type == "llama" else []
    first = first or [VALUES[model_type].replace("4h_to_h", "h_to_4h").replace("proj", "fc").replace("fc2", "fc1")]
    expected = []
    for layer in layers:
        value = layer.get_submodule(VALUES[model_type])
        weights = [layer.get_submodule(name).weight.detach() for name in first]
        k = torch.cat([w.t() if model_type == "gpt2" else w for w in weights], dim=1)
        v = value.weight.detach().t() if model_type == "gpt2" else value.weight.detach()
        expected.append((inputs_of(model, value).split([40, 8], 1), k.split([40, 8]), v.split([40, 8], 1)))
    importance = measure(model, text(), batch_size=2)
    assert list(importance.uses) == [(i, VALUES[model_type]) for i in range(2)]
    for uses, (weights, keys, values) in zip(importance.uses.values(), expected, strict=True):
        assert list(uses) == ["base", "more"]
        check(uses, weights, keys, values)


def test_closed_groups_have_no_weight():
    model = two_groups("ffn")
    for block in model.model.layers:
        block.mlp.add_gate("more")
        torch.nn.init.normal_(block.mlp.gates["more"].weight)
        torch.nn.init.zeros_(block.mlp.gates["more"].bias)
    ids, seen = tokens(), {}
    outside = model(ids).logits
    with watched_weights(model, lambda block, token_map, weights: seen.update({block: weights})):
        torch.testing.assert_close(model(ids).logits, outside, rtol=1e-4, atol=1e-4)
    x = []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: x.append(args[0]))
    model(ids)
    handle.remove()
    is_open = (model.model.layers[0].mlp.gates["more"](x[0]) > 0).squeeze(-1)
    assert is_open.any() and not is_open.all()
    assert torch.equal(seen[0]["more"].abs().sum(-1) > 0, is_open)
    assert seen[0]["base"].abs().sum(-1).min() > 0
    assert measure(model, text()).uses[0, "mlp"]["more"].active.max() < 1


@pytest.mark.parametrize("kind", ["paper", "grown", "llama"])
def test_measuring_leaves_the_model_as_it_was(kind):
    model = ordinary(kind) if kind == "llama" else make(kind)
    group_neurons(model)
    model.train()
    before, names = model(tokens()).logits, [name for name, _ in model.named_modules()]
    done = []
    measure(model, text(), batch_size=2, on_batch=lambda *at: done.append(at))
    assert done == [(2, 5), (4, 5), (5, 5)]
    assert model.training and names == [name for name, _ in model.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.base_model.modules())
    assert torch.equal(model(tokens()).logits, before)
    assert all(p.grad is None for p in model.parameters())


def test_a_failure_leaves_no_hooks():
    model = two_groups("ffn")
    model.model.layers[1].mlp.add_gate("more")
    with pytest.raises(RuntimeError, match="stop"):
        measure(model, text(), on_batch=lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("_routed_output" in m.__dict__ for m in model.modules())


def test_what_cannot_be_measured():
    with pytest.raises(GrowthError, match="no text"):
        measure(tiny("ffn"), Blocks())
    model = tiny("ffn")
    with torch.no_grad():
        model.model.layers[1].mlp.groups["base"].values.weight[0, 0] = math.nan
    with pytest.raises(GrowthError, match=r"block 1, mlp, token group base: .*not finite"):
        measure(model, text())


def test_ranks_fall_and_ties_keep_their_order():
    order = ranked(importance_of({(0, "mlp"): {"base": [1.0, 3.0, 1.0, 0.0, 3.0]}}))[0, "mlp"]["base"]
    assert order.tolist() == [1, 4, 0, 2, 3]


MAPS = {"self_attn.q_proj": "qkv", "self_attn.k_proj": "qkv", "self_attn.v_proj": "qkv", "mlp": "ffn"}


def importance_of(values, linear=()):
    def use(numbers):
        numbers = torch.tensor(numbers)
        return GroupUse(numbers, torch.zeros_like(numbers), torch.ones_like(numbers), torch.ones_like(numbers))

    uses = {place: {group: use(numbers) for group, numbers in groups.items()} for place, groups in values.items()}
    return Importance(uses, MAPS, frozenset(linear), 1)


@st.composite
def importances(draw):
    groups = draw(st.lists(st.sampled_from(["base", "more", "last"]), min_size=1, max_size=3, unique=True))
    number = st.integers(0, 64).map(lambda i: i / 8)
    values = {}
    for block in range(draw(st.integers(1, 3))):
        counts = {p: {g: draw(st.integers(1, 6)) for g in groups} for p in ("qkv", "ffn")}
        for name, projection in MAPS.items():
            values[block, name] = {
                g: draw(st.lists(number, min_size=n, max_size=n)) for g, n in counts[projection].items()
            }
    return importance_of(values, draw(st.sets(st.sampled_from(["qkv", "ffn"]))))


shares = st.floats(0.01, 1.0)


def sizes(importance, chosen, projection):
    """Kept and total by (block, group), of one map after checking that all maps of the projection agree."""
    found = {}
    for (block, name), groups in chosen.items():
        if MAPS[name] == projection:
            for group, indices in groups.items():
                use = importance.uses[block, name][group]
                pair = len(indices), len(use.importance)
                assert found.setdefault((block, group), pair) == pair
    return found


@given(importances(), shares, st.sampled_from(["layer", "global"]))
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_the_most_important(importance, keep, scope):
    chosen = kept(importance, keep, scope=scope)
    assert chosen.keys() == importance.uses.keys()
    for place, groups in chosen.items():
        for group, indices in groups.items():
            use = importance.uses[place][group].importance
            assert indices.dtype == torch.int64
            assert torch.equal(indices, indices.unique())
            gone = torch.ones(len(use), dtype=torch.bool).index_fill(0, indices, False)
            if len(indices) and gone.any():
                assert use[indices].min() >= use[gone].max()


@given(importances(), shares)
@settings(max_examples=40, deadline=None)
def test_per_layer_every_group_keeps_its_share(importance, keep):
    chosen = kept(importance, keep)
    for projection in ("qkv", "ffn"):
        for count, total in sizes(importance, chosen, projection).values():
            assert count >= 1 and keep * total - 1e-6 <= count < keep * total + 1


@given(importances(), shares)
@settings(max_examples=60, deadline=None)
def test_globally_every_projection_keeps_its_share(importance, keep):
    chosen = kept(importance, keep, scope="global")
    for projection in ("qkv", "ffn"):
        found = sizes(importance, chosen, projection)
        count, total = (sum(pair[i] for pair in found.values()) for i in (0, 1))
        blocks = {block for block, _ in found}
        needed = 0 if projection in importance.linear else len(blocks)
        assert count == max(needed, math.ceil(keep * total - 1e-9))
        if needed:
            assert all(sum(found[at][0] for at in found if at[0] == block) >= 1 for block in blocks)


@given(importances(), shares, st.integers(-3, 3))
@settings(max_examples=30, deadline=None)
def test_globally_the_scale_of_a_map_does_not_matter(importance, keep, power):
    first = next(iter(importance.uses))
    scaled = {group: use.importance * 2.0**power for group, use in importance.uses[first].items()}
    other = importance_of(
        {
            place: {g: (scaled[g] if place == first else use.importance).tolist() for g, use in uses.items()}
            for place, uses in importance.uses.items()
        },
        importance.linear,
    )
    a, b = kept(importance, keep, scope="global"), kept(other, keep, scope="global")
    assert all(torch.equal(a[place][group], b[place][group]) for place in a for group in a[place])


def test_globally_the_greatest_multiples_of_the_mean_stay():
    peaked, even = [9.0, 1.0, 1.0, 1.0], [200.0, 200.0, 200.0, 200.0]
    values = {(0, "mlp"): {"base": peaked}, (1, "mlp"): {"base": even}}
    chosen = kept(importance_of(values), 0.5, scope="global")
    assert chosen[0, "mlp"]["base"].tolist() == [0]  # 3 times the mean, and 1/3 of it
    assert chosen[1, "mlp"]["base"].tolist() == [0, 1, 2]
    silent = {(0, "mlp"): {"base": peaked, "more": [0.0, 0.0]}, (1, "mlp"): {"base": even}}
    assert kept(importance_of(silent), 0.5, scope="global")[0, "mlp"]["more"].tolist() == []


@pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, math.nan])
def test_shares_out_of_range(keep):
    with pytest.raises(GrowthError, match="above 0 and at most 1"):
        kept(importance_of({(0, "mlp"): {"base": [1.0]}}), keep)


def test_unknown_scope():
    with pytest.raises(GrowthError, match="layer or global"):
        kept(importance_of({(0, "mlp"): {"base": [1.0]}}), 0.5, scope="block")
