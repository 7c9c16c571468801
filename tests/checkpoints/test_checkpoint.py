import errno
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny
from transformers.utils.logging import disable_progress_bar

from tokenformer.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.checkpoints.verify import verify_checkpoint, weights_digest
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.errors import CheckpointError, TokenizerError

LINEAGE = Lineage().then(
    "train", data={"source": "x"}, seed=3, text_tokens_seen=1000, training_flops=1e9, training_seconds=2.5, loss=1.5
)
# Children are forked: they are to die in the middle of a save, not to import torch for seconds first.
forked = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A checkpoint with a tokenizer, made once and copied for each test."""
    path = tmp_path_factory.mktemp("original") / "c"
    save_checkpoint(path, tiny("ffn", vocab_size=300), make_tokenizer("bytes", []), LINEAGE)
    return path


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "c")


def hidden(folder):
    return [f.name for f in folder.iterdir() if f.name.startswith(".")]


def fork(target, *arguments):
    disable_progress_bar()  # a child that is killed in one keeps the lock that all processes share
    child = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    child.start()
    return child


def test_round_trip(tmp_path):
    model, tokenizer = tiny(vocab_size=300), make_tokenizer("bytes", [])
    written = save_checkpoint(tmp_path / "deep" / "c", model, tokenizer, LINEAGE)
    loaded, again, lineage = load_checkpoint(tmp_path / "deep" / "c")
    assert not loaded.training and hidden(tmp_path / "deep") == []
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    pairs = zip(loaded.named_parameters(), model.named_parameters(), strict=True)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert lineage == written and lineage.weights_sha256 == weights_digest(tmp_path / "deep" / "c")
    assert lineage.history == LINEAGE.history and len(lineage.last.versions) == 4


def test_dtype_as_stored_or_as_asked(tmp_path):
    save_checkpoint(tmp_path / "c", tiny("ffn", dtype=torch.bfloat16), None, Lineage())
    for asked, found in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model, tokenizer, _ = load_checkpoint(tmp_path / "c", dtype=asked)
        assert tokenizer is None and {p.dtype for p in model.parameters()} == {found}


def test_a_checkpoint_without_lineage_gets_its_digest(saved):
    (saved / "lineage.json").unlink()
    assert verify_checkpoint(saved) == Lineage(weights_sha256=weights_digest(saved), dtype="float32")


def test_lineage_carries_costs_and_parent_on(tmp_path):
    first = save_checkpoint(tmp_path / "a", tiny("ffn"), None, LINEAGE)
    grown = first.then("grow", arguments={"ffn_param_tokens": "+1"})
    assert grown.weights_sha256 is None and grown.last.parent == first.weights_sha256 is not None
    assert (grown.last.text_tokens_seen, grown.last.training_flops, grown.last.training_seconds) == (1000, 1e9, 2.5)
    assert grown.last.loss is None and grown.last.seed is None
    trained = grown.then("train", text_tokens_seen=1500)
    assert (trained.last.text_tokens_seen, trained.last.training_flops) == (1500, 1e9)
    assert [e.operation for e in trained.history] == ["train", "grow", "train"]
    assert len(first.history) == 1 and Lineage().last.operation == "unknown"


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def flip(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def undigested(damage):
    """Damage what a lineage of older versions did not name."""

    def act(file):
        damage(file)
        lineage = json.loads((file.parent / "lineage.json").read_text(encoding="utf-8"))
        lineage.pop("files_sha256")
        (file.parent / "lineage.json").write_text(json.dumps(lineage), encoding="utf-8")

    return act


def rewrite(**values):
    change = lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values))  # noqa: E731
    return lambda file: (undigested(change) if file.name == "config.json" else change)(file)


def index_alone(content):
    def act(file):
        file.write_bytes(content)
        file.with_name("model.safetensors").unlink()

    return act


def text(content):
    return lambda file: file.write_bytes(content)


def rename_a_tensor(file):
    tensors = load_file(file)
    save_file({("x" if k == "model.norm.weight" else k): v for k, v in tensors.items()}, file, {"format": "pt"})
    file.with_name("lineage.json").unlink()


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", cut, r"is damaged: model.safetensors \(\d+ bytes\) cannot be read: .*; copy it again"),
        ("model.safetensors", text(b"x" * 50), r"is damaged: model.safetensors \(50 bytes\) cannot be read"),
        ("model.safetensors", text(b""), r"is damaged: model.safetensors \(0 bytes\) cannot be read"),
        ("model.safetensors", flip, r"is damaged: its weights have sha256 \w{12}…, its lineage says \w{12}…; copy"),
        ("model.safetensors", lambda f: f.unlink(), "is incomplete: model.safetensors missing"),
        ("model.safetensors", rename_a_tensor, r"does not fit its own config.json: .*'missing_keys': \['model"),
        ("model.safetensors.index.json", index_alone(b"{"), "is damaged: model.safetensors.index.json: "),
        ("model.safetensors.index.json", index_alone(b"{}"), "is damaged: model.safetensors.index.json: "),
        ("config.json", lambda f: f.unlink(), "looked for config.json in it, found an empty or different folder"),
        ("config.json", cut, "is damaged: config.json: "),
        ("config.json", text(b"[]"), "is damaged: config.json: "),
        ("config.json", text(b"\xff\xfe"), "is damaged: config.json: "),
        ("config.json", rewrite(hidden_size="wide"), "is damaged: config.json: "),
        ("config.json", rewrite(hidden_size=65), "is damaged: config.json: .*hidden_size 65 is not a multiple"),
        ("config.json", rewrite(model_type="llama"), "does not fit its own config.json: .*"),
        ("config.json", rewrite(model_type="vit"), "transformers has no causal language model of the kind 'vit'"),
        ("config.json", rewrite(model_type=None), "is damaged: config.json: "),
        ("config.json", rewrite(vocab_size=301), "does not fit its own config.json: .*"),
        ("config.json", rewrite(num_hidden_layers=4), "does not fit its own config.json: .*missing_keys"),
        ("config.json", rewrite(num_hidden_layers=2), "does not fit its own config.json: .*unexpected_keys"),
        ("lineage.json", cut, "is damaged: lineage.json: "),
        ("lineage.json", rewrite(history=[{"operation": 3}]), "is damaged: lineage.json: "),
        ("lineage.json", text(b"\xff"), "is damaged: lineage.json: "),
        ("lineage.json", rewrite(weights_sha256="0" * 64), "its lineage says 000000000000…; copy it again, or delete"),
        ("tokenizer.json", undigested(cut), "is damaged: its tokenizer cannot be read: "),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_is_named(saved, file, damage, message):
    damage(saved / file)
    with pytest.raises(CheckpointError, match=rf"(?s)checkpoint (at )?{saved}.*{message}"):
        load_checkpoint(saved)


def test_a_tokenizer_larger_than_the_embedding(saved):
    shutil.rmtree(saved)
    save_checkpoint(saved, tiny("ffn", vocab_size=200), make_tokenizer("bytes", []), LINEAGE)
    with pytest.raises(
        TokenizerError, match="needs 257 rows of the model's embedding, which has 200: they do not belong"
    ):
        load_checkpoint(saved)


def test_what_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nope: .* found nothing"):
        verify_checkpoint(tmp_path / "nope")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="found a file"):
        verify_checkpoint(tmp_path / "file")
    with pytest.raises(CheckpointError, match=r"could not write .*c: .*exists: .*/file'"):
        save_checkpoint(tmp_path / "file" / "c", tiny("ffn"), None, Lineage())


def test_shards_verify_and_a_missing_one_is_named(saved):
    model = load_checkpoint(saved)[0]
    shutil.rmtree(saved)
    model.save_pretrained(saved, max_shard_size="100KB")
    shards = sorted(f.name for f in saved.glob("*.safetensors"))
    assert len(shards) > 2 and verify_checkpoint(saved).weights_sha256 == weights_digest(saved)
    assert load_checkpoint(saved)[0].config.vocab_size == 300
    (saved / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=f"is incomplete: {shards[1]} missing"):
        verify_checkpoint(saved)


def test_nothing_is_replaced_without_force(saved):
    before = {f.name: f.read_bytes() for f in saved.iterdir()}
    with pytest.raises(CheckpointError, match=f"{saved} exists already; choose another name, or --force to replace it"):
        save_checkpoint(saved, tiny("ffn"), None, Lineage())
    assert {f.name: f.read_bytes() for f in saved.iterdir()} == before and hidden(saved.parent) == []
    save_checkpoint(saved, tiny("ffn"), None, Lineage(), force=True)
    assert load_checkpoint(saved)[1] is None and hidden(saved.parent) == []


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError, KeyboardInterrupt])
def test_a_save_that_fails_midway_leaves_the_old_one(saved, error):
    def extra(folder):
        assert (folder / "model.safetensors").exists()
        (folder / "half").write_text("x")
        raise error

    before = verify_checkpoint(saved)
    wanted = CheckpointError if isinstance(error, OSError) else error
    with pytest.raises(
        wanted, match="No space left .*; what was there before is untouched" if wanted != error else None
    ):
        save_checkpoint(saved, tiny("ffn"), None, Lineage(), force=True, extra=extra)
    assert load_checkpoint(saved)[2] == before and hidden(saved.parent) == []


def save_on_a_full_disk(path, limit, connection):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save_checkpoint(path, tiny("ffn"), None, Lineage(), force=True)
    except BaseException as error:
        connection.send((type(error).__name__, str(error)))


@forked
@pytest.mark.parametrize("limit", [100, 50_000])
def test_a_full_disk_leaves_the_old_one(saved, limit):
    before = verify_checkpoint(saved)
    receive, send = multiprocessing.Pipe(duplex=False)
    child = fork(save_on_a_full_disk, saved, limit, send)
    child.join(60)
    assert child.exitcode == 0 and receive.poll()
    name, message = receive.recv()
    assert name == "CheckpointError" and f"could not write {saved}: " in message, message
    assert load_checkpoint(saved)[2] == before and hidden(saved.parent) == []


def save_for_ever(path, connection):
    for seed in range(10**9):
        save_checkpoint(path, tiny("ffn"), None, Lineage().then("train", seed=seed), force=True)
        connection.send(seed)


@forked
def test_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    path, start = tmp_path / "c", time.perf_counter()
    save_checkpoint(path, tiny("ffn"), None, Lineage().then("train", seed=0))
    took = time.perf_counter() - start
    for kill in range(8):
        receive, send = multiprocessing.Pipe(duplex=False)
        child = fork(save_for_ever, path, send)
        receive.recv()
        time.sleep(took * (kill + 0.5) / 6)
        child.kill()
        child.join()
        done = 0
        while receive.poll():
            done = receive.recv()
        assert load_checkpoint(path)[2].last.seed in (done, done + 1)
    save_checkpoint(path, tiny("ffn"), None, Lineage(), force=True)


def save_and_die(path, step):
    calls = iter(range(100))

    def dying(function):
        def wrapped(*arguments, **keywords):
            if next(calls) == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **keywords)

        return wrapped

    Path.rename, shutil.rmtree = dying(Path.rename), dying(shutil.rmtree)
    save_checkpoint(path, tiny("ffn"), None, Lineage().then("train", seed=7), force=True)


@forked
@pytest.mark.parametrize(("step", "seed"), [(0, 3), (1, 3), (2, 7), (3, 7)])
def test_kill_around_the_renames_is_recovered(saved, step, seed):
    """Removals and renames in order: old away (0), new in place (1), old out of sight (2), removed (3)."""
    child = fork(save_and_die, saved, step)
    child.join(60)
    assert child.exitcode == -signal.SIGKILL and saved.exists() == (step != 1)
    assert [path.name for path in saved.parent.glob(".c.*.tmp/old/*")] == (["c"] if step in (1, 2) else [])
    if step == 1:
        with pytest.raises(CheckpointError, match="exists already"):
            save_checkpoint(saved, tiny("ffn"), None, Lineage())
    assert load_checkpoint(saved)[2].last.seed == seed
    save_checkpoint(saved, tiny("ffn"), None, Lineage().then("train", seed=9), force=True)
    assert load_checkpoint(saved)[2].last.seed == 9 and hidden(saved.parent) == []


def test_a_rename_that_fails_puts_the_old_one_back(saved, monkeypatch):
    before, rename = verify_checkpoint(saved), Path.rename

    def refuse(self, target):
        if self.parent.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="Input/output error; what was there before is untouched"):
        save_checkpoint(saved, tiny("ffn"), None, Lineage(), force=True)
    assert saved.exists() and verify_checkpoint(saved) == before and hidden(saved.parent) == []
