"""Operations on ternary token groups, and packing them: what stays to the bit, and what is refused in which words."""

import datasets
import pytest
import torch
from group_operations import logits, ordinary, train
from tiny_models import SIZES, tiny, tokens
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from tokenformer import consolidate, drop, freeze, grow, load, merge, prune, route, save, shrink, split
from tokenformer.checkpoints.checkpoint import load_checkpoint
from tokenformer.checkpoints.facts import checkpoint_facts
from tokenformer.checkpoints.packing import pack_checkpoint
from tokenformer.checkpoints.rewrite import open_checkpoint, rewrite
from tokenformer.cost import group_parameters, parameters
from tokenformer.errors import GrowthError
from tokenformer.growth.architectures import token_groups
from tokenformer.growth.freeze import freeze_only
from tokenformer.growth.groups import drop_operation
from tokenformer.growth.grow import grow_operation
from tokenformer.growth.importance import measure
from tokenformer.growth.neurons import group_neurons
from tokenformer.growth.pack import pack
from tokenformer.models.ternary import PackedLinear, TernaryLinear, ternary


def llama():
    config = LlamaConfig(**SIZES, intermediate_size=56, num_key_value_heads=2, mlp_bias=True, weights="ternary")
    return ordinary(config)


KINDS = {
    "paper": lambda: tiny(weights="ternary", num_hidden_layers=2),
    "ffn, norms of their own": lambda: tiny("ffn", weights="ternary", token_group_norm="per_group"),
    "llama": llama,
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def kept(model):
    return {group.name: group.weights for group in token_groups(model.config)}


def maps(model, kind):
    return [module for module in model.modules() if type(module) is kind]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@every_kind
def test_growth_beside_ternary_groups_is_bit_for_bit(kind, dtype):
    model = KINDS[kind]().to(dtype)
    before = logits(model)
    assert len(maps(model, nn.Linear)) == 1  # the head
    grow(model, ffn_param_tokens="+12", num_hidden_layers="+1", name="more")
    grow(model, ffn_param_tokens="+8", name="plain", weights="float")
    assert torch.equal(logits(model), before)
    assert kept(model) == {"base": "ternary", "more": "ternary", "plain": "float"}


@pytest.mark.parametrize("kind", ["paper", "llama"])
def test_a_float_model_grows_a_ternary_group_that_learns_and_goes_again(kind, tmp_path):
    model = tiny("paper") if kind != "llama" else ordinary()
    before = logits(model)
    grow(model, ffn_param_tokens="+12", name="more", weights="ternary")
    freeze(model, all_but=["more"])
    train(model)
    assert not torch.equal(logits(model), before) and maps(model, TernaryLinear)
    save(tmp_path / "grown", model)
    loaded, _, _ = load(tmp_path / "grown")
    assert torch.equal(logits(loaded), logits(model)) and kept(loaded) == {"base": "float", "more": "ternary"}
    drop(loaded, ["more"])
    assert torch.equal(logits(loaded), before)


@pytest.mark.parametrize("kind", ["paper", "llama"])
def test_files_grow_and_drop_to_the_bits_of_memory(kind, tmp_path):
    model = KINDS[kind]()
    save(tmp_path / "parent", model)
    before = logits(model)
    operation = grow_operation(model.config, ffn_param_tokens="+12", name="more", seed=5, dtype=torch.float32)
    rewrite(open_checkpoint(tmp_path / "parent"), tmp_path / "grown", operation)
    grow(model, ffn_param_tokens="+12", name="more", seed=5)
    grown, _, _ = load(tmp_path / "grown")
    assert all(torch.equal(t, grown.state_dict()[name]) for name, t in model.state_dict().items())
    assert torch.equal(logits(grown), before)


@every_kind
def test_optimizers_move_what_ternary_maps_learn_with(kind):
    model = KINDS[kind]()
    grow(model, ffn_param_tokens="+12", name="more")
    freeze_only(model, ["base"])
    old = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, steps=1)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, old[name])}
    assert not any(".base." in name for name in moved)
    assert any(".more.keys." in name or "gate_proj.groups.more." in name for name in moved) or kind != "paper"
    assert any("self_attn" in name for name in moved) or kind == "paper"


def test_a_packed_checkpoint_computes_the_same_in_a_sixteenth_of_the_bytes(tmp_path):
    model = tiny(weights="ternary", num_hidden_layers=1)
    grow(model, ffn_param_tokens="+10", name="more")  # no multiple of four
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".more." in name:
                weight.normal_(std=0.2)
    save(tmp_path / "latent", model)
    pack_checkpoint(tmp_path / "latent", tmp_path / "packed")
    loaded, _, lineage = load_checkpoint(tmp_path / "packed")
    assert torch.equal(logits(loaded), logits(model)) and lineage.last.operation == "pack"
    assert kept(loaded) == {"base": "packed", "more": "packed"} and not maps(loaded, TernaryLinear)
    assert parameters(loaded.config) == parameters(model.config)
    assert group_parameters(loaded.config) == group_parameters(model.config)
    latent, packed = (checkpoint_facts(tmp_path / name)["groups"] for name in ("latent", "packed"))
    assert all(
        16 * b["bytes"] <= a["bytes"] * 1.1 and b["notes"] == ["packed"] for a, b in zip(latent, packed, strict=True)
    )

    before = logits(loaded)
    grow(loaded, ffn_param_tokens="+8", name="after")
    assert torch.equal(logits(loaded), before) and kept(loaded)["after"] == "ternary"
    freeze(loaded, all_but=["after"])
    train(loaded)
    drop(loaded, ["after"])
    assert torch.equal(logits(loaded), before)

    source = open_checkpoint(tmp_path / "packed")
    operation = grow_operation(source.config, ffn_param_tokens="+8", name="after", seed=1, dtype=torch.float32)
    rewrite(source, tmp_path / "grown", operation)
    grown, _, _ = load(tmp_path / "grown")
    assert torch.equal(logits(grown), before) and kept(grown)["after"] == "ternary"
    rewrite(open_checkpoint(tmp_path / "grown"), tmp_path / "less", drop_operation(grown.config, ["more"]))
    less, _, _ = load(tmp_path / "less")
    drop(model, ["more"])
    assert torch.equal(logits(less), logits(model))


