"""Advice on a trained model, from planted laws: what comes out is known, and so is what cannot be told."""

import json
import math

import numpy as np
import pytest
from typer.testing import CliRunner

from tokenformer import TokenformerConfig, TokenformerForCausalLM, cost
from tokenformer.advise import Trained, advise, sentences
from tokenformer.checkpoints.lineage import Event, Lineage
from tokenformer.cli.compare import comparisons
from tokenformer.errors import CheckpointError, EvaluationError, RecipeError
from tokenformer.law import AFTER_DECAY, Knowledge, Law, Transfer, loss_of

SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = TokenformerConfig(**SIZES, qkv_param_tokens=0, output_param_tokens=0, ffn_param_tokens=32)
N = cost.block_parameters(CONFIG)
CONTEXT = 16
CONSTANTS = (1.0, 20.0, 0.35, 60.0, 0.32)
TOKENS, BLOCKS, BOTH = ("ffn_param_tokens",), ("num_hidden_layers",), ("ffn_param_tokens", "num_hidden_layers")


def law(*, unsure=0.0, spread=1e-4, parameters=(1e3, 1e6), text_tokens=(1e4, 1e9)):
    """The planted law; its refits differ from it by `unsure` in the logarithm of A and B."""
    random = np.random.default_rng(0)
    E, A, alpha, B, beta = CONSTANTS
    refits = tuple((E, A * math.exp(x), alpha, B * math.exp(y), beta) for x, y in random.normal(0, unsure, (200, 2)))
    return Law(*CONSTANTS, {}, parameters, text_tokens, refits, spread, 0.95, 0.025)


def transfer(lost, grown=TOKENS, *, factors=(1.0, 20.0), shares=(0.0, 1.0), rate="kept"):
    return Transfer(grown, rate, (lost, lost), factors, shares)


def knowledge(*transfers, **changes):
    return Knowledge(("planted",), "examples", "bytes", CONTEXT, law(**changes), transfers)


def model(text_tokens, *, off=0.0, **changes):
    loss = float(loss_of(CONSTANTS, N, text_tokens)) + off
    facts = {"path": "runs/x/stage1", "decayed": True, "learning_rate": 1e-3, "bits_per_byte": loss, **changes}
    return Trained(config=CONFIG, context=CONTEXT, text_tokens=text_tokens, **facts)


def named(advice, what):
    return next(option for option in advice.options if option.what == what)


def flops(text_tokens, config=CONFIG):
    return text_tokens * cost.training_flops(config, CONTEXT)


def test_training_on_and_starting_over_are_what_the_law_says():
    advice = advise(model(1e6), flops(1e6), knowledge())
    on, over = named(advice, "train on"), named(advice, "start over")
    assert (on.text_tokens, on.bits_per_byte) == pytest.approx((2e6, loss_of(CONSTANTS, N, 2e6)))
    assert (over.text_tokens, over.bits_per_byte) == pytest.approx((1e6, loss_of(CONSTANTS, N, 1e6)))
    assert advice.best is on and not advice.rivals and advice.off is None
    assert on.interval[0] < on.bits_per_byte < on.interval[1]


@pytest.mark.parametrize("lost", [0.0, 0.4, 1.0])
def test_growing_loses_what_was_measured(lost):
    """Nothing lost: as from scratch after all the text. All: as from scratch after the text since growing."""
    advice = advise(model(2e6), flops(4e6), knowledge(transfer(lost)))
    grown = named(advice, "grow")
    size = N * (1 + grown.grown["ffn_param_tokens"] / 100 * _share_of_ffn())
    before = 2e6 + grown.after * 4e6
    whole, since = (loss_of(CONSTANTS, size, text) for text in (grown.text_tokens, grown.text_tokens - before))
    assert grown.bits_per_byte == pytest.approx(whole + lost * (since - whole))


def _share_of_ffn():
    more = TokenformerConfig(**SIZES, qkv_param_tokens=0, output_param_tokens=0, ffn_param_tokens=64)
    return (cost.block_parameters(more) - N) / N


def test_an_outgrown_model_is_told_to_grow_and_a_young_one_to_train_on():
    known = knowledge(transfer(0.1), text_tokens=(1e3, 1e12))
    assert advise(model(1e9), flops(1e9), known).best.what == "grow"
    assert advise(model(1e4), flops(1e4), knowledge(transfer(1.0))).best.what == "train on"


def test_growth_that_loses_everything_never_comes_before_starting_over():
    advice = advise(model(1e8), flops(5e8), knowledge(transfer(1.0), transfer(1.0, BLOCKS)))
    over = named(advice, "start over")
    assert all(option.bits_per_byte >= over.bits_per_byte for option in advice.options if option.what == "grow")


