"""Tokens beside any linear map of any model: exact at first, gone without trace, refused where impossible."""

import copy
import math

import datasets
import pytest
import torch
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from zoo import IDS, outputs

from tokenformer import drop, freeze, grow, merge, route, unfreeze
from tokenformer.errors import GrowthError
from tokenformer.growth.beside import names_beside
from tokenformer.growth.freeze import trainable_parts
from tokenformer.growth.sites import linear_maps, sites

ATTENTION = {
    "gpt2": "c_attn",
    "bert": "query|value",
    "vit": "query|value|q_proj|v_proj",
    "t5": "q|v",
    "mamba2": "in_proj",
    "xlstm": "q|v",
}


class Own(nn.Module):
    """Somebody's own module: a map called by keyword, one called twice, one inside torch's attention."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(6, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        h = self.again(self.again(self.first(input=x)))
        return self.head(h + self.attention(h, h, h)[0])


def fill(model, seed=1, only=None):
    """Give tokens values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sites(model).values():
            for name, group in layer.groups.items():
                if only in (None, name):
                    value = group.values.weight
                    value.copy_(torch.randn(value.shape, generator=generator) * 0.3)


# torch multiplies matrices of experts in types up to float32 only.
DTYPES = [
    (kind, dtype)
    for kind in zoo.MODELS
    for dtype in (torch.float32, torch.bfloat16, torch.float64)
    if dtype != torch.float64 or kind not in ("mixtral", "qwen3_next")
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "dtype"), DTYPES)
def test_growing_changes_no_bit_and_dropping_leaves_no_trace(kind, dtype):
    model = zoo.make(kind, dtype)
    before, names, maps = outputs(model), list(model.state_dict()), linear_maps(model)
    grow(model, at="all-linear", tokens=5, name="new", seed=1)
    assert torch.equal(outputs(model), before)
    assert set(sites(model)) <= set(maps) and all(linear_maps(model)[n] is maps[n] for n in sites(model))
    assert [name for name in model.state_dict() if ".param_tokens." not in name] == names
    fill(model)
    taught = outputs(model)
    assert not torch.equal(taught, before)
    # A second group, beside some of them and of another size, changes nothing either.
    grow(model, at=ATTENTION.get(kind, "q_proj|v_proj"), tokens=3, name="second", seed=2)
    assert torch.equal(outputs(model), taught)
    drop(model, ["new"])
    assert torch.equal(outputs(model), before)
    drop(model, ["second"])
    assert list(model.state_dict()) == names and not any(m._forward_hooks for m in model.modules())


def test_any_module():
    torch.manual_seed(0)
    model, x = Own().eval(), torch.randn(2, 5, 6)
    before = model(x)
    grow(model, at="all-linear", tokens=4, name="new")
    assert set(sites(model)) == {"first", "again", "head"}
    assert torch.equal(model(x), before)
    fill(model)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(x), model(x)) and not torch.equal(model(x), before)
    freeze(model, all_but=["new"])
    model(x).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if ".param_tokens." in n
    }
    assert set(trainable_parts(model)) == {"base", "new"}
    with pytest.raises(GrowthError, match=r"all_but is given as well"):
        freeze(model, ["base"], all_but=["new"])


def test_counts_by_map_and_the_equation():
    """Y = L(x) + values · gelu(keys · x · τ / norm), τ = √n, whatever stands beside."""
    torch.manual_seed(0)
    model = Own().eval()
    grow(model, at={"first": 4, "again": 2}, seed=3)
    assert {site: layer.num_tokens for site, layer in sites(model).items()} == {"first": 4, "again": 2}
    grow(model, at="first", tokens=16, name="wide")
    fill(model)
    x = torch.randn(3, 6)
    wanted = nn.functional.linear(x, model.first.weight, model.first.bias)
    for group in model.first.param_tokens.groups.values():
        scores = x @ group.keys.weight.T
        scale = math.sqrt(len(group.keys.weight)) / (scores.square().sum(-1, keepdim=True) + 1e-7).sqrt()
        wanted = wanted + nn.functional.gelu(scores * scale) @ group.values.weight.T
    torch.testing.assert_close(model.first(x), wanted)


def test_only_the_group_trains_and_the_parent_comes_back():
    model = zoo.make("llama")
    parent, before = copy.deepcopy(model.state_dict()), outputs(model)
    grow(model, at="q_proj|v_proj|down_proj", tokens=8, name="new")
    freeze(model, all_but=["new"])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(6):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in parent.items())
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
    drop(model, ["new"])
    assert torch.equal(outputs(model), before)


