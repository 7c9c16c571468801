"""The rules of a comparison, its segments, budgets and text."""

import json

import pytest
import torch
import yaml
from comparisons import SMALL, TOKENS, comparison, parsed
from tiny_models import tiny
from transformers import AutoModelForCausalLM, GPTNeoXConfig

from tokenformer import cost, grow
from tokenformer.compare.arms import Run, segments
from tokenformer.compare.budgets import cost_per_step, counted_flops, optimizer_flops, steps_within
from tokenformer.compare.methods import METHODS, grow_by
from tokenformer.compare.recipe import load_compare_recipe
from tokenformer.compare.results import Results, read_results
from tokenformer.compare.run import compare, load_text, rehearse
from tokenformer.errors import CheckpointError, DataError, EvaluationError, GrowthError, RecipeError
from tokenformer.growth.freeze import freeze_only
from tokenformer.training.recipe import TrainingSection

TEXT = {"text_sha256": "a"}

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    return comparison(tmp_path_factory.mktemp("text"))


# --- Rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": [2560, 1280]}, "smallest first"),
        ({"budgets": [1280, 1280]}, r"budgets are \[1280.0, 1280.0\]; write each of them once"),
        ({"learning_rates": [1e-3, 1e-3]}, r"learning_rates are \[0.001, 0.001\]; write each of them once"),
        ({"seeds": [0, 1, 0]}, r"seeds are \[0, 1, 0\]; write each of them once"),
        ({"tuning_budget": 5}, r"tuning_budget is 5; it must be one of the budgets"),
        ({"rules": {"reference": "large"}}, "rules.reference is 'large'; the arms are small, widened"),
        ({"rules": {"reference": "small", "treshold": 1}}, "did you mean 'threshold'"),
        ({"arms": {"small": {"model": SMALL, "stages": [{"at": 9999}]}}}, "lie below 2048, where the learning rate"),
        ({"arms": {"small": {"model": SMALL, "stages": [{"at": 2048}]}}}, "lie below 2048"),
        (
            {"arms": {"small": {"model": SMALL, "stages": [{"at": 9, "method": "magic"}]}}},
            "called 'magic'; there are exact",
        ),
        ({"arms": {"small": {"model": SMALL, "stages": [{"at": 9, "mehtod": "exact"}]}}}, "did you mean 'method'"),
        ({"arms": {"small": {"model": SMALL, "training": {"scedule": "wsd"}}}}, "did you mean 'schedule'"),
        ({"data": {"source": "x", "streaming": True}}, "streaming does not go with a comparison"),
        (
            {"arms": {"small": {"model": SMALL, "training": {"sequence_length": 12}}}},
            "12, which does not divide training",
        ),
        ({"training": {"parallel": {"fsdp": 2}}}, "parallel spreads one model over processes, and a comparison deals"),
    ],
)
def test_impossible_rules_are_refused(content, changes, message):
    with pytest.raises(RecipeError, match=message):
        parsed(content, **changes)


@pytest.mark.parametrize(
    ("arm", "error", "message"),
    [
        ({"model": {**SMALL, "hiden_size": 8}}, RecipeError, "did you mean 'hidden_size'"),
        ({"model": {"architecture": "gpt_nex"}}, RecipeError, "no architecture 'gpt_nex'; there are"),
        ({"model": {**TOKENS, "hidden_size": 15}}, RecipeError, r"arms.small.model: these sizes make no model"),
        ({"model": SMALL, "stages": [{"at": 9, "qkv_param_tokens": 64}]}, GrowthError, r"arms.small.stages.0: .*qkv"),
        (
            {"model": SMALL, "stages": [{"at": 9, "method": "published", "ffn_param_tokens": 64}]},
            GrowthError,
            "gpt_neox",
        ),
        (
            {"model": SMALL, "stages": [{"at": 9, "ffn_param_tokens": 64, "frozen": ["bas"]}]},
            GrowthError,
            "there is no part 'bas'",
        ),
    ],
)
def test_an_arm_that_cannot_run_is_refused_before_anything_runs(content, tmp_path, arm, error, message):
    with pytest.raises(error, match=message):
        compare(parsed(content, arms={"small": arm}), tmp_path / "out")
    assert not (tmp_path / "out" / "results.jsonl").exists()


def test_an_output_that_is_a_file_is_named(content, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="out"):
        compare(parsed(content), tmp_path / "out")


