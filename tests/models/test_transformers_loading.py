"""What transformers asks of every model's loading, placing and configuration, asked of ours however it was grown.

tests/test_transformers_common.py has what it asks of a model in memory.
"""

import copy
import io
import itertools
import math

import pytest
import torch
from accelerate import cpu_offload, infer_auto_device_map
from tiny_models import KINDS, SIZES, close, make, tokens
from transformers import AutoModelForCausalLM

from tokenformer import TokenformerConfig, TokenformerForCausalLM, TokenformerModel

# Initialisation and loading


def assert_initial(name: str, p: torch.Tensor, layers: int, hidden: int) -> None:
    wang = 2 / (layers * math.sqrt(hidden))
    if "norm" in name:
        assert torch.equal(p, torch.full_like(p, float(name.endswith("weight")))), name
        return
    wanted = wang if ".values." in name or "o_proj.linear" in name or "mlp.linear" in name else 0.02
    assert abs(p.std().item() / wanted - 1) < 6 / math.sqrt(2 * p.numel()), name
    assert abs(p.mean().item()) < 6 * wanted / math.sqrt(p.numel()), name


@pytest.mark.parametrize("kind", KINDS)
def test_weights_missing_from_a_checkpoint_are_drawn_like_new_ones(kind):
    """Loading nothing at all must leave no tensor on the meta device, at zero or at a module's own initialisation."""
    config = make(kind, tie_word_embeddings=False).config
    model = TokenformerForCausalLM.from_pretrained(None, config=config, state_dict={})
    assert all(t.device.type == "cpu" for t in itertools.chain(model.parameters(), model.buffers()))
    for name, p in model.named_parameters():
        assert_initial(name, p, config.num_hidden_layers, config.hidden_size)
    close(model.model.rotary_emb.inv_freq, make(kind).model.rotary_emb.inv_freq, 0)


def test_one_missing_tensor_is_named_and_the_others_are_kept(tmp_path):
    model = make("grown")
    state = model.state_dict()
    missing = "model.layers.1.mlp.groups.grown1.values.weight"
    del state[missing]
    model.save_pretrained(tmp_path, state_dict=dict(state))
    loaded, report = TokenformerForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == {missing} and not report["unexpected_keys"]
    for name, p in loaded.named_parameters():
        if name == missing:
            assert_initial(name, p, 3, 64)
        else:
            assert torch.equal(p, state[name]), name


def test_tensors_of_another_shape_are_refused_or_drawn_anew(tmp_path):
    """A checkpoint under a configuration with more parameter tokens in the same group."""
    make("ffn").save_pretrained(tmp_path)
    config = TokenformerConfig.from_pretrained(tmp_path).to_dict()
    config |= {"token_groups": [{"name": "base", "ffn": 200}], "ffn_param_tokens": 200}
    config = TokenformerConfig.from_dict(config)
    with pytest.raises(RuntimeError, match="mismatch"):
        TokenformerForCausalLM.from_pretrained(tmp_path, config=config)
    model, report = TokenformerForCausalLM.from_pretrained(
        tmp_path, config=config, ignore_mismatched_sizes=True, output_loading_info=True
    )
    changed = {name for name, *_ in report["mismatched_keys"]}
    assert changed == {f"model.layers.{i}.mlp.groups.base.{m}.weight" for i in range(3) for m in ("keys", "values")}
    for name, p in model.named_parameters():
        if name in changed:
            assert_initial(name, p, 3, 64)
    assert model(tokens()).logits.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_decoder_and_language_model_load_each_others_checkpoints(kind, tmp_path):
    model, ids = make(kind), tokens()
    model.save_pretrained(tmp_path / "whole")
    decoder, report = TokenformerModel.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)
    decoder.save_pretrained(tmp_path / "decoder")
    again, report = TokenformerForCausalLM.from_pretrained(tmp_path / "decoder", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_is_saved_and_asked_for(dtype, tmp_path):
    whole, ids = make("grown"), tokens()
    copy.deepcopy(whole).to(dtype).save_pretrained(tmp_path)
    half = TokenformerForCausalLM.from_pretrained(tmp_path)
    assert {p.dtype for p in half.parameters()} == {dtype} and half.config.dtype == dtype
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    logits = half(ids).logits
    assert logits.dtype == dtype
    assert ((logits.float() - whole(ids).logits).norm() / whole(ids).logits.norm()).item() < 0.03
    full = TokenformerForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in full.parameters()} == {torch.float32}


@pytest.mark.parametrize("kind", KINDS)
def test_shards_pickles_and_copies_hold_the_same_model(kind, tmp_path):
    model, ids = make(kind), tokens()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    pickled = io.BytesIO()
    torch.save(model, pickled)
    pickled.seek(0)
    for other in (
        AutoModelForCausalLM.from_pretrained(tmp_path),
        torch.load(pickled, weights_only=False),
        copy.deepcopy(model),
    ):
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert other.lm_head.weight is other.model.embed_tokens.weight


def test_device_contexts(tmp_path):
    """What `init_empty_weights` and torch.device do: everything on meta, or everything loaded."""
    model = make("grown")
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = TokenformerForCausalLM(model.config)
    assert {p.device.type for p in empty.parameters()} == {"meta"}
    with torch.device("cpu"):
        loaded = TokenformerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


