"""Learning rates are searched on losses that are known: what is tried next, and where the search ends."""

import math

import pytest
from comparisons import comparison, parsed

from tokenformer.compare.tuning import EXTENSIONS, known_runs, tuning

GRID = [1e-3, 3e-3, 1e-2]


@pytest.fixture
def recipe(tmp_path):
    return parsed(comparison(tmp_path), learning_rates=GRID, seeds=[7, 8, 9])


def line(run, bits):
    return {
        "event": "run",
        "purpose": "tuning",
        "arm": run.arm,
        "seed": run.seed,
        "learning_rate": run.learning_rate,
        "tuning_bits_per_byte": bits,
    }


def searched(recipe, loss):
    """Search as `tokenformer compare` does, one run at a time; return the search and its lines in order."""
    lines = []
    while True:
        known = known_runs(recipe, "small", lines)
        there = {(e["seed"], e["learning_rate"]) for e in lines}
        missing = [run for run, purpose in known if purpose == "tuning" and (run.seed, run.learning_rate) not in there]
        if not missing:
            return tuning(recipe, "small", lines), lines
        assert all(purpose == "tuning" for _, purpose in known)  # no final run before
        lines.append(line(missing[0], loss(missing[0].learning_rate, missing[0].seed)))


def bowl(best):
    """Bits per byte of a rate, least at `best`."""
    return lambda rate, seed: 2.0 + 0.1 * math.log(rate / best) ** 2


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (3e-3, [1e-3, 3e-3, 1e-2]),
        (3.4e-2, [1e-3, 3e-3, 1e-2, 1e-2 / 0.3, 1e-2 / 0.09]),
        (3.4e-4, [1e-3 / 9, 1e-3 / 3, 1e-3, 3e-3, 1e-2]),
    ],
)
def test_best_rate_at_an_end_extends_the_grid_until_it_lies_inside(recipe, best, tried):
    found, lines = searched(recipe, bowl(best))
    assert sorted(e["learning_rate"] for e in lines) == pytest.approx(tried, rel=1e-5)
    assert found.settled and found.end is None
    assert abs(math.log(found.rate / best)) < math.log(2)


def test_final_runs_train_with_the_best_rate_of_the_extended_grid(recipe):
    found, lines = searched(recipe, bowl(3.4e-2))
    finals = [run for run, purpose in known_runs(recipe, "small", lines) if purpose == "final"]
    assert {run.learning_rate for run in finals} == {found.rate} == {0.0333333}
    assert len(finals) == len(recipe.seeds) * len(recipe.budgets)


@pytest.mark.parametrize(("best", "end"), [(1e9, "largest"), (1e-9, "smallest")])
def test_extensions_are_limited_and_what_lies_at_the_end_then_is_said(recipe, best, end):
    found, lines = searched(recipe, bowl(best))
    assert len(lines) == len(GRID) + EXTENSIONS
    assert found.settled and found.end == end
    assert any(purpose == "final" for _, purpose in known_runs(recipe, "small", lines))


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_divergence_is_worse_than_any_loss(recipe, nothing):
    found, lines = searched(recipe, lambda rate, seed: nothing if rate > 5e-3 else 9.0 - 100 * rate)
    assert (found.rate, found.end, len(lines)) == (3e-3, None, 3)
    found, lines = searched(recipe, lambda rate, seed: nothing if rate > 5e-4 else 9.0)
    assert found.rate < 5e-4


def test_close_rates_are_tried_with_the_second_seed_and_the_better_mean_wins(recipe):
    bits = {(7, 3e-3): 2.000, (7, 1e-2): 2.005, (8, 3e-3): 2.1, (8, 1e-2): 2.08, (7, 0.0333333): 2.5}
    found, lines = searched(recipe, lambda rate, seed: bits.get((seed, rate), 3.0))
    assert [(e["seed"], e["learning_rate"]) for e in lines[3:]] == [(8, 3e-3), (8, 1e-2), (7, 0.0333333)]
    assert (found.rate, found.end, found.settled) == (1e-2, None, True)
    bits[7, 1e-2] = 2.011  # no closer than the threshold: one seed decides
    found, lines = searched(recipe, lambda rate, seed: bits.get((seed, rate), 3.0))
    assert (found.rate, len(lines)) == (3e-3, 3)


def test_close_rates_stay_with_one_seed_where_there_is_no_other(tmp_path):
    recipe = parsed(comparison(tmp_path), learning_rates=GRID, seeds=[7])
    found, lines = searched(recipe, lambda rate, seed: {3e-3: 2.0, 1e-2: 2.005}.get(rate, 3.0))
    assert (found.rate, len(lines)) == (3e-3, 3)


def test_one_rate_is_not_tuned(tmp_path):
    recipe = parsed(comparison(tmp_path), learning_rates=[1e-2])
    found, lines = searched(recipe, lambda rate, seed: 1 / 0)
    assert (found.rate, found.runs, found.settled, lines) == (1e-2, [], True, [])


def test_order_of_rates_and_lines_does_not_matter(recipe):
    turned = recipe.model_copy(update={"learning_rates": GRID[::-1]})
    found, lines = searched(recipe, bowl(3.4e-2))
    assert tuning(turned, "small", lines[::-1]) == found
