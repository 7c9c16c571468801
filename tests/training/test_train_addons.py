"""Training tokens beside an ordinary model's maps from a recipe: stages become add-ons that stack, and resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import zoo
from group_operations import run_and_kill
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Mamba2ForCausalLM
from typer.testing import CliRunner

from tokenformer import drop, load
from tokenformer.checkpoints.beside import read_addon
from tokenformer.checkpoints.verify import read_lineage
from tokenformer.cli import app as cli
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.errors import CheckpointError, GrowthError, RecipeError, TokenizerError
from tokenformer.growth.beside import names_beside
from tokenformer.training.log import read_log
from tokenformer.training.recipe import parse_recipe
from tokenformer.training.train import train

A = {"text_tokens": 640, "at": "q_proj|v_proj", "tokens": 4, "name": "first"}
B = {"text_tokens": 640, "at": {"up_proj": 3, "down_proj": 2}, "name": "second"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An ordinary model's folder and a text."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    sizes = {**zoo.SIZES, "vocab_size": 257, "max_position_embeddings": 64}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "parent")
    tokenizer = make_tokenizer("bytes", datasets.Dataset.from_dict({"text": []}))
    tokenizer.save_pretrained(folder / "parent")
    (folder / "text").mkdir()
    for i in range(12):
        (folder / "text" / f"{i:02}.txt").write_text(f"{i} the quick brown fox jumps over the lazy dog. " * 12)
    return folder


def recipe(place, *stages):
    training = {"batch_size": 4, "sequence_length": 32, "save_every": 3, "threads": 1, "precision": "float32"}
    return {
        "model": {"checkpoint": str(place / "parent")},
        "data": {"source": str(place / "text"), "validation_fraction": 0.1},
        "training": {**training, "evaluations_per_stage": 1},
        "stages": list(stages),
    }


@pytest.fixture(scope="module")
def trained(place):
    train(recipe(place, A, B, {"text_tokens": 128}), place / "run")
    return place / "run"


@torch.no_grad()
def test_each_stage_is_an_add_on_of_what_it_was_trained_on(place, trained):
    parent, ids = AutoModelForCausalLM.from_pretrained(place / "parent"), torch.randint(0, 257, (2, 9))
    one, two, three = (load(trained / f"stage{i}") for i in (1, 2, 3))
    assert [names_beside(m) for m, _, _ in (one, two, three)] == [["first"], ["first", "second"], ["first", "second"]]
    assert two[1] is not None and not torch.equal(one[0](ids).logits, parent(ids).logits)
    drop(two[0], ["second"])
    assert torch.equal(two[0](ids).logits, one[0](ids).logits)
    drop(one[0], ["first"])
    assert torch.equal(one[0](ids).logits, parent(ids).logits)
    assert [e.operation for e in three[2].history] == ["grow", "train", "grow", "train", "train"]
    assert three[2].last.text_tokens_seen == 1408 and three[2].last.loss < two[2].last.loss
    assert two[2].history[2].parent == one[2].weights_sha256
    grown = [e for e in read_log(trained) if e["event"] == "growth"]
    assert [e["logits_equal"] for e in grown] == [True, True]
    assert grown[1]["token_groups"] == {"base": 96, "first": 16, "second": 10}
    bases = [read_addon(trained / f"stage{i}")[0].base_model_name_or_path for i in (1, 2, 3)]
    assert bases == [str(place / "parent"), "../stage1", "../stage1"]


def test_the_run_may_move_and_an_earlier_stage_may_not_change(place, trained, tmp_path):
    for stage in ("stage1", "stage2"):
        (tmp_path / stage).mkdir()
        for file in (trained / stage).iterdir():
            (tmp_path / stage / file.name).write_bytes(file.read_bytes())
    assert names_beside(load(tmp_path / "stage2")[0]) == ["first", "second"]
    for file in (trained / "stage2").iterdir():
        (tmp_path / "stage1" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "stage1" / "addon_config.json").read_text())
    config["base_model_name_or_path"] = str(trained / "stage1")
    (tmp_path / "stage1" / "addon_config.json").write_text(json.dumps(config))
    with pytest.raises(GrowthError, match="token group 'second' exists already"):
        load(tmp_path / "stage2")


def test_commands(place, tmp_path):
    (tmp_path / "a.yaml").write_text(json.dumps(recipe(place, {**A, "text_tokens": 128})))
    done = CliRunner().invoke(cli.app, ["train", str(tmp_path / "a.yaml"), "-o", str(tmp_path / "run")])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    assert "first 16" in done.output
    shown = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "run" / "stage1")])
    assert "Lineage" in shown.output and "grow" in shown.output


@pytest.mark.slow
def test_killed_at_any_moment_resumes_to_the_same_bits(place, trained, tmp_path):
    content = recipe(place, A, B, {"text_tokens": 128})

    def go():
        train(content, tmp_path / "run", resume=(tmp_path / "run" / "recipe.yaml").exists())

    kills = 0
    while not run_and_kill(go, 0.4 + kills * 0.4):
        kills += 1
    assert kills >= 1
    for i in (1, 2, 3):
        mine, theirs = (read_addon(folder / f"stage{i}") for folder in (tmp_path / "run", trained))
        assert mine[1].keys() == theirs[1].keys() and mine[2] == theirs[2]
        assert all(torch.equal(mine[1][name], theirs[1][name]) for name in mine[1])
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ([{**A, "at": "q_prj"}], GrowthError, r"stages.0: no linear map .* named 'q_prj'. Near are q_proj"),
        ([{**A, "tokens": None}], GrowthError, r"stages.0: tokens is None"),
        ([{**A, "ffn_param_tokens": "+8"}], GrowthError, r"stages.0: at puts .*grow ffn_param_tokens in a stage"),
        ([A, {**B, "name": "first"}], GrowthError, r"stages.1: token group 'first' exists already"),
        ([A, {"text_tokens": 64, "ffn_param_tokens": "+8"}], GrowthError, r"stages.1: a stage before has put tokens"),
        ([{**A, "frozen": ["base"]}], RecipeError, r"stages.0: frozen is base, but the stage is kept as an add-on"),
        ([{"text_tokens": 64, "tokens": 4}], GrowthError, r"stages.0: tokens=4 goes with at"),
    ],
)
def test_mistakes_are_found_before_anything_is_trained(place, tmp_path, stages, error, message):
    with pytest.raises(error, match=message):
        train(recipe(place, *stages), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_a_recipe_may_begin_with(place, trained, tmp_path):
    content = recipe(place, A)
    with pytest.raises(RecipeError, match="the first stage trains `model`"):
        parse_recipe({**content, "model": {"preset": "1m-modern"}})
    with pytest.raises(RecipeError, match="is an add-on; name its parent"):
        train({**content, "model": {"checkpoint": str(trained / "stage1")}}, tmp_path / "run")


def test_the_parent_brings_the_tokenizer(place, tmp_path):
    AutoModelForCausalLM.from_pretrained(place / "parent").save_pretrained(tmp_path / "bare")
    with pytest.raises(TokenizerError, match="bare has no tokenizer, and an add-on takes that of its parent"):
        train({**recipe(place, A), "model": {"checkpoint": str(tmp_path / "bare")}}, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba2", "from random weights"])
def test_models_outside_the_table_and_models_of_the_recipe(place, tmp_path, kind):
    content = recipe(place, {"text_tokens": 256, "at": "in_proj|q_proj", "tokens": 4, "name": "first"})
    if kind == "mamba2":
        config = zoo.make("mamba2").config
        config.vocab_size = 257
        Mamba2ForCausalLM(config).save_pretrained(tmp_path / "parent")
        make_tokenizer("bytes", datasets.Dataset.from_dict({"text": []})).save_pretrained(tmp_path / "parent")
        content["model"] = {"checkpoint": str(tmp_path / "parent")}
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        content["model"] = {"architecture": "llama", **sizes}
        content["data"]["tokenizer"] = "bytes"
        content["stages"].insert(0, {"text_tokens": 256})
    *_, last = train(content, tmp_path / "run")
    model, tokenizer, lineage = load(last)
    assert names_beside(model) == ["first"] and tokenizer is not None and lineage.last.operation == "train"


def test_an_add_on_without_history_still_loads(trained, tmp_path):
    for file in ("addon_config.json", "addon_model.safetensors"):
        (tmp_path / file).write_bytes((trained / "stage1" / file).read_bytes())
    assert not read_lineage(tmp_path).history and names_beside(load(tmp_path)[0]) == ["first"]
    (tmp_path / "lineage.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        load(tmp_path)


GRADIENTS = """
import sys
import torch
import torch.distributed as dist
import zoo
from tokenformer import freeze, grow
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
model = zoo.make("llama")
grow(model, at="all-linear", tokens=4, name="new", seed=1)
with torch.no_grad():
    for name, p in model.named_parameters():
        if ".param_tokens." in name:
            p.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))
