"""Two processes and one run folder; --force that is killed, and --force after it."""

import json
import multiprocessing
import os
import shutil
import signal
from contextlib import ExitStack, contextmanager

import pytest
from test_damage import content  # noqa: F401
from tiny_models import make
from typer.testing import CliRunner

from tokenformer.checkpoints.checkpoint import save_checkpoint
from tokenformer.checkpoints.files import recover, replacing_file, replacing_folder
from tokenformer.checkpoints.lock import locked
from tokenformer.checkpoints.temporary import temporary_folder
from tokenformer.cli import app as cli
from tokenformer.errors import CheckpointError
from tokenformer.training import text
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
    run = tmp_path / "run"
    (tmp_path / ".run.12345678.tmp").mkdir()  # that nobody locked, and that holds something: not ours
    (tmp_path / ".run.12345678.tmp" / "file").touch()
    (run / ".stage1.12345678.tmp").mkdir(parents=True)  # killed before it could lock

    def begin():
        with locked(run), temporary_folder(run), temporary_folder(run / "stage1"):
            os.kill(os.getpid(), signal.SIGKILL)

    process = FORK.Process(target=begin)
    process.start()
    process.join(60)
    assert len(list(tmp_path.iterdir())) == 4 and len(list(run.iterdir())) == 1
    with locked(run):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".run.12345678.tmp", ".run.lock", "run"]
        assert f"process {os.getpid()} on" in (tmp_path / ".run.lock").read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".run.12345678.tmp", "run"]
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


def test_a_run_is_not_replaced_while_another_process_trains_in_it(tmp_path):
    """Nor is a checkpoint in it, by whatever command; beside it, and by the trainer itself, all goes on."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("theirs", encoding="utf-8")
    save_checkpoint(tmp_path / "model", make("grown"))
    for target in (run / "stage1", run):
        drop = ["drop", str(tmp_path / "model"), "grown1", "-o", str(target), "--force"]
        with another_process(run) as process:
            done = CliRunner().invoke(cli.app, drop)
            assert isinstance(done.exception, CheckpointError)
            assert f"run is being trained in by process {process.pid} on" in str(done.exception)
            assert [path.name for path in run.iterdir()] == ["recipe.yaml"]
            with replacing_folder(tmp_path / "beside") as folder:
                (folder / "config.json").touch()
            shutil.rmtree(tmp_path / "beside")
    with locked(run):
        assert CliRunner().invoke(cli.app, drop).exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]


def test_of_two_that_write_one_folder_the_second_is_told(tmp_path):
    for write in (replacing_folder, replacing_file):
        path = tmp_path / write.__name__

        def fill(place, text):
            (place / "config.json" if place.is_dir() else place).write_text(text, encoding="utf-8")

        with pytest.raises(CheckpointError, match="exists already"), write(path) as second:
            with write(path) as first:
                fill(first, "first")
            fill(second, "second")
        assert (path / "config.json" if path.is_dir() else path).read_text(encoding="utf-8") == "first"
    assert len(list(tmp_path.iterdir())) == 2


def test_training_that_begins_while_its_folder_is_being_written_is_left_alone(tmp_path):
    save_checkpoint(tmp_path / "run", make("ffn"))
    before = (tmp_path / "run" / "lineage.json").read_bytes()
    with ExitStack() as stack:
        with (
            pytest.raises(CheckpointError, match="is being trained in"),
            replacing_folder(tmp_path / "run", force=True) as folder,
        ):
            (folder / "config.json").touch()
            stack.enter_context(another_process(tmp_path / "run"))
        assert (tmp_path / "run" / "lineage.json").read_bytes() == before
    with locked(tmp_path / "run"):  # the killed one has left its lock, which the next one removes
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
