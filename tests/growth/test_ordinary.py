"""Ordinary transformers, one for each row of the table and more: grown, trained, saved, and given back."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from group_operations import facts, logits, same, train_only
from tiny_models import SIZES, close, tokens
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    NanoChatConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)

from tokenformer import grow
from tokenformer.checkpoints.checkpoint import load_checkpoint
from tokenformer.errors import GrowthError
from tokenformer.growth.architectures import ARCHITECTURES, group_names, places, token_groups
from tokenformer.growth.freeze import trainable_parts
from tokenformer.growth.groups import consolidate, drop, merge
from tokenformer.growth.neurons import GroupedLinear, group_neurons

GATED = {**SIZES, "intermediate_size": 56, "num_key_value_heads": 2}
OPT = {**SIZES, "ffn_dim": 56, "word_embed_proj_dim": 64}
GPT2 = {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS = {
    "llama": LlamaConfig(**GATED),
    "llama-biases": LlamaConfig(**GATED, mlp_bias=True, attention_bias=True, tie_word_embeddings=True),
    "mistral": MistralConfig(**GATED, sliding_window=8),
    "qwen2": Qwen2Config(**GATED, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen2-tied": Qwen2Config(**GATED, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**GATED, head_dim=8),
    "gemma": GemmaConfig(**GATED, head_dim=16),
    "gemma2": Gemma2Config(**GATED, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3_text": Gemma3TextConfig(
        **GATED, head_dim=16, sliding_window=8, query_pre_attn_scalar=16, layer_types=GEMMA3_LAYERS
    ),
    "phi3": Phi3Config(**GATED, pad_token_id=0),
    "starcoder2": Starcoder2Config(**GATED),
    "nanochat": NanoChatConfig(**GATED),
    "gpt_neox": GPTNeoXConfig(**SIZES, intermediate_size=128),
    "gpt_neox-sequential": GPTNeoXConfig(
        **SIZES, intermediate_size=56, use_parallel_residual=False, tie_word_embeddings=True, attention_bias=False
    ),
    "gpt2": GPT2Config(**GPT2),
    "gpt2-untied": GPT2Config(**GPT2, n_inner=56, tie_word_embeddings=False),
    "opt": OPTConfig(**OPT),
    "opt-unbiased": OPTConfig(**OPT, enable_bias=False, tie_word_embeddings=False),
    "opt-350m": OPTConfig(**{**OPT, "word_embed_proj_dim": 32}, do_layer_norm_before=False),
}
# One of every way to hold the neurons.
LAYOUTS = ["llama-biases", "phi3", "gpt_neox", "gpt2", "opt"]
DEEP = [name for name in CONFIGS if name != "opt-350m"]
every_model = pytest.mark.parametrize("name", CONFIGS)
GROWTH = {"ffn_param_tokens": "+25%"}
# Between grouped and whole maps, logits of about 10, in float32.
TOLERANCE = 5e-5
# Loads checkpoints in a process that knows nothing of tokenformer, and leaves their logits.
PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
ids, *folders = torch.load(sys.argv[1]), *sys.argv[2:]
out = {}
for folder in folders:
    model, report = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        out[folder] = model.eval()(ids).logits
assert not any(name.startswith("tokenformer") for name in sys.modules)
torch.save(out, sys.argv[1] + ".logits")
"""


def whole(name, dtype=torch.float32):
    """The model as transformers makes it, its neurons not yet grouped."""
    config = copy.deepcopy(CONFIGS[name])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.2)
    return model.to(dtype)


def grown(name, *, trained=True, **growth):
    model = whole(name)
    if name in DEEP:
        growth.setdefault("num_hidden_layers", "+2")
    grow(model, **{**GROWTH, **growth}, name="new")
    if trained:
        train_only(model, "new")
    return model


def test_every_row_is_tested():
    assert {config.model_type for config in CONFIGS.values()} == {
        kind for kind, row in ARCHITECTURES.items() if not row.has_pattention
    }