freeze(model, all_but=["new"])
ids = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(0))
wrapped = DistributedDataParallel(model)
wrapped(input_ids=ids[2 * rank : 2 * rank + 2], labels=ids[2 * rank : 2 * rank + 2]).loss.backward()
found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
model.zero_grad()
model(input_ids=ids, labels=ids).loss.backward()
wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
assert found.keys() == wanted.keys() and all(".param_tokens." in n for n in found) and found
for name in found:
    torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)
print("same", len(found))
"""


@pytest.mark.slow
def test_gradients_of_two_processes_are_those_of_one(tmp_path):
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(tmp_path / "gradients.py")]
    tests = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([tests, *sys.path])}
    done = subprocess.run(start, env=environment, timeout=300, check=True, capture_output=True, text=True)
    assert done.stdout.count("same") == 2


@pytest.mark.slow
def test_two_processes_train_an_add_on(place, tmp_path):
    (tmp_path / "a.yaml").write_text(json.dumps(recipe(place, A)))
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tokenformer", "train"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = tmp_path / "run"
    subprocess.run([*start, str(tmp_path / "a.yaml"), "-o", str(run)], env=environment, timeout=300, check=True)
    train(recipe(place, A), tmp_path / "one")
    together, alone = (read_addon(folder / "stage1")[1] for folder in (run, tmp_path / "one"))
    for name in alone:
        torch.testing.assert_close(together[name], alone[name], rtol=1e-2, atol=1e-4)
