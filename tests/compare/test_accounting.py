"""Both accounts of growing, on planted results in which every miscount would give another number."""

import math

import pytest

from tokenformer.compare.accounting import accounts, cheapest, counted, owned, saving, scratch_twin
from tokenformer.compare.findings import Findings
from tokenformer.compare.tables import savings

SMALL = {"architecture": "gpt_neox", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
BUDGETS, AT = [1e11, 2e11, 4e11, 8e11, 1.6e12], 1.5e11
SIZES = {"small": 1000, "middle": 1500, "large": 2000, "grown": 2000}
# Bits per byte at 1e11 FLOPs, and what they fall by with each doubling; "grown" is as small until it grows.
CURVES = {"small": (2.6, 0.05), "middle": (2.7, 0.12), "large": (2.9, 0.15), "grown": (2.75, 0.16)}


def bits(arm, flops):
    level, slope = CURVES[arm]
    return level - slope * math.log2(flops / 1e11)


def flops_at(arm, goal):
    """Where a curve has a value."""
    level, slope = CURVES[arm]
    return 1e11 * 2 ** ((level - goal) / slope)


def run(arm, budget, seed=0):
    grown = arm == "grown" and budget > AT
    kind = arm if arm != "grown" or grown else "small"
    return {
        "event": "run",
        "purpose": "final",
        "arm": arm,
        "seed": seed,
        "learning_rate": 1e-3,
        "budget": budget,
        "training_flops": budget,
        "text_tokens": budget / SIZES[kind],
        "seconds": 1.0,
        "bits_per_byte": bits(kind, budget) + 0.01 * seed,
        "parameters": SIZES[kind],
        "config": {"model_type": "gpt_neox", "hidden_size": 16},
        "growths": [{"training_flops": AT}] if grown else [],
        "curve": [],
    }


def lines(arms=tuple(SIZES), seeds=(0, 1), budgets=BUDGETS):
    recipe = {
        "question": "Does it pay?",
        "data": {"source": "examples", "tokenizer": "bytes"},
        "training": {"decay": 0.2},
        "budgets": budgets,
        "seeds": list(seeds),
        "learning_rates": [1e-3],
        "tuning_budget": budgets[0],
        "rules": {"reference": arms[0]},
        "arms": {a: {"model": SMALL, "stages": [{"at": AT, "ffn_param_tokens": 64}] * (a == "grown")} for a in arms},
    }
    begun = {"event": "recipe", "name": "pays", "date": "2026-01-01", "recipe": recipe}
    return [begun, *(run(arm, budget, seed) for arm in arms for seed in seeds for budget in budgets)]


def findings(changed=lambda line: line, **contents):
    return Findings.of([line if line["event"] == "recipe" else changed(line) for line in lines(**contents)])


def test_counted_pays_for_everything_and_asks_for_the_best_arm_of_any_size():
    found = counted(findings(), "grown")
    goal, paid = bits("middle", BUDGETS[-1]), flops_at("grown", bits("middle", BUDGETS[-1]))
    assert found.target == "middle" and min(bits(arm, BUDGETS[-1]) for arm in ("small", "middle", "large")) == goal
    assert (found.flops, found.share) == pytest.approx((paid, paid / BUDGETS[-1]))
    assert found.by_seed == pytest.approx([found.share] * 2) and found.seeds == 2 and not found.at_once
    miscounts = {
        "base not paid": (paid - AT) / BUDGETS[-1],
        "base paid twice": (paid + AT) / BUDGETS[-1],
        "growth paid twice": (paid + (paid - AT)) / BUDGETS[-1],
        "another arm's goal": flops_at("grown", bits("large", BUDGETS[-1])) / BUDGETS[-1],
        "another budget's goal": flops_at("grown", bits("middle", BUDGETS[-2])) / BUDGETS[-1],
        "another budget's cost": paid / BUDGETS[-2],
        "linear in FLOPs": (4e11 + 4e11 * (bits("grown", 4e11) - goal) / CURVES["grown"][1]) / BUDGETS[-1],
    }
    for miscount, share in miscounts.items():
        assert abs(share - found.share) > 0.02, miscount


def test_owned_pays_for_what_comes_after_growth_and_asks_for_the_last_size_from_scratch():
    found = owned(findings(), "grown")
    assert found.target == scratch_twin(findings(), "grown") == "large"
    goal = bits("large", BUDGETS[-1])
    # Between the ends at 4e11 and 8e11 the FLOPs after growth are 2.5e11 and 6.5e11.
    share = (bits("grown", 4e11) - goal) / CURVES["grown"][1]
    assert 0 < share < 1
    paid = 2.5e11 * (6.5e11 / 2.5e11) ** share
    assert (found.flops, found.share) == pytest.approx((paid, paid / BUDGETS[-1]))
    miscounts = {
        "base paid": (paid + AT) / BUDGETS[-1],
        "base sunk in the target too": paid / (BUDGETS[-1] - AT),
        "the best arm's goal": counted(findings(), "grown").share,
        "another budget's cost": paid / BUDGETS[-2],
    }
    for miscount, wrong in miscounts.items():
        assert abs(wrong - found.share) > 0.02, miscount


def test_runs_that_end_before_growth_are_the_small_models():
    """Here the small model is as good as the target at its first end, where the arm has not grown."""

    def early(line):
        return {**line, "bits_per_byte": 1.0} if line["arm"] == "grown" and line["budget"] < AT else line

    assert counted(findings(early), "grown") == counted(findings(), "grown")
    assert owned(findings(early), "grown") == owned(findings(), "grown")
    assert saving(findings(early), "grown", "middle").flops == BUDGETS[0]


def test_only_the_last_size_is_owned():
    def twice(line):
        later = line["arm"] == "grown" and line["budget"] >= 8e11
        return {**line, "growths": line["growths"] + [{"training_flops": 5e11}] * later}

    several = lines()
    several[0]["recipe"]["arms"]["grown"]["stages"] = [{"at": at, "ffn_param_tokens": "+50%"} for at in (AT, 5e11)]
    found = Findings.of([several[0], *map(twice, several[1:])])
    assert counted(found, "grown") == counted(findings(), "grown")
    assert owned(found, "grown").at_once
    assert owned(found, "grown").flops == 8e11 - AT


def test_nothing_is_extrapolated():
    """The grown arm would cross soon after its last end, and the large arm has a larger budget than it."""
    assert counted(findings(budgets=BUDGETS[:3]), "grown") is not None
    short = lines()
    short = [e for e in short if e.get("arm") != "grown" or e["budget"] <= 4e11]
    found = Findings.of([e for e in short if e.get("arm") != "large" or e["budget"] != 4e11])
    assert found.last == 2e11  # the largest budget that all arms have
    assert counted(found, "grown").share == pytest.approx(flops_at("grown", bits("small", 2e11)) / 2e11)
    worse = findings(lambda line: {**line, "bits_per_byte": line["bits_per_byte"] + (line["arm"] == "grown")})
    assert counted(worse, "grown") is None and owned(worse, "grown") is None
    told = " ".join(accounts(worse))
    assert "no arm that grows reaches the final bits per byte of middle" in told
    assert "Owned, with the first model there already, no arm that grows reaches those of its size" in told


@pytest.mark.parametrize("change", [{"parameters": 2070}, {"config": {"model_type": "gpt2"}}])
def test_another_size_or_kind_from_scratch_is_no_twin(change):
    other = findings(lambda line: {**line, **change} if line["arm"] == "large" else line)
    assert scratch_twin(other, "grown") is None and owned(other, "grown") is None
    assert "is open: no arm trains a grown size from scratch" in " ".join(accounts(other))
    near = findings(lambda line: {**line, "parameters": 2050} if line["arm"] == "large" else line)
    assert scratch_twin(near, "grown") == "large"


def test_seeds_that_only_one_of_both_has_count_for_neither():
    """Seed 1 of the target is somewhat off, and the grown arm does not have it."""
    several = [e for e in lines() if not (e.get("arm") == "grown" and e["seed"] == 1)]
    for line in several:
        if line.get("arm") == "middle" and line["seed"] == 1:
            line["bits_per_byte"] += 0.05
    found = counted(Findings.of(several), "grown")
    assert (found.target, found.seeds) == ("middle", 1)
    assert found.share == counted(findings(seeds=(0,)), "grown").share


def test_both_accounts_are_in_the_sentences_and_the_table():
    found = findings()
    told = " ".join(accounts(found))
    shares = counted(found, "grown").share, owned(found, "grown").share
    assert (
        f"grown reaches the final bits per byte of middle, the best arm that never grows, with {shares[0]:.2f}" in told
    )
    assert f"grown reaches those of large, its size from scratch, with {shares[1]:.2f} × its training FLOPs" in told
    text = "\n".join(element.markdown() for element in savings(found))
    assert f"{shares[0]:.2f} × ({shares[0]:.2f}–{shares[0]:.2f}) |" in text and "| large |" in text
    assert cheapest(found, owned).arm == "grown"
    assert list(accounts(findings(arms=("small", "middle")))) == []