@every_model
def test_a_row_names_what_its_model_has(name):
    model, row = whole(name), ARCHITECTURES[CONFIGS[name].model_type]
    assert model.base_model_prefix == row.prefix
    blocks = model.base_model.get_submodule(row.blocks)
    assert len(blocks) == getattr(model.config, row.depth)
    (count,) = row.counts.values()
    neurons = getattr(model.config, count) or 4 * model.config.hidden_size
    state = model.state_dict()
    for block, token_map in places(model.config):
        found = {p.stored: state.get(row.block_name(block) + p.stored) for p in token_map.parts}
        assert all(t is not None for n, t in found.items() if n.endswith(".weight"))
        shapes = [p.read(t).shape[p.axis] for p in token_map.parts if (t := found[p.stored]) is not None]
        assert set(shapes) == {neurons}
        # Every tensor of the MLP's maps is a part, but for the bias that belongs to no neuron.
        modules = {n.rpartition(".")[0] for n in found}
        inside = {n for n in blocks[block].state_dict() if n.rpartition(".")[0] in modules}
        assert inside - {f"{token_map.name}.bias"} == {n for n, t in found.items() if t is not None}


@every_model
@torch.no_grad()
def test_zero_last_maps_silence_a_block(name):
    model, row = whole(name), ARCHITECTURES[CONFIGS[name].model_type]
    seen = []
    block = model.base_model.get_submodule(row.blocks)[1]
    hook = lambda module, inputs, kwargs, out: seen.append((inputs[0], out[0] if isinstance(out, tuple) else out))  # noqa: E731
    block.register_forward_hook(hook, with_kwargs=True)
    for module in row.last:
        before = [p for n, p in block.named_parameters() if n.startswith(f"{module}.")]
        assert before and all(row.is_last(f"{module}.{n}") for n, _ in block.get_submodule(module).named_parameters())
    for parameter_name, p in block.named_parameters():
        if row.is_last(parameter_name):
            p.zero_()
    model(tokens())
    assert torch.equal(*seen[-1]) == (name in DEEP)


@every_model
@torch.no_grad()
def test_a_row_names_what_a_block_adds_to_the_stream(name):
    model, row = whole(name), ARCHITECTURES[CONFIGS[name].model_type]
    seen, block = {}, model.base_model.get_submodule(row.blocks)[1]
    for part in row.adds or row.last:
        block.get_submodule(part).register_forward_hook(lambda module, inputs, out, part=part: seen.update({part: out}))
    block.register_forward_pre_hook(lambda module, inputs, kwargs: seen.update(before=inputs[0]), with_kwargs=True)
    block.register_forward_hook(
        lambda module, inputs, out: seen.update(after=out[0] if isinstance(out, tuple) else out)
    )
    model(tokens())
    before, after = seen.pop("before"), seen.pop("after")
    if getattr(model.config, "do_layer_norm_before", True):
        close(after.view_as(before) - before, sum(out.view_as(before) for out in seen.values()))


@every_model
def test_growth_changes_no_bit_and_drop_gives_the_original_back(name):
    model = whole(name)
    state, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    before = logits(model)
    group_neurons(model)
    grouped = facts(model)
    close(grouped["logits"], before, TOLERANCE)
    assert torch.equal(grouped["logits"], before) or name.startswith(("gpt2", "phi3"))
    assert all(torch.equal(grouped["weights"][k], v) for k, v in state.items())
    grow(model, **GROWTH, **({"num_hidden_layers": "+2"} if name in DEEP else {}), name="new")
    assert torch.equal(logits(model), grouped["logits"])
    train_only(model, "new")
    assert not torch.equal(logits(model), grouped["logits"])
    drop(model, ["new"])
    assert same(facts(model), grouped)
    assert model.state_dict().keys() == state.keys() and all(
        torch.equal(model.state_dict()[k], v) for k, v in state.items()
    )
    after = model.config.to_dict()
    assert {k for k in after if after[k] != config.get(k)} <= {"token_groups", "n_inner"}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_growth_changes_no_bit_in_half_precision(name, dtype):
    model = whole(name, dtype)
    group_neurons(model)
    before = logits(model)
    grow(model, **GROWTH, num_hidden_layers="+1")
    assert torch.equal(logits(model), before) and {p.dtype for p in model.parameters()} == {dtype}