# Devices and plans


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("elsewhere", ["disk", "cpu"])
def test_blocks_kept_elsewhere_are_brought_in_when_used(kind, elsewhere, tmp_path):
    """Accelerate's hooks on the maps must be called, and so switch off the path that reads their weights directly."""
    model, ids = make(kind), tokens()
    model.save_pretrained(tmp_path / "checkpoint")
    if elsewhere == "disk":
        parts = ("embed_tokens", "layers.0", "layers.1", "layers.2.self_attn", "layers.2.mlp", "norm", "rotary_emb")
        places = dict.fromkeys([*(f"model.{part}" for part in parts), "lm_head"], "cpu")
        places |= {"model.layers.1": "disk", "model.layers.2.mlp": "disk"}
        moved = AutoModelForCausalLM.from_pretrained(
            tmp_path / "checkpoint", device_map=places, offload_folder=tmp_path / "offloaded"
        )
        assert moved.hf_device_map == places
    else:
        moved = cpu_offload(TokenformerForCausalLM.from_pretrained(tmp_path / "checkpoint"), torch.device("cpu"))
    away = moved.model.layers[1].mlp.groups["base"].keys
    assert away.weight.device.type == "meta"
    with torch.no_grad():
        close(moved(ids).logits, model(ids).logits)
        how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(moved.generate(ids, **how), model.generate(ids, **how))
    assert away.weight.device.type == "meta"


def test_device_maps_never_split_a_block():
    model = make("grown")
    block = 4 * sum(p.numel() for p in model.model.layers[0].parameters())
    # The embedding, one block, and as much again as the largest part, which accelerate keeps free.
    room = {0: 4 * model.model.embed_tokens.weight.numel() + int(2.5 * block), "cpu": 10**9}
    places = infer_auto_device_map(model, max_memory=room, no_split_module_classes=model._no_split_modules)
    assert [places[f"model.layers.{i}"] for i in range(3)] == [0, "cpu", "cpu"]
    split = infer_auto_device_map(model, max_memory=room)
    assert any(name.count(".") > 2 for name in split) and all(name.count(".") <= 2 for name in places)


@pytest.mark.parametrize("kind", KINDS)
def test_parallel_plans_name_what_exists(kind):
    model = TokenformerForCausalLM(make(kind).config)
    modules = {name for name, _ in model.named_modules()}
    block_weights = {n.removesuffix(".weight") for n, _ in model.named_parameters() if ".layers." in n}
    for i in range(3):
        assert {p.replace("*", str(i)) for p in model.tp_plan} <= modules
        here = {n for n in block_weights if f".layers.{i}." in n}
        assert {p.replace("*", str(i)) for p in model.tp_plan if "layers.*" in p} == here
    assert set(model._pp_plan) <= modules | {"model.embed_tokens", "model.layers", "model.norm"}
    for name in model._no_split_modules:
        assert any(type(m).__name__ == name for m in model.modules())


# Configuration


@pytest.mark.parametrize("kind", KINDS)
def test_configuration_survives_every_way_to_write_it(kind, tmp_path):
    config = make(kind).config
    config.save_pretrained(tmp_path / "folder" / "below")
    config.to_json_file(tmp_path / "all.json")
    config.to_json_file(tmp_path / "diff.json", use_diff=True)
    copies = [
        TokenformerConfig.from_pretrained(tmp_path / "folder", subfolder="below"),
        TokenformerConfig.from_pretrained(tmp_path / "folder" / "below"),
        TokenformerConfig.from_json_file(tmp_path / "all.json"),
        TokenformerConfig.from_json_file(tmp_path / "diff.json"),
        TokenformerConfig.from_dict(config.to_dict()),
        TokenformerConfig(**config.to_diff_dict()),
        copy.deepcopy(config),
    ]
    wanted = {k: v for k, v in config.to_dict().items() if k != "transformers_version"}
    for other in copies:
        assert {k: v for k, v in other.to_dict().items() if k in wanted} == wanted
    assert config.get_text_config() is config


def test_configuration_keeps_what_it_does_not_know_and_counts_labels():
    config = TokenformerConfig(**SIZES, num_labels=3, my_note="kept")
    assert config.num_labels == len(config.id2label) == 3
    config.num_labels = 2
    assert len(config.id2label) == len(config.label2id) == 2
    assert TokenformerConfig.from_dict(config.to_dict()).my_note == "kept"
    with pytest.raises(Exception, match="hidden_size"):
        TokenformerConfig(hidden_size="64")


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn"])
def test_rotary_scaling_from_the_configuration(kind):
    ids, long = tokens(1, 20), tokens(1, 90)
    plain = make("ffn").model
    scaling = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000.0}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = 64
    scaled = make("ffn", rope_parameters=scaling).model
    assert scaled.config.rope_parameters["partial_rotary_factor"] == 0.25
    short_is_kept = torch.allclose(scaled(ids).last_hidden_state, plain(ids).last_hidden_state, atol=1e-5)
    assert short_is_kept == (kind == "dynamic")
    assert not torch.allclose(scaled(long).last_hidden_state, plain(long).last_hidden_state, atol=1e-3)
    if kind == "linear":
        spread = plain(ids, position_ids=torch.arange(20)[None] / 4)
        close(scaled(ids).last_hidden_state, spread.last_hidden_state)


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_rotary_embedding_turns_the_share_of_a_head_it_is_told(share):
    model = make("ffn", rope_parameters={"partial_rotary_factor": share}).model
    cos, _ = model.rotary_emb(torch.zeros(1, 1, 64), torch.arange(5)[None])
    assert cos.shape == (1, 5, int(16 * share))
    assert model(tokens()).last_hidden_state.isfinite().all()