def test_parameters_can_be_required_to_be_equal(content, tmp_path):
    recipe = parsed(content, rules={"reference": "small", "parameters_within": 0.01})
    with pytest.raises(RecipeError, match=r"within 1.0% of those of 'small', [\d,]+; found widened [\d,]+"):
        rehearse(recipe, load_text(recipe, tmp_path))


def test_rules_stand_before_results(content, tmp_path):
    results = Results(tmp_path)
    results.begin(parsed(content), "trial", TEXT)
    results.begin(parsed(content), "trial", TEXT)
    assert [line["event"] for line in results.lines()] == ["recipe"]
    more = parsed(content, seeds=[0, 1, 2], arms={**content["arms"], "again": {"model": TOKENS}})
    results.begin(more, "trial", TEXT)
    for changes in (
        {"seeds": [0]},
        {"seeds": [3, 0, 1, 2]},
        {"budgets": [640, 1280, 2560]},
        {"rules": {"reference": "widened"}},
        {"learning_rates": [1e-3]},
    ):
        with pytest.raises(RecipeError, match=f"differs from the one .* in .*{next(iter(changes))}"):
            results.begin(parsed(content, **changes), "trial", TEXT)


def test_a_comparison_does_not_go_on_with_another_text(tmp_path):
    (tmp_path / "text").mkdir()
    recipe = parsed(comparison(tmp_path / "text"))
    Results(tmp_path).begin(recipe, "trial", load_text(recipe, tmp_path).report.facts)
    for path in (tmp_path / "text").iterdir():
        path.write_text(path.read_text(encoding="utf-8").replace("question", "answer"), encoding="utf-8")
    with pytest.raises(DataError, match=r"\(Python 3.*differ: .*text_sha256 \w+ then \w+.* Results on different texts"):
        compare(recipe, tmp_path)
    assert [line["event"] for line in read_results(tmp_path / "results.jsonl")] == ["recipe"]


def test_results_of_a_version_that_kept_no_text_can_be_added_to(content, tmp_path):
    results = Results(tmp_path)
    results.begin(parsed(content), "trial", TEXT)
    [line] = results.lines()
    results.path.write_text(json.dumps({field: value for field, value in line.items() if field != "text"}) + "\n")
    results.begin(parsed(content), "trial", TEXT)
    assert [line.get("text") for line in results.lines()] == [None, TEXT]
    with pytest.raises(DataError, match="text_sha256 a then b"):
        results.begin(parsed(content), "trial", {"text_sha256": "b"})


def test_a_start_that_failed_leaves_no_tokenizer_to_the_next(content, tmp_path):
    with pytest.raises(RecipeError, match="make no model"):
        compare(parsed(content, arms={"small": {"model": {**TOKENS, "hidden_size": 15}}}), tmp_path)
    recipe = parsed(content, data={**content["data"], "tokenizer": "bpe:300"})
    assert len(load_text(recipe, tmp_path, fresh=True).report.tokenizer) == 300
    assert len(load_text(parsed(content), tmp_path).report.tokenizer) == 300  # it has begun: the tokenizer stays


def test_a_recipe_may_be_based_on_another_but_not_on_itself(content, tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "more" / "second.yaml").write_text("based_on: ../first.yaml\nseeds: [0, 1, 2]\n")
    (tmp_path / "third.yaml").write_text("based_on: more/second.yaml\nquestion: And now?\n")
    found = load_compare_recipe(tmp_path / "third.yaml")
    assert (found.question, found.seeds) == ("And now?", [0, 1, 2]) and list(found.arms) == ["small", "widened"]
    (tmp_path / "first.yaml").write_text("based_on: third.yaml\n")
    with pytest.raises(RecipeError, match=r"third.yaml is based_on itself, by way of second.yaml, first.yaml"):
        load_compare_recipe(tmp_path / "third.yaml")


def test_results_survive_a_line_cut_short(content, tmp_path):
    results = Results(tmp_path)
    results.begin(parsed(content), "trial", TEXT)
    with results.path.open("a") as stream:
        stream.write('{"event": "segment", "id": "a", "lo')
    results.add({"event": "segment", "id": "a"}, {"event": "segment", "id": "b"})
    results.add({"event": "segment", "id": "b"})
    assert [line.get("id") for line in read_results(results.path)] == [None, "a", "b"]


def test_results_that_are_not_there_are_named(tmp_path):
    with pytest.raises(RecipeError, match=r"cannot read results .*none\.jsonl: No such file"):
        read_results(tmp_path / "none.jsonl")


# --- Segments ------------------------------------------------------------------------------------------------------