# peft 0.21 still asks transformers 5.23 for the old name of activation checkpointing.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_flops_are_those_of_two_products_as_loras():
    x, flops = torch.randn(4, 6, requires_grad=True), []
    plain, tokens, lora = nn.Sequential(nn.Linear(6, 8)), nn.Sequential(nn.Linear(6, 8)), nn.Sequential(nn.Linear(6, 8))
    grow(tokens, at="0", tokens=3, name="new")
    freeze(tokens, all_but=["new"])
    for model in (plain.requires_grad_(False), tokens, get_peft_model(lora, LoraConfig(target_modules=["0"], r=3))):
        with FlopCounterMode(display=False) as counted:
            model(x).sum().backward()
        flops.append(counted.get_total_flops())
    assert flops[1] - flops[0] == flops[2] - flops[0] == 3 * 2 * 4 * 3 * (6 + 8)


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = zoo.make("llama")
        grow(model, at="all-linear", tokens=4, seed=1)
        fill(model)
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(torch.equal(gradients[1][name], gradient) for name, gradient in gradients[0].items())


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend):
    model = zoo.make("llama")
    before = outputs(model)
    grow(model, at="q_proj|v_proj", tokens=4, seed=1)
    fill(model)
    wanted = outputs(model)
    torch.testing.assert_close(
        torch.compile(model, backend=backend)(input_ids=IDS).logits, wanted, rtol=1e-4, atol=1e-5
    )
    assert not torch.equal(wanted, before)


@torch.no_grad()
def test_beside_a_quantised_map():
    model = zoo.make("llama")
    quantize_(model.model, Int8WeightOnlyConfig(version=2))
    before, weight = outputs(model), model.model.layers[0].self_attn.q_proj.weight
    grow(model, at="q_proj|v_proj", tokens=4, name="new")
    assert torch.equal(outputs(model), before) and model.model.layers[0].self_attn.q_proj.weight is weight
    assert {p.dtype for layer in sites(model).values() for p in layer.parameters()} == {torch.float32}


# peft 0.21 still asks transformers 5.23 for the old name of activation checkpointing.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@torch.no_grad()
def test_beside_a_map_that_lora_wraps_before_or_after():
    model = zoo.make("llama")
    grow(model, at="q_proj|v_proj", tokens=4, name="new")
    fill(model)
    taught = outputs(model)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    assert torch.equal(wrapped(input_ids=IDS).logits, taught)
    grow(wrapped, at="q_proj", tokens=3, name="outside")
    assert len(sites(wrapped)) == 6 and torch.equal(wrapped(input_ids=IDS).logits, taught)


@torch.no_grad()
def test_generation_with_a_cache_and_left_padding():
    model = zoo.make("llama")
    grow(model, at="all-linear", tokens=4)
    fill(model)
    alone = model.generate(IDS[:1], max_new_tokens=6, do_sample=False, pad_token_id=0)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[:1]], 1)
    mask = (padded != 0).long()
    batch = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(batch[:, 3:], alone)
    assert torch.equal(model.generate(IDS[:1], max_new_tokens=6, do_sample=False, use_cache=False), alone)


@torch.no_grad()
def test_children_of_one_parent_merge():
    parent = zoo.make("bert")
    a, b = copy.deepcopy(parent), copy.deepcopy(parent)
    grow(a, at="query", tokens=4, name="a")
    grow(b, at="query|value", tokens=6, name="b")
    fill(a, seed=1)
    fill(b, seed=2)
    both = copy.deepcopy(b)
    merge(a, b)
    assert names_beside(a) == ["a", "b"]
    drop(a, ["a"])
    assert torch.equal(outputs(a), outputs(both))
    drop(a, ["b"])
    assert torch.equal(outputs(a), outputs(parent))
    parent.cls.predictions.bias.add_(1)
    with pytest.raises(GrowthError, match=r"differ in [0-9]+ tensors?, such as cls.predictions"):
        merge(parent, b)


@torch.no_grad()
def test_routed_groups_are_closed_for_other_text():
    model = zoo.make("llama")
    grow(model, at="q_proj|v_proj", tokens=4, name="new")
    before = outputs(model)
    fill(model)
    texts = [torch.randint(*ids, (8, 12)).tolist() for ids in ((3, 30), (34, 64))]
    routing = route(model, "new", *(datasets.Dataset.from_dict({"input_ids": text}) for text in texts))
    assert routing.open_on_own > 0.9 and routing.open_on_other < 0.1
    for layer in sites(model).values():
        layer.gates["new"].weight.zero_()
        layer.gates["new"].bias.fill_(-1)
    assert torch.equal(outputs(model), before)


