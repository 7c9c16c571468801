"""Commands that are killed, and files that want to do harm: what `make torture` does, a little of it."""

import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import hostile
import mutations
import torture
from tiny_models import tiny

from tokenformer.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.checkpoints.optimizer import load_states
from tokenformer.checkpoints.verify import config_fields, weight_files
from tokenformer.convert.files import convert_official, convert_to_official
from tokenformer.errors import CheckpointError, ConversionError, RecipeError
from tokenformer.sections import load_yaml, parse_sections
from tokenformer.training.model import ModelSection
from tokenformer.training.recipe import load_recipe

sys.path.pop(0)
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_twenty_kills_and_twenty_full_disks_lose_nothing(tmp_path):
    lines = []
    assert torture.torture(20, 20, 1, tmp_path, lines.append) == []
    assert {line["command"] for line in lines} == set(torture.WEIGHTS)
    assert sum(line["times"] for line in lines if line["fault"] == "kill -9") >= 20
    assert {line["way"] for line in lines} == {*torture.WAYS, *torture.DISKS}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and asks /proc for memory")
def test_hostile_files_are_refused(tmp_path):
    hostile.write_corpus(tmp_path / "corpus")
    for number, name in enumerate(hostile.KINDS):
        found = hostile.attack(name, tmp_path / "corpus", tmp_path / str(number), inputs=15, seed=1)
        assert not found["problems"], (name, found["problems"])
        assert sum(found["outcomes"].values()) == 15


# What was found, or thought of, and read before as if it were harmless.


@pytest.mark.parametrize("text", [*mutations.ODD_YAML, f"seed: {'9' * 5000}", f"seed: {mutations.laughs()}"])
def test_yaml_that_no_recipe_can_mean(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text if ":" in text else f"seed: {text}", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load_recipe(tmp_path / "recipe.yaml")


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "model.bin", 5, None, "", "a/b.safetensors"])
def test_an_index_names_weight_files_in_its_own_folder_alone(tmp_path, name):
    (tmp_path / "c").mkdir()
    (tmp_path / "outside.safetensors").touch()
    index = {"weight_map": {"w": name}}
    (tmp_path / "c" / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"index\.json: it names .*, which is no \*\.safetensors in this folder"):
        weight_files(tmp_path / "c")


def test_optimizers_that_are_larger_than_their_files(tmp_path):
    for number, odd in enumerate(mutations.odd_pickles()):
        for new in (True, False):
            torch.save(odd, tmp_path / "optimizer.pt", _use_new_zipfile_serialization=new)
            with pytest.raises(CheckpointError, match=r"optimizer\.pt .* cannot be read"):
                load_states(tmp_path)
                pytest.fail(f"{number} was read")
    assert [path.name for path in tmp_path.iterdir()] == ["optimizer.pt"]  # and nothing ran
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(mutations.Call(print, "ran")))
    with pytest.raises(CheckpointError, match=r"more than tensors \(.*print\), which could run code"):
        load_states(tmp_path)


def test_configurations_that_describe_far_more_than_the_files_hold(tmp_path):
    save_checkpoint(tmp_path / "c", tiny("ffn"))
    (tmp_path / "c" / "lineage.json").unlink()
    file = tmp_path / "c" / "config.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    for field, value, message in (
        ("num_hidden_layers", 10**9, r"num_hidden_layers is 1000000000, and here there can be at most \d+ blocks"),
        ("vocab_size", 10**9, r"describes 64,\d+,\d+,\d+ parameters, and the files hold \d+"),
    ):
        file.write_text(json.dumps({**fields, field: value}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=message):
            load_checkpoint(tmp_path / "c")
    with pytest.raises(ValueError, match="num_hidden_layers is 1000000000, and here there can be at most 2,000"):
        parse_sections(ModelSection, {"num_hidden_layers": 10**9}, where="recipe").config()


@pytest.mark.parametrize("change", [{"num_layers": 10**9}, {"rotary_emb_base": "x"}, {"attention_config": [3]}])
def test_an_official_configuration_of_the_wrong_kinds(tmp_path, change):
    save_checkpoint(tmp_path / "c", tiny("paper"))
    described = convert_to_official(tmp_path / "c", tmp_path / "official.bin")
    described.write_text(yaml.safe_dump({**load_yaml(described), **change}), encoding="utf-8")
    with pytest.raises(ConversionError, match=r"official\.yml describes no TokenFormer: "):
        convert_official(tmp_path / "official.bin", described, tmp_path / "out")


def test_a_configuration_larger_than_any(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"x": "y" * 20_000_000}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json: it has 20,000,\d+ bytes, and none that we know"):
        config_fields(tmp_path)