def test_budgets_share_a_trunk_and_arms_a_beginning(content):
    recipe = parsed(content)
    short, long = (segments(recipe, Run("widened", 0, 1e-3, budget)) for budget in recipe.budgets)
    assert [(s.start, s.end, s.phase) for s in short] == [(0, 640, "hold"), (640, 1024, "hold"), (1024, 1280, "fall")]
    assert [s.end for s in long] == [640, 1024, 2048, 2560]
    assert [s.id for s in short[:2]] == [s.id for s in long[:2]] and short[2].id != long[2].id
    assert [s.growth is not None for s in long] == [False, True, False, False]
    twin = parsed(
        content, arms={**content["arms"], "twin": {"model": SMALL, "stages": [{"at": 640, "num_hidden_layers": 2}]}}
    )
    theirs = segments(twin, Run("twin", 0, 1e-3, 2560))
    assert theirs[0].id == long[0].id and theirs[1].id != long[1].id
    assert segments(recipe, Run("widened", 1, 1e-3, 2560))[0].id != long[0].id


@pytest.mark.parametrize(("decay", "end"), [(0.2, 1024), (0.7, 384)])
def test_a_run_that_decays_where_its_arm_would_grow_ends_ungrown(content, decay, end):
    """Growth never falls into the decay, rounding errors or not: 1280 · (1 − 0.7) is 384.00000000000006 here."""
    stages = [{"at": end, "ffn_param_tokens": 64}]
    training = {**content["training"], "decay": decay}
    recipe = parsed(content, training=training, arms={"small": {"model": SMALL, "stages": stages}})
    short, long = (segments(recipe, Run("small", 0, 1e-3, budget)) for budget in recipe.budgets)
    assert [(s.end, s.growth is not None) for s in short] == [(end, False), (1280, False)]
    assert [(s.end, s.growth is not None) for s in long] == [(end, False), (2 * end, True), (2560, False)]
    assert short[0].id == long[0].id


def test_a_whole_run_warms_up_holds_and_decays(content):
    recipe = parsed(content, training={**content["training"], "warmup": 0.1})
    rates = []
    for segment in segments(recipe, Run("widened", 0, 1.0, 2560)):
        steps = int((segment.end - segment.start) / 128)
        rates += [segment.rate(i, steps=steps, per_step=128) for i in range(steps)]
    assert len(rates) == 20
    assert rates[0] == pytest.approx(0.5) and rates[1:16] == [1.0] * 15
    assert rates[16:] == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_cosine_is_one_a_stage_and_constant_never_falls(content):
    arm = content["arms"]["widened"]
    cosine = parsed(content, arms={"small": {**arm, "training": {"schedule": "cosine", "warmup": 0.0}}})
    found = segments(cosine, Run("small", 0, 1.0, 2560))
    assert [(s.start, s.end, s.phase) for s in found] == [(0, 640, "cosine"), (640, 2560, "cosine")]
    rates = [found[1].rate(i, steps=15, per_step=128) for i in range(15)]
    assert rates[0] == 1.0 and rates == sorted(rates, reverse=True) and 0.1 < rates[-1] < 0.13
    constant = parsed(content, arms={"small": {**arm, "training": {"schedule": "constant"}}})
    assert {s.phase for s in segments(constant, Run("small", 0, 1.0, 2560))} == {"hold"}


def rates_of(recipe, arm, budget, *, new=False):
    """Every learning rate of a run with peak 1 and steps of 128, and the steps at which it grows."""
    rates, growths = [], []
    for segment in segments(recipe, Run(arm, 0, 1.0, budget)):
        steps = round((segment.end - segment.start) / 128)
        growths += [len(rates)] if segment.growth else []
        rate = segment.rate_of_new if new else segment.rate
        rates += [rate(i, steps=steps, per_step=128) for i in range(steps)]
    return rates, growths


def growing(content, **stage):
    arm = {"model": SMALL, "stages": [{"at": 1280, "ffn_param_tokens": 64, **stage}]}
    training = {**content["training"], "warmup": 0.2}
    return parsed(content, training=training, budgets=[1280, 5120], arms={"small": {"model": SMALL}, "grown": arm})


def test_the_rate_rises_again_after_growing(content):
    plain, warmed = growing(content), growing(content, rewarm=0.4)
    rates, growths = rates_of(warmed, "grown", 5120)
    assert growths == [10] and rates[10:15] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[:10] == rates_of(plain, "grown", 5120)[0][:10] and rates[14:] == rates_of(plain, "grown", 5120)[0][14:]
    first, second = (segments(recipe, Run("grown", 0, 1.0, 5120)) for recipe in (plain, warmed))
    assert [a.id == b.id for a, b in zip(first, second, strict=True)] == [True, True, False, False]