def test_gates_close_and_open_a_packed_group():
    model = tiny("ffn", weights="ternary", num_hidden_layers=1)
    without = logits(model)
    grow(model, ffn_param_tokens="+8", name="more")
    layer = model.model.layers[0].mlp
    nn.init.normal_(layer.groups.more.keys.weight)
    pack(model)
    with_it = logits(model)
    text = [datasets.Dataset.from_dict({"input_ids": (tokens() // part).tolist()}) for part in (1, 2)]
    route(model, "more", *text)
    for bias, wanted in ((1.0, with_it), (-1.0, without)):
        nn.init.zeros_(layer.gates.more.weight)
        nn.init.constant_(layer.gates.more.bias, bias)
        assert torch.equal(logits(model), wanted)
    assert not torch.equal(with_it, without)


def test_a_packed_llama_is_an_ordinary_one_of_ternary_numbers(tmp_path):
    model = llama()
    grow(model, ffn_param_tokens="+8", name="more")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".more." in name:
                weight.normal_(std=0.5)
    down = model.model.layers[0].mlp.down_proj.groups
    wanted = torch.cat([ternary(down.base.weight), ternary(down.more.weight)], dim=1)
    before = logits(model)
    save(tmp_path / "latent", model)
    assert "tokenformer pack" in (tmp_path / "latent" / "README.md").read_text(encoding="utf-8")
    pack_checkpoint(tmp_path / "latent", tmp_path / "packed")
    assert "tokenformer pack" not in (tmp_path / "packed" / "README.md").read_text(encoding="utf-8")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(plain.model.layers[0].mlp.down_proj.weight, wanted)
    assert len(wanted[:, :56].unique()) == len(wanted[:, 56:].unique()) == 3
    assert plain.model.layers[0].self_attn.q_proj.weight.unique().numel() == 3
    # But for the rounding of what goes in.
    assert 0 < (logits(plain) - before).norm() < 0.05 * before.norm()


def packed():
    model = tiny("paper", weights="ternary")
    grow(model, ffn_param_tokens="+8", name="more")
    pack(model)
    return model


def two(weights="ternary"):
    model = tiny("paper")
    grow(model, ffn_param_tokens="+8", name="more", weights=weights)
    return model


def ternary_neurons():
    model = ordinary()
    grow(model, ffn_param_tokens="+8", name="more", weights="ternary")
    return model


BLOCKS = [{"input_ids": [1, 2, 3, 4]}]
REFUSED = {
    "consolidate": (two, consolidate, "token group more is ternary, with scales of its own; .* outputs would change"),
    "consolidate packed": (packed, consolidate, "token group base, more is ternary, with scales of its own"),
    "shrink": (two, lambda m: shrink(m, 0.5), "cannot shrink: token group more is ternary, and its scale is the mean"),
    "prune": (two, lambda m: prune(m, BLOCKS, keep=0.5), "cannot prune: token group more is ternary"),
    "measure packed": (
        packed,
        lambda m: measure(m, BLOCKS),
        "base, more is packed in 2 bits, .* cannot be looked into",
    ),
    "blocks": (packed, lambda m: grow(m, num_hidden_layers="+1"), "cannot add blocks: .* packed in 2 bits"),
    "merge": (
        lambda: tiny("paper"),
        lambda m: merge(m, two_packed()),
        "token group more is packed in 2 bits, and a pack",
    ),
    "split packed": (packed, lambda m: split(m, "more", "more.safetensors"), "'more' is packed in 2 bits; split the"),
    "route neurons": (
        ternary_neurons,
        lambda m: route(m, "more", BLOCKS, BLOCKS),
        "'more' is ternary, and neurons that",
    ),
    "a word": (two, lambda m: grow(m, ffn_param_tokens="+8", weights="int3"), "weights is 'int3'; it must be float or"),
    "beside": (two, lambda m: grow(m, at="lm_head", tokens=4, weights="ternary"), "beside linear maps are float"),
    "nothing": (lambda: tiny("paper"), pack, "nothing of this model is ternary: its maps are float"),
}


def two_packed():
    model = two()
    pack(model)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_scale_of_its_own_forbids_is_refused(case):
    make, operation, message = REFUSED[case]
    model = make()
    before, groups = logits(model), model.config.token_groups
    with pytest.raises(GrowthError, match=message):
        operation(model)
    assert torch.equal(logits(model), before) and model.config.token_groups == groups


def test_maps_of_gpt2_are_refused_and_its_neurons_are_not():
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_inner": 48, "vocab_size": 64}
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes, weights="ternary"))
    with pytest.raises(GrowthError, match="'gpt2' model are transformers' Conv1D, which has no ternary form"):
        group_neurons(model)
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).eval()
    group_neurons(model)
    before = logits_of(model)
    grow(model, ffn_param_tokens="+8", weights="ternary")
    assert torch.equal(logits_of(model), before) and maps(model, TernaryLinear)


@torch.no_grad()
def logits_of(model):
    return model(input_ids=torch.arange(12).view(2, 6)).logits


def test_packed_maps_say_what_they_are():
    shown = repr(packed().model.layers[0].mlp)
    assert "PackedLinear(in_features=64, out_features=160, bias=False)" in shown
    assert maps(packed(), PackedLinear)
