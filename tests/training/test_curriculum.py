"""Stages that read texts, lengths and batches of their own."""

import copy
import random

import pytest
import torch
import yaml
from group_operations import run_and_kill
from typer.testing import CliRunner

from tokenformer.checkpoints.checkpoint import load_checkpoint
from tokenformer.checkpoints.verify import read_lineage
from tokenformer.cli import app as cli
from tokenformer.cost import training_flops_of
from tokenformer.errors import RecipeError
from tokenformer.evaluation import evaluate
from tokenformer.training.difficulty import difficulty
from tokenformer.training.log import read_log
from tokenformer.training.optimization import learning_rate, steps_of
from tokenformer.training.preparation import prepare_run
from tokenformer.training.recipe import parse_recipe
from tokenformer.training.settings import reading
from tokenformer.training.train import train

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    """Old text in short sequences, then new text with some of the old, then as the recipe says for all stages."""
    folder = tmp_path_factory.mktemp("text")
    for name, words in {"old": ["to", "be", "or", "not"], "new": ["def", "return", "self", "None"]}.items():
        dice = random.Random(name)
        (folder / name).mkdir()
        for i in range(12):
            text = f"{name} {i} " + " ".join(dice.choice(words) for _ in range(200))
            (folder / name / f"{i:02}.txt").write_text(text, encoding="utf-8")
    old, new = str(folder / "old"), str(folder / "new")
    return {
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "qkv_param_tokens": 0,
            "output_param_tokens": 0,
            "ffn_param_tokens": 16,
        },
        "data": {"mixture": {"old": {"source": old}}, "tokenizer": "bytes", "validation_fraction": 0.2},
        "training": {
            "batch_size": 4,
            "sequence_length": 32,
            "learning_rate": 1e-2,
            "save_every": 3,
            "log_every": 1,
            "evaluations_per_stage": 2,
            "threads": 1,
            "precision": "float32",
        },
        "stages": [
            {"text_tokens": 640, "sequence_length": 8, "batch_size": 10},
            {
                "text_tokens": 1600,
                "batch_size": 5,
                "data": {"mixture": {"new": {"source": new, "weight": 9}, "old": {"source": old}}},
            },
            {"text_tokens": 1024, "ffn_param_tokens": 24},
        ],
    }


@pytest.fixture(scope="module")
def finished(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, train(parse_recipe(content), folder)


def test_costs_and_text_tokens_follow_each_stage(content, finished):
    tokens = flops = 0.0
    for checkpoint, size, length in zip(finished[1], [640, 1600, 1024], [8, 32, 32], strict=True):
        model, _, lineage = load_checkpoint(checkpoint)
        tokens += size
        flops += size * training_flops_of(model, length)
        assert lineage.last.text_tokens_seen == tokens
        assert lineage.last.training_flops == pytest.approx(flops)
        assert model.config.max_position_embeddings == 32


def test_the_lineage_says_what_each_stage_read(finished):
    reads = [read_lineage(checkpoint).last.data["reads"] for checkpoint in finished[1]]
    assert [{text: r["share"] for text, r in read.items()} for read in reads] == [
        {"old": 1.0},
        {"new": 0.9, "old": 0.1},
        {"old": 1.0},
    ]
    stages = [e for e in read_log(finished[0]) if e["event"] == "stage"]
    assert [e["reads"] for e in stages] == reads
    facts = read_lineage(finished[1][0]).last.data["texts"]
    blocks = facts["new"]["training_text_tokens"] / 31
    assert reads[1]["new"]["passes"] == pytest.approx(45 / blocks)


def test_a_mixture_has_its_weights_and_goes_on_where_each_text_stopped(content):
    readings = [reading(parse_recipe(content), index) for index in range(3)]
    assert [r.counts for r in readings] == [{"old": 80}, {"new": 45, "old": 5}, {"old": 32}]
    assert [dict(r.skipped) for r in readings] == [{}, {"old": 20}, {"old": 25, "new": 45}]
    assert [r.pieces for r in readings] == [4, 1, 1]


def test_each_text_is_validated_on_its_own_and_all_together(content, finished, tmp_path):
    data = prepare_run(parse_recipe(content), tmp_path).data
    model, _, lineage = load_checkpoint(finished[1][-1])
    own, total = {}, 0.0
    for name, held in data.validation.items():
        own[name] = evaluate(model, held.blocks, num_bytes=held.num_bytes).bits_per_byte
        total += own[name] * held.num_bytes
    assert lineage.last.bits_per_byte_of == pytest.approx(own) and list(own) == ["old", "new"]
    assert lineage.last.bits_per_byte == pytest.approx(total / data.facts["validation_bytes"])
    logged = [e for e in read_log(finished[0]) if e["event"] == "evaluation"]
    assert all(e["bits_per_byte_of"].keys() == {"old", "new"} for e in logged) and len(logged) == 6
    first, mixed = logged[1]["bits_per_byte_of"], logged[3]["bits_per_byte_of"]
    assert mixed["new"] < first["new"] - 0.5  # it was learned when it was read


def test_killed_at_any_moment_resumes_to_the_same_bits(finished, content, tmp_path):
    recipe, folder, kills, dice = parse_recipe(content), tmp_path / "run", 0, random.Random(0)

    def go():
        train(recipe, folder, resume=(folder / "recipe.yaml").exists())

    while not run_and_kill(go, dice.uniform(0.3, 1.0) + kills / 4):
        kills += 1
    assert kills >= 2
    for mine, theirs in zip(sorted(folder.glob("stage?")), finished[1], strict=True):
        assert (mine / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    mine, theirs = (
        [{**e, "seconds": 0} for e in read_log(f) if e["event"] in ("stage", "evaluation") and e.get("done", 0) == 0]
        for f in (folder, finished[0])
    )
    assert [e for e in mine if e["event"] == "evaluation"] == [e for e in theirs if e["event"] == "evaluation"]


def test_the_closing_tables_show_each_text_within_80_columns(content, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    done = CliRunner().invoke(cli.app, ["train", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "run")])
    assert done.exit_code == 0, done.output
    lineage = read_lineage(tmp_path / "run" / "stage3")
    for name, found in lineage.last.bits_per_byte_of.items():
        assert any(line.split() == ["3", name, f"{found:.4f}"] for line in done.output.splitlines())
    assert "stage 3 reads old" not in done.output
    assert all(len(line) <= 80 for line in done.output.splitlines()[-12:-1])
    assert f"new {lineage.last.bits_per_byte_of['new']:.4f}" in (tmp_path / "run" / "stage3" / "README.md").read_text()


def test_a_text_that_is_read_again_is_said(content, tmp_path):
    small = {**copy.deepcopy(content), "stages": [{"text_tokens": 2 * 10**4}]}
    small["training"] |= {"batch_size": 64, "evaluations_per_stage": 1}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(small), encoding="utf-8")
    done = CliRunner().invoke(cli.app, ["train", str(tmp_path / "r.yaml"), "-o", str(tmp_path / "run")])
    passes = read_lineage(tmp_path / "run" / "stage1").last.data["reads"]["old"]["passes"]
    assert passes > 2 and f"stage 1 reads old {passes:.1f} times over" in done.output


def test_the_schedule_counts_text_tokens_whatever_the_batches(content):
    """A ramp of batches has the rates of an even run at the same shares of the text."""
    even = {**content, "stages": [{"text_tokens": 12_800}]}
    ramp = {**content, "stages": [{"text_tokens": 6400, "batch_size": n} for n in (2, 10)]}
    want = {step * 128: learning_rate(parse_recipe(even), 0, step) for step in range(100)}
    recipe, read = parse_recipe(ramp), 0
    t, common = recipe.training, 0
    for index, stage in enumerate(recipe.stages):
        for step in range(steps_of(stage, recipe)):
            rate = learning_rate(recipe, index, step)
            if read in want and read > 640:  # the warm-up ends with the step that it falls into
                assert rate == pytest.approx(want[read]), read
                common += 1
            assert rate <= t.learning_rate
            read += stage.training(t).tokens_per_step
    assert read == 12_800 and common > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sequence_length": 12}, "stages.0.sequence_length is 12, which does not divide training.sequence_length, 32"),
        ({"sequence_length": 64}, "stages.0.sequence_length is 64, which does not divide"),
        ({"data": {"source": "a", "mixture": {"b": 1}}}, "stages.0.data: name one text as source, or several"),
        ({"data": {"mixture": {"old": 1}}}, "the text 'old' has two sources"),
        ({"data": {"mixture": {"new": {"weight": -1}}}}, "stages.0.data.mixture.new.weight is -1: input should be gr"),
        ({"data": {"mixtur": {"new": 1}}}, "unknown key 'stages.0.data.mixtur'; did you mean 'mixture'?"),
        ({"batch_size": 0}, "stages.0.batch_size is 0"),
    ],
)
def test_stages_that_cannot_be(content, change, message):
    wrong = {**content, "stages": [{"text_tokens": 64, **change}]}
    with pytest.raises(RecipeError) as caught:
        parse_recipe(wrong)
    assert message in str(caught.value)


