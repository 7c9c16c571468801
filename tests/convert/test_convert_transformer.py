"""GPT-NeoX checkpoints become TokenFormers of the same logits: every variant, every refusal."""

import json
import re
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import tokens
from transformers import AutoModelForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

from tokenformer import TokenformerForCausalLM, grow
from tokenformer.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.checkpoints.verify import weights_digest
from tokenformer.convert.transformer import (
    config_from_gpt_neox,
    convert_tensors,
    convert_transformer,
    fold_norm,
    linear_as_tokens,
    third_of_heads,
)
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.errors import CheckpointError, ConversionError

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}
ASKED = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def neox(dtype=torch.float32, **changes):
    """A GPT-NeoX in which everything is random, norms and biases too."""
    config = GPTNeoXConfig(**{**SIZES, **changes})
    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(mean=1.0 if "norm.weight" in name else 0.0, std=0.15)
    return model.to(dtype).eval()


def save(model, folder):
    model.save_pretrained(folder)
    (folder / "LICENSE").write_text("be kind", encoding="utf-8")
    return folder


def converted(model, folder):
    convert_transformer(save(model, folder / "neox"), folder / "ours")
    return load_checkpoint(folder / "ours")


def relative(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "more",
    [
        {"use_parallel_residual": True},
        {"use_parallel_residual": False, "tie_word_embeddings": True, "rotary_pct": 1.0},
        {"use_parallel_residual": False, "attention_bias": False, "layer_norm_eps": 1e-3, "rotary_emb_base": 500},
    ],
)
@torch.no_grad()
def test_logits_are_equal_to_rounding(dtype, more, tmp_path):
    theirs, ids = neox(dtype, **more), tokens()
    ours, tokenizer, lineage = converted(theirs, tmp_path)
    assert ours.dtype == dtype and tokenizer is None
    assert (tmp_path / "ours" / "LICENSE").read_text(encoding="utf-8") == "be kind"
    want = theirs(ids).logits
    assert relative(ours(ids).logits, want) < TOLERANCE[dtype]
    rope = {"rope_type": "default", "rope_theta": more.get("rotary_emb_base", 10000.0)}
    assert ours.config.rope_parameters == rope | {"partial_rotary_factor": more.get("rotary_pct", 0.25)}
    first = ours(ids[:, :9], use_cache=True)
    rest = ours(ids[:, 9:], past_key_values=first.past_key_values)
    assert relative(torch.cat([first.logits, rest.logits], 1), want) < TOLERANCE[dtype]
    if dtype == torch.float64:
        assert torch.equal(ours.generate(ids, **ASKED), theirs.generate(ids, **ASKED))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == bool(more.get("tie_word_embeddings"))
    assert lineage.last.operation == "convert" and lineage.last.arguments == {"from": "gpt_neox", "checkpoint": "neox"}
    assert lineage.last.parent == weights_digest(tmp_path / "neox")


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_then_it_grows_like_any_other(dtype, tmp_path):
    ours, ids = converted(neox(dtype), tmp_path)[0], tokens()
    before = ours(ids).logits
    grow(ours, qkv_param_tokens="+16", output_param_tokens="+8", ffn_param_tokens="+50%", name="new")
    assert torch.equal(ours(ids).logits, before)
    assert all("new" in layer.groups for layers in ours.pattention_layers.values() for layer in layers)


def test_what_it_says_of_itself(tmp_path):
    theirs = neox(tie_word_embeddings=False, bos_token_id=5, eos_token_id=7, layer_norm_eps=1e-4)
    ours = converted(theirs, tmp_path)[0]
    config = ours.config
    assert config.norm_activation_type == "gelu" and config.pattention_bias and config.use_parallel_residual
    assert config.token_groups == [{"name": "base", "qkv": 128, "output": 128, "ffn": 96}]
    assert (config.bos_token_id, config.eos_token_id, config.layer_norm_eps) == (5, 7, 1e-4)
    assert torch.equal(ours.model.norm.bias, theirs.gpt_neox.final_layer_norm.bias)
    keys = ours.model.layers[0].self_attn.q_proj.groups["base"].keys
    assert torch.equal(keys.weight[:64], torch.eye(64)) and not keys.bias.any()


