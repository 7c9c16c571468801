"""A comparison is run: what it spends, what is shared, and what happens when it is cut off."""

import json
import math
import multiprocessing
import operator
import random
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml
from comparisons import SMALL, comparison, parsed
from group_operations import run_and_kill
from safetensors.torch import load_file
from transformers import AutoConfig

from tokenformer import cost
from tokenformer.compare import run as running
from tokenformer.compare.arms import final_runs
from tokenformer.compare.report import write_report
from tokenformer.compare.results import Results, read_results
from tokenformer.compare.run import compare, work
from tokenformer.compare.tuning import tuning as search
from tokenformer.errors import DataError, RecipeError, TokenformerError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")

TIMES = ("seconds", "curve", "growths", "growth")


def timeless(line):
    """A line without what no two runs have in common: times, and which of the arms that share a segment trained it."""
    kept = {key: value for key, value in line.items() if key not in TIMES}
    if line["event"] == "segment":
        kept.pop("arm")
    return json.dumps(kept, sort_keys=True)


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return comparison(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory):
    folder, began = tmp_path_factory.mktemp("compare"), time.monotonic()
    Results(folder).begin(parsed(content), "trial", {"text_sha256": "a"})
    work(parsed(content), folder, list(content["arms"]))
    return folder, read_results(folder / "results.jsonl"), time.monotonic() - began


def runs(lines, **facts):
    return [e for e in lines if e["event"] == "run" and all(e[key] == value for key, value in facts.items())]


def test_every_arm_is_tuned_then_run_with_every_seed_and_budget(finished, content):
    recipe, (_, lines, _) = parsed(content), finished
    for arm in recipe.arms:
        tuning, final = runs(lines, arm=arm, purpose="tuning"), runs(lines, arm=arm, purpose="final")
        found = search(recipe, arm, lines)
        key = operator.itemgetter("arm", "seed", "learning_rate", "budget")
        assert {key(e) for e in tuning} == {(r.arm, r.seed, r.learning_rate, r.budget) for r in found.runs}
        assert {key(e) for e in final} == {
            (r.arm, r.seed, r.learning_rate, r.budget) for r in final_runs(recipe, arm, found.rate)
        }
        assert found.settled
        assert {1e-3, 1e-2} < {line["learning_rate"] for line in tuning}  # a grid of two has no inside
    assert all(line["bits_per_byte"] != line["tuning_bits_per_byte"] for line in runs(lines))


def test_what_a_run_spent_adds_up(finished, content):
    _, lines, _ = finished
    done = {line["id"]: line for line in lines if line["event"] == "segment"}
    assert len(done) < sum(len(line["segments"]) for line in runs(lines))
    for line in runs(lines):
        chain = [done[name] for name in line["segments"]]
        assert [part["parent"] for part in chain] == [None, *line["segments"][:-1]]
        assert line["text_tokens"] == sum(part["steps"] for part in chain) * 128 == line["budget"]
        assert line["seconds"] == chain[-1]["seconds"] > chain[0]["seconds"] > 0
        config = AutoConfig.for_model(**line["config"])
        assert line["parameters"] == cost.parameters(config)
        points = [point["text_tokens"] for point in line["curve"]]
        assert points == sorted(points) and points[-1] == line["budget"]
        assert line["curve"][-1]["bits_per_byte"] == line["bits_per_byte"]
    small, widened = (runs(lines, arm=arm, purpose="final", seed=1, budget=2560)[0] for arm in ("small", "widened"))
    flops = [cost.training_flops(AutoConfig.for_model(**line["config"]), 32) for line in (small, widened)]
    assert small["training_flops"] == pytest.approx(2560 * flops[0])
    assert widened["training_flops"] == pytest.approx(640 * flops[0] + 1920 * flops[1])


