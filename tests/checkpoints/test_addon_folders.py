"""Add-on folders: tokens beside the linear maps of any model, kept apart and put back to the last bit."""

import json

import pytest
import torch
import zoo
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from typer.testing import CliRunner
from zoo import outputs

from tokenformer import attach, drop, grow, load, save, split
from tokenformer.cli import app as cli
from tokenformer.errors import CheckpointError, GrowthError
from tokenformer.growth.beside import names_beside
from tokenformer.growth.sites import sites


def taught(kind, name="new", at="all-linear", dtype=torch.float32, gate=False):
    model = zoo.make(kind, dtype)
    grow(model, at=at, tokens=4, name=name, seed=1)
    with torch.no_grad():
        for layer in sites(model).values():
            layer.groups[name].values.weight.normal_(std=0.3)
            if gate:
                layer.add_gate(name)
                layer.gates[name].weight.normal_()
    return model


@torch.no_grad()
@pytest.mark.parametrize("kind", zoo.MODELS)
def test_round_trip(kind, tmp_path):
    model = taught(kind, gate=kind == "bert")
    split(model, "new", tmp_path / "new")
    again = zoo.make(kind)
    attach(again, tmp_path / "new")
    assert torch.equal(outputs(again), outputs(model))
    attach(again, tmp_path / "new", name="twice")
    assert names_beside(again) == ["new", "twice"]
    drop(again, ["twice"])
    split(again, "new", tmp_path / "again")
    files = [load_file(tmp_path / folder / "addon_model.safetensors") for folder in ("new", "again")]
    assert files[0].keys() == files[1].keys() and all(torch.equal(files[0][n], files[1][n]) for n in files[0])


@torch.no_grad()
def test_loading_an_add_on_loads_its_parent(tmp_path):
    zoo.make("llama").save_pretrained(tmp_path / "parent")
    model = type(zoo.make("llama")).from_pretrained(tmp_path / "parent")
    grow(model, at="q_proj", tokens=4, name="new", seed=1)
    split(model, "new", tmp_path / "new")
    found, tokenizer, _ = load(tmp_path / "new")
    assert tokenizer is None and torch.equal(outputs(found), outputs(model)) and names_beside(found) == ["new"]
    save(tmp_path / "whole", found)
    whole, _, _ = load(tmp_path / "whole")
    assert torch.equal(outputs(whole), outputs(model)) and names_beside(whole) == ["new"]
    (tmp_path / "parent").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match=r"parent of add-on .* cannot be loaded.*load it yourself"):
        load(tmp_path / "new")
    split(taught("llama"), "new", tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"does not say where its parent"):
        load(tmp_path / "nowhere")


@torch.no_grad()
def test_another_parent_is_refused(tmp_path):
    split(taught("llama"), "new", tmp_path / "new")
    other = zoo.make("llama")
    other.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    with pytest.raises(GrowthError, match=r"layers.1.mlp.up_proj.weight differs \(1 tensor differ and 0 are missing"):
        attach(other, tmp_path / "new")
    with pytest.raises(GrowthError, match=r"belongs to another parent"):
        attach(zoo.make("bert"), tmp_path / "new")
    with pytest.raises(GrowthError, match=r"belongs to another parent.*in the type"):
        attach(zoo.make("llama", torch.bfloat16), tmp_path / "new")
    assert not sites(other)
    taken = taught("llama")
    with pytest.raises(GrowthError, match=r"token group 'new' exists already"):
        attach(taken, tmp_path / "new")


@torch.no_grad()
# peft 0.21 still asks transformers 5.23 for the old name of activation checkpointing.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_parent_whose_maps_lora_wraps(tmp_path):
    model = taught("llama", at="q_proj|v_proj")
    split(model, "new", tmp_path / "new")
    lora = LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    after, before = get_peft_model(zoo.make("llama"), lora), get_peft_model(model, lora)
    attach(after, tmp_path / "new")
    before.load_state_dict({n: t for n, t in after.state_dict().items() if ".lora_" in n}, strict=False)
    torch.testing.assert_close(outputs(after), outputs(before))
    with before.disable_adapter():
        alone = outputs(before)
    with after.disable_adapter():
        assert torch.equal(outputs(after), alone)
    drop(after, ["new"])
    drop(before, ["new"])
    assert torch.equal(outputs(after), outputs(before))


