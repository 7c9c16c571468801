"""Token groups as files: split off and attached, to the last bit, or refused."""

import pytest
import torch
from group_operations import (
    as_trained,
    child,
    facts,
    leftovers,
    logits,
    make_family,  # noqa: F401
    on_disk,
    ordinary,
    same,
    same_files,
    train_only,
)
from safetensors.torch import load_file, save_file
from tiny_models import two_groups
from typer.testing import CliRunner

from tokenformer import grow
from tokenformer.checkpoints.addons import attach, attach_operation, split, split_state
from tokenformer.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.checkpoints.rewrite import merge_checkpoints, open_checkpoint, rewrite
from tokenformer.checkpoints.verify import weight_files, weights_digest
from tokenformer.cli import app as cli
from tokenformer.errors import CheckpointError, GrowthError


def split_checkpoint(source, group, file):
    return split_state(source.config, source.tensors, group, file)


def attach_addon(source, addon, folder, name=None):
    return rewrite(source, folder, attach_operation(source.config, source.tensors, addon, name=name))


def test_split_and_attach_go_round(family):
    folder, _ = family
    addon = split_checkpoint(open_checkpoint(folder / "a"), "a", folder / "a.safetensors")
    assert addon.stat().st_size < sum(f.stat().st_size for f in weight_files(folder / "a")) / 4
    lineage = attach_addon(open_checkpoint(folder / "parent"), addon, folder / "again")
    assert same_files(folder / "again", folder / "a")
    assert lineage.last.operation == "attach" and lineage.last.arguments["groups"] == ["a"]
    assert lineage.last.parent == weights_digest(folder / "parent")
    # Onto the parent with another group as well, under another name, is what merging gives.
    attach_addon(open_checkpoint(folder / "b"), addon, folder / "both", name="c")
    b, a = open_checkpoint(folder / "b"), open_checkpoint(folder / "a")
    merge_checkpoints(b, a, folder / "ba", rename={"a": "c"}, norm=as_trained(b))
    assert same_files(folder / "both", folder / "ba")


def test_split_and_attach_in_memory(family):
    folder, models = family
    split(models["a"], "a", folder / "memory.safetensors")
    disk = split_checkpoint(open_checkpoint(folder / "a"), "a", folder / "disk.safetensors")
    wanted, found = load_file(disk), load_file(folder / "memory.safetensors")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[n], found[n]) for n in wanted)
    attach(models["parent"], disk)
    assert same(facts(models["parent"]), facts(models["a"]))
    content = disk.read_bytes()
    train_only(models["parent"], "a")  # does not write through to the file
    assert disk.read_bytes() == content


@pytest.mark.parametrize("make", [lambda: two_groups("ffn"), ordinary], ids=["tokenformer", "llama"])
def test_an_addon_trained_in_float32_goes_onto_the_bfloat16_parent_it_came_from(make, tmp_path):
    """Training writes float32; the same numbers in another type are the same parent, and rounded ones are not."""

    def addon_of(parent):
        model = child(load_checkpoint(tmp_path / parent, dtype=torch.float32)[0], "new")
        save_checkpoint(tmp_path / f"child of {parent}", model, None, Lineage())
        source = open_checkpoint(tmp_path / f"child of {parent}")
        return split_checkpoint(source, "new", tmp_path / f"{parent}.safetensors")

    save_checkpoint(tmp_path / "exact", make(), None, Lineage())
    save_checkpoint(tmp_path / "rounded", make().to(torch.bfloat16), None, Lineage())
    wanted = logits(load_checkpoint(addon_of("rounded").with_name("child of rounded"), dtype=torch.bfloat16)[0])
    attach_addon(open_checkpoint(tmp_path / "rounded"), tmp_path / "rounded.safetensors", tmp_path / "again")
    assert {tensor.dtype for tensor in on_disk(tmp_path / "again").values()} == {torch.bfloat16}
    assert torch.equal(logits(load_checkpoint(tmp_path / "again")[0]), wanted)
    memory = load_checkpoint(tmp_path / "rounded")[0]
    attach(memory, tmp_path / "rounded.safetensors")
    assert torch.equal(logits(memory), wanted)
    with pytest.raises(GrowthError, match=r"belongs to another parent: .*\. Attach it to the checkpoint"):
        attach_addon(open_checkpoint(tmp_path / "exact"), tmp_path / "rounded.safetensors", tmp_path / "out")
    with pytest.raises(
        GrowthError, match=r"split from a float32 checkpoint, and this one is bfloat16\. If this is its"
    ):
        attach_addon(open_checkpoint(tmp_path / "rounded"), addon_of("exact"), tmp_path / "out")


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def foreign(file):
    save_file({"x": torch.zeros(2)}, file)