def test_growth_says_what_it_did(finished):
    _, lines, _ = finished
    for line in runs(lines, arm="widened"):
        (growth,) = line["growths"]
        assert growth["logits_equal"] and growth["bits_per_byte_before"] == growth["bits_per_byte_after"]
        assert growth["text_tokens"] == 640 and growth["parameters_after"] == line["parameters"]
    assert not any(line["growths"] for line in runs(lines, arm="small"))


def test_new_parameters_warm_up_alone(content, tmp_path):
    """AdamW's first step has the size of the rate: of new neurons' outputs, which begin as zeros, half of it."""
    stage = {"at": 640, "ffn_param_tokens": 64, "rewarm_new": 128 / 768}
    recipe = parsed(
        content,
        training={**content["training"], "decay": 0.0, "weight_decay": 0.0},
        budgets=[768],
        tuning_budget=768,
        seeds=[0],
        learning_rates=[1e-2],
        arms={"small": {"model": SMALL, "stages": [stage]}},
    )
    Results(tmp_path).begin(recipe, "trial", {"text_sha256": "a"})
    work(recipe, tmp_path, ["small"])
    [line] = runs(read_results(tmp_path / "results.jsonl"))
    weights = load_file(tmp_path / "segments" / line["segments"][-1] / "checkpoint" / "model.safetensors")
    new = weights["gpt_neox.layers.0.mlp.dense_4h_to_h.weight"][:, 32:].abs()
    assert new.median().item() == pytest.approx(0.5 * 1e-2, rel=1e-3)


def test_nothing_is_computed_again(finished, content):
    folder, lines, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}
    work(parsed(content), folder, list(content["arms"]))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert read_results(folder / "results.jsonl") == lines


def test_a_worker_that_is_interrupted_alone_makes_no_report_of_half(content, tmp_path, monkeypatch):
    """It ends as one that has nothing left to do."""
    ended = SimpleNamespace(join=lambda timeout: True, processes=[])
    monkeypatch.setattr("tokenformer.compare.run.multiprocessing.start_processes", lambda *_, **__: ended)
    with pytest.raises(TokenformerError, match=r"a worker was interrupted .* the same command continues"):
        compare(parsed(content), tmp_path, name="trial")


