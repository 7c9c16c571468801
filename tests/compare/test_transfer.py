"""What growing loses is measured on planted comparisons, and tells what others come to that it was not fitted to."""

import math
import sys
from pathlib import Path

import pytest

from tokenformer.compare.findings import Findings
from tokenformer.compare.law import fit
from tokenformer.compare.transfer import family, grown_runs, points, transfers
from tokenformer.compare.trial import choices, lost, missed, right
from tokenformer.law import AFTER_DECAY, Knowledge, loss_of

E, A, ALPHA, B, BETA = CONSTANTS = (1.0, 20.0, 0.35, 60.0, 0.32)
TOKENS = {"n1": 32, "n2": 96, "n3": 224, "n4": 480}
BUDGETS, AT = [1e11, 3e11, 9e11, 2.7e12], 2e11


def model(tokens, **changes):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_param_tokens": tokens}
    return {**sizes, "qkv_param_tokens": 0, "output_param_tokens": 0, **changes}


def size(tokens):
    """Parameters of the maps in the blocks."""
    return 4 * 16 * 16 + 2 * 16 * tokens


def run(arm, budget, seed, *, share, harder, noise):
    """The end of a run; a grown one loses `share` of the text that it read before."""
    small, large = TOKENS["n2"], TOKENS["n3"]
    grown = arm == "grown" and budget > AT
    tokens = TOKENS[arm] if arm != "grown" else large if grown else small
    read = AT / (6 * size(small)) if grown else 0.0
    text = read + (budget - (AT if grown else 0.0)) / (6 * size(tokens))
    whole, since = (loss_of(CONSTANTS, size(tokens), t) for t in (text, text - read))
    bits = whole + (share * (since - whole) if grown else 0.0) + harder
    growth = {
        "training_flops": AT,
        "text_tokens": read,
        "parameters_before": 2048 + size(small),
        "parameters_after": 2048 + size(large),
    }
    return {
        "event": "run",
        "purpose": "final",
        "arm": arm,
        "seed": seed,
        "learning_rate": 1e-3,
        "budget": budget,
        "training_flops": budget,
        "text_tokens": text,
        "seconds": 1.0,
        "bits_per_byte": bits * math.exp(noise * ((seed * 7 + len(arm) + int(budget / 1e11)) % 5 - 2)),
        "parameters": 2048 + size(tokens),
        "config": {"model_type": "tokenformer", "vocab_size": 128, **model(tokens)},
        "growths": [growth] if grown else [],
        "curve": [],
    }


def planted(*, share=0.3, harder=0.0, noise=0.0, stage=None, extra=None):
    """A comparison on a text that is `harder` by so many bits per byte."""
    arms = {arm: {"model": model(tokens)} for arm, tokens in TOKENS.items()}
    stage = {"at": AT, "ffn_param_tokens": TOKENS["n3"], **(stage or {})}
    arms["grown"] = {"model": model(TOKENS["n2"]), "stages": [stage]}
    recipe = {
        "question": "Does it pay?",
        "data": {"source": "examples", "tokenizer": "bytes"},
        "budgets": BUDGETS,
        "seeds": [0, 1, 2],
        "learning_rates": [1e-3],
        "tuning_budget": BUDGETS[0],
        "rules": {"reference": "n1"},
        "arms": {**arms, **(extra or {})},
    }
    facts = {"share": share, "harder": harder, "noise": noise}
    return Findings.of(
        [
            {"event": "recipe", "name": "planted", "date": "2026-01-01", "recipe": recipe},
            *(run(arm, budget, seed, **facts) for arm in arms for seed in (0, 1, 2) for budget in BUDGETS),
        ]
    )


def learned(findings):
    law = fit(points(findings, family(findings)))
    ways = tuple(transfers(list(grown_runs(findings)), law))
    return Knowledge(("planted",), "examples", "bytes", 256, law, ways)


@pytest.fixture(scope="module")
def known():
    return learned(planted(noise=0.001))


def test_a_family_differs_in_size_alone():
    other = {"model": model(32, use_qk_norm=True)}, {"model": model(32), "training": {"optimizer": "muon"}}
    assert family(planted(extra={"normed": other[0], "muon": other[1]})) == list(TOKENS)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, 1.5])
def test_what_growing_loses_is_found(share):
    [way] = learned(planted(share=share)).transfers
    assert (way.grown, way.rate) == (("ffn_param_tokens",), "kept")
    assert way.mean == pytest.approx(share, abs=0.02) and len(way.lost) == 3
    assert way.factors == pytest.approx((2.0, 2.0))
    read = AT / (6 * size(96))
    assert way.shares[0] == pytest.approx(read / (read + (2.7e12 - AT) / (6 * size(224))))


def test_a_gap_is_taken_at_equal_text():
    """The grown arm reads more text than its twin for the same FLOPs: beside that, nothing would seem lost."""
    law = learned(planted()).law
    for each in grown_runs(planted()):
        assert each.text_tokens > each.scratch[0]
        naive = (each.loss - each.scratch[1]) / (
            law.loss(each.after, each.text_tokens - each.read) - law.loss(each.after, each.text_tokens)
        )
        assert naive < 0.3 - 0.1


@pytest.mark.parametrize(
    ("stage", "rate"), [({"rewarm": 0.1}, "warmed up again"), ({"after_decay": True}, AFTER_DECAY)]
)
def test_learning_rates_make_ways_of_their_own(stage, rate):
    assert {run.rate for run in grown_runs(planted(stage=stage))} == {rate}


@pytest.mark.parametrize(
    "stage", [{"method": "random_keys"}, {"frozen": ["base"]}, {"rewarm_new": 0.1}, {"batch_size": 8}]
)
def test_only_what_grow_does_is_measured(stage):
    assert list(grown_runs(planted(stage=stage))) == []


def test_advice_holds_on_a_comparison_that_it_was_not_fitted_to(known):
    several = list(choices(planted(harder=0.4, noise=0.001), known))
    assert {(c.arm, c.base) for c in several} == {("grown", "n2")}
    assert [c.budget for c in several] == BUDGETS[1:]
    for choice in several:
        assert choice.expected == pytest.approx(choice.gain.mean, abs=0.02)
    assert missed(several) < 0.02 and right(several) == len(several)
    assert lost(several) == 0.0
    assert max(lost(several, grow=grow) for grow in (True, False)) > 0.0
    assert sum(choice.held for choice in several) >= 5


def test_advice_that_fails_is_seen_to_fail(known):
    """Where growing loses far more than it did in what was fitted, forecasts miss, and advice costs."""
    several = list(choices(planted(share=3.0), known))
    assert missed(several) > 0.05
    assert lost(several) > 0.0 and right(several) < len(several)
    assert sum(choice.held for choice in several) <= 4


def test_the_command_learns_from_several_comparisons(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    monkeypatch.delitem(sys.modules, "law", raising=False)
    import law

    one, two = (planted(share=share) for share in (0.2, 0.4))
    known = law.learned({"one": one, "two": two})
    assert known.comparisons == ("one", "two") and known.transfers[0].mean == pytest.approx(0.3, abs=0.02)
    assert (known.text, known.tokenizer, known.context) == ("examples", "bytes", 256)
