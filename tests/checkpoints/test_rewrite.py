"""Operations on the files of checkpoints: what they give in memory to the last bit, or nothing at all."""

import copy
import errno
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from group_operations import (
    as_trained,
    leftovers,
    link,
    logits,
    make_family,  # noqa: F401
    ordinary,
    random_lesson,
    same_files,
    train,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import SIZES, make, tiny, tiny_vision, two_groups
from transformers import Phi3Config

from tokenformer import grow
from tokenformer.checkpoints.addons import split_state
from tokenformer.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.checkpoints.optimizer import load_states
from tokenformer.checkpoints.rewrite import merge_checkpoints, open_checkpoint, rewrite
from tokenformer.checkpoints.verify import weight_files, weights_digest
from tokenformer.errors import CheckpointError, GrowthError
from tokenformer.growth.architectures import architecture_of, group_names, token_groups
from tokenformer.growth.freeze import freeze_only, trainable_parts
from tokenformer.growth.groups import consolidate_operation, drop_operation, merge
from tokenformer.growth.grow import grow_operation
from tokenformer.growth.operations import apply


def phi3():
    sizes = {**SIZES, "intermediate_size": 56, "num_key_value_heads": 2, "pad_token_id": 0}
    model = ordinary(Phi3Config(**sizes))
    grow(model, ffn_param_tokens="+7", name="more")
    return model


def llama(dtype=torch.float32):
    model = ordinary()
    grow(model, ffn_param_tokens="+7", name="more")
    return model.to(dtype)


def looped(model):
    grow(model, ffn_param_tokens="+5", num_loops=2, name="again")
    return model


MODELS = {
    "paper": lambda: two_groups("paper"),
    "ffn": lambda: two_groups("ffn"),
    "looped": lambda: looped(tiny("ffn")),
    "grown": lambda: make("grown"),
    "per_group": lambda: tiny(token_group_norm="per_group"),
    "biased": lambda: tiny(pattention_bias=True, norm_activation_type="gelu", use_parallel_residual=True),
    "vision": lambda: two_groups("paper", make=tiny_vision),
    "llama": llama,
    "phi3": phi3,
}


def operations(config, dtype):
    """Every operation that is possible, the same each time it is asked for."""
    names = group_names(config)
    seeded = {"seed": 5, "dtype": dtype}
    yield grow_operation(config, **seeded, ffn_param_tokens="+25%", num_hidden_layers="+2")
    if architecture_of(config).has_pattention:
        yield grow_operation(
            config, **seeded, qkv_param_tokens="+3", output_param_tokens="+3", num_loops="+2", name="x"
        )
    if len(names) > 1:
        yield drop_operation(config, names[1:])
    if len(names) > 1 and not any(group.brought for group in token_groups(config)):
        yield consolidate_operation(config)


HALF = [
    *((kind, torch.bfloat16) for kind in ("grown", "llama")),
    *(pytest.param(kind, torch.float16, marks=pytest.mark.slow) for kind in ("grown", "llama")),
]


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, torch.float32) for kind in MODELS), *HALF])
def test_every_operation_gives_the_bits_it_gives_in_memory(kind, dtype, tmp_path, monkeypatch):
    model = MODELS[kind]().to(dtype)
    parent = save_checkpoint(tmp_path / "c", model, None, Lineage())
    for shards in (False, True) if kind in ("grown", "llama") and dtype == torch.float32 else (False,):
        if shards:
            monkeypatch.setattr("tokenformer.checkpoints.checkpoint._SHARD_BYTES", 60_000)
        for i, operation in enumerate(operations(open_checkpoint(tmp_path / "c").config, dtype)):
            memory, disk = tmp_path / f"memory{i}{shards}", tmp_path / f"disk{i}{shards}"
            twin = load_checkpoint(tmp_path / "c")[0]
            apply(twin, list(operations(twin.config, dtype))[i])
            twin.save_pretrained(memory)
            lineage = rewrite(open_checkpoint(tmp_path / "c"), disk, operation)
            assert same_files(memory, disk) and (shards or len(weight_files(disk)) == 1)
            assert torch.equal(logits(load_checkpoint(disk)[0]), logits(twin))
            assert (lineage.last.operation, lineage.last.parent) == (operation.name, parent.weights_sha256)
            assert lineage.last.arguments == operation.arguments
            assert lineage.weights_sha256 == weights_digest(disk) == load_checkpoint(disk)[2].weights_sha256