def test_lines_of_runs_lost_to_a_kill_are_written_again(finished, content, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    kept = [line for line in finished[1] if line["event"] != "run"]
    (tmp_path / "copy" / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    work(parsed(content), tmp_path / "copy", list(content["arms"]))
    lines = read_results(tmp_path / "copy" / "results.jsonl")
    assert sorted(map(timeless, lines)) == sorted(map(timeless, finished[1]))


def test_results_alone_can_gain_an_arm(finished, content, tmp_path):
    """benchmarks/results keeps the lines of runs, not those of segments."""
    kept = [line for line in finished[1] if line["event"] != "segment"]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    twin = {**content["arms"]["small"], "training": {"warmup": 0.5}}
    more = parsed(content, arms={**content["arms"], "twin": twin}, seeds=[0, 1])
    work(more, tmp_path, list(more.arms))
    lines = read_results(tmp_path / "results.jsonl")
    assert lines[: len(kept)] == kept
    assert {line["arm"] for line in lines[len(kept) :]} == {"twin"}
    assert len(runs(lines, arm="twin", purpose="final")) == 4


def test_segments_of_another_text_are_not_continued_from(finished, content, tmp_path):
    """Results of one text beside the segments of another, or none: ids of segments do not tell texts apart."""
    shutil.copytree(finished[0], tmp_path / "copy")
    results = Results(tmp_path / "copy")
    results.path.unlink()
    with pytest.raises(DataError, match="segments were trained on another text: its sha256 is a…, that of this one b…"):
        results.begin(parsed(content), "trial", {"text_sha256": "b"})
    assert not results.path.exists()
    results.begin(parsed(content), "trial", {"text_sha256": "a"})


@pytest.mark.slow
def test_a_parent_that_was_deleted_is_trained_again_for_a_new_child(finished, content, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "segments")
    more = parsed(content, budgets=[1280, 2560, 3200], arms={"small": content["arms"]["small"]})
    work(more, tmp_path / "copy", ["small"])
    lines = read_results(tmp_path / "copy" / "results.jsonl")
    assert lines[: len(finished[1])] == finished[1]
    assert {line["budget"] for line in runs(lines, arm="small", purpose="final")} == {1280, 2560, 3200}


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_at_any_moment_gives_the_same_results(content, tmp_path, seed):
    dice, kills = random.Random(seed), 0
    recipe = parsed(content, seeds=[0], budgets=[1280], learning_rates=[1e-2])
    whole, killed, began = tmp_path / "whole", tmp_path / "killed", time.monotonic()
    for folder in (whole, killed):
        folder.mkdir()
        Results(folder).begin(recipe, "trial", {"text_sha256": "a"})
    assert run_and_kill(lambda: work(recipe, whole, list(recipe.arms)), math.inf)
    usual = time.monotonic() - began
    while not run_and_kill(
        lambda: work(recipe, killed, list(recipe.arms)), usual * dice.uniform(0.1, 0.4 + kills / 20)
    ):
        kills += 1
    assert kills >= 2
    mine, theirs = (read_results(folder / "results.jsonl") for folder in (killed, whole))
    assert {timeless(line) for line in mine[1:]} == {timeless(line) for line in theirs[1:]}
    assert not [*killed.rglob("*.partial"), *killed.rglob(".*.tmp")]


@pytest.mark.slow
def test_of_two_comparisons_that_begin_at_once_one_is_refused_or_both_share(content, tmp_path, monkeypatch):
    """Rules and tokenizers are never mixed, whoever comes first."""
    monkeypatch.setattr(running, "_run", lambda *arguments, **options: time.sleep(3) or [])
    context, told = multiprocessing.get_context("fork"), multiprocessing.Manager().list()

    def begin(folder, **changes):
        try:
            compare(parsed(content, **changes), tmp_path / folder, on_event=lambda event: told.append(event["event"]))
        except RecipeError as error:
            told.append(str(error))

    for folder, other in {"refused": {"budgets": [2560, 3200], "tuning_budget": 2560}, "shared": {}}.items():
        processes = [context.Process(target=begin, args=[folder], kwargs=changes) for changes in ({}, other)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [line["event"] for line in read_results(tmp_path / folder / "results.jsonl")] == ["recipe"]
    assert len(told) == 2 and "the recipe differs from the one that" in told[0] and told[1] == "shared"


@pytest.mark.slow
def test_two_workers_share_the_work(finished, content, tmp_path):
    events = []
    lines = compare(parsed(content), tmp_path, name="trial", workers=2, on_event=events.append)
    assert {timeless(line) for line in lines[1:]} == {timeless(line) for line in finished[1][1:]}
    assert [e for e in events if e["event"] != "progress"] == lines
    assert events[-1]["event"] == "progress" and events[-1]["done"] == events[-1]["total"] > 0


@pytest.mark.slow
def test_torchrun_hands_out_the_arms_and_one_report_takes_them_all(finished, content, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "tokenformer", "compare"]
    done = subprocess.run([*command, "recipe.yaml", "-o", "out"], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    lines = read_results(tmp_path / "out" / "results.jsonl")
    assert {timeless(line) for line in lines[1:]} == {timeless(line) for line in finished[1][1:]}
    assert "are missing" not in write_report(lines, tmp_path / "report").read_text()


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, (0, 1)),
        ({"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0"}, (2, 3)),
        ({"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}, (2, 4)),
        (
            {
                "SLURM_ARRAY_TASK_ID": "8",
                "SLURM_ARRAY_TASK_MIN": "0",
                "SLURM_ARRAY_TASK_COUNT": "3",
                "SLURM_ARRAY_TASK_STEP": "4",
            },
            (2, 3),
        ),
    ],
)
def test_arms_are_handed_out(monkeypatch, environment, share):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert running._share() == share
