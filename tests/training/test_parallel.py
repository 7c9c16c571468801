"""One model spread over several processes: FSDP2, tensor parallelism and both, with growth in between."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from tokenformer import RecipeError
from tokenformer.checkpoints.optimizer import load_states
from tokenformer.checkpoints.verify import read_lineage, verify_checkpoint
from tokenformer.training.log import read_log
from tokenformer.training.train import train

LAYOUTS = [
    ({"fsdp": 2}, 2),
    ({"tensor": 2}, 2),
    ({"fsdp": 2, "tensor": 2}, 4),
    ({"fsdp": 2}, 4),
]  # the last: two copies
CONTENT = {
    "model": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "qkv_param_tokens": 32,
        "output_param_tokens": 32,
        "ffn_param_tokens": 62,
    },
    "data": {"source": str(Path(__file__).parent / "test_r*.py"), "tokenizer": "bytes"},
    "training": {
        "batch_size": 8,
        "sequence_length": 32,
        "threads": 1,
        "learning_rate": 0.003,
        "save_every": 3,
        "log_every": 1,
        "evaluations_per_stage": 1,
        "precision": "float32",
    },
    "stages": [
        {"text_tokens": 2048},
        {"text_tokens": 2048, "ffn_param_tokens": "+32", "qkv_param_tokens": "+18", "num_hidden_layers": "+1"},
    ],
}


def recipe(parallel=None, **training):
    fields = {**CONTENT["training"], **training}
    return {**CONTENT, "training": {**fields, "parallel": parallel} if parallel is not None else fields}


def start(content, run, processes, *options, restarts=0):
    """Start the command as its users do."""
    file = run.with_name(f"{run.name}.yaml")
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    # Else torchrun 2.13 leaves the addresses of lost processes to those that it starts in their place.
    apart = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **apart}
    return subprocess.Popen(
        [*command, "-m", "tokenformer", "train", str(file), "-o", str(run), *options],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate(timeout=250)
    assert process.returncode == 0, said[-3000:]
    return said


def once_saved(process, run):
    """Wait for the second stage's first state, and return the run's processes by rank."""
    while not (run / "stage2.partial" / "checkpoint-3" / "complete").exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        time.sleep(0.01)
    return {child.environ()["RANK"]: child for child in psutil.Process(process.pid).children()}


def weights(run, stage=2):
    verify_checkpoint(run / f"stage{stage}")
    return load_file(run / f"stage{stage}" / "model.safetensors")


def losses(run):
    return [event["loss"] for event in read_log(run) if event["event"] in ("train", "evaluation")]


def assert_close(run, other, tolerance=1e-4):
    """A step is up to 3e-3, so that a gradient of another size or sign would show; rounding is what is left."""
    a, b = weights(run), weights(other)
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        torch.testing.assert_close(tensor, b[name], rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    torch.testing.assert_close(torch.tensor(losses(run)), torch.tensor(losses(other)), rtol=1e-5, atol=1e-5)
    states, same = load_states(run / "stage2"), load_states(other / "stage2")
    assert {n: set(s) for n, s in states.items()} == {n: set(s) for n, s in same.items()}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of each optimizer in one process, which has all of the model."""
    runs = {}
    for optimizer in ("adamw", "muon"):
        runs[optimizer] = tmp_path_factory.mktemp(optimizer) / "run"
        train(recipe(optimizer=optimizer), runs[optimizer])
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(("parallel", "count"), LAYOUTS, ids=str)
def test_a_model_in_parts_grows_and_learns_as_one_that_is_whole(alone, parallel, count, optimizer, tmp_path):
    said = finish(start(recipe(parallel, optimizer=optimizer), tmp_path / "run", count))
    assert "bit for bit equal" in " ".join(said.split())
    assert_close(tmp_path / "run", alone[optimizer])
    mine, other = (read_lineage(run / "stage2").last for run in (tmp_path / "run", alone[optimizer]))
    assert mine.training_flops == other.training_flops and mine.text_tokens_seen == other.text_tokens_seen
    assert not list((tmp_path / "run").glob("*.partial"))


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_as_it_was_and_on_fewer_processes(alone, tmp_path):
    both = {"fsdp": 2, "tensor": 2}

    def killed(run):
        with start(recipe(both), run, 4) as process:
            for victim in (process, *once_saved(process, run).values()):
                victim.kill()
        assert not (run / "stage2").exists()

    finish(start(recipe(both), tmp_path / "whole", 4))
    killed(tmp_path / "same")
    finish(start(recipe(both), tmp_path / "same", 4, "--resume"))
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "same")[name]), name
    for i, parallel in enumerate([{"fsdp": 2}, {"fsdp": 1}]):
        killed(tmp_path / f"fewer{i}")
        finish(start(recipe(parallel), tmp_path / f"fewer{i}", parallel["fsdp"], "--resume"))
        assert_close(tmp_path / f"fewer{i}", alone["adamw"])


@pytest.mark.slow
def test_torchrun_starts_again_from_the_newest_state_when_a_process_is_lost(alone, tmp_path):
    run = tmp_path / "run"
    process = start(recipe({"fsdp": 2}), run, 2, restarts=1)
    once_saved(process, run)["1"].kill()
    finish(process)
    assert_close(run, alone["adamw"])
    assert [e["done"] for e in read_log(run) if e["event"] == "stage"] == [0, 0, 3]


@pytest.mark.slow
def test_what_is_wrong_is_said_by_one_process_alone(tmp_path):
    content = recipe({"tensor": 2})
    content["model"] = {**content["model"], "norm_activation_type": "softmax"}
    with start(content, tmp_path / "run", 2) as process:
        said = process.communicate(timeout=200)[0]
    assert said.count("error: training.parallel.tensor splits parameter tokens") == 1 and "[rank" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_example_grows_in_place_and_to_the_same_bits():
    file = Path(__file__).parents[2] / "examples" / "grow_sharded.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert "logits the same bits: True" in said.stdout, said.stderr[-3000:]
    assert "8 new tensors, in parts; 51 of 51 tensors have trained since" in said.stdout


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"parallel": {"fsdp": 2, "tensor": 2}}, "spreads the model over 2 × 2 processes, and the run has 1: torchrun"),
        ({"parallel": {"fsdp": 0}}, "greater than 0"),
        ({"parallel": {"fdsp": 2}}, "fdsp"),
    ],
)
def test_what_cannot_be_spread_is_refused(change, said, tmp_path):
    content = {**CONTENT, "training": {**CONTENT["training"], **change}}
    with pytest.raises(RecipeError, match=said):
        train(content, tmp_path / "run")
    assert not (tmp_path / "run").exists()
