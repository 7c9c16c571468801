"""Checkpoints as others leave them (leftovers, ties, old buffers, mixed types, bare tokenizers): what is kept."""

import json
import shutil

import pytest
import torch
from group_operations import logits, ordinary
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, tiny, tokens
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

from tokenformer.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.checkpoints.rewrite import open_checkpoint, rewrite
from tokenformer.checkpoints.verify import carry_files, verify_checkpoint, weight_files
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.errors import CheckpointError, TokenizerError
from tokenformer.growth.freeze import freeze_only, freeze_operation, unfreeze_operation
from tokenformer.growth.groups import drop_operation
from tokenformer.growth.grow import grow_operation

LLAMA = {**SIZES, "intermediate_size": 56, "num_key_value_heads": 2}


def tied(kind="llama"):
    configs = {
        "llama": lambda: LlamaConfig(**LLAMA, tie_word_embeddings=True),
        "opt": lambda: OPTConfig(**SIZES, ffn_dim=56, word_embed_proj_dim=64, tie_word_embeddings=True),
        "gpt2": lambda: GPT2Config(vocab_size=128, n_embd=64, n_layer=3, n_head=4, n_positions=64),
    }
    return ordinary(configs[kind]())


def written(folder):
    return {name: tensor for file in weight_files(folder) for name, tensor in load_file(file).items()}


def replace(folder, change):
    """Write the one weight file of a checkpoint anew, as `change` makes it."""
    tensors = {name: tensor.clone() for name, tensor in written(folder).items()}
    save_file(change(tensors), folder / "model.safetensors", {"format": "pt"})


def grown(source, **growth):
    growth = growth or {"ffn_param_tokens": "+8"}
    return grow_operation(source.config, seed=0, dtype=source.dtype, name="more", **growth)


def act(folder, output, operation):
    source = open_checkpoint(folder)
    rewrite(source, output, operation(source))
    return output


def theirs(folder):
    """Logits as transformers computes them."""
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()(tokens()).logits


# --- which files


def test_only_what_transformers_loads_is_read(tmp_path):
    model = ordinary()
    model.save_pretrained(tmp_path / "c", max_shard_size="60KB")
    other = {name: torch.ones_like(tensor) for name, tensor in written(tmp_path / "c").items()}
    for name in ("consolidated", "model-00001-of-00099", "model-00099-of-00099", "zz"):
        save_file(other, tmp_path / "c" / f"{name}.safetensors", {"format": "pt"})
    assert len(weight_files(tmp_path / "c")) > 2
    wanted = theirs(tmp_path / "c")
    act(tmp_path / "c", tmp_path / "grown", grown)
    back = act(tmp_path / "grown", tmp_path / "back", lambda source: drop_operation(source.config, ["more"]))
    assert torch.equal(theirs(back), wanted) and torch.equal(logits(load_checkpoint(back)[0]), wanted)
    digest = verify_checkpoint(tmp_path / "c").weights_sha256
    (tmp_path / "c" / "zz.safetensors").unlink()
    assert verify_checkpoint(tmp_path / "c").weights_sha256 == digest
    # Beside a whole file an index counts for nothing, as in transformers.
    save_file(other, tmp_path / "c" / "model.safetensors", {"format": "pt"})
    assert torch.equal(theirs(tmp_path / "c"), logits(load_checkpoint(tmp_path / "c")[0]))
    assert [f.name for f in weight_files(tmp_path / "c")] == ["model.safetensors"]


# --- embedding and head