@torch.no_grad()
def test_a_quantised_parent_is_compared_where_it_is_not(tmp_path):
    split(taught("llama", at="q_proj"), "new", tmp_path / "new")
    model = zoo.make("llama")
    quantize_(model.model, Int8WeightOnlyConfig(version=2))
    attach(model, tmp_path / "new")
    assert names_beside(model) == ["new"]
    split(model, "new", tmp_path / "from_int8")
    other = zoo.make("llama")
    other.model.norm.weight += 1
    for addon in ("new", "from_int8"):
        with pytest.raises(GrowthError, match=r"model.norm.weight differs"):
            attach(other, tmp_path / addon)
    plain = zoo.make("llama")
    attach(plain, tmp_path / "from_int8")
    assert torch.equal(outputs(plain), outputs(taught_like(plain)))


def taught_like(model):
    again = zoo.make("llama")
    for site, layer in sites(model).items():
        grow(again, at=site.replace(".", r"\."), tokens=4, name="x" if not sites(again) else f"x{len(sites(again))}")
        group = next(iter(sites(again)[site].groups.values()))
        group.keys.weight.copy_(layer.groups["new"].keys.weight)
        group.values.weight.copy_(layer.groups["new"].values.weight)
    return again


def test_damage_is_found(tmp_path):
    file = split(taught("bert"), "new", tmp_path / "new") / "addon_model.safetensors"
    with pytest.raises(CheckpointError, match=r"exists already"):
        split(taught("bert"), "new", tmp_path / "new")
    split(taught("bert"), "new", tmp_path / "new", force=True)
    config = tmp_path / "new" / "addon_config.json"
    whole, said = file.read_bytes(), config.read_text()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"is damaged"):
        attach(zoo.make("bert"), tmp_path / "new")
    file.write_bytes(whole[:100])
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        attach(zoo.make("bert"), tmp_path / "new")
    save_file(load_file_of(whole, tmp_path), file)  # as another tool would write it
    with pytest.raises(CheckpointError, match=r"cannot be read"):
        attach(zoo.make("bert"), tmp_path / "new")
    file.write_bytes(whole)
    fields = json.loads(said)
    fields["sites"].popitem()
    config.write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"is damaged"):
        attach(zoo.make("bert"), tmp_path / "new")


def load_file_of(content, folder):
    (folder / "copy.safetensors").write_bytes(content)
    return load_file(folder / "copy.safetensors")


def run(*arguments):
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_commands(tmp_path):
    zoo.make("bert").save_pretrained(tmp_path / "bert")
    found = run(
        "grow", tmp_path / "bert", "--at", "query|value", "--tokens", 4, "--name", "new", "-o", tmp_path / "new"
    )
    assert found.exit_code == 0 and "beside 4 linear maps" in found.output
    found = run("grow", tmp_path / "bert", "--at", "query=3", "--at", "value=2", "-o", tmp_path / "two")
    assert found.exit_code == 0
    shown = json.loads(run("inspect", tmp_path / "two", "--json").output)
    assert sorted(site["tokens"] for site in shown["sites"].values()) == [2, 2, 3, 3]
    assert shown["parameters"] == 2 * (3 + 2) * (32 + 32)
    for command, message in (
        (("drop", tmp_path / "new", "new", "-o", tmp_path / "x"), "is an add-on"),
        (("grow", tmp_path / "bert", "--tokens", 4, "-o", tmp_path / "x"), "--at and --tokens go together"),
        (("grow", tmp_path / "bert", "--at", "query", "--ffn", "+4", "-o", tmp_path / "x"), "and alone"),
        (("attach", tmp_path / "bert", tmp_path / "new", "-o", tmp_path / "x"), "no ordinary checkpoint can hold"),
        (("inspect", tmp_path / "new", "--prompt", "a"), "is an add-on"),
        (("grow", tmp_path / "bert", "--at", "query", "-o", tmp_path / "x"), "tokens is None"),
    ):
        found = run(*command)
        assert message in str(found.exception) and not (tmp_path / "x").exists()
