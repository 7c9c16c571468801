"""Official checkpoints in and out: golden outputs, the released sizes, every way in which a file can be wrong."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import official_reference
import pytest
import torch
import yaml
from golden_data import FOLDER, MANIFEST, formula, inputs, outputs
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_models import tiny, tokens
from typer.testing import CliRunner

from tokenformer import TokenformerConfig, TokenformerForCausalLM, grow
from tokenformer.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.checkpoints.verify import weights_digest
from tokenformer.cli import app as cli
from tokenformer.convert.files import convert_official, convert_to_official, read_official
from tokenformer.convert.official import config_from_official, express, official_tensors
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.errors import CheckpointError, ConversionError, TokenizerError
from tokenformer.models.pattention import pattention

RELEASED = ("150M", "450M", "900M", "1-5B")
LISTINGS = json.loads((FOLDER / "official_state_dicts.json").read_text())


def golden_case(letter="M"):
    """State dict, YAML fields and text tokens of a whole-model golden case."""
    state = {n.removeprefix("case_m."): t for n, t in inputs(letter).items() if "sequential" in n}
    return state, official_reference.fields(**MANIFEST["cases"][letter]["config"]), MANIFEST["cases"][letter]["tokens"]


def fields_of(listing):
    """YAML fields of an official listing."""
    names = {"layers": "num_layers", "hidden": "hidden_size", "heads": "num_attention_heads", "seq": "seq_length"}
    names |= {name: f"{name}_slot_num" for name in ("qkv", "proj", "ffn")}
    return official_reference.fields(**{name: listing["config"][theirs] for name, theirs in names.items()})


def write(folder, state, fields):
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "eval.yml").write_text(yaml.safe_dump(fields))
    return folder / "pytorch_model.bin", folder / "eval.yml"


def in_layers(state, folder):
    """Save a state dict as DeepSpeed's pipeline does: a file a module, named after its number."""
    folder.mkdir(parents=True)
    for i in {int(name.split(".")[1]) for name in state}:
        prefix = f"sequential.{i}."
        part = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        torch.save(part, folder / f"layer_{i:02d}-model_00-model_states.pt")