def test_neurons_of_a_map_with_tokens_beside_it_stay():
    model = zoo.make("llama")
    grow(model, at="up_proj", tokens=4)
    before = outputs(model)
    with pytest.raises(GrowthError, match=r"mlp.up_proj has tokens beside it"):
        grow(model, ffn_param_tokens="+8")
    assert torch.equal(outputs(model), before)
    grow(model, num_hidden_layers=3, name="deeper")
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize(
    ("at", "tokens", "message"),
    [
        ("q_prj", 4, r"no linear map of this LlamaForCausalLM is named 'q_prj'. Near are q_proj"),
        ("embed_tokens", 4, r"matches model.embed_tokens \(Embedding\), but tokens go beside linear maps"),
        ("lm_head", 4, r"lm_head shares its weight with model.embed_tokens"),
        ("((", 4, r"is no regular expression"),
        ("q_proj", None, r"tokens is None for maps named 'q_proj'"),
        ("q_proj", 0, r"tokens is 0"),
        ({"q_proj": 4, ".*_proj": 2}, None, r"q_proj matches two patterns, which ask for 4 and 2"),
        ({"q_proj": 4}, 2, r"leave out tokens=2"),
    ],
)
def test_refused_sites(at, tokens, message):
    model = LlamaTied()
    with pytest.raises(GrowthError, match=message):
        grow(model, at=at, tokens=tokens)
    assert not sites(model)


def LlamaTied():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**zoo.SIZES, tie_word_embeddings=True))


def test_refused_models_and_names():
    with pytest.raises(GrowthError, match=r"patch_embeddings.projection \(Conv2d\)"):
        grow(zoo.make("vit"), at="projection", tokens=4)
    with pytest.raises(GrowthError, match=r"compiled already"):
        grow(torch.compile(zoo.make("bert")), at="query", tokens=4)
    with torch.device("meta"), pytest.raises(GrowthError, match=r"on the meta device"):
        grow(zoo.MODELS["bert"](), at="query", tokens=4)
    with pytest.raises(GrowthError, match=r"take parameter tokens themselves: grow qkv_param_tokens"):
        grow(tiny("ffn"), at="all-linear", tokens=4)
    model = zoo.make("llama")
    for name, message in (("base", "exists already"), ("a b", "cannot be used")):
        with pytest.raises(GrowthError, match=message):
            grow(model, at="q_proj", tokens=4, name=name)
    with pytest.raises(GrowthError, match=r"grow num_hidden_layers in a call of its own"):
        grow(model, at="q_proj", tokens=4, num_hidden_layers=3)
    with pytest.raises(GrowthError, match=r"goes with at"):
        grow(model, tokens=4)
    with pytest.raises(GrowthError, match=r"no model of transformers"):
        grow(Own(), ffn_param_tokens=4)
    with pytest.raises(GrowthError, match=r"there is no token group 'new'"):
        drop(model, ["new"])
    grow(model, at="q_proj", tokens=4, name="new")
    with pytest.raises(GrowthError, match=r"token group 'new' exists already"):
        grow(model, ffn_param_tokens="+4", name="new")
    assert names_beside(model) == ["new"]


STEPS = st.lists(
    st.tuples(st.sampled_from(["grow", "drop", "train", "freeze", "copy"]), st.integers(0, 7), st.integers(1, 5)),
    min_size=1,
    max_size=6,
)


@settings(max_examples=12, deadline=None)
@given(kind=st.sampled_from(sorted(zoo.MODELS)), steps=STEPS)
def test_any_sequence_keeps_the_parent(kind, steps):
    """Whatever is grown, trained and dropped beside a frozen parent, without the groups it is there to the last bit."""
    model = zoo.make(kind)
    before, state = outputs(model), {name: t.clone() for name, t in model.state_dict().items()}
    maps = [name for name in linear_maps(model) if "lm_head" not in name and "predictions" not in name]
    grown = 0
    for step, which, count in steps:
        names, now = names_beside(model), outputs(model)
        if step == "grow":
            grow(model, at=maps[which % len(maps)].replace(".", r"\."), tokens=count, name=f"g{grown}", seed=which)
            grown += 1
            assert torch.equal(outputs(model), now)
        elif step == "copy":
            with torch.no_grad():  # RecurrentGemma keeps its last state, which cannot be copied with its graph
                outputs(model)
            model = copy.deepcopy(model)
            assert torch.equal(outputs(model), now)
        elif names and step == "drop":
            drop(model, [names[which % len(names)]])
        elif names and step == "train":
            fill(model, seed=which, only=names[which % len(names)])
        elif names:
            freeze(model, all_but=[names[which % len(names)]])
    drop(model, names_beside(model))
    model.requires_grad_(True)  # what is frozen torch may multiply in another order (docs/lab-notebook.md)
    assert torch.equal(outputs(model), before)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state.items())