def test_each_way_of_growing_is_weighed_by_what_it_loses():
    ways = (transfer(0.5), transfer(0.05, BLOCKS), transfer(0.2, BOTH, rate="warmed up"))
    advice = advise(model(1e8), flops(5e8), knowledge(*ways))
    assert {(*option.grown, option.rate) for option in advice.options if option.what == "grow"} == {
        (*TOKENS, "kept"),
        (*BLOCKS, "kept"),
        (*BOTH, "warmed up"),
    }
    assert advise(model(1e8), flops(5e8), knowledge(transfer(0.3, ("qkv_param_tokens",)))).best.what != "grow"


def test_what_has_decayed_is_weighed_by_what_grew_after_a_decay():
    known = knowledge(transfer(0.1), transfer(0.6, rate=AFTER_DECAY))
    for decayed, rate in ((True, AFTER_DECAY), (False, "kept")):
        assert named(advise(model(1e8, decayed=decayed), flops(5e8), known), "grow").rate == rate
    assert named(advise(model(1e8), flops(5e8), knowledge(transfer(0.1))), "grow").rate == "kept"


def test_another_text_shifts_all_numbers_alike():
    known = knowledge(transfer(0.2))
    plain, shifted = (advise(model(1e7, off=off), flops(1e7), known) for off in (0.0, 0.3))
    assert [o.what for o in plain.options] == [o.what for o in shifted.options]
    for one, other in zip(plain.options, shifted.options, strict=True):
        assert other.bits_per_byte - one.bits_per_byte == pytest.approx(0.3)
    assert plain.off is None and shifted.off == pytest.approx(0.3)
    said = " ".join(sentences(model(1e7, off=0.3), shifted, known))
    assert "The model is 0.300 bits per byte above what the law expects" in said


def test_what_lies_beyond_the_comparisons_is_not_advised():
    narrow = {"parameters": (0.9 * N, 1.1 * N), "text_tokens": (1e5, 3e7)}
    advice = advise(model(1e7), flops(1e7), knowledge(transfer(0.0), **narrow))
    assert named(advice, "grow").beyond == ("size",) and advice.best.what == "train on"
    advice = advise(model(1e7), flops(1e8), knowledge(transfer(0.0), **narrow))
    assert named(advice, "train on").beyond == ("text",)
    small = advise(model(1e4), flops(1e6), knowledge(transfer(0.0, shares=(0.4, 0.5)), text_tokens=(1e5, 1e9)))
    assert named(small, "grow").beyond == ("growth", "start") and named(small, "train on").beyond == ("start",)
    far = advise(model(1e10), flops(1e10), knowledge())
    assert far.best is None and all(option.beyond for option in far.options)
    said = " ".join(sentences(model(1e10), far, knowledge()))
    assert said.startswith("No advice: everything that these FLOPs could buy lies beyond")
    assert "Growing was not weighed" in said


def test_options_that_cannot_be_told_apart_are_both_named():
    sure = advise(model(1e8), flops(1e8), knowledge(transfer(0.1)))
    unsure = advise(model(1e8), flops(1e8), knowledge(transfer(0.1), spread=0.2))
    assert not [o for o in sure.rivals if o.what == "train on"]
    assert {o.what for o in unsure.rivals} == {"train on", "grow", "start over"} - {unsure.best.what}
    assert "It cannot be told from this: " in " ".join(sentences(model(1e8), unsure, knowledge()))
    widths = [o.interval[1] - o.interval[0] for o in (sure.best, unsure.best)]
    assert widths[1] > 100 * widths[0]


def test_intervals_cover_runs_of_other_laws():
    """Refits differ as the truth may from the law: 95 % of intervals should hold what the truth gives."""
    random, held = np.random.default_rng(1), []
    known = knowledge(unsure=0.05, spread=0.003)
    E, A, alpha, B, beta = CONSTANTS
    for _ in range(200):
        x, y = random.normal(0, 0.05, 2)
        truth = (E, A * math.exp(x), alpha, B * math.exp(y), beta)
        seen = loss_of(truth, N, 1e6) * math.exp(random.normal(0, 0.003))
        low, high = named(advise(model(1e6, bits_per_byte=seen), flops(9e6), known), "train on").interval
        held.append(low <= loss_of(truth, N, 1e7) * math.exp(random.normal(0, 0.003)) <= high)
    assert 0.88 <= np.mean(held) <= 1.0