@pytest.mark.parametrize("letter", ["M", "M_gelu_l2_norm", "M_softmax"])
def test_golden_logits(letter, tmp_path):
    state, fields, ids = golden_case(letter)
    convert_official(*write(tmp_path, state, fields), tmp_path / "ours")
    model, _, lineage = load_checkpoint(tmp_path / "ours")
    torch.testing.assert_close(model(torch.tensor(ids)).logits, outputs(letter)["logits"], rtol=0, atol=5e-5)
    assert lineage.last.operation == "convert" and len(lineage.last.parent) == 64
    reference = official_reference.logits(state, fields, torch.tensor(ids))
    torch.testing.assert_close(reference, outputs(letter)["logits"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", LISTINGS)
def test_every_official_listing_is_met(name):
    listing = LISTINGS[name]
    fields = fields_of(listing)
    config = config_from_official(fields, vocab_size=listing["padded_vocab_size"])
    table = official_tensors(config)
    assert {name: list(shape) for name, (_, shape, _) in table.items()} == listing["state_dict"]
    with torch.device("meta"):
        model = TokenformerForCausalLM(config)
    ours = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert ours == {n: shape[::-1] if transposed else shape for n, shape, transposed in table.values()}


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_released_sizes_with_closed_form_weights(name, tmp_path):
    """Full size: logits against an independent reference, and memory, measured in a process of its own."""
    listing = LISTINGS[f"tokenformer/{name}_eval.yml"]
    sizes, dtype = listing["config"], torch.float16 if name == "1-5B" else torch.float32
    fields = fields_of(listing)
    value_std = 2 / (sizes["num_layers"] * sizes["hidden_size"] ** 0.5)
    state = {
        n: formula(f"full.{n}", shape, value_std if "value_param" in n else 0.02, float("norm.weight" in n)).to(dtype)
        for n, shape in listing["state_dict"].items()
    }
    weights, config = write(tmp_path, state, fields)
    # VmHWM, in KiB: getrusage's figure starts from that of this process.
    program = (
        "import re, sys; from tokenformer.convert.files import convert_official\n"
        "convert_official(*sys.argv[1:])\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, weights, config, tmp_path / "ours"]
    peak = 1024 * int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert peak < max(1.3 * weights.stat().st_size, 1.5e9)
    weights.unlink()
    model = load_checkpoint(tmp_path / "ours", dtype=torch.float32)[0]
    assert sum(p.numel() for p in model.parameters()) == listing["parameters"]
    ids = torch.randint(0, 50304, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got = model(ids).logits
        del model
        want = official_reference.logits({n: t.float() for n, t in state.items()}, fields, ids)
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "module.", "module.module.sequential."])
def test_prefixes_and_wrappers(prefix, tmp_path):
    state, fields, _ = golden_case()
    _, config = write(tmp_path, state, fields)
    renamed = {prefix + name.removeprefix("sequential."): t for name, t in state.items()}
    torch.save({"module": renamed, "iteration": 7, "args": {"lr": 1e-3}}, tmp_path / "mp_rank_00_model_states.pt")
    convert_official(tmp_path / "mp_rank_00_model_states.pt", config, tmp_path / "a")
    convert_official(tmp_path / "pytorch_model.bin", config, tmp_path / "b")
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


@pytest.mark.parametrize("where", ["", "global_step600000"])
@pytest.mark.parametrize("latest", [True, False])
def test_layer_files(where, latest, tmp_path):
    state, fields, _ = golden_case()
    weights, config = write(tmp_path, state, fields)
    in_layers(state, tmp_path / "run" / where)
    if latest and where:
        (tmp_path / "run" / "global_step1").mkdir()
        (tmp_path / "run" / "latest").write_text(where)
    convert_official(weights, config, tmp_path / "a")
    convert_official(tmp_path / "run", config, tmp_path / "b")
    assert weights_digest(tmp_path / "a") == weights_digest(tmp_path / "b")


def test_half_precision_stays_and_old_pickles_are_read(tmp_path):
    state, fields, _ = golden_case()
    weights, config = write(tmp_path, {n: t.half() for n, t in state.items()}, fields)
    torch.save(torch.load(weights), weights, _use_new_zipfile_serialization=False)
    convert_official(weights, config, tmp_path / "ours")
    model = load_checkpoint(tmp_path / "ours")[0]
    assert model.dtype == torch.float16
    values = state["sequential.3.mlp.value_param_tokens"].half()
    assert torch.equal(model.model.layers[1].mlp.groups["base"].values.weight, values.T)


def test_shards_hold_what_one_file_holds(tmp_path, monkeypatch):
    state, fields, _ = golden_case()
    weights, config = write(tmp_path, state, fields)
    convert_official(weights, config, tmp_path / "whole")
    monkeypatch.setattr("tokenformer.checkpoints.checkpoint._SHARD_BYTES", 100_000)
    seen = []
    convert_official(weights, config, tmp_path / "shards", on_progress=lambda *numbers: seen.append(numbers))
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    total = sum(t.nbytes for t in state.values())
    assert len(files) > 3 and seen[0] == (0, total) and seen[-1] == (total, total)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    parts = {n: t for file in files for n, t in load_file(file).items()}
    assert whole.keys() == parts.keys() and all(torch.equal(whole[n], parts[n]) for n in whole)
    assert torch.equal(
        load_checkpoint(tmp_path / "shards")[0](tokens()).logits,
        load_checkpoint(tmp_path / "whole")[0](tokens()).logits,
    )


def test_tokenizer_is_kept_and_its_ids_go_into_the_configuration(tmp_path):
    state, fields, _ = golden_case()
    state["sequential.0.word_embeddings.weight"] = torch.randn(384, 64)
    weights, config = write(tmp_path, state, fields)
    make_tokenizer("bytes", None).save_pretrained(tmp_path / "bytes")
    for i, spec in enumerate((tmp_path / "bytes", tmp_path / "bytes" / "tokenizer.json")):
        convert_official(weights, config, tmp_path / f"ours{i}", tokenizer=spec)
        model, tokenizer, _ = load_checkpoint(tmp_path / f"ours{i}")
        assert tokenizer.decode(tokenizer("ünï")["input_ids"]) == "ünï"
        assert model.config.eos_token_id == tokenizer.eos_token_id == 0


def test_round_trip_is_the_same_file(tmp_path):
    state, fields, _ = golden_case()
    convert_official(*write(tmp_path, state, fields), tmp_path / "ours")
    described = convert_to_official(tmp_path / "ours", tmp_path / "back" / "model.bin")
    back = torch.load(tmp_path / "back" / "model.bin", weights_only=True)
    assert back.keys() == state.keys() and all(torch.equal(back[n], state[n]) for n in state)
    again = yaml.safe_load(described.read_text())
    assert {n: again[n] for n in fields if n != "tokenizer-type"} == {
        n: v for n, v in fields.items() if n != "tokenizer-type"
    }


@settings(max_examples=200, deadline=None)
@example(kind="l2_norm_gelu", counts=[3, 12], width=9, tau=23**0.5, seed=0)  # τ² falls just short of 23
@given(
    kind=st.sampled_from(["l2_norm_gelu", "gelu_l2_norm", "softmax"]),
    counts=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    width=st.integers(1, 9),
    tau=st.one_of(st.integers(1, 40).map(lambda n: n**0.5), st.floats(0.3, 7)),
    seed=st.integers(0, 2**20),
)
def test_any_groups_and_tau_can_be_expressed(kind, counts, width, tau, seed):
    """One group under the official code's τ computes what several groups under a constant τ do."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # Scores of at most a few: GELU of less than -38 is exactly 0, and the official code has no eps for a row of those.
    keys, values = [0.3 * draw(n, width) for n in counts], [draw(5, n) for n in counts]
    x = draw(4, width)
    want = pattention(x, keys, values, tau=tau, norm_activation_type=kind, eps=0.0)
    k, v = express(keys, values, tau=tau, norm_activation_type=kind)
    s = x @ k.T
    if kind == "softmax":
        weights = s.softmax(-1) * len(k)
    elif kind == "gelu_l2_norm":
        weights = torch.nn.functional.gelu(s)
        weights = weights / weights.norm(dim=-1, keepdim=True) * len(k) ** 0.5
    else:
        weights = torch.nn.functional.gelu(s / s.norm(dim=-1, keepdim=True) * len(k) ** 0.5)
    torch.testing.assert_close(weights @ v, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["l2_norm_gelu", "gelu_l2_norm"])
def test_a_grown_model_keeps_its_function_in_the_official_code(kind, tmp_path):
    model = tiny(norm_activation_type=kind)
    grow(model, qkv_param_tokens="+16", ffn_param_tokens="+100%", num_hidden_layers="+1")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    save_checkpoint(tmp_path / "ours", model, None, Lineage())
    described = convert_to_official(tmp_path / "ours", tmp_path / "model.bin")
    state, fields = torch.load(tmp_path / "model.bin"), yaml.safe_load(described.read_text())
    with torch.no_grad():
        got = official_reference.logits(state, fields, tokens())
        torch.testing.assert_close(got, model(tokens()).logits, rtol=0, atol=1e-4)


def without(name):
    return lambda state, fields: (state.pop(name) if name in state else fields.pop(name), None)[1]


def change(**new):
    return lambda state, fields: fields.update(new)


def tensor(name, value):
    return lambda state, fields: state.update({name: value})


MLP = "sequential.2.mlp.key_param_tokens"
BUFFER = "sequential.2.attention.rotary_emb.inv_freq"
FREQUENCIES = 10000.0 ** -(torch.arange(0, 4, 2) / 4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(MLP), r"1 missing: sequential\.2\.mlp\.key_param_tokens"),
        (without("sequential.0.word_embeddings.weight"), "holds no sequential.0.word_embeddings.weight"),
        (tensor("sequential.3.attention.query_key_value.weight", torch.ones(3, 3)), "1 unknown: .*query_key_value"),
        (tensor("optimizer", torch.ones(1)), "1 unknown: optimizer"),
        (tensor(MLP, torch.ones(200, 64)), r"mlp.key_param_tokens is \[200, 64\], the YAML says \[256, 64\]"),
        (tensor(MLP, torch.ones(256, 64, dtype=torch.int64)), "1 not of floating point"),
        (tensor(MLP, "a string"), "holds a str as sequential.2.mlp"),
        (tensor("module.2.mlp.key_param_tokens", torch.ones(1)), "mlp.key_param_tokens twice"),
        (tensor(BUFFER, FREQUENCIES * 1.1), "this is not the YAML of this checkpoint"),
        (change(num_layers=4), "12 missing"),
        (change(hidden_size=128), r"of other shapes: .*the YAML says \[\d+, 128\]"),
        (change(num_layers=2), "12 unknown"),
        (change(hidden_size=66), "66 is not a multiple of num_attention_heads 4"),
        (change(num_layers="three"), "describes no TokenFormer"),
        (change(norm="layernorm"), "has norm 'layernorm'; .* has 'layernorm_nonparam'"),
        (change(pos_emb="learned"), "has pos_emb 'learned'"),
        (change(no_weight_tying=True), "no_weight_tying True"),
        (change(attention_config=[[["global"], 3]]), "its blocks are .'global'."),
        (without("attention_config"), "its blocks are .'global'."),
        (without("ffn_slot_num"), "does not say ffn_slot_num"),
        (change(norm_activation_type="relu"), "must be one of l2_norm_gelu"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_written(damage, message, tmp_path):
    state, fields, _ = golden_case()
    damage(state, fields)
    weights, config = write(tmp_path, state, fields)
    with pytest.raises(ConversionError, match=message):
        convert_official(weights, config, tmp_path / "ours")
    assert {p.name for p in tmp_path.iterdir()} == {"pytorch_model.bin", "eval.yml"}


def test_rotary_buffers_are_checked_and_counted(tmp_path):
    state, fields, _ = golden_case()
    state[BUFFER] = FREQUENCIES.half()
    lineage = convert_official(*write(tmp_path, state, fields), tmp_path / "ours")
    assert lineage.last.arguments["rotary_buffers_checked"] == 1


class _Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("new_format", [True, False])
def test_code_in_a_pickle_does_not_run(new_format, tmp_path):
    state, fields, _ = golden_case()
    weights, config = write(tmp_path, state, fields)
    torch.save({**state, "x": _Code(tmp_path / "ran")}, weights, _use_new_zipfile_serialization=new_format)
    with pytest.raises(ConversionError, match=r"holds more than tensors \(posix\.mkdir\)"):
        convert_official(weights, config, tmp_path / "ours")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()


@pytest.mark.parametrize("new_format", [True, False])
def test_whatever_is_damaged_in_a_file_is_told_in_a_sentence(new_format, tmp_path):
    file, dice = tmp_path / "pytorch_model.bin", random.Random(0)
    tensors = {"a": torch.ones(20), "b": {"c": torch.zeros(3, 4)}}
    torch.save({"module": tensors}, file, _use_new_zipfile_serialization=new_format)
    content, refused = file.read_bytes(), 0
    for _ in range(400):
        damaged = bytearray(content)
        for _ in range(3):
            damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        file.write_bytes(damaged[: dice.randrange(len(damaged))] if dice.random() < 0.2 else damaged)
        try:
            read_official([file])
        except ConversionError:
            refused += 1
    assert refused > 100


def half_of(weights):
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (half_of, r"its end is missing \(\d+,\d+ bytes are there\); download it again"),
        (lambda file: file.write_bytes(b""), "is no PyTorch checkpoint"),
        (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "Git LFS pointer"),
        (lambda file: file.write_text("<html>404</html>"), "is no PyTorch checkpoint .begins with b'<html>40'"),
        (lambda file: torch.save([1, 2], file), "holds a list, not named tensors"),
        (lambda file: file.unlink(), "there is no .*pytorch_model.bin"),
        (lambda file: (file.unlink(), file.mkdir()), "holds no layer_XX-model_00-model_states.pt, only nothing"),
    ],
)
def test_damaged_files(spoil, message, tmp_path):
    weights, config = write(tmp_path, *golden_case()[:2])
    spoil(weights)
    with pytest.raises(ConversionError, match=message):
        convert_official(weights, config, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_flipped_bytes_inside_a_whole_archive_are_found(tmp_path):
    weights, config = write(tmp_path, *golden_case()[:2])
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0xFF
    weights.write_bytes(content)
    with pytest.raises(ConversionError, match="does not match its checksum"):
        convert_official(weights, config, tmp_path / "ours")


def test_folders_that_leave_a_choice(tmp_path):
    state, fields, _ = golden_case()
    _, config = write(tmp_path, state, fields)
    for step in (1, 2):
        in_layers(state, tmp_path / "run" / f"global_step{step}")
    with pytest.raises(ConversionError, match="2 checkpoints; name one: global_step1, global_step2"):
        convert_official(tmp_path / "run", config, tmp_path / "ours")
    torch.save({}, tmp_path / "run" / "global_step1" / "layer_02-model_01-model_states.pt")
    with pytest.raises(ConversionError, match="split over 2 model-parallel processes"):
        convert_official(tmp_path / "run" / "global_step1", config, tmp_path / "ours")


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1, 2]", "holds list"), ("a: [", "not valid YAML"), (None, "No such file"), ("a: 1", "does not say num_layers")],
)
def test_yaml_that_is_none(content, message, tmp_path):
    weights, config = write(tmp_path, *golden_case()[:2])
    config.unlink() if content is None else config.write_text(content)
    with pytest.raises(ConversionError, match=message):
        convert_official(weights, config, tmp_path / "ours")


def test_a_tokenizer_that_does_not_fit(tmp_path):
    weights, config = write(tmp_path, *golden_case()[:2])
    make_tokenizer("bytes", None).save_pretrained(tmp_path / "bytes")
    with pytest.raises(TokenizerError, match="needs 257 rows of the model's embedding, which has 128"):
        convert_official(weights, config, tmp_path / "ours", tokenizer=tmp_path / "bytes")
    with pytest.raises(TokenizerError, match=r"neither .* a tokenizer\.json"):
        convert_official(weights, config, tmp_path / "ours", tokenizer="no/such")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("ffn", {}, "its qkv projection has a linear map; its output projection has a linear map"),
        ("paper", {"linear_projections": ["ffn"]}, "its ffn projection has a linear map"),
        (
            "paper",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            r"rotary embedding is scaled \(linear\)",
        ),
        ("paper", {"tie_word_embeddings": False}, "not tied"),
        ("paper", {"use_qk_norm": True}, "its queries and keys are normalised"),
        ("paper", {"use_embedding_norm": True}, "its embeddings are normalised"),
        ("paper", {"elementwise_affine": True}, "norms in its blocks have weights and biases"),
        ("paper", {"norm_activation_type": "gelu_l1_norm"}, "by 'gelu_l1_norm'"),
    ],
)
def test_what_the_official_code_cannot_express(family, changes, message, tmp_path):
    save_checkpoint(tmp_path / "ours", tiny(family, **changes), None, Lineage())
    with pytest.raises(ConversionError, match=message):
        convert_to_official(tmp_path / "ours", tmp_path / "model.bin")
    assert {p.name for p in tmp_path.iterdir()} == {"ours"}


def test_nothing_is_overwritten(tmp_path):
    weights, config = write(tmp_path, *golden_case()[:2])
    convert_official(weights, config, tmp_path / "ours")
    before = weights.read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        convert_official(weights, config, tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin exists already"):
        convert_to_official(tmp_path / "ours", weights)
    assert weights.read_bytes() == before and not weights.with_suffix(".yml").exists()
    convert_official(weights, config, tmp_path / "ours", force=True)
    convert_to_official(tmp_path / "ours", weights, force=True)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        convert_to_official(tmp_path / "nothing", tmp_path / "model.bin")


def test_command_line_both_ways(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, *golden_case()[:2])
    done = CliRunner().invoke(
        cli.app, ["convert", "official", "pytorch_model.bin", "--config", "eval.yml", "-o", "ours"]
    )
    assert done.exit_code == 0, done.output
    assert "Written: ours" in done.output and "--tokenizer keeps" in done.output and " k " in done.output
    model, _, _ = load_checkpoint("ours")
    grow(model, ffn_param_tokens="+100%", name="more")
    save_checkpoint("grown", model, None, Lineage())
    done = CliRunner().invoke(cli.app, ["convert", "to-official", "grown", "-o", "grown.bin"])
    assert done.exit_code == 0, done.output
    assert "ffn: each map was given 64 parameter tokens without value, because" in done.output
    assert "Written: grown.bin and grown.yml" in done.output
    with pytest.raises(CheckpointError, match="ours exists already"):
        CliRunner().invoke(
            cli.app,
            ["convert", "official", "pytorch_model.bin", "--config", "eval.yml", "-o", "ours"],
            catch_exceptions=False,
        )


def test_config_without_package_defaults():
    """Fields that the YAML leaves out take the official code's defaults, not ours."""
    fields = official_reference.fields(layers=1, hidden=64, heads=4, qkv=8, proj=8, ffn=8)
    del fields["rotary_pct"]
    config = config_from_official(fields, vocab_size=128)
    assert isinstance(config, TokenformerConfig) and config.rope_parameters["partial_rotary_factor"] == 1.0
    assert Path(config.auto_map["AutoModel"]).stem == "modeling_tokenformer"