def test_every_tensor_of_ours_is_made():
    for changes in ({}, {"attention_bias": False}, {"tie_word_embeddings": True}):
        config = GPTNeoXConfig(**SIZES, **changes)
        with torch.device("meta"):
            theirs = GPTNeoXForCausalLM(config).state_dict()
            ours = TokenformerForCausalLM(config_from_gpt_neox(config)).state_dict()
        made = {}
        for owner in {re.sub(r"(self_attn\.\w+|mlp)\..*", r"\1", name) for name in ours}:
            made |= convert_tensors(config, owner, lambda name, theirs=theirs: torch.zeros(theirs[name].shape))
        assert {n: t.shape for n, t in made.items()} == {n: t.shape for n, t in ours.items()}


@settings(max_examples=20, deadline=None)
@given(heads=st.integers(1, 4), size=st.integers(1, 5), width=st.integers(1, 8), seed=st.integers(0, 99))
def test_algebra(heads, size, width, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, fused, x, scale, shift = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((5, width), (heads * 3 * size, width), (7, width), (width,), (width,))
    )
    bias = torch.randn(5, generator=generator, dtype=torch.float64)
    folded, offset = fold_norm(weight, bias, scale, shift)
    torch.testing.assert_close(x @ folded.t() + offset, (x * scale + shift) @ weight.t() + bias)
    keys, values = linear_as_tokens(weight)
    torch.testing.assert_close(torch.nn.functional.gelu(x @ keys.t()) @ values.t(), x @ weight.t())
    query, key, value = (x @ fused.t()).view(7, heads, 3, size).unbind(2)
    for part, want in enumerate((query, key, value)):
        torch.testing.assert_close(x @ third_of_heads(fused, heads, part).t(), want.flatten(1))


@torch.no_grad()
def test_the_l2_norm_with_tau_of_twice_the_width_is_not_exact(tmp_path):
    """LayerNorm's eps makes its outputs shorter than √D where the variance is small; the L2 norm undoes that."""
    theirs, ids = neox(torch.float64), tokens()
    theirs.gpt_neox.embed_in.weight.normal_(std=0.02)
    ours = converted(theirs, tmp_path)[0]
    want = theirs(ids).logits
    assert relative(ours(ids).logits, want) < 1e-10
    for layer in ours.pattention_layers["qkv"]:
        layer.norm_activation_type, layer.tau, layer.eps = "l2_norm_gelu", (2 * 64) ** 0.5, 0.0
    x = theirs.gpt_neox.embed_in.weight[ids]
    expected = (1e-5 / x.var(-1, correction=0)).mean().item() / 2
    plain = ours.model.layers[0].input_layernorm(x)
    keys = ours.model.layers[0].self_attn.k_proj
    normed = keys(plain) - keys.bias
    keys.norm_activation_type = "gelu"
    assert relative(normed, keys(plain) - keys.bias) == pytest.approx(expected, rel=0.1)
    keys.norm_activation_type = "l2_norm_gelu"
    assert relative(ours(ids).logits, want) > 1e-4


def test_whether_groups_are_normed_jointly_does_not_matter_without_a_norm(tmp_path):
    ours, ids = converted(neox(), tmp_path)[0], tokens()
    grow(ours, ffn_param_tokens="+16", name="new")
    with torch.no_grad():
        for p in ours.parameters():
            p.add_(torch.randn_like(p), alpha=0.05)
    joint = ours(ids).logits
    for layers in ours.pattention_layers.values():
        for layer in layers:
            layer.token_group_norm = "per_group"
    torch.testing.assert_close(ours(ids).logits, joint, rtol=1e-5, atol=1e-5)


def test_sharded_checkpoints_and_old_buffers(tmp_path):
    theirs = neox()
    whole = save(theirs, tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    old = tmp_path / "old"
    shutil.copytree(whole, old)
    state = load_file(old / "model.safetensors")
    for i in range(2):
        prefix = f"gpt_neox.layers.{i}.attention"
        state[f"{prefix}.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
        state[f"{prefix}.masked_bias"] = torch.tensor(-1e9)
        state[f"{prefix}.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(state, old / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((old / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rotary_pct": rope["partial_rotary_factor"], "rotary_emb_base": 10000, "torch_dtype": "float32"}
    (old / "config.json").write_text(json.dumps(config))
    seen = []
    for name in ("whole", "shards", "old"):
        on_progress = lambda done, total: seen.append((done, total))  # noqa: E731
        convert_transformer(tmp_path / name, tmp_path / f"{name}-ours", on_progress=on_progress)
    assert len({weights_digest(tmp_path / f"{name}-ours") for name in ("whole", "shards", "old")}) == 1
    assert seen[-1][0] == seen[-1][1] > 0


def test_the_tokenizer_and_the_lineage_are_kept(tmp_path):
    tokenizer = make_tokenizer("bytes", [])
    theirs = neox(vocab_size=len(tokenizer))
    save_checkpoint(tmp_path / "neox", theirs, tokenizer, Lineage().then("train", seed=3))
    convert_transformer(tmp_path / "neox", tmp_path / "ours")
    _, kept, lineage = load_checkpoint(tmp_path / "ours")
    assert kept.get_vocab() == tokenizer.get_vocab()
    assert [event.operation for event in lineage.history] == ["train", "convert"]
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "ours"), TokenformerForCausalLM)


