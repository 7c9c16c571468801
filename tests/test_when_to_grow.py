"""The advice "grow now" or "train on": slopes, bargains, what is fitted to choices of known outcome, real logs."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenformer.compare.decision import Choice, choices, fitted_worth, lost_by, right
from tokenformer.compare.findings import Findings
from tokenformer.compare.statistics import Estimate
from tokenformer.when_to_grow import WORTH_OF_PARAMETERS, Bargain, held_curve, slope


def choice(price, gain):
    return Choice("grown", "small", 1.0, 2.0, Bargain(price, 1.0, 1.0), Estimate(gain, None, None, 1))


@given(st.floats(0.01, 1), st.floats(1, 5), st.floats(1e3, 1e12), st.integers(3, 9))
def test_slope_of_a_line_in_doublings_is_found(per_doubling, start, end, points):
    shares = [2 ** (-i / (points - 1)) for i in range(points)]
    curve = [(end * share, start - per_doubling * math.log2(share)) for share in shares]
    assert slope(curve, end) == pytest.approx(per_doubling, rel=1e-6)


def test_slope_ignores_what_is_older_or_later_than_the_last_doubling():
    curve = [(100.0, 9.0), (500.0, 3.0), (1000.0, 2.9), (2000.0, 0.0)]
    assert slope(curve, 1000.0) == pytest.approx(0.1)


@pytest.mark.parametrize("curve", [[], [(1000.0, 2.0)], [(900.0, 2.1), (1000.0, 2.0)]])
def test_no_slope_from_points_that_span_less_than_half_a_doubling(curve):
    assert slope(curve, 1000.0) is None


def test_a_bargain_pays_where_parameters_gained_are_worth_more_than_text_given_up():
    bargain = Bargain(slope=0.1, parameters=2.0, text=0.5)
    assert bargain.price == pytest.approx(0.025)
    assert bargain.pays(0.026)
    assert not bargain.pays(0.024)


def test_fitted_worth_parts_what_paid_from_what_did_not():
    several = [choice(0.01, 0.02), choice(0.02, 0.01), choice(0.08, -0.01), choice(0.1, -0.03)]
    worth = fitted_worth(several)
    assert worth == pytest.approx(0.04)
    assert right(several, worth) == 4
    assert lost_by(several, worth) == 0
    assert lost_by(several, math.inf) == pytest.approx(0.01)  # always growing loses 0.01 and 0.03 of four
    assert lost_by(several, 0.0) == pytest.approx(0.0075)


def test_fitted_worth_loses_least_where_no_number_is_always_right():
    several = [choice(0.01, 0.05), choice(0.02, -0.001), choice(0.04, 0.02), choice(0.08, -0.06)]
    worth = fitted_worth(several)
    assert 0.04 < worth < 0.08
    assert right(several, worth) == 3
    assert lost_by(several, worth) == pytest.approx(0.001 / 4)


@pytest.mark.parametrize("gains", [(0.01, 0.02, 0.03), (-0.01, -0.02, -0.03)])
def test_no_worth_where_growing_always_or_never_paid(gains):
    assert fitted_worth([choice(0.01 * (i + 1), gain) for i, gain in enumerate(gains)]) is None


def event(kind, tokens, **facts):
    return {"event": kind, "text_tokens_seen": tokens, **facts}


def test_held_curve_leaves_out_warm_up_decay_and_earlier_models():
    log = [
        event("evaluation", 100, learning_rate=2e-3, bits_per_byte=5.0),
        event("growth", 100),
        event("train", 150, learning_rate=2e-4),
        event("evaluation", 160, learning_rate=2e-4, bits_per_byte=4.5),
        event("evaluation", 210, learning_rate=1e-3, bits_per_byte=4.0),
        event("evaluation", 300, learning_rate=1e-3, bits_per_byte=3.5),
        event("evaluation", 400, learning_rate=5e-4, bits_per_byte=2.0),
    ]
    assert held_curve(log) == [(210, 4.0), (300, 3.5)]
    assert held_curve(log[:1]) == [(100, 5.0)]


def results(slopes, *, gained):
    """Lines of a comparison: the base gains `slopes` per doubling, one a seed; the grown arm ends `gained` lower."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_param_tokens": 32}
    small |= {"qkv_param_tokens": 0, "output_param_tokens": 0}
    stages = [{"at": 400.0, "ffn_param_tokens": 160}]
    yield {
        "event": "recipe",
        "name": "when",
        "date": "2026-01-01",
        "recipe": {
            "question": "When?",
            "data": {"source": "examples", "tokenizer": "bytes"},
            "training": {"decay": 0.2},
            "budgets": [500.0, 2000.0],
            "seeds": list(range(len(slopes))),
            "learning_rates": [1e-3],
            "tuning_budget": 500.0,
            "rules": {"reference": "small"},
            "arms": {"small": {"model": small}, "grown": {"model": small, "stages": stages}},
        },
    }
    for arm in ("small", "grown"):
        for seed, slope_of_seed in enumerate(slopes):
            for budget in (500.0, 2000.0):
                tokens = 160 if arm == "grown" and budget > 500 else 32
                yield {
                    "event": "run",
                    "purpose": "final",
                    "arm": arm,
                    "seed": seed,
                    "learning_rate": 1e-3,
                    "budget": budget,
                    "training_flops": budget,
                    "text_tokens": budget / (2 if tokens > 32 else 1),
                    "bits_per_byte": 3.0 - (gained if tokens > 32 else 0.0) - 0.001 * seed,
                    "config": {"model_type": "tokenformer", **small, "vocab_size": 259, "ffn_param_tokens": tokens},
                    "growths": [{"method": "exact"}] if tokens > 32 else [],
                    "curve": [
                        {"training_flops": x, "text_tokens": x, "bits_per_byte": 5 - slope_of_seed * math.log2(x)}
                        for x in (100.0, 200.0, 300.0, 400.0, 1600.0)
                    ]
                    + [{"training_flops": budget, "text_tokens": budget, "bits_per_byte": 0.0}],
                }


def test_a_choice_says_what_could_be_known_before_growing_and_what_came_of_it():
    [found] = choices(Findings.of(list(results([0.1, 0.3], gained=0.05))))
    assert (found.arm, found.base, found.at, found.budget) == ("grown", "small", 400.0, 2000.0)
    assert found.bargain.slope == pytest.approx(0.2)
    assert found.bargain.text == pytest.approx(1.0)
    assert found.bargain.parameters == pytest.approx(
        math.log2((4 * 16 * 16 + 2 * 16 * 160) / (4 * 16 * 16 + 2 * 16 * 32))
    )
    assert found.gain.mean == pytest.approx(0.05)


def test_no_choice_from_a_cosine_whose_slope_is_that_of_its_learning_rate():
    first, *runs = results([0.1, 0.3], gained=0.05)
    first["recipe"]["training"] = {"schedule": "cosine"}
    assert choices(Findings.of([first, *runs])) == []


def test_the_worth_is_that_of_the_shipped_results(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import compare

    fitted, tested = compare.fitting()
    assert round(fitted_worth(fitted), 3) == WORTH_OF_PARAMETERS
    assert not {(c.arm, c.budget, c.gain) for c in fitted} & {
        (c.arm, c.budget, c.gain) for t in tested.values() for c in t
    }