def test_rates_and_commands_are_those_of_the_run():
    known = knowledge(transfer(0.0), text_tokens=(1e3, 1e12))
    said = list(sentences(model(1e9), advise(model(1e9), flops(1e9), known), known))
    assert said[1].startswith("Warm up again to 0.001, since it has decayed; hold it, through the growth")
    assert said[2].startswith("tokenformer grow runs/x/stage1 -o GROWN --ffn-param-tokens +")
    young = model(1e9, decayed=False)
    said = " ".join(sentences(young, advise(young, flops(1e9), known), known))
    assert "Go on at 0.001; hold it" in said and "has not decayed yet; after a decay, all of these" in said
    unknown = model(1e9, bits_per_byte=None)
    advice = advise(unknown, flops(1e9), known)
    assert named(advice, "train on").bits_per_byte == pytest.approx(loss_of(CONSTANTS, N, 2e9))
    assert "does not say how good it is" in " ".join(sentences(unknown, advice, known))


def test_no_budget_is_refused():
    with pytest.raises(RecipeError, match="the budget is 0 training FLOPs"):
        advise(model(1e6), 0.0, knowledge())


@pytest.fixture
def run(tmp_path):
    """A run's folder of two stages, the first of which has not decayed."""
    recipe = {"training": {"learning_rate": 2e-3, "sequence_length": CONTEXT}, "stages": [{}, {"learning_rate": 3e-3}]}
    history = []
    for stage, text in ((1, 1_000_000), (2, 2_000_000)):
        facts = {
            "recipe": recipe,
            "text_tokens_seen": text,
            "training_flops": flops(text),
            "bits_per_byte": 2.0 / stage,
        }
        history.append(Event(operation="train", arguments={"stage": stage}, **facts))
        TokenformerForCausalLM(CONFIG).save_pretrained(tmp_path / "run" / f"stage{stage}")
        (tmp_path / "run" / f"stage{stage}" / "lineage.json").write_text(Lineage(history=history).model_dump_json())
    return tmp_path / "run"


def test_a_run_says_what_it_is(run):
    last, first = Trained.read(run), Trained.read(run / "stage1")
    assert (last.path, last.text_tokens, last.bits_per_byte) == (run / "stage2", 2_000_000, 1.0)
    assert (last.learning_rate, last.decayed, last.context) == (3e-3, True, CONTEXT)
    assert (first.learning_rate, first.decayed) == (2e-3, False)
    (run / "stage2" / "lineage.json").write_text(Lineage().model_dump_json())
    with pytest.raises(RecipeError, match="does not say what text it has read"):
        Trained.read(run)
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere"):
        Trained.read(run / "nowhere")


def test_what_is_known_survives_its_file(tmp_path):
    known = knowledge(transfer(0.123456789), unsure=0.1)
    (tmp_path / "law.json").write_text(known.json())
    read = Knowledge.read(tmp_path / "law.json")
    assert read.transfers[0].lost == (0.123457, 0.123457) and read.transfers[0].grown == TOKENS
    assert read.law.loss(1e5, 1e7) == pytest.approx(known.law.loss(1e5, 1e7), rel=1e-5)
    assert read.law.interval(1e5, 1e7) == pytest.approx(known.law.interval(1e5, 1e7), rel=1e-4)
    (tmp_path / "law.json").write_text('{"law": {}}')
    for path in (tmp_path / "law.json", tmp_path / "none.json"):
        with pytest.raises(EvaluationError, match=r"cannot read a fitted law from .*benchmarks/law.py"):
            Knowledge.read(path)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    path = tmp_path / "law.json"
    path.write_text(knowledge(transfer(0.1), transfer(0.2, BOTH), unsure=0.02, spread=0.01).json())
    monkeypatch.setattr("tokenformer.law.SHIPPED", path)
    return path


def test_the_command_advises_in_80_columns(run, planted, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(comparisons, ["plan", "--run", str(run), "--budget", str(flops(1e7))])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80 and "…" not in result.output
    text = " ".join(result.output.split())
    assert "train on" in text and "start over" in text and "ffn +" in text and "The law rests on planted" in text


def test_the_command_advises_machines(run, planted):
    result = CliRunner().invoke(comparisons, ["plan", "--run", str(run), "--budget", str(flops(1e7)), "--json"])
    found = json.loads(result.output)
    assert found.keys() == {"options", "best", "conclusions"}
    assert "drawn" not in found["options"][0]
    advice = advise(Trained.read(run), flops(1e7), Knowledge.read(planted))
    assert [o["bits_per_byte"] for o in found["options"]] == [o.bits_per_byte for o in advice.options]
    assert found["best"] == (advice.options.index(advice.best) if advice.best else None)


@pytest.mark.parametrize("arguments", [[], ["--budget", "1e9"], ["--run", "x"]])
def test_a_plan_or_a_run_with_a_budget(arguments):
    result = CliRunner().invoke(comparisons, ["plan", *arguments])
    assert isinstance(result.exception, RecipeError) and "give either a plan" in str(result.exception)
