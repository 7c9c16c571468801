"""Two processes and one run folder; --force that is killed, and --force after it."""

import json
import multiprocessing
import os
import shutil
import signal
from contextlib import contextmanager

import pytest
from test_damage import content  # noqa: F401
from typer.testing import CliRunner

from tokenformer.checkpoints.files import recover
from tokenformer.cli import app as cli
from tokenformer.errors import CheckpointError
from tokenformer.training import text
from tokenformer.training.lock import locked
from tokenformer.training.recipe import parse_recipe
from tokenformer.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

FORK = multiprocessing.get_context("fork")


@contextmanager
def another_process(run):
    """Hold `run` in a process of its own; gives it."""
    ready = FORK.Event()

    def hold():
        with locked(run):
            ready.set()
            signal.pause()

    process = FORK.Process(target=hold)
    process.start()
    assert ready.wait(30)
    try:
        yield process
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize("option", ["--resume", "--force", None])
def test_a_second_process_is_told_who_trains_there(content, tmp_path, option):  # noqa: F811
    run, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(content), encoding="utf-8")
    run.mkdir()
    (run / "recipe.yaml").write_text("theirs", encoding="utf-8")
    with another_process(run) as process:
        done = CliRunner().invoke(cli.app, ["train", str(recipe), "-o", str(run), *([option] if option else [])])
        assert isinstance(done.exception, CheckpointError)
        assert f"is being trained in by process {process.pid} on" in str(done.exception)
    assert [(path.name, path.read_text(encoding="utf-8")) for path in run.iterdir()] == [("recipe.yaml", "theirs")]


def test_a_killed_process_lets_go_and_its_leftovers_vanish(tmp_path):
    run, other = tmp_path / "run", tmp_path / ".run.1.7.tmp"
    other.mkdir()
    (tmp_path / ".run.7.tmp").mkdir()
    (run / ".stage1.7.tmp").mkdir(parents=True)
    with another_process(run):
        pass
    with locked(run):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".run.1.7.tmp", ".run.lock", "run"]
        assert f"process {os.getpid()} on" in (tmp_path / ".run.lock").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.1.7.tmp", "run"]
    assert not list(run.iterdir())


def test_a_link_and_its_folder_are_one_run(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "run", target_is_directory=True)
    with (
        locked(tmp_path / "run"),
        pytest.raises(CheckpointError, match="is being trained in"),
        locked(tmp_path / "link"),
    ):
        pass


def test_a_killed_force_never_costs_the_old_run_nor_do_those_after_it(content, tmp_path, monkeypatch):  # noqa: F811
    """Killed while it prepares the new run, again and again: the old one stays, whole."""
    recipe = parse_recipe({**content, "stages": [{"text_tokens": 64}]})
    (old,) = train(recipe, tmp_path / "run")
    weights = (old / "model.safetensors").read_bytes()

    def die(*arguments, **options):
        os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(2):
        with monkeypatch.context() as patch:
            patch.setattr(text, "prepare", die)
            process = FORK.Process(target=train, args=(recipe, tmp_path / "run"), kwargs={"force": True})
            process.start()
            process.join(60)
        assert process.exitcode == -signal.SIGKILL
        recover(tmp_path / "run")
        assert (old / "model.safetensors").read_bytes() == weights
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    assert train(recipe, tmp_path / "run", force=True) == [old]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