VERBS = {
    "grow": grown,
    "freeze": lambda source: freeze_operation(source.config, ["base"]),
    "unfreeze": lambda source: unfreeze_operation(source.config, ["base"]),
    "drop": lambda source: drop_operation(source.config, ["more"]),
}


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
def test_a_head_of_its_own_is_kept_whatever_the_configuration_says(kind, tmp_path):
    tied(kind).save_pretrained(tmp_path / "c")
    replace(tmp_path / "c", lambda tensors: {**tensors, "lm_head.weight": torch.randn(128, 64)})
    wanted, folder = theirs(tmp_path / "c"), tmp_path / "c"
    head = written(tmp_path / "c")["lm_head.weight"]
    for i, verb in enumerate(VERBS.values()):
        folder = act(folder, tmp_path / f"{i}", verb)
        assert torch.equal(written(folder)["lm_head.weight"], head)
        assert torch.equal(theirs(folder), wanted) or torch.allclose(theirs(folder), wanted, atol=1e-4)
        assert not json.loads((folder / "config.json").read_text(encoding="utf-8"))["tie_word_embeddings"]
    model = load_checkpoint(tmp_path / "c")[0]
    assert torch.equal(logits(model), wanted) and not model.config.tie_word_embeddings
    save_checkpoint(tmp_path / "saved", model)
    assert torch.equal(theirs(tmp_path / "saved"), wanted)


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("stored", ["head", "both"])
def test_tied_checkpoints_that_hold_the_head(kind, stored, tmp_path):
    model = tied(kind)
    model.save_pretrained(tmp_path / "c")
    (embedding,) = set(model.all_tied_weights_keys.values())
    wanted = theirs(tmp_path / "c")

    def change(tensors):
        head = tensors[embedding] if stored == "both" else tensors.pop(embedding)
        return {**tensors, "lm_head.weight": head.clone()}

    replace(tmp_path / "c", change)
    act(tmp_path / "c", tmp_path / "grown", grown)
    folder = act(tmp_path / "grown", tmp_path / "back", VERBS["drop"])
    assert torch.equal(theirs(folder), wanted) and torch.equal(logits(load_checkpoint(tmp_path / "c")[0]), wanted)
    assert "lm_head.weight" not in written(folder)


# --- old buffers


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_buffers_of_old_gpt2_checkpoints(prefix, tmp_path):
    tied("gpt2").save_pretrained(tmp_path / "c")
    wanted = theirs(tmp_path / "c")

    def change(tensors):
        old = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8) for i in range(3)}
        old |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
        return {name.replace("transformer.", prefix): tensor for name, tensor in (tensors | old).items()}

    replace(tmp_path / "c", change)
    assert torch.equal(logits(load_checkpoint(tmp_path / "c")[0]), wanted)
    act(tmp_path / "c", tmp_path / "grown", grown)
    folder = act(tmp_path / "grown", tmp_path / "back", VERBS["drop"])
    assert torch.equal(theirs(folder), wanted)
    assert not any(".attn.bias" in name or "masked" in name for name in written(folder))


# --- types


def test_each_tensor_keeps_its_type(tmp_path):
    model = ordinary(LlamaConfig(**LLAMA, dtype="bfloat16"))
    save_checkpoint(tmp_path / "c", model.to(torch.bfloat16))
    wide = ("lm_head.weight", "model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.up_proj.weight")
    replace(tmp_path / "c", lambda ts: {n: t.float() if n in wide else t for n, t in ts.items()})
    (tmp_path / "c" / "lineage.json").unlink()
    dtypes = {name: tensor.dtype for name, tensor in written(tmp_path / "c").items()}
    folder = tmp_path / "c"
    for i, verb in enumerate(VERBS.values()):
        folder = act(folder, tmp_path / f"{i}", verb)
        assert {name: tensor.dtype for name, tensor in written(folder).items()} == dtypes
        assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"
        assert verify_checkpoint(folder).dtype == "float32"
    assert all(torch.equal(t, written(tmp_path / "c")[n]) for n, t in written(folder).items())


@pytest.mark.parametrize("kind", ["llama", "tokenformer"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_frozen_while_training_in_float32_comes_back_as_it_was(kind, dtype, tmp_path):
    model = (ordinary() if kind == "llama" else tiny()).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(tmp_path / "c")
    act(tmp_path / "c", tmp_path / "grown", grown)
    frozen = ["base", "embedding", "final_norm", "linear_maps"]
    model, _, lineage = load_checkpoint(tmp_path / "grown", dtype=torch.float32)
    freeze_only(model, [part for part in frozen if part in ("base", "embedding", "final_norm", "linear_maps")])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 7)
    save_checkpoint(tmp_path / "trained", model, None, lineage.then("train"))
    assert verify_checkpoint(tmp_path / "trained").dtype == "float32"
    back = act(tmp_path / "trained", tmp_path / "back", VERBS["drop"])
    before, after = written(tmp_path / "c"), written(back)
    assert before.keys() == after.keys()
    assert all(t.dtype == after[n].dtype and torch.equal(t, after[n]) for n, t in before.items())
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in (tmp_path / "c", back)]
    assert configs[0]["dtype"] == configs[1]["dtype"] == str(dtype).removeprefix("torch.")