def test_the_rise_goes_on_into_the_next_segment_and_the_decay(content):
    """A rise over 1,024 of a run that decays 640 after it has grown, and of one that is cut for the other's sake."""
    recipe = growing(content, rewarm=0.8)
    recipe = parsed(recipe.model_dump(exclude_unset=True), budgets=[1280, 2400, 5120])
    short, long = rates_of(recipe, "grown", 2400)[0], rates_of(recipe, "grown", 5120)[0]
    assert long[10:19] == pytest.approx([(i + 1) / 9 for i in range(9)])
    assert short[10:15] == long[10:15] and short[15] == pytest.approx(6 / 9) and short[16] < 7 / 9


def test_the_rate_of_new_parameters_alone_rises(content):
    recipe = growing(content, rewarm_new=0.4)
    rates, new = (rates_of(recipe, "grown", 5120, new=new)[0] for new in (False, True))
    assert rates == rates_of(growing(content), "grown", 5120)[0]
    assert new[10:15] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert new[:10] == rates[:10] and new[15:] == rates[15:]


def test_what_grows_after_a_decay_begins_as_the_small_model_that_ended_there(content):
    recipe = growing(content, after_decay=True)
    small, grown = (
        segments(recipe, Run(arm, 0, 1.0, budget)) for arm, budget in (("small", 1280.0), ("grown", 5120.0))
    )
    assert [(s.start, s.end, s.phase, s.growth is not None) for s in grown] == [
        (0, 1024, "hold", False),
        (1024, 1280, "fall", False),
        (1280, 4096, "hold", True),
        (4096, 5120, "fall", False),
    ]
    assert [s.id for s in small] == [s.id for s in grown[:2]]
    rates, growths = rates_of(recipe, "grown", 5120)
    assert growths == [10] and rates[8:13] == pytest.approx([1.0, 0.5, 1 / 3, 2 / 3, 1.0])
    plateau = segments(growing(content), Run("grown", 0, 1.0, 5120))
    assert plateau[0].id == grown[0].id and plateau[2].id != grown[2].id


def test_growth_at_most_of_the_text_comes_before_the_decay(content):
    """Depth at once after 79 % of the text at the full learning rate, which decays over the last fifth."""
    stages = [{"at": 4040, "num_hidden_layers": 4, "method": "stack"}]
    arms = {"small": {"model": SMALL}, "late": {"model": SMALL, "stages": stages}}
    rates, growths = rates_of(parsed(content, budgets=[1280, 5120], arms=arms), "late", 5120)
    assert growths == [32] and rates[31] == rates[32] == 1.0 and rates[33] < 1.0
    with pytest.raises(RecipeError, match="must rise and lie below 4096"):
        parsed(content, budgets=[1280, 5120], arms={**arms, "late": {"model": SMALL, "stages": [{"at": 4096}]}})


@pytest.mark.parametrize(
    ("stage", "training", "message"),
    [
        ({"rewarm": 0.1}, {"schedule": "cosine"}, "stages.0 has rewarm, which goes with growing and with schedule wsd"),
        ({"after_decay": True}, {"schedule": "constant"}, "stages.0 has after_decay, which goes with growing"),
        ({"rewarm_new": 0.1}, {"keep_optimizer_state": False}, "rewarm_new: without keep_optimizer_state"),
        ({"rewarm_new": 0.9}, {}, r"rewarm_new ends at 1792, but the next stage or the first decay begins at 1000"),
        ({"after_decay": True, "at": 1100}, {}, "after_decay: the decay begins at 880, but a stage begins later"),
    ],
)
def test_rates_that_make_no_sense_are_refused(content, stage, training, message):
    stages = [{"at": 640, "ffn_param_tokens": 64}, {"at": 1000, "ffn_param_tokens": 96}]
    i = 1 if "at" in stage else 0
    stages[i] = {**stages[i], **stage}
    if i:
        stages[0]["at"] = 900
    with pytest.raises(RecipeError, match=message):
        parsed(content, arms={"small": {"model": SMALL, "stages": stages, "training": training}})