@every_model
def test_only_the_new_neurons_move(name):
    model = grown(name, trained=False, num_hidden_layers=None)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train_only(model, "new")
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    new = {n for n in before if ".groups.new." in n}
    assert moved == new and {id(p) for p in trainable_parts(model)["new"]} == {
        id(dict(model.named_parameters())[n]) for n in new
    }


def test_plain_transformers_loads_what_was_grown(tmp_path):
    torch.save(tokens(), tmp_path / "ids")
    wanted = {}
    for name in CONFIGS:
        model = grown(name)
        wanted[str(tmp_path / name)] = logits(model)
        model.save_pretrained(tmp_path / name)
        if name in LAYOUTS:
            half = model.to(torch.bfloat16)
            wanted[str(tmp_path / f"{name}-half")] = logits(half)
            half.save_pretrained(tmp_path / f"{name}-half")
    command = [sys.executable, "-W", "error", "-c", PLAIN, str(tmp_path / "ids"), *wanted]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "ids.logits")
    for folder, expected in wanted.items():
        close(found[folder].float(), expected.float(), 0.25 if folder.endswith("-half") else TOLERANCE)


@every_model
def test_a_grouped_model_is_saved_loaded_copied_and_pickled(name, tmp_path):
    model = grown(name)
    model.save_pretrained(tmp_path / "c")  # which sets config.architectures
    before = facts(model)
    again, _, _ = load_checkpoint(tmp_path / "c")
    assert all(torch.equal(again.state_dict()[k], v) for k, v in before["weights"].items())
    assert torch.equal(logits(again), before["logits"]) and token_groups(again.config) == before["groups"]
    assert list(dict(again.named_parameters())) == list(dict(model.named_parameters()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(facts(twin), before)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert same(facts(model), before) and not logits(twin).any()
        twin.load_state_dict(before["weights"])
        assert same(facts(twin), before)
    grouped = next(m for m in model.modules() if isinstance(m, GroupedLinear))
    with pytest.raises(RuntimeError, match=r"Unexpected key|Missing key"):
        grouped.load_state_dict({"weight": torch.zeros(3, 3)})


@every_model
def test_generate_with_and_without_a_cache(name):
    model = grown(name)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(tokens(), use_cache=True, **options)
    assert cached.shape == (2, 26) and torch.equal(cached, model.generate(tokens(), use_cache=False, **options))


@pytest.mark.parametrize("config", [MixtralConfig, Qwen3MoeConfig])
def test_mixtures_of_experts_are_refused_in_a_sentence(config):
    with pytest.raises(GrowthError, match=f"'{config.model_type}' model is a mixture of .* experts, .* not supported"):
        token_groups(config())


@pytest.mark.parametrize("name", LAYOUTS)
def test_children_of_an_ordinary_parent_merge(name):
    parent = whole(name)
    a, b = copy.deepcopy(parent), copy.deepcopy(parent)
    for model, group in ((a, "a"), (b, "b")):
        grow(model, **GROWTH, name=group)
        train_only(model, group)
    other = facts(b)
    merge(a, b)
    assert same(facts(b), other) and group_names(a.config) == ["base", "a", "b"]
    drop(a, ["a"])
    assert same(facts(a), other)
    consolidate(a)
    close(logits(a), other["logits"], TOLERANCE)
    assert all(torch.equal(a.state_dict()[k], v) for k, v in other["weights"].items())
