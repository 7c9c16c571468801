"""Files and folders that are written whole or not at all, whatever they are called and wherever they lie."""

import os
import shutil
from pathlib import Path

import pytest

from tokenformer.checkpoints.files import (
    check_file,
    check_target,
    recover,
    replacing_file,
    replacing_folder,
)
from tokenformer.errors import CheckpointError


def write(path, content):
    with replacing_folder(path, force=True) as folder:
        (folder / "config.json").write_text(content, encoding="utf-8")
    return path


def read(path):
    recover(path)
    return (path / "config.json").read_text(encoding="utf-8")


def put_aside(path):
    """Leave a folder as a kill between the two renames does."""
    old = path.with_name(f".{path.name}.0123abcd.tmp") / "old" / path.name
    old.parent.mkdir(parents=True)
    (old.parents[1] / "tokenformer.lock").touch()
    path.rename(old)


def names(folder):
    return sorted(f.name for f in folder.iterdir())


def test_a_reader_between_the_two_renames_costs_the_writer_nothing(tmp_path, monkeypatch):
    path, rename, found = write(tmp_path / "c", "old"), Path.rename, []

    def interrupted(self, target):
        rename(self, target)
        if Path(target).parent.name == "old" and len(found) < 3:
            found.append(read(path))

    monkeypatch.setattr(Path, "rename", interrupted)
    write(path, "new")
    assert found == ["old"] * 3 and read(path) == "new" and names(tmp_path) == ["c"]


def test_a_writer_between_a_readers_look_and_its_rename(tmp_path, monkeypatch):
    path, rename = write(tmp_path / "c", "old"), Path.rename
    put_aside(path)

    def late(self, target):
        monkeypatch.setattr(Path, "rename", rename)
        shutil.rmtree(tmp_path / ".c.0123abcd.tmp")
        write(path, "new")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert read(path) == "new" and names(tmp_path) == ["c"]


def test_behind_a_symbolic_link_the_folder_it_points_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "c"
    link.symlink_to(tmp_path / "disk" / "c")  # dangling at first
    for content in ("first", "second", "third"):
        write(link, content)
        assert read(link) == read(tmp_path / "disk" / "c") == content and link.is_symlink()
        assert names(tmp_path) == ["c", "disk"] and names(tmp_path / "disk") == ["c"]
    put_aside(tmp_path / "disk" / "c")
    assert read(link) == "third"


def test_behind_a_symbolic_link_the_file_it_points_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "f.png"
    link.symlink_to(tmp_path / "disk" / "f.png")
    for content in ("first", "second"):
        with replacing_file(link, force=True) as file:
            assert file.parents[2] == tmp_path / "disk" and file.name == "f.png"
            file.write_text(content, encoding="utf-8")
        assert link.is_symlink() and link.read_text(encoding="utf-8") == content
    assert names(tmp_path) == ["disk", "f.png"] and names(tmp_path / "disk") == ["f.png"]


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "c").symlink_to(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"could not write .*/c: "):
        write(tmp_path / "c", "x")


@pytest.mark.parametrize("name", ["x" * 250, "é" * 125, "x" * 255])
def test_names_as_long_as_the_disk_takes(tmp_path, name):
    for content in ("first", "second"):
        assert read(write(tmp_path / name, content)) == content
    (tmp_path / "files").mkdir()
    with replacing_file(tmp_path / "files" / name) as file:
        file.touch()
    assert names(tmp_path / "files") == [name] and len(names(tmp_path)) == 2


@pytest.mark.parametrize("act", [check_target, check_file, lambda path, force: recover(path)])
def test_names_longer_than_that(tmp_path, act):
    with pytest.raises(CheckpointError, match="File name too long"):
        act(tmp_path / ("x" * 256), force=False)


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    for place in (Path("/proc/nowhere"), tmp_path / "file" / "c"):
        with pytest.raises(CheckpointError, match=f"could not write {place}: "):
            write(place, "x")
        with pytest.raises(CheckpointError, match=f"could not write {place}: "), replacing_file(place) as file:
            file.touch()
    assert names(tmp_path) == ["file"]


def test_a_kill_while_writing_leaves_the_old_one_and_so_does_the_next_attempt(tmp_path):
    path = write(tmp_path / "c", "old")
    child = os.fork()
    if child == 0:
        with replacing_folder(path, force=True) as folder:
            (folder / "config.json").touch()
            os._exit(9)
    os.waitpid(child, 0)
    with pytest.raises(ZeroDivisionError), replacing_folder(path, force=True):
        raise ZeroDivisionError
    assert read(path) == "old"
    assert names(tmp_path) == ["c"]


@pytest.mark.parametrize("said", ["too large (os error 27)", "unexpected pos 832 vs 790", "clear: iostream error"])
def test_what_other_libraries_say_of_a_full_disk(tmp_path, said):
    """Tokenizers raise a bare Exception, and torch counts how much it could not write."""
    refused = pytest.raises(CheckpointError, match=r"could not write .*/c: .*; what was there before is untouched")
    with refused, replacing_folder(tmp_path / "c"):
        raise Exception(said)
    assert names(tmp_path) == []


def test_a_file_is_replaced_only_when_asked_and_only_whole(tmp_path):
    file = tmp_path / "deep" / "f"
    with replacing_file(file) as new:
        new.write_bytes(b"old")
    with pytest.raises(CheckpointError, match="exists already; choose another name, or --force"), replacing_file(file):
        pass
    with pytest.raises(CheckpointError, match="deep is a folder; name a file in it"):
        check_file(file.parent, force=True)
    with pytest.raises(ZeroDivisionError), replacing_file(file, force=True) as new:
        new.write_bytes(b"half")
        raise ZeroDivisionError
    assert file.read_bytes() == b"old" and names(file.parent) == ["f"]


def test_folders_that_cannot_be_opened_as_on_windows(tmp_path, monkeypatch):
    opened = os.open

    def refuse(path, *arguments, **options):
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(shutil, "_use_fd_functions", False)
    assert read(write(tmp_path / "c", "old")) == "old"
    with replacing_file(tmp_path / "f") as file:
        file.touch()
    assert names(tmp_path) == ["c", "f"]
