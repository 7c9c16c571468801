import copy
import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from group_operations import run_and_kill
from safetensors.torch import load_file

from tokenformer.checkpoints.checkpoint import load_checkpoint, read_config, save_checkpoint
from tokenformer.checkpoints.optimizer import OPTIMIZER_FILE
from tokenformer.checkpoints.verify import verify_checkpoint
from tokenformer.cost import training_flops_of
from tokenformer.errors import CheckpointError, DataError, GrowthError, RecipeError, TokenizerError
from tokenformer.growth.freeze import freeze_only
from tokenformer.training.log import read_log
from tokenformer.training.optimization import learning_rate, steps_of
from tokenformer.training.recipe import parse_recipe
from tokenformer.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    words = ["to", "be", "or", "not", "that", "is", "the", "question", "whether", "nobler", "slings", "and", "arrows"]
    dice = random.Random(0)
    for i in range(12):
        (folder / f"{i:02}.txt").write_text(" ".join(dice.choice(words) for _ in range(300)))
    return folder


@pytest.fixture(scope="module")
def content(text):
    return {
        "model": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "qkv_param_tokens": 16,
            "output_param_tokens": 0,
            "ffn_param_tokens": 32,
        },
        "data": {"source": str(text), "tokenizer": "bytes", "validation_fraction": 0.1},
        "training": {
            "batch_size": 4,
            "sequence_length": 32,
            "save_every": 3,
            "log_every": 2,
            "evaluations_per_stage": 2,
            "threads": 1,
            "precision": "float32",
        },
        "stages": [
            {"text_tokens": 1300},
            {"text_tokens": 1300, "ffn_param_tokens": "+50%", "num_hidden_layers": 3, "name": "more"},
            {
                "text_tokens": 1300,
                "qkv_param_tokens": "+8",
                "output_param_tokens": 8,
                "num_loops": 2,
                "frozen": ["base", "embedding"],
            },
        ],
    }


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory):
    """An uninterrupted run: its folder, its checkpoints, all its events and how long it took."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    events, started = [], time.monotonic()
    checkpoints = train(parse_recipe(content), folder, on_event=events.append)
    return folder, checkpoints, events, time.monotonic() - started


def weights(checkpoint: Path) -> bytes:
    return (checkpoint / "model.safetensors").read_bytes()


def is_frozen(name: str, config) -> bool:
    """Whether the last stage freezes a parameter: base and embedding, but for the block that came with "more"."""
    (new,) = config.token_groups[1]["blocks"]
    return (".base." in name and f"layers.{new}." not in name) or "embed_tokens" in name


def test_log_holds_every_training_loss_also_where_it_is_evaluated(finished, content):
    events, every = read_log(finished[0]), content["training"]["log_every"]
    for stage in (1, 2):
        of_stage = [e for e in events if e.get("stage") == stage]
        steps = {kind: [e["step"] for e in of_stage if e["event"] == kind] for kind in ("train", "evaluation")}
        assert steps["train"] == list(range(every, of_stage[-1]["step"] + 1, every))
        assert set(steps["train"]) & set(steps["evaluation"])
    rates = [e["learning_rate"] for e in events if e["event"] == "evaluation"]
    assert rates[-1] < max(rates) == parse_recipe(content).training.learning_rate


def test_stages_grow_the_model_and_the_lineage_adds_up(finished, content):
    _, checkpoints, events, _ = finished
    configs, costs = [], 0.0
    for i, checkpoint in enumerate(checkpoints):
        model, tokenizer, lineage = load_checkpoint(checkpoint)
        configs.append(model.config)
        assert lineage.last.text_tokens_seen == (i + 1) * 11 * 4 * 32 and len(tokenizer) == 257
        freeze_only(model, ["base", "embedding"] if i == 2 else [])
        costs += 11 * 4 * 32 * training_flops_of(model, 32)
        assert lineage.last.training_flops == pytest.approx(costs)
        assert lineage.last.recipe == parse_recipe(content).model_dump(exclude_unset=True)
    assert [c.ffn_param_tokens for c in configs] == [32, 48, 48]
    assert [c.num_hidden_layers for c in configs] == [2, 3, 3]
    assert [c.num_loops for c in configs] == [1, 1, 2]
    assert [e.operation for e in lineage.history] == ["train", "grow", "train", "grow", "train"]
    assert [e.arguments.get("name") for e in lineage.history] == [None, "more", None, "grown1", None]
    assert lineage.history[1].parent == verify_checkpoint(checkpoints[0]).weights_sha256
    assert [g["name"] for g in configs[2].token_groups] == ["base", "more", "grown1"]
    losses = [e["loss"] for e in events if e["event"] == "evaluation"]
    assert losses[-1] < losses[0] - 0.3


def test_growth_is_reported_with_equal_losses_and_logits(finished):
    growths = [e for e in finished[2] if e["event"] == "growth"]
    assert len(growths) == 2
    for event in growths:
        assert event["logits_equal"] is True and event["loss_before"] == event["loss_after"]


def test_log_is_what_was_reported(finished):
    folder, _, events, _ = finished
    assert read_log(folder) == json.loads(json.dumps([e for e in events if e["event"] != "progress"]))
    assert [e["step"] for e in events if e["event"] == "progress"] == [*range(1, 12)] * 3
    tokens = [e["text_tokens_seen"] for e in events if e["event"] == "progress"]
    assert tokens == sorted(tokens)


def test_frozen_groups_do_not_move_and_the_others_do(finished):
    before, after = (load_file(c / "model.safetensors") for c in finished[1][1:])
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == is_frozen(name, read_config(finished[1][2])), name


def test_old_parameters_keep_their_optimizer_state_and_new_ones_start_theirs(finished):
    states = [torch.load(c / OPTIMIZER_FILE, weights_only=True) for c in finished[1]]
    embedding = [s["model.embed_tokens.weight"]["step"].item() for s in states]
    assert embedding == [11, 22, 22]  # frozen in the third stage, kept for a fourth
    old = "model.layers.0.mlp.groups.base.keys.weight"
    assert states[1][old]["step"].item() == 22
    assert states[1]["model.layers.0.mlp.groups.more.keys.weight"]["step"].item() == 11
    # Two blocks became three: the copy is in the middle or at the end, and the old ones moved with their states.
    steps = [states[1][f"model.layers.{i}.mlp.groups.base.keys.weight"]["step"].item() for i in range(3)]
    assert sorted(steps) == [11, 22, 22]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_killed_at_any_moment_resumes_to_the_same_bits(finished, content, tmp_path, seed):
    dice = random.Random(seed)
    recipe, folder, kills = parse_recipe(content), tmp_path / "run", 0

    def go():
        train(recipe, folder, resume=(folder / "recipe.yaml").exists())

    while not run_and_kill(go, finished[3] * dice.uniform(0.05, 0.3 + kills / 20)):
        kills += 1
    assert kills >= 2
    for mine, theirs in zip(sorted(folder.glob("stage?")), finished[1], strict=True):
        assert weights(mine) == weights(theirs)
        a, b = (torch.load(c / OPTIMIZER_FILE, weights_only=True) for c in (mine, theirs))
        assert a.keys() == b.keys() and all(torch.equal(a[n][k], b[n][k]) for n in a for k in a[n])
    mine, theirs = (
        [(e["event"], e["step"], e.get("loss")) for e in read_log(f) if e["event"] == "evaluation"]
        for f in (folder, finished[0])
    )
    assert mine == theirs
    assert not list(folder.glob("*.partial")) and not list(folder.glob(".*"))


def test_interrupt_saves_and_resumes_to_the_same_bits(finished, content, tmp_path):
    recipe, folder, handler = parse_recipe(content), tmp_path / "run", signal.getsignal(signal.SIGINT)

    def interrupt(event):
        if event["event"] == "progress" and event["stage"] == 2 and event["step"] == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(recipe, folder, on_event=interrupt)
    assert (folder / "stage2.partial" / "checkpoint-5" / "complete").exists()
    assert signal.getsignal(signal.SIGINT) is handler
    steps = []
    train(recipe, folder, resume=True, on_event=lambda e: steps.append((e["event"], e.get("stage"), e.get("step"))))
    assert ("progress", 2, 5) not in steps and ("progress", 2, 6) in steps
    assert weights(folder / "stage3") == weights(finished[1][-1])


def test_a_finished_run_resumes_to_nothing_and_a_new_one_is_refused(finished, content):
    folder, checkpoints, *_ = finished
    recipe = parse_recipe(content)
    assert train(recipe, folder, resume=True) == checkpoints
    with pytest.raises(CheckpointError, match="exists already; --resume to continue it, --force to replace"):
        train(recipe, folder)
    changed = parse_recipe({**content, "seed": 1})
    with pytest.raises(RecipeError, match=r"differs .* in: seed; resume with that one"):
        train(changed, folder, resume=True)


def test_nothing_to_resume(content, tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing to resume: .* holds no run"):
        train(parse_recipe(content), tmp_path / "none", resume=True)


def test_a_later_recipe_continues_from_a_checkpoint_with_its_optimizer(finished, content, tmp_path):
    more = copy.deepcopy(content)
    more["model"] = {"checkpoint": str(finished[1][-1])}
    more["stages"] = [{"text_tokens": 256, "ffn_param_tokens": "+4"}]
    (last,) = train(parse_recipe(more), tmp_path / "more")
    lineage = verify_checkpoint(last)
    assert lineage.last.text_tokens_seen == 3 * 11 * 128 + 256 and len(lineage.history) == 7
    state = torch.load(last / OPTIMIZER_FILE, weights_only=True)
    assert state["model.embed_tokens.weight"]["step"].item() == 24


def test_a_checkpoint_without_a_tokenizer_needs_one_that_fits(finished, content, tmp_path):
    model, _, lineage = load_checkpoint(finished[1][-1])
    save_checkpoint(tmp_path / "bare", model, None, lineage)
    more = copy.deepcopy(content)
    more |= {"model": {"checkpoint": str(tmp_path / "bare")}, "stages": [{"text_tokens": 256}]}
    assert train(parse_recipe(more), tmp_path / "same")
    more["data"]["tokenizer"] = "bpe:300"
    with pytest.raises(TokenizerError, match=r"bpe:300 go up to 299, .*bare has 257 rows: name the one"):
        train(parse_recipe(more), tmp_path / "other")


def test_a_damaged_optimizer_is_named(finished, content, tmp_path):
    shutil.copytree(finished[1][-1], tmp_path / "c")
    file = tmp_path / "c" / OPTIMIZER_FILE
    file.write_bytes(file.read_bytes()[:1000])
    more = {**copy.deepcopy(content), "model": {"checkpoint": str(tmp_path / "c")}, "stages": [{"text_tokens": 256}]}
    with pytest.raises(CheckpointError, match=r"is damaged: optimizer\.pt has sha256"):
        train(parse_recipe(more), tmp_path / "run")


def test_changed_text_is_noticed_on_resuming(text, content, tmp_path):
    shutil.copytree(text, tmp_path / "text")
    moving = {**content, "data": {**content["data"], "source": str(tmp_path / "text")}}

    def interrupt(event):
        if event["event"] == "progress" and event["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(parse_recipe(moving), tmp_path / "run", on_event=interrupt)
    (tmp_path / "text" / "more.txt").write_text("more " * 400)
    with pytest.raises(DataError, match=r"data is not what this run began with .*training_documents 11 → 12"):
        train(parse_recipe(moving), tmp_path / "run", resume=True)


def test_force_takes_over_after_a_kill_and_spares_what_is_no_run(finished, content, tmp_path):
    recipe = parse_recipe({**content, "stages": [{"text_tokens": 256}]})
    shutil.copytree(finished[0], tmp_path / "run")
    left = tmp_path / ".run.0123abcd.tmp"  # as a kill -9 between the two renames leaves it
    shutil.copytree(finished[0], left / "old" / "run")
    (left / "tokenformer.lock").touch()
    assert train(recipe, tmp_path / "run", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "x.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        train(recipe, tmp_path / "notes", force=True)
    with pytest.raises(CheckpointError, match="give one of them"):
        train(recipe, tmp_path / "run", force=True, resume=True)
    assert (tmp_path / "notes" / "x.txt").read_text() == "mine"


def test_streaming_trains_and_resumes_to_the_same_bits(content, tmp_path):
    stream = copy.deepcopy(content)
    stream["data"] |= {"streaming": True, "validation_bytes": 2000, "validation_fraction": 0.2}
    stream["stages"] = stream["stages"][:2]
    recipe = parse_recipe(stream)

    def interrupt(event):
        if event["event"] == "progress" and event["stage"] == 2 and event["step"] == 4:
            signal.raise_signal(signal.SIGINT)

    whole = train(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "parts", on_event=interrupt)
    parts = train(recipe, tmp_path / "parts", resume=True)
    assert weights(whole[-1]) == weights(parts[-1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"stages": [{"text_tokens": 9, "frozen": ["bse"]}]},
            r"there is no part 'bse'; this model has base, embedding",
        ),
        (
            {"stages": [{"text_tokens": 9, "frozen": ["base", "embedding", "final_norm", "linear_maps"]}]},
            "nothing to train",
        ),
        ({"training": {"training_arguments": {"max_steps": 3}}}, "sets max_steps, which other recipe fields decide"),
        ({"training": {"training_arguments": {"learning_rate": 3}}}, "sets learning_rate, which other recipe fields"),
        ({"training": {"report_to": ["tensorbord"]}}, "report_to: .*tensorbord"),
        ({"training": {"training_arguments": {"lerning_rate": 3}}}, "training_arguments: .*lerning_rate"),
        (
            {"training": {"batch_size": 4, "micro_batch_size": 3}},
            "batch_size 4 is not a multiple of micro_batch_size 3",
        ),
        ({"model": {"hidden_size": 30, "num_attention_heads": 4}}, "hidden_size 30 is not a multiple"),
    ],
)
def test_recipes_that_cannot_be_trained(content, tmp_path, change, message):
    merged = {**content, **change}
    if "training" in change:
        merged["training"] = {**content["training"], **change["training"]}
    with pytest.raises(RecipeError, match=message):
        train(parse_recipe(merged), tmp_path / "run")


def test_a_mistake_in_a_later_stage_is_found_at_once_and_leaves_nothing_behind(content, tmp_path):
    wrong = copy.deepcopy(content)
    wrong["stages"][2]["frozen"] = ["mroe"]
    with pytest.raises(RecipeError, match=r"stages\.2: there is no part 'mroe'; this model has base, more, grown1"):
        train(parse_recipe(wrong), tmp_path / "run")
    wrong["stages"][2] = {"text_tokens": 9, "ffn_param_tokens": 40}
    with pytest.raises(GrowthError, match=r"stages\.2: ffn_param_tokens asked 40, found 48"):
        train(parse_recipe(wrong), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_force_that_fails_leaves_the_old_run(finished, content, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    wrong = {**content, "data": {**content["data"], "source": str(tmp_path / "none.txt")}}
    with pytest.raises(DataError, match="no file or folder"):
        train(parse_recipe(wrong), tmp_path / "run", force=True)
    assert train(parse_recipe(content), tmp_path / "run", resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def schedule(content, **training):
    recipe = parse_recipe({**content, "training": {**content["training"], "learning_rate": 1.0, **training}})
    return [[learning_rate(recipe, i, s) for s in range(steps_of(st, recipe))] for i, st in enumerate(recipe.stages)]


def test_wsd_rises_holds_and_falls_once_over_all_stages(content):
    lrs = [lr for stage in schedule(content, warmup=0.2, decay=0.2) for lr in stage]
    assert lrs[0] < lrs[3] < lrs[6] and lrs[8:26] == [1.0] * 18
    fall = lrs[-6:]
    assert fall == sorted(fall, reverse=True) and fall[-1] == pytest.approx(1 / 6.6)


def test_cosine_restarts_in_every_stage_and_a_stage_may_set_its_rate(content):
    stages = schedule(content, schedule="cosine", warmup=0.1)
    assert stages[0] == stages[1] and stages[0][-1] < 0.15
    content = copy.deepcopy(content)
    content["stages"][1]["learning_rate"] = 0.5
    assert schedule(content)[1][0] == 0.5


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(content, tmp_path):
    half = copy.deepcopy(content)
    half["training"]["precision"] = "bfloat16"
    half["stages"] = [{"text_tokens": 400}]
    (last,) = train(parse_recipe(half), tmp_path / "run")
    assert {t.dtype for t in load_file(last / "model.safetensors").values()} == {torch.float32}
    assert verify_checkpoint(last).last.loss < 6