def edit_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


DENSE = "gpt_neox.layers.1.attention.dense.weight"
REFUSALS = {
    "llama": (lambda f: edit_config(f, model_type="llama"), ConversionError, "is a 'llama' model; only GPT-NeoX-like"),
    "gelu_fast": (
        lambda f: edit_config(f, hidden_act="gelu_fast"),
        ConversionError,
        "hidden_act is 'gelu_fast', and on",
    ),
    "scaled": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
        ConversionError,
        r"its rotary embedding is scaled \('linear'\)",
    ),
    "no type": (lambda f: (f / "config.json").write_text("{}"), CheckpointError, "is damaged: config.json: Unrec"),
    "no config": (lambda f: (f / "config.json").unlink(), CheckpointError, "no checkpoint at"),
    "not json": (lambda f: (f / "config.json").write_text("{"), CheckpointError, r"is damaged: config\.json"),
    "list": (lambda f: (f / "config.json").write_text("[]"), CheckpointError, r"is damaged: config\.json"),
    "quantised": (lambda f: edit_config(f, quantization_config={"quant_method": "x"}), CheckpointError, "is quantised"),
    "sizes": (lambda f: edit_config(f, num_attention_heads=5), CheckpointError, r"is damaged: config\.json"),
    "types": (lambda f: edit_config(f, hidden_size="64"), CheckpointError, r"is damaged: config\.json"),
    "missing": (lambda f: edit_tensors(f, lambda s: s.pop(DENSE)), CheckpointError, f"1 missing: {DENSE}"),
    "unknown": (lambda f: edit_tensors(f, lambda s: s.update(x=torch.ones(1))), CheckpointError, "1 unknown: x"),
    "deeper": (
        lambda f: edit_config(f, num_hidden_layers=3),
        CheckpointError,
        r"12 missing: gpt_neox\.layers\.2.*, …",
    ),
    "shape": (
        lambda f: edit_tensors(f, lambda s: s.update({DENSE: torch.ones(64, 8)})),
        CheckpointError,
        rf"1 of other shapes: {DENSE} is \[64, 8\], not \[64, 64\]",
    ),
    "integers": (
        lambda f: edit_tensors(f, lambda s: s.update({DENSE: torch.ones(64, 64, dtype=torch.int8)})),
        CheckpointError,
        f"1 not of floating point: {DENSE} is torch.int8",
    ),
    "infinite": (
        lambda f: edit_tensors(f, lambda s: s.update({DENSE: torch.full((64, 64), torch.inf)})),
        CheckpointError,
        DENSE,
    ),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_refused_with_nothing_written(what, tmp_path):
    change, error, message = REFUSALS[what]
    change(save(neox(), tmp_path / "neox"))
    with pytest.raises(error, match=message):
        convert_transformer(tmp_path / "neox", tmp_path / "ours")
    assert [file.name for file in tmp_path.iterdir()] == ["neox"]


def test_damaged_or_pickled_weights_and_a_target_in_the_way(tmp_path):
    folder = save(neox(), tmp_path / "neox")
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "config.json").write_text("old")
    with pytest.raises(CheckpointError, match="exists already"):
        convert_transformer(folder, tmp_path / "ours")
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .* cannot be read"):
        convert_transformer(folder, tmp_path / "ours", force=True)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        convert_transformer(folder, tmp_path / "ours", force=True)
    assert (tmp_path / "ours" / "config.json").read_text() == "old"
    (folder / "pytorch_model.bin").unlink()
    weights.write_bytes(content)
    convert_transformer(folder, tmp_path / "ours", force=True)
    assert load_checkpoint(tmp_path / "ours")[0].config.model_type == "tokenformer"