ADDONS = {
    "flipped": (flip, "is damaged: its tensors are not those that were written"),
    "cut": (lambda f: f.write_bytes(f.read_bytes()[:-9]), "cannot read .*a.safetensors"),
    "empty": (lambda f: f.write_bytes(b""), "cannot read .*a.safetensors"),
    "missing": (lambda f: f.unlink(), "cannot read .*a.safetensors"),
    "foreign": (foreign, "a.safetensors is no add-on; `tokenformer split` writes them"),
}


@pytest.mark.parametrize("case", ADDONS)
def test_a_damaged_or_foreign_addon(case, tmp_path):
    damage, message = ADDONS[case]
    model = two_groups("ffn")
    save_checkpoint(tmp_path / "c", model, None, Lineage())
    addon = split_checkpoint(open_checkpoint(tmp_path / "c"), "more", tmp_path / "a.safetensors")
    damage(addon)
    before = leftovers(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        attach_addon(open_checkpoint(tmp_path / "c"), addon, tmp_path / "out")
    assert leftovers(tmp_path) == before


def test_addons_belong_to_one_parent(family):
    folder, models = family
    source = open_checkpoint(folder / "a")
    addon = split_checkpoint(source, "a", folder / "a.safetensors")
    with torch.no_grad():
        next(models["parent"].parameters())[0, 0] += 1
    save_checkpoint(folder / "other", models["parent"], None, Lineage())
    save_checkpoint(folder / "kind", two_groups("ffn"), None, Lineage())
    before = leftovers(folder)
    with pytest.raises(
        GrowthError, match=r"belongs to another parent: .* sha256 \w{12}… \(token groups base\), the same of"
    ):
        attach_addon(open_checkpoint(folder / "other"), addon, folder / "out")
    with pytest.raises(
        GrowthError,
        match=r"belongs to (another parent|a '(llama|tokenformer_vision)' model; .* is a 'tokenformer' model)",
    ):
        attach_addon(open_checkpoint(folder / "kind"), addon, folder / "out")
    with pytest.raises(GrowthError, match="'a' exists already, beside base, a; choose another name"):
        attach_addon(source, addon, folder / "out")
    with pytest.raises(GrowthError, match="no token group 'z'; there are base, a"):
        split_checkpoint(source, "z", folder / "z.safetensors")
    with pytest.raises(CheckpointError, match=r"z\.pt should be called \*\.safetensors"):
        split_checkpoint(source, "a", folder / "z.pt")
    with pytest.raises(CheckpointError, match="exists already; choose another name, or --force"):
        split_checkpoint(source, "a", addon)
    with pytest.raises(CheckpointError, match="parent is a checkpoint, and some tools load every"):
        split_checkpoint(source, "a", folder / "parent" / "a.safetensors")
    grow(models["a"], num_hidden_layers="+1", name="deep")
    save_checkpoint(folder / "deep", models["a"], None, Lineage())
    with pytest.raises(GrowthError, match=r"'deep' came with blocks [0-9]+, which an add-on cannot carry"):
        split_checkpoint(open_checkpoint(folder / "deep"), "deep", folder / "d.safetensors")
    assert leftovers(folder) == sorted([*before, "deep"])


def test_damaged_weights_give_no_addon(family):
    folder, _ = family
    flip(next(folder.glob("a/*.safetensors")))
    done = CliRunner().invoke(cli.app, ["split", str(folder / "a"), "a", "-o", str(folder / "x.safetensors")])
    assert "its weights have sha256" in str(done.exception) and not (folder / "x.safetensors").exists()