def test_batches_that_do_not_divide_are_found_before_training(content, tmp_path):
    wrong = {**content, "training": {**content["training"], "micro_batch_size": 2}}
    with pytest.raises(RecipeError, match=r"stages\.1: batch_size 5 is not a multiple of micro_batch_size 2"):
        train(parse_recipe(wrong), tmp_path / "run")


def test_streams_have_one_length(content):
    source = content["data"]["mixture"]["old"]["source"]
    wrong = {**content, "data": {"source": source, "streaming": True}, "stages": [content["stages"][0]]}
    with pytest.raises(RecipeError, match="streaming goes with one sequence_length"):
        parse_recipe(wrong)


def test_difficulty_is_each_documents_bits_per_byte(content, finished, tmp_path):
    data = prepare_run(parse_recipe(content), tmp_path).data
    documents = data.validation["old"].documents
    found = difficulty(str(finished[1][-1]), documents)
    model, tokenizer, _ = load_checkpoint(finished[1][-1], dtype=torch.float32)
    for text, bits in zip(documents["text"], found, strict=True):
        eos = tokenizer.eos_token_id
        ids = [eos, *tokenizer.encode(text), eos]
        rows = [{"input_ids": ids[start : start + 32]} for start in range(0, len(ids) - 1, 31)]
        total = sum(evaluate(model, _Rows([row]), num_bytes=len(text)).bits_per_byte for row in rows)
        assert total == pytest.approx(bits, rel=1e-5)


class _Rows(list):
    def __getitem__(self, at):
        return {"input_ids": [row["input_ids"] for row in super().__getitem__(at)]}


def test_a_stage_may_read_the_easier_documents_first(content, finished, tmp_path):
    easier = copy.deepcopy(content)
    part = easier["stages"][1]["data"]["mixture"]["new"]
    part |= {"share": 0.5, "sorted_by": str(finished[1][0])}
    easier["stages"] = easier["stages"][1:2]
    (checkpoint,) = train(parse_recipe(easier), tmp_path / "run")
    reads = read_lineage(checkpoint).last.data["reads"]
    key = f"new 0–0.5 by {finished[1][0]}"
    assert reads.keys() == {key, "old"}
    facts = read_lineage(checkpoint).last.data["texts"]
    assert facts[key]["training_documents"] == round(0.5 * (12 - 2))