# --- Budgets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["paper", "ffn"])
@pytest.mark.parametrize("frozen", [[], ["base"], ["embedding"], ["base", "embedding", "linear_maps"]])
def test_counted_flops_are_those_of_the_formula(family, frozen):
    model = tiny(family)
    grow(model, ffn_param_tokens="+32", num_hidden_layers="+1")
    freeze_only(model, frozen)
    stated = cost.training_flops_of(model, 48)
    assert counted_flops(model, 48) == pytest.approx(stated, rel=1e-9)
    assert model.config._attn_implementation == "sdpa"
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_counted_flops_hold_after_every_way_to_grow(method):
    kind = METHODS[method].model_types[-1]
    config = GPTNeoXConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    model = tiny("paper") if kind == "tokenformer" else AutoModelForCausalLM.from_config(config)
    amounts = {"factor": 2, "num_hidden_layers": 6 if kind == "tokenformer" else 4, "ffn_param_tokens": 192}
    asked = {name: amounts[name] for name in METHODS[method].amounts if name in amounts}
    model, _ = grow_by(model, {}, method, seed=0, **asked)
    assert counted_flops(model, 24) == pytest.approx(cost.training_flops(model.config, 24), rel=1e-9)


def test_a_planted_miscount_is_caught(monkeypatch):
    """A formula that forgets token-token attention, or a model with a map that it does not know of."""
    model = tiny("ffn")
    monkeypatch.setattr(cost, "training_flops_of", lambda model, context: 6.0 * cost.matrix_parameters(model.config))
    with pytest.raises(EvaluationError, match=r"torch counts [\d,]+ a text token, tokenformer.cost [\d,]+"):
        counted_flops(model, 48)
    monkeypatch.undo()
    extra = torch.nn.Linear(64, 64)
    model.model.norm.register_forward_hook(lambda module, arguments, output: output + extra(output))
    with pytest.raises(EvaluationError, match="cannot be trusted"):
        counted_flops(model, 48)


def test_units_of_a_budget():
    model, training = tiny("ffn"), training_section()
    assert cost_per_step(model, training, "text_tokens") == 128
    stated = 128 * cost.training_flops(model.config, 32)
    assert cost_per_step(model, training, "training_flops") == pytest.approx(stated)
    assert 1e-5 < cost_per_step(model, training, "seconds") < 10
    assert [steps_within(100, spent, 7) for spent in (0, 93, 99, 200)] == [14, 1, 0, 0]


def test_what_muon_multiplies_counts():
    """Newton–Schulz of torch.optim.Muon: five times, three products of the smaller side with itself and the matrix."""
    model = tiny("ffn")
    before = {name: p.clone() for name, p in model.named_parameters()}
    blocks = [p for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2]
    expected = sum(5 * 2 * (2 * min(p.shape) ** 2 * max(p.shape) + min(p.shape) ** 3) for p in blocks)
    assert optimizer_flops(model, training_section(optimizer="muon")) == expected
    assert optimizer_flops(model, training_section()) == 0
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def training_section(**training):
    content = {"batch_size": 4, "sequence_length": 32, **training}
    return TrainingSection(**content)


# --- Text ----------------------------------------------------------------------------------------------------------


def held_out(data):
    (held,) = data.validation.values()
    return held.documents


def test_no_arm_sees_the_text_it_is_judged_on(content, tmp_path):
    recipe = parsed(content)
    text = load_text(recipe, tmp_path)
    tuning, report = (set(held_out(half)["text"]) for half in (text.tuning, text.report))
    assert tuning and report and not tuning & report
    assert text.tuning.train_blocks is text.report.train_blocks
    (blocks,) = text.report.train_blocks.values()
    train = "".join(text.report.tokenizer.decode(block[1:]) for block in blocks["input_ids"])
    assert all(document[:60] not in train and document[-60:] not in train for document in tuning | report)
    for half in (text.tuning, text.report):
        (part,) = half.validation.values()
        held = "".join(half.tokenizer.decode(b[1:]) for b in part.blocks["input_ids"])
        assert all(document in held for document in part.documents["text"])
        assert part.num_bytes == sum(len(d.encode()) for d in part.documents["text"])


def test_halves_share_no_text_when_documents_repeat(content, tmp_path):
    rows = [{"text": f"{'abcd'[i % 4]} document " * 3} for i in range(40)]
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = parsed(content, data={**content["data"], "validation_source": str(tmp_path / "held.jsonl")})
    text = load_text(recipe, tmp_path)
    halves = [held_out(half)["text"] for half in (text.tuning, text.report)]
    assert not set(halves[0]) & set(halves[1]) and [len(half) for half in halves] == [20, 20]


def test_one_held_out_document_is_too_few(content, tmp_path):
    recipe = parsed(content, data={**content["data"], "validation_fraction": 0.01})
    with pytest.raises(DataError, match="1 document is held out"):
        load_text(recipe, tmp_path)
