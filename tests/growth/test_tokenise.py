"""Parameter tokens in place of linear maps: any architecture grows exactly as a TokenFormer, kept and found again."""

import copy
import math

import pytest
import torch
import zoo
from tiny_models import close
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from zoo import IDS, outputs

from tokenformer import consolidate, drop, freeze, grow, load, merge, save, split, tokenise, unfreeze
from tokenformer.cost import group_parameters, group_tokens, parameters
from tokenformer.errors import CheckpointError, GrowthError
from tokenformer.growth.beside import names_beside
from tokenformer.growth.freeze import trainable_parts
from tokenformer.growth.sites import linear_maps, sites

RECURRENT = ["xlstm", "mamba2", "recurrent_gemma", "qwen3_next"]


def tokenised(kind, dtype=torch.float32):
    model = tokenise(zoo.make(kind, dtype))
    spread(model)
    return model


def spread(model, group=None, seed=1):
    """Give tokens of a group keys and values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sites(model).values():
            for name, tokens in layer.groups.items():
                for half in (tokens.keys, tokens.values):
                    if group in (None, name):
                        half.weight.copy_(torch.randn(half.weight.shape, generator=generator) * 0.1)


def step_by_step(model):
    """The logits of a few steps of generation, each from the state of the last, and the text tokens found."""
    found = model.generate(
        IDS, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    return torch.stack(found.logits), found.sequences


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("llama", torch.float32), ("llama", torch.float64), ("gpt2", torch.bfloat16), ("t5", torch.float32)],
)
def test_growing_changes_no_bit_and_dropping_gives_it_back(kind, dtype):
    model = tokenised(kind, dtype)
    before, state = outputs(model), {name: t.clone() for name, t in model.state_dict().items()}
    grow(model, at="all-linear", tokens=5, name="more", seed=1)
    assert torch.equal(outputs(model), before) and names_beside(model) == ["base", "more"]
    freeze(model, all_but=["more"])
    spread(model, "more")
    assert not torch.equal(outputs(model), before)
    drop(model, ["more"])
    assert torch.equal(outputs(model), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "beside"),
    [
        ("xlstm", False),
        ("mamba2", True),
        *(pytest.param(kind, False, marks=pytest.mark.slow) for kind in RECURRENT if kind != "xlstm"),
        *(pytest.param(kind, True, marks=pytest.mark.slow) for kind in RECURRENT if kind != "mamba2"),
    ],
)
def test_recurrent_models_grow_exactly_in_parallel_and_step_by_step(kind, beside, tmp_path):
    model = zoo.make(kind) if beside else tokenised(kind)
    before, (steps, _) = outputs(model), step_by_step(model)
    grow(model, at="all-linear", tokens=3, name="more", seed=1)
    assert torch.equal(outputs(model), before) and torch.equal(step_by_step(model)[0], steps)
    spread(model, "more")
    taught, (_, found) = outputs(model), step_by_step(model)
    assert not torch.equal(taught, before)
    in_parallel = model(input_ids=found, use_cache=False).logits[:, IDS.shape[1] - 1 : -1].argmax(-1)
    assert torch.equal(in_parallel, found[:, IDS.shape[1] :])  # the state came from tokens as well
    save(tmp_path / "model", model)
    loaded, _, _ = load(tmp_path / "model")
    assert type(loaded) is type(model) and torch.equal(outputs(loaded), taught)


@torch.no_grad()
def test_what_a_tokenised_map_computes():
    """Y = b + values · gelu(keys · x · τ / norm) over all groups together, τ = √n of the first."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(3, 6)
    bias = model[0].bias
    assert tokenise(model) is model and model[0].bias is bias
    assert sites(model)["0"].num_tokens == 3  # 6 · 8 / (6 + 8) tokens have 6 · 8 parameters
    grow(model, at="0", tokens=5, name="more")
    spread(model)
    keys, values = (
        torch.cat([getattr(group, half).weight for group in model[0].param_tokens.groups.values()], dim)
        for half, dim in (("keys", 0), ("values", 1))
    )
    scores = x @ keys.T
    scale = math.sqrt(3) / (scores.square().sum(-1, keepdim=True) + 1e-7).sqrt()
    close(model(x), bias + nn.functional.gelu(scores * scale) @ values.T)


@torch.no_grad()
def test_outputs_begin_as_large_as_the_maps():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 96, bias=False)), torch.randn(500, 64)
    before = model(x).std()
    assert tokenise(model, tokens=200)(x).std() / before == pytest.approx(1, abs=0.1)


@torch.no_grad()
def test_consolidated_it_computes_the_same():
    model = tokenised("llama")
    grow(model, at="q_proj|down_proj", tokens=4, name="more")
    spread(model, "more")
    before = outputs(model)
    freeze(model, ["base"])
    with pytest.raises(GrowthError, match=r"some of base, more are frozen and some are not"):
        consolidate(model)
    unfreeze(model)
    consolidate(model, name="one")
    assert names_beside(model) == ["one"] and list(group_tokens(model.config)) == ["one"]
    close(outputs(model), before, 1e-5)
    with pytest.raises(GrowthError, match=r"at least two token groups; asked for one, and there are one"):
        consolidate(model)