def test_a_model_that_was_never_narrower_stays_as_it_is(tmp_path):
    save_checkpoint(tmp_path / "c", tiny(tie_word_embeddings=False), None, Lineage().then("train"))
    act(tmp_path / "c", tmp_path / "grown", grown)
    back = act(tmp_path / "grown", tmp_path / "back", VERBS["drop"])
    assert {tensor.dtype for tensor in written(back).values()} == {torch.float32}


def test_float8_is_refused_in_words(tmp_path):
    ordinary().save_pretrained(tmp_path / "c")
    name = "model.layers.0.mlp.up_proj.weight"
    replace(tmp_path / "c", lambda ts: {**ts, name: ts[name].to(torch.float8_e4m3fn)})
    for read in (open_checkpoint, load_checkpoint, verify_checkpoint):
        with pytest.raises(
            CheckpointError, match=rf"c is quantised: 1 of its \d+ tensors, such as {name} \(F8_E4M3\);"
        ):
            read(tmp_path / "c")


# --- what lies beside the weights


def test_tokenizer_licence_and_settings_are_carried_along(tmp_path):
    save_checkpoint(tmp_path / "c", tiny(vocab_size=300), make_tokenizer("bytes", []))
    names = ("LICENSE", "tokenizer.model", "notes.txt", "chat_template.jinja")
    beside = {**{name: name.encode() for name in names}, "generation_config.json": b'{"temperature": 0.3}'}
    for name, content in beside.items():
        (tmp_path / "c" / name).write_bytes(content)
    for name in ("pytorch_model.bin", "old.safetensors", ".hidden", "model.gguf"):
        (tmp_path / "c" / name).write_bytes(b"x")
    (tmp_path / "c" / "lineage.json").unlink()
    beside |= {f.name: f.read_bytes() for f in (tmp_path / "c").glob("tokenizer*")}
    folder = tmp_path / "c"
    for i, verb in enumerate(VERBS.values()):
        folder = act(folder, tmp_path / f"{i}", verb)
        assert {name: (folder / name).read_bytes() for name in beside} == beside
        assert not {"pytorch_model.bin", "old.safetensors", ".hidden", "model.gguf"} & {
            f.name for f in folder.iterdir()
        }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "LICENSE").write_bytes(b"mine")
    carry_files(folder, tmp_path / "run")
    assert (tmp_path / "run" / "LICENSE").read_bytes() == b"mine" and (tmp_path / "run" / "notes.txt").exists()


