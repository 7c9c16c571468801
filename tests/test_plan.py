"""Plans: arithmetic against independent formulas, planted mistakes, and the paper's series through the command."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tokenformer import TokenformerConfig, TokenformerVisionConfig
from tokenformer.cli.compare import comparisons
from tokenformer.cli.tables import cost_table, total_table
from tokenformer.errors import RecipeError
from tokenformer.plan import DEVICES, HardwareSection, Plan, conclusions, read_plan
from tokenformer.sections import parse_sections
from tokenformer.units import scientific

PAPER = Path(__file__).parents[1] / "recipes" / "plan" / "paper.yaml"
SIZES = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY = {**SIZES, "qkv_param_tokens": 8, "output_param_tokens": 8, "ffn_param_tokens": 16}
BIG = {**TINY, "ffn_param_tokens": 48}
HARDWARE = {"peak_tflops": 2, "memory_gb": 1, "count": 4, "utilisation": 0.5, "price_per_hour": 3}


def plan(**sections):
    content = {"context": 16, "hardware": HARDWARE, "grown": [{"model": TINY, "text_tokens": 1e9}]}
    return parse_sections(Plan, {**content, **sections}, where="plan")


def refusal(**sections):
    with pytest.raises(RecipeError) as caught:
        plan(**sections)
    return str(caught.value)


@pytest.fixture(scope="module")
def paper():
    return read_plan(PAPER)


def rows(table):
    """Cells of a table by row, the first one the key."""
    columns = [list(column.cells) for column in table.columns]
    return {row[0]: row[1:] for row in zip(*columns, strict=True)}


def test_flops_of_the_papers_series_are_its_formula(paper):
    """6N + 12·layers·width·context for each text token; N counts keys, values and the tied embedding, no norm."""
    flops, attention = 0.0, 12 * 12 * 768 * 1024
    stages = [(576, 2304, 300e9), (2140, 8560, 30e9), (4850, 19400, 30e9), (8620, 34480, 30e9)]
    for cost, (attention_tokens, ffn_tokens, text_tokens) in zip(paper.grown_costs, stages, strict=True):
        n = 2 * 12 * 768 * (4 * attention_tokens + ffn_tokens) + 50304 * 768
        own = (6 * n + attention) * text_tokens
        flops += own
        assert cost.training_flops == pytest.approx(own, rel=1e-12)
        assert cost.total_flops == pytest.approx(flops, rel=1e-12)
        assert cost.parameters == n + 2 * 768
    assert [f"{c.training_flops:.4g}" for c in paper.grown_costs] == [
        "2.564e+20",
        "6.715e+19",
        "1.391e+20",
        "2.391e+20",
    ]
    assert paper.grown_costs[-1].total_text_tokens == 390e9


def test_the_transformers_have_the_sizes_that_the_paper_names(paper):
    for cost, width, layers in zip(paper.scratch_costs, (768, 1024, 1536, 2048), (12, 24, 24, 24), strict=True):
        n = 12 * layers * width**2 + 50304 * width
        assert cost.training_flops == pytest.approx((6 * n + 12 * layers * width * 1024) * 300e9, rel=1e-12)
        assert cost.training_flops == cost.total_flops
    assert [round(c.parameters / 1e6) for c in paper.scratch_costs] == [124, 354, 757, 1312]


def test_published_hours_imply_what_they_imply_on_a_tpu_v4(paper):
    """The 757M stage: 1.391e20 FLOPs in 2800 − 2100 hours of 275 TFLOP/s."""
    costs = [*paper.grown_costs, *paper.scratch_costs]
    assert [c.published_hours for c in costs] == [1700, 400, 700, 1100, 1600, 4200, 7400, 11600]
    assert costs[2].implied_utilisation == pytest.approx(1.39080e20 / (700 * 3600 * 275e12), rel=1e-4)
    assert [round(c.implied_utilisation, 3) for c in costs] == [0.152, 0.170, 0.201, 0.220, 0.162, 0.175, 0.204, 0.221]


def test_hours_price_and_memory_by_hand():
    """5e11 FLOP in 1e12 FLOP/s of useful work is half a second of one device."""
    hardware = HardwareSection(**HARDWARE)
    assert hardware.device_hours(5e11) == 0.5 / 3600
    content = plan(grown=[{"model": TINY, "text_tokens": 36e9}, {"model": BIG, "text_tokens": 36e9}])
    small, big = content.grown_costs
    assert small.parameters == 128 * 32 + 2 * 32 + 2 * 2 * 32 * (4 * 8 + 16) == 10304
    assert small.memory_bytes == 16 * 10304
    # (6 · 10240 + 12 · 2 · 32 · 16) · 36e9 = 2.654e15 FLOPs; at 4e12 FLOP/s of all four devices 663.6 s.
    own, so_far = (rows(table(content))["tokenformer 2 × 32"] for table in (cost_table, total_table))
    assert small.training_flops == (6 * 10240 + 12 * 2 * 32 * 16) * 36e9
    assert big.total_flops == small.training_flops + (6 * (10240 + 2 * 2 * 32 * 32) + 12 * 2 * 32 * 16) * 36e9
    seconds = [f / 4e12 for f in (big.training_flops, big.total_flops)]
    assert [own[4], so_far[2]] == [f"{s / 3600:.3g}" for s in seconds]
    assert [own[5], so_far[3]] == [f"{s / 3600 * 4 * 3:.3g}" for s in seconds]


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 4096), utilisation=st.floats(0.01, 1), flops=st.floats(1e6, 1e25))
def test_the_utilisation_implied_by_computed_hours_is_the_given_one(count, utilisation, flops):
    hardware = HardwareSection(device="h100", count=count, utilisation=utilisation)
    assert hardware.implied_utilisation(flops, hardware.device_hours(flops)) == pytest.approx(utilisation)


def test_sharding_spreads_memory_and_nothing_else():
    alone, shared = plan(), plan(hardware={**HARDWARE, "sharded": True})
    assert shared.grown_costs[0].memory_bytes == alone.grown_costs[0].memory_bytes / 4
    assert shared.grown_costs[0].training_flops == alone.grown_costs[0].training_flops


def test_what_does_not_fit_is_named():
    tight = {**HARDWARE, "memory_gb": 16 * 10304 / 1e9}
    stages = [{"model": TINY, "text_tokens": 1}, {"model": {**BIG, "num_hidden_layers": 3}, "text_tokens": 1}]
    assert conclusions(plan(hardware=tight, grown=stages[:1])) == []
    [said] = conclusions(plan(hardware=tight, grown=stages))
    assert "activations: tokenformer 3 × 32; set hardware.sharded" in said
    assert conclusions(plan(hardware={**tight, "sharded": True}, grown=stages)) == []
    [said] = conclusions(plan(hardware={**tight, "count": 1}, grown=stages))
    assert said.endswith("take more or larger ones.")


def test_without_price_memory_scratch_and_published_hours():
    content = plan(hardware={"peak_tflops": 1, "utilisation": 1})
    assert not any("price" in str(column.header) for column in cost_table(content).columns)
    assert "from scratch" not in rows(cost_table(content)) and conclusions(content) == []


def test_a_stage_after_one_without_published_hours_implies_nothing():
    stage = {"model": TINY, "text_tokens": 1e9}
    costs = plan(grown=[stage, {**stage, "published_hours": 2}, {**stage, "published_hours": 5}]).grown_costs
    assert [c.published_hours for c in costs] == [None, None, 3]
    assert [c.implied_utilisation is None for c in costs] == [True, True, False]


def test_equal_text_and_parameters_are_called_equal():
    run = {"model": TINY, "text_tokens": 1e9}
    said = conclusions(plan(grown=[run], scratch=[run]))
    assert ", 1 times as many" in said[0] and said[1].count("(equal within 1%)") == 2
    said = conclusions(plan(grown=[run, run], scratch=[run]))
    assert "Text tokens: 2 B against 1 B (not equal); parameters: 10.3 k against 10.3 k (equal" in said[1]
    assert "could read 2 B text tokens" in said[2]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"hardware": {"device": "h1000", "utilisation": 0.4}},
            "hardware: there is no device 'h1000'; there are a100-40",
        ),
        ({"hardware": {"utilisation": 0.4}}, "hardware: give either device or peak_tflops"),
        ({"hardware": {**HARDWARE, "device": "h100"}}, "hardware: give either device or peak_tflops"),
        ({"hardware": {"device": "h100", "memory_gb": 9, "utilisation": 0.4}}, "'h100' brings its own memory"),
        (
            {"hardware": {**HARDWARE, "utilisation": 40}},
            "hardware.utilisation is 40: input should be less than or equal",
        ),
        ({"hardware": {**HARDWARE, "utilization": 0.4}}, "'hardware.utilization'; did you mean 'utilisation'?"),
        ({"grown": [{"model": "1m", "text_token": 1}]}, "'grown.0.text_token'; did you mean 'text_tokens'?"),
        ({"grown": []}, "grown is []: list should have at least 1 item"),
        ({"grown": [{"model": "9m", "text_tokens": 1}]}, "grown.0.model: there is no preset '9m'; did you mean 900m"),
        ({"grown": [{"model": {"hiden_size": 8}, "text_tokens": 1}]}, "no 'hiden_size'; did you mean 'hidden_size'?"),
        ({"grown": [{"model": {"architectures": "gpt2"}, "text_tokens": 1}]}, "models have no 'architectures'"),
        (
            {"grown": [{"model": {"architecture": "vit"}, "text_tokens": 1}]},
            "there is no architecture 'vit'; there are",
        ),
        ({"scratch": [{"model": {"architecture": "opt", "preset": "1m"}, "text_tokens": 1}]}, "take out preset"),
        ({"grown": [{"model": {**TINY, "num_attention_heads": 3}, "text_tokens": 1}]}, "make no model: hidden_size 32"),
        (
            {"scratch": [{"model": {"architecture": "gpt_neox", "hidden_size": -8}, "text_tokens": 1}]},
            "hidden_size is -8",
        ),
        (
            {"grown": [{"model": BIG, "text_tokens": 1}, {"model": TINY, "text_tokens": 1}]},
            "grown.1 has 10,304 parameters, fewer than the 14,400 of the stage before; put the stages in order",
        ),
        (
            {"grown": [{"model": TINY, "text_tokens": 1, "published_hours": h} for h in (3, 2)]},
            "published_hours of grown are [3.0, 2.0]; each includes the stages before",
        ),
    ],
)
def test_refusals(sections, message):
    assert message in refusal(**sections)


@pytest.fixture
def trained(tmp_path):
    """As `train` leaves it: 128 text tokens cost 1e9 FLOPs."""
    run = tmp_path / "run"
    TokenformerConfig(**TINY).save_pretrained(run / "stage1")
    events = [
        {"event": "evaluation", "stage": 1, "text_tokens_seen": 128 * i, "training_flops": 1e9 * i}
        for i in range(1, 11)
    ]
    (run / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def test_a_run_is_a_plans_first_stage(trained):
    grown = plan(grown=[{"run": trained}, {"model": BIG, "text_tokens": 1280}])
    first, second = grown.grown_costs
    assert (first.label, first.text_tokens, first.training_flops) == (str(trained), 1280, 1e10)
    assert second.total_flops == 1e10 + second.training_flops
    [said] = conclusions(grown)
    assert said.endswith(f"`tokenformer plan --run {trained} --budget {scientific(second.training_flops)}` weighs.")


def test_a_run_that_cannot_be_weighed_is_refused(trained, tmp_path):
    assert "is no folder of a training run" in refusal(grown=[{"run": tmp_path}])
    assert "give model and text_tokens, or run" in refusal(grown=[{"run": trained, "model": TINY, "text_tokens": 1}])
    assert "give model and text_tokens, or run" in refusal(grown=[{"run": trained, "text_tokens": 1}])
    assert "give model and text_tokens, or run" in refusal(grown=[{"model": TINY}])
    assert "only the first of grown" in refusal(grown=[{"model": TINY, "text_tokens": 1}, {"run": trained}])
    stages = [{"run": trained}, {"model": BIG, "text_tokens": 1}]
    assert "no more parameters in its blocks" in refusal(grown=[stages[0], {"model": TINY, "text_tokens": 1}])
    wide = {"model": {**BIG, "vocab_size": 256}, "text_tokens": 1}
    assert "a vocabulary of 256" in refusal(grown=[stages[0], wide])
    (trained / "log.jsonl").write_text("")
    assert "or no log" in refusal(grown=stages)


def test_plans_are_of_models_that_read_text(trained):
    sees = {"architecture": "tokenformer_vision", "preset": "vit-b-86m"}
    assert "reads images; plans count text tokens" in refusal(grown=[{"model": sees, "text_tokens": 1}])
    config = TokenformerVisionConfig.from_preset("vit-b-86m")
    config.save_pretrained(trained / "stage1")
    assert "reads images; plans count text tokens" in refusal(grown=[{"run": trained}])


def test_help_names_every_device():
    text = HardwareSection.model_fields["device"].description
    assert all(device in text for device in DEVICES)


def test_the_command_prints_the_papers_plan_in_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    result = CliRunner().invoke(comparisons, ["plan", str(PAPER)])
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 80 and "…" not in result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[0] == "64 × tpu-v4 (34.4 GB) at 40% of the peak; context 1,024"
    assert "1.4b 1.31 B 21 30 B 2.39e20 9.44 1,945" in lines and "1.4b 390 B 7.02e20 27.7 5,706" in lines
    assert "gpt_neox 24 × 2048 6,417 11,600 6,417 11,600 0.221" in lines
    text = " ".join(result.output.split())
    assert "gpt_neox 24 × 2048 from scratch 2.54e21, 3.62 times as many. Text tokens: 390 B against 300 B" in text
    assert "With 124m there already, growing takes 4.45e20 FLOPs, 0.175 times those of gpt_neox 24 × 2048" in text
    assert "imply a utilisation of 0.152 to 0.221" in text


def test_the_command_gives_the_papers_plan_to_machines(paper):
    result = CliRunner().invoke(comparisons, ["plan", "--json", str(PAPER)])
    found = json.loads(result.output)
    assert found.keys() == {"grown", "scratch", "conclusions"}
    assert [run["training_flops"] for run in found["grown"]] == [c.training_flops for c in paper.grown_costs]
    hours = [paper.hardware.device_hours(c.total_flops) for c in paper.grown_costs]
    assert [run["total_device_hours"] for run in found["grown"]] == hours
    assert found["conclusions"] == conclusions(paper)