def test_parts_and_their_marks_are_kept(tmp_path):
    model = tokenised("xlstm")
    grow(model, at="q|k", tokens=4, name="more")
    assert set(trainable_parts(model)) == {"base", "more"}
    assert sum(p.numel() for part in trainable_parts(model).values() for p in part) == parameters(model.config)
    assert group_parameters(model.config)["more"] == 2 * 2 * 4 * (64 + 64)
    freeze(model, all_but=["more"])
    save(tmp_path / "model", model)
    loaded, _, _ = load(tmp_path / "model", dtype=torch.bfloat16)
    trained = {name for name, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in loaded.named_parameters() if ".groups.more." in name} and len(trained) == 8
    assert loaded.dtype == torch.bfloat16


def test_a_configuration_becomes_a_model():
    config = LlamaConfig(**zoo.SIZES)
    model = tokenise(config, "q_proj|v_proj", 8)
    assert isinstance(model, LlamaForCausalLM) and not hasattr(config, "token_sites")
    assert {site.rpartition(".")[2] for site in sites(model)} == {"q_proj", "v_proj"}
    assert model.config.token_sites["model.layers.0.self_attn.q_proj"] == {
        "linear": False,
        "groups": {"base": {"tokens": 8, "tau": math.sqrt(8)}},
    }


def test_every_parameter_learns():
    model = tokenised("qwen3_next")
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.any() for layer in sites(model).values() for p in layer.parameters())


@pytest.mark.parametrize(
    ("at", "tokens", "message"),
    [
        ("q_prj", 4, r"is named 'q_prj'. Near are q_proj"),
        ("embed_tokens", 4, r"matches model.embed_tokens \(Embedding\), but tokens go beside linear maps"),
        ("lm_head", 4, r"lm_head shares its weight with model.embed_tokens"),
        ("q_proj", 0, r"tokens is 0"),
        ({"q_proj": 4, ".*_proj": None}, None, r"q_proj matches two patterns, which ask for 4 and 16"),
        ("k_proj", 4, r"k_proj has token groups beside it already"),
        ("v_proj", 4, r"v_proj is parameter tokens already"),
        ("o_proj", 4, r"tokens cannot take the place of model.layers.0.self_attn.o_proj: a map is a .*Quantised"),
    ],
)
def test_refused(at, tokens, message):
    class Quantised(nn.Linear):
        pass

    model = LlamaForCausalLM(LlamaConfig(**zoo.SIZES, tie_word_embeddings=True))
    model.model.layers[0].self_attn.o_proj.__class__ = Quantised
    grow(model, at="k_proj", tokens=3, name="grown")
    tokenise(model, "v_proj", 3)
    maps, noted = linear_maps(model), copy.deepcopy(model.config.token_sites)
    with pytest.raises(GrowthError, match=message):
        tokenise(model, at, tokens)
    assert linear_maps(model) == maps and model.config.token_sites == noted


def test_refused_of_a_tokenised_model(tmp_path):
    with pytest.raises(GrowthError, match=r"patch_embeddings.projection \(Conv2d\)"):
        tokenise(zoo.make("vit"), "projection", 4)
    model = tokenised("llama")
    grow(model, at="q_proj", tokens=4, name="more")
    for change, message in (
        (lambda: drop(model, ["base"]), r"nothing would be left of model.layers.0.self_attn.k_proj"),
        (lambda: grow(model, num_hidden_layers=3), r"parameter tokens in place of linear maps"),
        (lambda: split(model, "more", tmp_path / "more"), r"share a norm, so that 'more' does nothing of its own"),
        (lambda: merge(model, tokenised("llama")), r"there is nothing to merge"),
    ):
        with pytest.raises(GrowthError, match=message):
            change()
    assert names_beside(model) == ["base", "more"] and not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sites_that_do_not_fit_are_named(tmp_path):
    model = tokenised("llama")
    save(tmp_path / "model", model)
    file = tmp_path / "model" / "config.json"
    (tmp_path / "model" / "lineage.json").unlink()
    text = file.read_text()
    file.write_text(text.replace("layers.0.mlp.up_proj", "layers.7.mlp.up_proj"))
    with pytest.raises(CheckpointError, match=r"lists token groups at model.layers.7.mlp.up_proj, which is no linear"):
        load(tmp_path / "model")
    file.write_text(text.replace('"LlamaForCausalLM"', '"NoSuchClass"'))
    with pytest.raises(CheckpointError, match=r"its class is \['NoSuchClass'\]"):
        load(tmp_path / "model")


def test_transformers_alone_says_that_it_does_not_know_the_tokens(tmp_path, caplog):
    save(tmp_path / "model", tokenised("llama"))
    _, report = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert any("q_proj.param_tokens" in str(name) for name in report["unexpected_keys"])
    assert any("q_proj.weight" in str(name) for name in report["missing_keys"])