def test_sharded_sources_and_those_that_transformers_wrote(tmp_path):
    for name, model in (("ours", two_groups("paper")), ("theirs", llama())):
        model.save_pretrained(tmp_path / name, max_shard_size="60KB")
        source = open_checkpoint(tmp_path / name)
        assert len(weight_files(tmp_path / name)) > 3
        operation = drop_operation(source.config, ["more"])
        rewrite(source, tmp_path / f"{name}-dropped", operation)
        apply(model, operation)
        model.save_pretrained(tmp_path / f"{name}-memory")
        assert same_files(tmp_path / f"{name}-dropped", tmp_path / f"{name}-memory")


# --- the optimizer's state


def with_states(folder, model, frozen=()):
    """Save a model after three steps with the state its optimizer has; returns that by name."""
    freeze_only(model, frozen)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(3):
        model(**random_lesson(model)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    states = {n: dict(optimizer.state[p]) for n, p in model.named_parameters() if p in optimizer.state}
    save_checkpoint(folder, model.eval(), None, Lineage(), extra=lambda f: torch.save(states, f / "optimizer.pt"))
    return states


def same_states(a, b):
    pairs = [(a[name], b[name]) for name in a if name in b]
    return a.keys() == b.keys() and all(
        s.keys() == t.keys() and all(torch.equal(s[moment], t[moment]) for moment in s) for s, t in pairs
    )


@pytest.mark.parametrize("kind", ["paper", "ffn", "grown", "looped", "vision", "llama", "phi3"])
@pytest.mark.parametrize("frozen", [(), ("base", "embedding")])
def test_the_optimizers_state_moves_along(kind, frozen, tmp_path):
    model = MODELS[kind]()
    states = with_states(tmp_path / "c", model, frozen)
    objects = {id(p): n for n, p in model.named_parameters()}
    source = open_checkpoint(tmp_path / "c")
    (other,) = group_names(model.config)[1:]
    for i, operation in enumerate(operations(source.config, source.dtype)):
        folder = tmp_path / f"{operation.name}{i}"
        rewrite(source, folder, operation)
        moved, twin = load_states(folder), copy.deepcopy(model)
        parameters = list(twin.parameters())  # kept, so that no new one gets the number of an old one
        before = dict(zip(map(id, parameters), objects.values(), strict=True))
        apply(twin, operation)
        after = dict(twin.named_parameters())
        # What is still there keeps its state under its new name; what is new has none.
        expected = {n: states[before[id(p)]] for n, p in after.items() if before.get(id(p)) in states}
        if operation.name != "consolidate":
            assert same_states(moved, expected)
            continue
        united = [n for n in after if n not in expected and ".base." in n]
        assert same_states({n: s for n, s in moved.items() if n not in united}, expected)
        for name in united:
            elder, younger = states.get(name), states.get(name.replace(".base.", f".{other}."))
            if not elder and not younger:
                assert name not in moved
                continue
            for moment in ("exp_avg", "exp_avg_sq"):
                assert moved[name][moment].shape == after[name].shape
                n = younger[moment].shape[0 if "values" not in name and "down" not in name else 1]
                axis = 1 if "values" in name or "down_proj" in name else 0
                old, new = moved[name][moment].split([after[name].shape[axis] - n, n], dim=axis)
                assert torch.equal(new, younger[moment])
                assert torch.equal(old, elder[moment]) if elder else not old.any()
            assert moved[name]["step"] == 3


def test_merged_tokens_keep_the_state_of_the_child_they_come_from(tmp_path):
    parent = tiny()
    save_checkpoint(tmp_path / "parent", parent, None, Lineage())
    states = {}
    for name in "ab":
        model = copy.deepcopy(parent)
        grow(model, ffn_param_tokens="+5", name=name)
        states[name] = with_states(tmp_path / name, model, [p for p in trainable_parts(model) if p != name])
        link(tmp_path / name, tmp_path / "parent")
    merge_checkpoints(open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b"), tmp_path / "ab")
    assert same_states(load_states(tmp_path / "ab"), states["a"] | states["b"])
    renamed = {n.replace(".groups.b.", ".groups.c."): s for n, s in states["b"].items()}
    merge_checkpoints(
        open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b"), tmp_path / "ac", rename={"b": "c"}
    )
    assert same_states(load_states(tmp_path / "ac"), states["a"] | renamed)


# --- merging


def test_merging_on_disk_is_merging_in_memory(family):
    folder, models = family
    a, b = open_checkpoint(folder / "a"), open_checkpoint(folder / "b")
    lineage = merge_checkpoints(a, b, folder / "ab", norm=as_trained(a))
    merge(models["a"], models["b"], norm=as_trained(a))
    models["a"].save_pretrained(folder / "memory")
    assert same_files(folder / "ab", folder / "memory")
    norm = {"norm": as_trained(a)} if as_trained(a) else {}
    assert lineage.last.arguments == {"other": b.lineage.weights_sha256, "groups": ["b"], **norm}
    assert lineage.last.parent == a.lineage.weights_sha256 and lineage.last.operation == "merge"
    rewrite(open_checkpoint(folder / "ab"), folder / "back", drop_operation(models["a"].config, ["a"]))
    assert same_files(folder / "back", folder / "b")


def test_strangers_are_refused_by_lineage_and_by_weights(family):
    folder, models = family
    before = leftovers(folder)
    (folder / "b" / "lineage.json").unlink()
    with pytest.raises(
        GrowthError, match=r"a and .*b are strangers: no checkpoint is a parent of both \(theirs: \w{8} \w"
    ):
        merge_checkpoints(open_checkpoint(folder / "a"), open_checkpoint(folder / "b"), folder / "ab")
    freeze_only(models["b"], [])
    train(models["b"])
    save_checkpoint(folder / "b", models["b"], None, Lineage(), force=True)
    link(folder / "b", folder / "parent")
    with pytest.raises(GrowthError, match=r"do not share a parent's weights: they differ in [0-9]+ tensors"):
        merge_checkpoints(open_checkpoint(folder / "a"), open_checkpoint(folder / "b"), folder / "ab")
    assert leftovers(folder) == before


# --- damage


def change(**tensors):
    def damage(file):
        with safe_open(file, "pt") as f:
            stored = {n: f.get_tensor(n) for n in f.keys()}  # noqa: SIM118
        save_file({n: t for n, t in (stored | tensors).items() if t is not None}, file, {"format": "pt"})

    return damage


NORM, KEYS = "model.norm.weight", "model.layers.1.mlp.groups.more.keys.weight"
DAMAGES = {
    "missing": (change(**{KEYS: None}), f"does not fit its own config.json: 1 missing: {KEYS}"),
    "unknown": (change(extra=torch.zeros(2)), "does not fit its own config.json: 1 unknown: extra"),
    "misshapen": (change(**{NORM: torch.zeros(3)}), rf"1 of other shapes: {NORM} is \[3\], not \[64\]"),
    "nan": (change(**{NORM: torch.tensor([float("nan")] * 2 + [1.0] * 62)}), f"not finite: 2 of 64 in {NORM}; go back"),
    "inf": (change(**{KEYS: torch.full((48, 64), -float("inf"))}), f"not finite: 3072 of 3072 in {KEYS}; go back"),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_bad_weights_are_named_and_nothing_is_written(case, tmp_path):
    damage, message = DAMAGES[case]
    save_checkpoint(tmp_path / "c", two_groups("ffn"), None, Lineage())
    damage(tmp_path / "c" / "model.safetensors")
    (tmp_path / "c" / "lineage.json").unlink()
    source = open_checkpoint(tmp_path / "c")
    with pytest.raises(CheckpointError, match=f"checkpoint {re.escape(str(tmp_path))}/c .*{message}"):
        rewrite(
            source, tmp_path / "out", grow_operation(source.config, seed=0, dtype=source.dtype, ffn_param_tokens="+1")
        )
    if case == "inf":
        with pytest.raises(
            CheckpointError, match=f"token group 'more' has weights that are not finite: 3072 of 3072 in {KEYS}"
        ):
            split_state(source.config, source.tensors, "more", tmp_path / "a.safetensors")
    assert leftovers(tmp_path) == ["c"]


def test_a_damaged_optimizer_file_and_a_target_that_exists(tmp_path):
    save_checkpoint(tmp_path / "c", two_groups("ffn"), None, Lineage())
    source, whole = open_checkpoint(tmp_path / "c"), tmp_path / "whole.pt"
    torch.save({"a": {"step": torch.ones(999)}}, whole)
    contents = [b"", b"x", b"PK", whole.read_bytes()[:-50], whole.read_bytes()[:500], pickle.dumps([1]), b"\x80\x02."]
    for content in [*contents, pickle.dumps({"a": {"step": 3}}), pickle.dumps({"a": 3})]:
        (tmp_path / "c" / "optimizer.pt").write_bytes(content)
        size = len(content)
        with pytest.raises(
            CheckpointError, match=rf"is damaged: optimizer.pt \({size} bytes\) cannot be read \(\w+: .*\); delete it"
        ):
            rewrite(source, tmp_path / "out", drop_operation(source.config, ["more"]))
    with pytest.raises(CheckpointError, match="c exists already; choose another name, or --force"):
        rewrite(source, tmp_path / "c", drop_operation(source.config, ["more"]))
    assert leftovers(tmp_path) == ["c", "whole.pt"]


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "c", two_groups("ffn"), None, Lineage())
    source = open_checkpoint(tmp_path / "c")
    before = {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()}

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    for where in ("save_file", "sync"):
        with monkeypatch.context() as patch:
            patch.setattr(f"tokenformer.checkpoints.checkpoint.{where}", full)
            with pytest.raises(CheckpointError, match=r"could not write .*No space left"):
                rewrite(source, tmp_path / "c", drop_operation(source.config, ["more"]), force=True)
    monkeypatch.setattr("tokenformer.checkpoints.addons.save_file", full)
    with pytest.raises(CheckpointError, match=r"could not write .*No space left"):
        split_state(source.config, source.tensors, "more", tmp_path / "a.safetensors")
    assert leftovers(tmp_path) == ["c"] and before == {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()}


KILLED = """
import sys, time
import tokenformer.checkpoints.checkpoint as checkpoint
from tokenformer.growth.groups import drop_operation
from tokenformer.checkpoints.rewrite import open_checkpoint, rewrite
save = checkpoint.save_file
def slow(*arguments, **options):
    print("writing", flush=True)
    time.sleep(0.05)
    save(*arguments, **options)
checkpoint.save_file, checkpoint._SHARD_BYTES = slow, 60_000
while True:
    source = open_checkpoint("c")
    rewrite(source, "out", drop_operation(source.config, ["more"]), force=True)
"""


@pytest.mark.slow
def test_kill_at_any_moment_leaves_whole_checkpoints(tmp_path):
    save_checkpoint(tmp_path / "c", two_groups("ffn"), None, Lineage())
    before = {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()}
    for kill in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for _ in range(1 + 9 * kill):
            assert process.stdout.readline() == b"writing\n"
        time.sleep(0.03 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert before == {f.name: f.read_bytes() for f in (tmp_path / "c").iterdir()}
        if (tmp_path / "out").exists():
            assert group_names(load_checkpoint(tmp_path / "out")[0].config) == ["base"]
            shutil.rmtree(tmp_path / "out")


def test_buffers_of_older_transformers_are_left_out(tmp_path):
    save_checkpoint(tmp_path / "c", llama(), None, Lineage())
    state = load_file(tmp_path / "c" / "model.safetensors")
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(state, tmp_path / "c" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "c" / "lineage.json").unlink()
    source = open_checkpoint(tmp_path / "c")
    rewrite(source, tmp_path / "d", grow_operation(source.config, seed=0, dtype=source.dtype, ffn_param_tokens="+8"))
    load_checkpoint(tmp_path / "c"), load_checkpoint(tmp_path / "d")
