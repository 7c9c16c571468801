from functools import partial

import pytest
import torch
from group_operations import ordinary
from tiny_models import FAMILIES, SIZES, images, tiny, tiny_vision, tokens
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

from tokenformer import cost, grow
from tokenformer.growth.architectures import architecture_of
from tokenformer.growth.freeze import freeze_only


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_groups_match_the_model(family):
    model = tiny(family)
    grow(model, ffn_param_tokens="+24", name="more")
    assert cost.parameters(model.config) == sum(p.numel() for p in model.parameters())
    for group, count in cost.group_parameters(model.config).items():
        assert count == sum(p.numel() for name, p in model.named_parameters() if f".groups.{group}." in name)
    assert cost.group_tokens(model.config)["more"] == 24 * 3


OPT = {"word_embed_proj_dim": 64, "ffn_dim": 56, "activation_dropout": 0.1}
ORDINARY = {
    "llama": lambda: LlamaConfig(**SIZES, intermediate_size=56, num_key_value_heads=2),
    "tied llama": lambda: LlamaConfig(**SIZES, intermediate_size=56, tie_word_embeddings=True),
    "gpt_neox": lambda: GPTNeoXConfig(**SIZES, intermediate_size=56),
    "gpt2": lambda: GPT2Config(vocab_size=128, n_embd=64, n_layer=3, n_head=4, n_positions=64),
    "opt": lambda: OPTConfig(**SIZES, **OPT),
}
MODELS = {
    **{family: partial(tiny, family) for family in FAMILIES},
    "untied": lambda: tiny(tie_word_embeddings=False),
    "per_group": lambda: tiny(token_group_norm="per_group"),
    **{name: lambda make=make: ordinary(make()) for name, make in ORDINARY.items()},
}
FROZEN = {
    "nothing": [],
    "base": ["base"],
    "embedding": ["embedding"],
    "all but what was added": ["base", "embedding", "final_norm", "linear_maps"],
    "all but the final norm": ["base", "new", "embedding", "linear_maps"],
}


def counted(model, ids):
    """What torch's counter sees, attention written out."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("growth", [{"ffn_param_tokens": "+24"}, {"num_hidden_layers": "+1"}], ids=["tokens", "block"])
@pytest.mark.parametrize("kind", MODELS)
def test_flops_are_what_torch_counts_whatever_is_frozen(kind, growth):
    model, ids = MODELS[kind](), tokens()
    grow(model, **growth, name="new")
    for names in FROZEN.values():
        freeze_only(model, names)
        state, training = torch.get_rng_state(), model.training
        stated = cost.training_flops_of(model, ids.shape[1])
        assert torch.equal(torch.get_rng_state(), state) and model.training is training
        assert not any(module._forward_pre_hooks for module in model.modules())
        assert counted(model, ids) == pytest.approx(stated, rel=1e-9), names
        if not names:
            assert stated == pytest.approx(cost.training_flops(model.config, ids.shape[1]))


@pytest.mark.parametrize("make", [tiny, tiny_vision])
def test_flops_of_loops_are_what_torch_counts(make):
    model = make("ffn", attention="eager", num_loops=2)
    grow(model, qkv_param_tokens="+9", ffn_param_tokens="+24", num_loops="+2", name="new")
    given = {"input_ids": tokens(), "labels": tokens()} if make is tiny else {"pixel_values": images(2)}
    for names in FROZEN.values():
        freeze_only(model, names)
        with FlopCounterMode(display=False) as counter:
            out = model(**given)
            (out.logits.sum() if out.loss is None else out.loss).backward()
        stated = cost.training_flops_of(model, 20 if make is tiny else None)
        assert counter.get_total_flops() / (40 if make is tiny else 2) == pytest.approx(stated, rel=1e-9), names
        if not names and make is tiny:
            assert stated == pytest.approx(cost.training_flops(model.config, 20))


@pytest.mark.parametrize("bottom", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_no_backward_runs_below_the_lowest_part_that_trains(kind, bottom):
    model, ids = MODELS[kind](), tokens()
    freeze_only(model, ["embedding"])
    architecture_of(model.config).blocks_of(model)[:bottom].requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "layers" not in name and ".h." not in name and "head" not in name:
            parameter.requires_grad_(False)
    whole = cost.training_flops(model.config, ids.shape[1])
    stated = cost.training_flops_of(model, ids.shape[1])
    assert counted(model, ids) == pytest.approx(stated, rel=1e-9)
    assert stated < 0.9 * whole


def test_the_heads_share_is_that_of_its_products():
    config = tiny("paper").config
    with FlopCounterMode(display=False) as whole:
        tiny("paper", attention="eager")(tokens(1, 48), use_cache=False)
    head = 2 * 48 * config.vocab_size * config.hidden_size
    assert cost.head_share(config, 48) == pytest.approx(head / whole.get_total_flops())


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
def test_flops_of_an_image_are_what_torch_counts(pooling, frozen):
    model = tiny_vision("ffn", attention="eager", pooling=pooling)
    grow(model, qkv_param_tokens="+9", num_hidden_layers="+1", name="new")
    freeze_only(model, frozen)
    with FlopCounterMode(display=False) as counter:
        model(images(3), labels=torch.tensor([0, 1, 2])).loss.backward()
    assert cost.training_flops_of(model) == pytest.approx(counter.get_total_flops() / 3, rel=1e-9)


def test_forward_flops_are_the_papers_formula():
    config = tiny().config
    n = cost.parameters(config) - 2 * config.hidden_size
    assert cost.forward_flops(config, 20) == 2 * n + 4 * 3 * 64 * 20
    with torch.device("meta"):
        assert cost.training_bytes(config) == 16 * cost.parameters(config)
