"""Training what `grow` and `freeze` leave to train, of ordinary transformers too; slices, gates, and their commands."""

import datasets
import pytest
import torch
from group_operations import ordinary
from tiny_models import tiny
from typer.testing import CliRunner

from tokenformer import consolidate, drop, freeze, grow, prune, route, shrink, sort
from tokenformer.checkpoints.checkpoint import load_checkpoint, read_config, save_checkpoint
from tokenformer.checkpoints.lineage import Lineage
from tokenformer.checkpoints.optimizer import load_states
from tokenformer.cli import app as cli
from tokenformer.data.tokenizer import make_tokenizer
from tokenformer.errors import GrowthError, RecipeError
from tokenformer.growth.architectures import group_names, token_groups
from tokenformer.growth.freeze import freeze_only, trainable_parts
from tokenformer.growth.route import route_operation
from tokenformer.models.pattention import Pattention
from tokenformer.training.recipe import parse_recipe
from tokenformer.training.train import train

OLD = ["base", "embedding", "final_norm", "linear_maps"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(f"{i} the quick brown fox jumps over the lazy dog. " * 12)
    return folder


def command(*arguments):
    done = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert done.exit_code == 0, f"{done.output}\n{done.exception!r}"
    return done.output


def saved(model, path):
    tokenizer = make_tokenizer("bytes", datasets.Dataset.from_dict({"text": []}))
    save_checkpoint(path, model, tokenizer, Lineage())
    return path


def recipe(checkpoint, text, **stage):
    return parse_recipe(
        {
            "model": {"checkpoint": str(checkpoint)},
            "data": {"source": str(text), "validation_fraction": 0.1},
            "training": {"batch_size": 4, "sequence_length": 32, "save_every": 3, "threads": 1, "precision": "float32"},
            "stages": [{"text_tokens": 1000, **stage}],
        }
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """An ordinary checkpoint, and what `grow` and `freeze` make of it."""
    from transformers import LlamaConfig

    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ordinary(LlamaConfig(**sizes, intermediate_size=48, max_position_embeddings=64))
    folder = tmp_path_factory.mktemp("llama")
    saved(model, folder / "parent")
    command("grow", folder / "parent", "-o", folder / "grown", "--ffn", "+25%", "--num-hidden-layers", "+1")
    command("freeze", folder / "grown", *OLD, "-o", folder / "frozen")
    return folder


def test_only_the_new_neurons_of_an_ordinary_checkpoint_train(llama, text, tmp_path):
    assert read_config(llama / "frozen").frozen == OLD
    (trained,) = train(recipe(llama / "frozen", text), tmp_path / "run")
    before, _, _ = load_checkpoint(llama / "frozen")
    after, _, lineage = load_checkpoint(trained)
    new = {name for name, _ in after.named_parameters() if ".groups.grown1." in name or "layers.2." in name}
    moved = {
        n for (n, p), q in zip(after.named_parameters(), before.parameters(), strict=True) if not torch.equal(p, q)
    }
    assert moved == new and new
    assert set(load_states(trained)) == new
    assert [event.operation for event in lineage.history] == ["grow", "freeze", "train"]
    command("drop", trained, "grown1", "-o", tmp_path / "back")
    back, _, _ = load_checkpoint(tmp_path / "back")
    parent, _, _ = load_checkpoint(llama / "parent")
    assert all(torch.equal(t, parent.state_dict()[name]) for name, t in back.state_dict().items())
    assert not load_states(tmp_path / "back")


def test_an_interrupted_run_of_an_ordinary_checkpoint_resumes_to_the_same_bits(llama, text, tmp_path):
    content = recipe(llama / "grown", text, ffn_param_tokens="+8", name="more", frozen=["base", "grown1"])
    (whole,) = train(content, tmp_path / "whole")

    def interrupt(event):
        if event["event"] == "progress" and event["step"] == 4:
            import signal

            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(content, tmp_path / "parts", on_event=interrupt)
    (resumed,) = train(content, tmp_path / "parts", resume=True)
    for file in ("model.safetensors", "optimizer.pt"):
        assert (whole / file).read_bytes() == (resumed / file).read_bytes()


def test_a_stage_decides_against_the_checkpoints_marks(llama, text, tmp_path):
    (trained,) = train(recipe(llama / "frozen", text, frozen=["grown1"]), tmp_path / "run")
    before, after = (load_checkpoint(path)[0] for path in (llama / "frozen", trained))
    for (name, p), q in zip(after.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q) == (".groups.grown1." in name or "layers.2." in name), name
    command("unfreeze", llama / "frozen", *OLD, "-o", tmp_path / "free")
    assert read_config(tmp_path / "free").frozen == []
    assert all(p.requires_grad for p in load_checkpoint(tmp_path / "free")[0].parameters())
    assert not any(p.requires_grad for n, p in load_checkpoint(llama / "frozen")[0].named_parameters() if "embed" in n)


def test_a_mark_goes_with_its_group(llama, tmp_path):
    command("freeze", llama / "grown", "grown1", "embedding", "-o", tmp_path / "frozen")
    command("drop", tmp_path / "frozen", "grown1", "-o", tmp_path / "dropped")
    assert load_checkpoint(tmp_path / "dropped")[0].config.frozen == ["embedding"]


def test_sequences_longer_than_an_ordinary_model_reads_are_refused(llama, text, tmp_path):
    content = recipe(llama / "grown", text).model_dump(exclude_unset=True)
    content["training"]["sequence_length"] = 128
    with pytest.raises(RecipeError, match="128, more than the 64 text tokens"):
        train(parse_recipe(content), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"stages\.0: nested_dropout"):
        train(recipe(llama / "grown", text, nested_dropout=0.5), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_nested_dropout_trains_prefixes_and_resumes(text, tmp_path):
    model = tiny("ffn", vocab_size=257)
    saved(model, tmp_path / "start")
    (plain,) = train(recipe(tmp_path / "start", text), tmp_path / "plain")
    (nested,) = train(recipe(tmp_path / "start", text, nested_dropout=0.25), tmp_path / "nested")
    moved = {}
    for path in (plain, nested):
        layer = load_checkpoint(path)[0].model.layers[0].mlp.groups["base"].values.weight
        change = (layer - model.model.layers[0].mlp.groups["base"].values.weight).norm(dim=0)
        moved[path] = (change[-20:].mean() / change[:20].mean()).item()
    assert moved[nested] < 0.95 * moved[plain]
    shares = [layer.keep for layer in load_checkpoint(nested)[0].modules() if isinstance(layer, Pattention)]
    assert set(shares) == {1.0}


def test_an_interrupt_while_writing_leaves_nothing_and_says_so(llama, tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tokenformer.checkpoints.checkpoint.save_file", interrupt)
    done = CliRunner().invoke(cli.app, ["drop", str(llama / "grown"), "grown1", "-o", str(tmp_path / "new")])
    assert done.exit_code == 130 and "Nothing was written" in done.output
    assert list(tmp_path.iterdir()) == []


def blocks(seed=0, rows=6):
    ids = torch.randint(0, 128, (rows, 20), generator=torch.Generator().manual_seed(seed)).tolist()
    return datasets.Dataset.from_dict({"input_ids": ids})


@pytest.mark.parametrize("make", [tiny, lambda: tiny("ffn"), ordinary], ids=["paper", "ffn", "llama"])
def test_a_sorted_model_is_the_same_and_its_prefixes_are_models(make):
    model, ids = make(), torch.tensor(blocks(1)["input_ids"])
    before = model(ids).logits
    sort(model, blocks())
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    whole = {group.name: group.count("ffn", 0) for group in token_groups(model.config)}
    shrink(model, 0.5)
    assert token_groups(model.config)[0].count("ffn", 0) == -(-whole["base"] // 2)
    assert model(ids).logits.isfinite().all() and not torch.allclose(model(ids).logits, before)


CHANGES = {
    "prune": lambda model: prune(model, blocks(), keep=0.5),
    "sort": lambda model: sort(model, blocks()),
    "shrink": lambda model: shrink(model, 0.5),
    "consolidate": lambda model: consolidate(model, ["base", "a"], name="both"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", [lambda: tiny("ffn"), ordinary], ids=["ffn", "llama"])
def test_what_was_frozen_stays_frozen_in_memory_and_when_it_was_saved(make, change, tmp_path):
    model = make()
    for name in ("a", "b"):
        grow(model, ffn_param_tokens="+8", name=name)
    freeze(model, ["base", "a"])
    CHANGES[change](model)
    frozen = {"both"} if change == "consolidate" else {"base", "a"}
    save_checkpoint(tmp_path / "c", model, None, Lineage())
    for found in (model, load_checkpoint(tmp_path / "c")[0]):
        trains = {name: {p.requires_grad for p in parts} for name, parts in trainable_parts(found).items() if parts}
        assert {name for name in group_names(found.config) if trains[name] == {False}} == frozen
        assert trains["b"] == {True} and set(found.config.frozen) == frozen


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_keeps_what_matters(scope):
    model, ids = tiny("ffn"), torch.tensor(blocks(1)["input_ids"])
    silent = torch.arange(160) % 2 == 1
    with torch.no_grad():
        for layer in model.pattention_layers["ffn"]:
            layer.groups["base"].values.weight[:, silent] = 0
            layer.groups["base"].keys.weight[silent] = 0
    before = model(ids).logits
    prune(model, blocks(), keep=0.5, scope=scope)
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-4)
    counts = model.config.token_groups[0]["ffn"]
    assert counts == 80 and all(layer.num_tokens == 80 for layer in model.pattention_layers["ffn"])
    for keep in (0, -1, 1.5):
        with pytest.raises(GrowthError, match="above 0 and at most 1"):
            prune(model, blocks(), keep=keep)
    with pytest.raises(GrowthError, match="layer or global"):
        prune(model, blocks(), keep=0.5, scope="wide")


def test_global_pruning_gives_blocks_of_their_own_sizes_and_saves_them(tmp_path):
    model, ids = tiny("ffn", vocab_size=257), torch.tensor(blocks(1)["input_ids"])
    with torch.no_grad():
        model.model.layers[0].mlp.groups["base"].values.weight[:, 16:] *= 1e-3
    prune(model, blocks(), keep=0.5, scope="global")
    counts = model.config.token_groups[0]["ffn"]
    assert isinstance(counts, list) and counts[0] < min(counts[1:])
    saved(model, tmp_path / "pruned")
    assert torch.equal(load_checkpoint(tmp_path / "pruned")[0](ids).logits, model(ids).logits)
    with pytest.raises(GrowthError, match="one number for all"):
        llama = ordinary()
        with torch.no_grad():
            for name, p in llama.named_parameters():
                if "layers.0.mlp.down_proj" in name and p.dim() == 2:
                    p[:, 8:] = 0
        prune(llama, blocks(), keep=0.5, scope="global")


def test_gates_are_fitted_to_tell_texts_apart_and_close_to_the_last_bit():
    model = tiny("ffn")
    low, high = (datasets.Dataset.from_dict({"input_ids": torch.randint(a, a + 64, (8, 20)).tolist()}) for a in (0, 64))
    ids = torch.tensor(low["input_ids"])
    parent = model(ids).logits
    grow(model, ffn_param_tokens="+32", name="high")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".groups.high." in name:
                p.normal_(std=0.2)
    routing = route(model, "high", high, low)
    assert routing.open_on_own > 0.9 and routing.open_on_other < 0.1
    assert model.config.token_groups[-1]["routed"] is True
    for layer in model.pattention_layers["ffn"]:
        layer.gates["high"].weight.zero_()
        layer.gates["high"].bias.fill_(-1)
    assert torch.equal(model(ids).logits, parent)
    drop(model, ["high"])
    assert torch.equal(model(ids).logits, parent)
    freeze_only(model, [])


def grown(model, **growth):
    grow(model, **growth, name="new")
    return model


def texts():
    return blocks(), blocks(1)


def test_fitting_gates_leaves_the_model_as_it_is_until_they_are_put_on():
    model = grown(tiny("ffn"), ffn_param_tokens="+8")
    before, parameters = dict(model.state_dict()), list(model.parameters())
    operation, _ = route_operation(model, "new", *texts())
    assert dict(model.state_dict()).keys() == before.keys() and operation.config.token_groups[-1]["routed"]
    route(model, "new", *texts())
    assert all(any(p is q for q in model.parameters()) for p in parameters)


def test_routing_is_refused_where_there_is_nothing_else():
    with pytest.raises(GrowthError, match="nothing would be left"):
        route(tiny("ffn"), "base", blocks(), blocks(1))
    with pytest.raises(GrowthError, match="came with blocks 1, which gates cannot close"):
        route(grown(tiny("ffn", num_hidden_layers=1), ffn_param_tokens="+8", num_hidden_layers="+1"), "new", *texts())
    with pytest.raises(GrowthError, match="came with blocks 1"):
        route(grown(tiny("ffn", num_hidden_layers=1), num_hidden_layers="+1"), "new", *texts())
    model = grown(tiny("ffn"), ffn_param_tokens="+8")
    route(model, "new", *texts())
    with pytest.raises(GrowthError, match="no other gate is open"):
        route(model, "base", *texts())
    with pytest.raises(GrowthError, match="nothing would be left in the ffn projection"):
        route(ordinary(), "base", blocks(), blocks(1))
    with pytest.raises(GrowthError, match="there is no token group 'x'"):
        route(tiny(), "x", blocks(), blocks(1))
