"""Publishing, up to the network: a server on this machine stands where the Hub would be and keeps what it is sent."""

import json

import pytest
import yaml
import zoo
from hub_server import Hub, serve_hub, use_hub  # noqa: F401
from tiny_models import tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from tokenformer import attach, grow, split
from tokenformer.checkpoints.card import model_card
from tokenformer.checkpoints.checkpoint import save_checkpoint
from tokenformer.checkpoints.hub import push_to_hub
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.checkpoints.optimizer import OPTIMIZER_FILE
from tokenformer.cli import app as cli
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.errors import CheckpointError, HubError
from tokenformer.growth.beside import names_beside


def lineage():
    trained = Lineage().then(
        "train",
        arguments={"stage": 1},
        data={"source": "shakespeare"},
        recipe={"training": {"sequence_length": 64}},
        text_tokens_seen=123_456,
        training_flops=4.5e12,
        training_seconds=1234.0,
        loss=4.25,
        bits_per_byte=2.5,
    )
    arguments = {"ffn_param_tokens": "+50%", "name": "grown1"}
    return trained.then("grow", arguments=arguments, loss=4.25, bits_per_byte=2.5)


@pytest.fixture
def checkpoint(tmp_path):
    model = tiny("ffn", vocab_size=257)
    grow(model, ffn_param_tokens="+50%")
    save_checkpoint(
        tmp_path / "ours",
        model,
        make_tokenizer("bytes", None),
        lineage(),
        extra=lambda folder: (folder / OPTIMIZER_FILE).write_bytes(b"large and of no use to others"),
    )
    return tmp_path / "ours"


def test_model_card_tells_sizes_data_cost_growth_licence_and_loading(checkpoint):
    text = (checkpoint / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["tokenformer"]}
    for fact in (
        "| base | ffn 160 | 480 |",
        "| grown1 | ffn 80 | 240 |",
        "| Text | shakespeare |",
        "| Text tokens seen | 123,456 |",
        "| Training FLOPs | 4.5e+12 |",
        "| Training time | 1,234 s |",
        "4.2500 nats per text token, 2.5000 bits per byte",
        "grow (ffn_param_tokens +50%, name grown1)",
        "Licence of the weights | not stated",
        "AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)",
    ):
        assert fact in text, fact
    licensed = model_card(tiny("ffn").config, lineage(), license="apache-2.0")
    assert yaml.safe_load(licensed.split("---")[1])["license"] == "apache-2.0"


def test_push_sends_the_whole_checkpoint_but_the_optimizer(checkpoint, hub):
    (checkpoint / "consolidated.safetensors").touch()  # nobody loads it
    done = CliRunner().invoke(cli.app, ["push", str(checkpoint), "someone/model", "--license", "mit"])
    assert done.exit_code == 0, done.output
    (checkpoint / "consolidated.safetensors").unlink()
    assert "Published: http://127.0.0.1" in done.output
    here = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    assert OPTIMIZER_FILE in here and set(hub.files) == set(here) - {OPTIMIZER_FILE}
    assert {"config.json", "modeling_tokenformer.py", "pattention.py", "lineage.json"} <= set(hub.files)
    card = hub.files.pop("README.md").decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit"
    assert all(content == here[name] for name, content in hub.files.items())


def test_transformers_own_push_sends_the_code_too(checkpoint, hub):
    AutoModelForCausalLM.from_pretrained(checkpoint).push_to_hub("someone/model")
    assert {"config.json", "configuration_tokenformer.py", "modeling_tokenformer.py", "pattention.py"} <= set(hub.files)
    assert "auto_map" in json.loads(hub.files["config.json"])


def test_a_hub_that_cannot_be_reached_is_one_clear_error(checkpoint, monkeypatch):
    use_hub(monkeypatch, 1)
    with pytest.raises(HubError, match=r"could not push .* to 'someone/model': ConnectError.*; the same command tries"):
        push_to_hub(checkpoint, "someone/model")


@pytest.mark.parametrize("name", ["bad", "a/b/c", "so me/one"])
def test_a_name_that_no_repository_has_is_refused_before_anything_is_read(name, tmp_path):
    with pytest.raises(HubError, match=rf"could not push .* to '{name}': write USER/NAME, such as"):
        push_to_hub(tmp_path / "not even there", name)


def test_only_who_is_refused_is_told_to_log_in(checkpoint, hub, monkeypatch):
    monkeypatch.setattr(Hub, "do_POST", lambda self: self._answer({"error": "Invalid username or password."}, 401))
    with pytest.raises(HubError, match=r"401 .*; `hf auth login` logs in"):
        push_to_hub(checkpoint, "someone/model")


def test_a_damaged_checkpoint_is_not_published(checkpoint, hub):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\0" * 8)
    with pytest.raises(CheckpointError, match="is damaged"):
        push_to_hub(checkpoint, "someone/model")
    assert not hub.files


def test_an_add_on_is_published_without_this_machines_paths(tmp_path, hub):
    zoo.make("bert").save_pretrained(tmp_path / "bert")
    model = type(zoo.make("bert")).from_pretrained(tmp_path / "bert")
    grow(model, at="query", tokens=4, name="legal")
    split(model, "legal", tmp_path / "legal")
    done = CliRunner().invoke(cli.app, ["push", str(tmp_path / "legal"), "someone/legal", "--license", "mit"])
    assert done.exit_code == 0, done.output
    assert set(hub.files) == {"addon_config.json", "addon_model.safetensors", "README.md"}
    assert json.loads(hub.files["addon_config.json"])["base_model_name_or_path"] is None
    card = hub.files["README.md"].decode()
    assert yaml.safe_load(card.split("---")[1])["license"] == "mit" and str(tmp_path) not in card
    (tmp_path / "fetched").mkdir()
    for name, content in hub.files.items():
        (tmp_path / "fetched" / name).write_bytes(content)
    again = type(model).from_pretrained(tmp_path / "bert")
    attach(again, tmp_path / "fetched")
    assert names_beside(again) == ["legal"]
    weights = tmp_path / "legal" / "addon_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"\1" * 8)
    hub.files.clear()
    with pytest.raises(CheckpointError, match="is damaged"):
        push_to_hub(tmp_path / "legal", "someone/legal")
    assert not hub.files