def test_a_tokenizer_json_alone(tmp_path):
    save_checkpoint(tmp_path / "c", tiny(vocab_size=300, eos_token_id=0), make_tokenizer("bytes", []))
    (tmp_path / "c" / "tokenizer_config.json").unlink()
    (tmp_path / "c" / "lineage.json").unlink()
    tokenizer = load_checkpoint(tmp_path / "c")[1]
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.decode(tokenizer("grüße")["input_ids"]) == "grüße"
    act(tmp_path / "c", tmp_path / "grown", grown)
    assert load_checkpoint(tmp_path / "grown")[1].get_vocab() == tokenizer.get_vocab()
    config = json.loads((tmp_path / "c" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "c" / "config.json").write_text(json.dumps(config | {"eos_token_id": 999}), encoding="utf-8")
    with pytest.raises(TokenizerError, match="has no end-of-text token"):
        load_checkpoint(tmp_path / "c")


def test_growing_needs_no_tokenizer(tmp_path):
    large = make_tokenizer("bytes", [])
    save_checkpoint(tmp_path / "large", tiny(vocab_size=200), large)
    large.eos_token = None
    save_checkpoint(tmp_path / "endless", tiny(vocab_size=300), large)
    save_checkpoint(
        tmp_path / "odd", tiny(vocab_size=300), None, extra=lambda f: (f / "tokenizer.json").write_text("?")
    )
    for name in ("large", "endless", "odd"):
        folder = act(tmp_path / name, tmp_path / f"{name}-grown", grown)
        for file in (tmp_path / name).glob("tokenizer*"):
            assert file.read_bytes() == (folder / file.name).read_bytes()
        with pytest.raises((TokenizerError, CheckpointError)):
            load_checkpoint(folder)


# --- digests


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "optimizer.pt"])
def test_one_changed_byte_anywhere_is_found(name, tmp_path):
    states = {"model.norm.weight": {"exp_avg": torch.ones(64)}}
    save_checkpoint(
        tmp_path / "c",
        tiny(vocab_size=300),
        make_tokenizer("bytes", []),
        extra=lambda f: torch.save(states, f / "optimizer.pt"),
    )
    verify_checkpoint(tmp_path / "c")
    (tmp_path / "c" / "README.md").write_text("Rewritten by the Hub.", encoding="utf-8")
    (tmp_path / "c" / "LICENSE").touch()
    verify_checkpoint(tmp_path / "c")
    file = tmp_path / "c" / name
    content = file.read_bytes()
    changes = {"config.json": (b'_tau": ', b'_tau": 1'), "optimizer.pt": (content[-300:], b"?" + content[-299:])}
    file.write_bytes(content.replace(*changes.get(name, (b"1", b"2"))))
    with pytest.raises(
        CheckpointError, match=rf"is damaged: {name} has sha256 \w{{12}}…, its lineage says \w{{12}}…; c"
    ):
        verify_checkpoint(tmp_path / "c")
    with pytest.raises(CheckpointError, match=f"is damaged: {name}"):
        act(tmp_path / "c", tmp_path / "grown", lambda s: grown(s, ffn_param_tokens="+3"))
    file.unlink()
    if name == "optimizer.pt":  # which is not published
        verify_checkpoint(tmp_path / "c")
    else:
        with pytest.raises(CheckpointError, match=f"(is incomplete: {name} missing|no checkpoint at)"):
            verify_checkpoint(tmp_path / "c")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["c"]


def test_files_written_are_not_read_again_to_be_verified(tmp_path, monkeypatch):
    from tokenformer.checkpoints import verify
    from tokenformer.cli.tables import stage_row

    save_checkpoint(tmp_path / "c", tiny(), None, Lineage().then("train", loss=1.5))
    monkeypatch.setattr(verify, "weights_digest", lambda path: pytest.fail(f"{path} is hashed"))
    stage_row("one", tmp_path / "c")


# --- configurations for older versions


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_the_rotary_base_is_written_where_older_versions_look(theta, tmp_path):
    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": theta}
    configs = {
        "plain": (LlamaConfig(**LLAMA, rope_theta=theta), {"rope_theta": theta}),
        "scaled": (
            LlamaConfig(**LLAMA, rope_parameters=scaling),
            {"rope_theta": theta, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        "neox": (
            GPTNeoXConfig(**SIZES, intermediate_size=56, rotary_emb_base=theta, rotary_pct=0.5),
            {"rotary_emb_base": theta, "rotary_pct": 0.5},
        ),
    }
    for name, (config, older) in configs.items():
        model = ordinary(config)
        save_checkpoint(tmp_path / name, model)
        act(tmp_path / name, tmp_path / f"{name}-grown", grown)
        for folder in (tmp_path / name, tmp_path / f"{name}-grown"):
            fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            assert {field: fields.get(field) for field in older} == older
            assert load_checkpoint(folder)[0].config.rope_parameters == config.rope_parameters
            assert torch.equal(theirs(folder), logits(model))
    shutil.rmtree(tmp_path / "plain")


def test_the_rotary_bases_of_two_kinds_of_block(tmp_path):
    from tokenformer.checkpoints.checkpoint import _add_older_rope_fields

    Gemma3TextConfig(**LLAMA, head_dim=16).save_pretrained(tmp_path)
    wanted = Gemma3TextConfig.from_pretrained(tmp_path).rope_parameters
    _add_older_rope_fields(tmp_path / "config.json")
    fields = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (fields["rope_theta"], fields["rope_local_base_freq"]) == (1_000_000.0, 10_000.0)
    assert Gemma3TextConfig.from_pretrained(tmp_path).rope_parameters == wanted
