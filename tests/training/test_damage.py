"""What happens to a run whose loss diverges, or whose files were damaged."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tokenformer.checkpoints.checkpoint import load_checkpoint
from tokenformer.cli import app as cli
from tokenformer.errors import TokenformerError
from tokenformer.training import whole
from tokenformer.training.log import read_log
from tokenformer.training.recipe import parse_recipe
from tokenformer.training.stream import StreamTrainer
from tokenformer.training.train import train


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(f"{i} the quick brown fox jumps over the lazy dog. " * 12, encoding="utf-8")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"qkv_param_tokens": 0, "output_param_tokens": 0, "ffn_param_tokens": 16}
    return {
        "model": {**sizes, **tokens},
        "data": {"source": str(folder), "tokenizer": "bytes", "validation_fraction": 0.1},
        "training": {
            "batch_size": 2,
            "sequence_length": 16,
            "save_every": 2,
            "log_every": 1,
            "evaluations_per_stage": 2,
            "threads": 1,
            "precision": "float32",
        },
        "stages": [{"text_tokens": 192}, {"text_tokens": 192, "ffn_param_tokens": "+8"}],
    }


def strictly(line):
    """Read JSON as every other language does: without NaN."""
    return json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_a_loss_that_diverges_is_logged_as_none_and_said(content, tmp_path):
    training = {**content["training"], "learning_rate": 1e37, "warmup": 0, "schedule": "constant"}
    training["on_bad_step"] = "go_on"
    events = []
    checkpoints = train(parse_recipe({**content, "training": training}), tmp_path / "run", on_event=events.append)
    lines = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    log = [strictly(line) for line in lines]
    assert log == [event for event in events if event["event"] != "progress"]
    losses = [event["loss"] for event in log if event["event"] == "train"]
    assert losses[0] > 1 and losses[-1] is None and 0.0 not in losses
    assert [event["stage"] for event in log if event["event"] == "diverged"] == [1, 2]
    assert log[-1]["loss"] is None and load_checkpoint(checkpoints[-1])[2].last.loss is None
    growth = next(event for event in log if event["event"] == "growth")
    assert growth["loss_before"] is None and growth["loss_after"] is None
    diverged = tmp_path / "diverged.yaml"
    diverged.write_text(json.dumps({**content, "training": training}), encoding="utf-8")
    done = CliRunner().invoke(cli.app, ["train", str(diverged), "-o", str(tmp_path / "again")])
    assert done.exit_code == 0 and "stage 1 has diverged at step" in " ".join(done.output.split())


def test_a_step_that_would_spoil_the_weights_stops_the_run(content, tmp_path, monkeypatch):
    """It can then be left out: the second run is the first one resumed, and takes every other step."""
    ordinary = StreamTrainer.training_step

    def spoilt(self, model, *arguments):
        loss = ordinary(self, model, *arguments)
        if self.state.global_step == 3:
            model.get_input_embeddings().weight.grad[0] = float("nan")
        return loss

    monkeypatch.setattr(StreamTrainer, "training_step", spoilt)
    stages = content["stages"][:1]
    said = r"stage 1 stopped before step 4, .* not finite in 1 of \d+ tensors: .*embed.* state after step 2 is saved"
    with pytest.raises(TokenformerError, match=said):
        train(parse_recipe({**content, "stages": stages}), tmp_path / "run")
    skipping = {**content, "stages": stages, "training": {**content["training"], "on_bad_step": "skip"}}
    (last,) = train(parse_recipe(skipping), tmp_path / "run", resume=True)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(last / "model.safetensors").values())
    (skipped,) = [event for event in read_log(tmp_path / "run") if event["event"] == "skipped"]
    assert skipped["step"] == 4 and "embed" in skipped["problem"]


def test_steps_of_too_large_gradients_are_left_out_whole(content, tmp_path):
    """Neither gradients nor momentum nor weight decay move anything: the last weights are the first."""
    results = []
    kinds = {"none": {"on_bad_step": "skip", "bad_grad_norm": 1e-9}, "slow": {"learning_rate": 1e-30}}
    for name, more in kinds.items():
        recipe = {**content, "stages": content["stages"][:1], "training": {**content["training"], **more}}
        (last,) = train(parse_recipe(recipe), tmp_path / name)
        results.append(load_file(last / "model.safetensors"))
    assert all(torch.allclose(a, results[1][name], rtol=0, atol=1e-28) for name, a in results[0].items())
    skipped = [event for event in read_log(tmp_path / "none") if event["event"] == "skipped"]
    assert [event["step"] for event in skipped] == [1, 2, 3, 4, 5, 6]
    assert all("is 1e-09" in event["problem"] for event in skipped)


@pytest.fixture(scope="module")
def interrupted(content, tmp_path_factory):
    """A run interrupted after step 4 of the second stage, and the weights of one that was not."""
    folder = tmp_path_factory.mktemp("runs")

    def interrupt(event):
        if event["event"] == "progress" and (event["stage"], event["step"]) == (2, 4):
            signal.raise_signal(signal.SIGINT)

    (_, whole) = train(parse_recipe(content), folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(parse_recipe(content), folder / "run", on_event=interrupt)
    return folder / "run", (whole / "model.safetensors").read_bytes()


def another_model(file):
    tensors = load_file(file)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


DAMAGE = {
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "a byte flipped": lambda file: file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:]),
}
FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"]
CASES = [(DAMAGE[kind], file) for file in FILES for kind in ("missing", "truncated")]
CASES += [(DAMAGE["empty"], "optimizer.pt"), (DAMAGE["a byte flipped"], "scheduler.pt")]
CASES += [(another_model, "model.safetensors"), (DAMAGE["empty"], "complete"), (DAMAGE["truncated"], "complete")]


@pytest.mark.parametrize(("damage", "file"), CASES)
def test_a_damaged_state_is_left_out_and_an_older_one_continues_to_the_same_bits(
    content, interrupted, tmp_path, damage, file
):
    shutil.copytree(interrupted[0], tmp_path / "run")
    place = tmp_path / "run" / "stage2.partial"
    assert {path.name for path in place.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    damage(place / "checkpoint-4" / file)
    events = []
    (_, last) = train(parse_recipe(content), tmp_path / "run", resume=True, on_event=events.append)
    assert (last / "model.safetensors").read_bytes() == interrupted[1]
    (event,) = [event for event in read_log(tmp_path / "run") if event["event"] == "damaged"]
    assert event["step"] == 2 and file in event["problem"] and "checkpoint-4" in event["problem"]
    assert [e["step"] for e in events if e["event"] == "progress"] == [3, 4, 5, 6]


def test_without_a_whole_state_a_stage_starts_again(content, interrupted, tmp_path):
    shutil.copytree(interrupted[0], tmp_path / "run")
    for state in (tmp_path / "run" / "stage2.partial").iterdir():
        (state / "optimizer.pt").write_bytes(b"")
    (tmp_path / "run" / "stage2.partial" / "checkpoint-best").mkdir()  # a user's
    (tmp_path / "run" / ".stage2.0123abcd.tmp").mkdir()  # of a process that was killed while it wrote
    events = []
    (_, last) = train(parse_recipe(content), tmp_path / "run", resume=True, on_event=events.append)
    assert (last / "model.safetensors").read_bytes() == interrupted[1]
    assert [e["step"] for e in events if e["event"] == "progress"] == [1, 2, 3, 4, 5, 6]
    assert [e["step"] for e in events if e["event"] == "damaged"] == [0, 0]
    assert not list((tmp_path / "run").glob(".stage2*"))


def test_what_lies_beside_a_checkpoint_goes_along(content, interrupted, tmp_path):
    shutil.copytree(interrupted[0] / "stage1", tmp_path / "start")
    (tmp_path / "start" / "LICENSE").write_text("Free.", encoding="utf-8")
    more = {**content, "model": {"checkpoint": str(tmp_path / "start")}}
    for checkpoint in train(parse_recipe(more), tmp_path / "run"):
        assert (checkpoint / "LICENSE").read_text(encoding="utf-8") == "Free."


def test_the_end_of_a_stage_is_logged_once_wherever_a_kill_comes(content, tmp_path, monkeypatch):
    """Before its checkpoint is whole, or after: the log is that of a run that nobody disturbed."""
    recipe = parse_recipe({**content, "stages": content["stages"][:1]})

    def fail(*arguments, **options):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(whole, "save_checkpoint", fail)
        with pytest.raises(ZeroDivisionError):
            train(recipe, tmp_path / "run")
    assert [event["event"] for event in read_log(tmp_path / "run")].count("end") == 1
    train(recipe, tmp_path / "run", resume=True)
    assert [event["event"] for event in read_log(tmp_path / "run")][-2:] == ["stage", "end"]
    assert [event["event"] for event in read_log(tmp_path / "run")].count("end") == 1
