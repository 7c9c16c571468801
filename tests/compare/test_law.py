from dataclasses import replace

import numpy as np
import pytest

from tokenformer.compare.law import Point, fit
from tokenformer.errors import EvaluationError

# E, A, alpha, B, beta
PLANTED = {"E": 1.0, "A": 20.0, "alpha": 0.35, "B": 60.0, "beta": 0.32}
SIZES = [50_000, 150_000, 500_000, 1_500_000]
TEXTS = [4, 12, 40, 120]  # text tokens a parameter


def planted(parameters, text_tokens):
    p = PLANTED
    return p["E"] + p["A"] / parameters ** p["alpha"] + p["B"] / text_tokens ** p["beta"]


def runs(*, noise=0.0, trial=0, seeds=3):
    random = np.random.default_rng(trial)
    return [
        Point(size, size * text, planted(size, size * text) * np.exp(random.normal(0, noise)), seed)
        for size in SIZES
        for seed in range(seeds)
        for text in TEXTS
    ]


def test_law_without_noise_is_found():
    law = fit(runs())
    for name, value in PLANTED.items():
        assert getattr(law, name) == pytest.approx(value, rel=0.01)
        assert law.intervals[name] == pytest.approx((value, value), rel=0.01)
    assert law.loss(1e6, 1e9) == pytest.approx(planted(1e6, 1e9), rel=1e-3)
    assert law.spread < 1e-3


def test_intervals_cover_the_constants_and_further_runs():
    constants, further = [], []
    for trial in range(5):
        law = fit(runs(noise=0.004, trial=trial))
        assert law.alpha == pytest.approx(PLANTED["alpha"], abs=0.06)
        assert law.beta == pytest.approx(PLANTED["beta"], abs=0.03)
        constants += [law.intervals[name][0] <= value <= law.intervals[name][1] for name, value in PLANTED.items()]
        random = np.random.default_rng(100 + trial)
        for size, text in ((300_000, 1e7), (1_000_000, 1e8), (3_000_000, 4e8)):
            low, high = law.interval(size, text)
            further.append(low <= planted(size, text) * np.exp(random.normal(0, 0.004)) <= high)
            assert high - low < 0.06  # nor do they cover by saying nothing
    assert sum(constants) >= 0.85 * len(constants)
    assert sum(further) >= 0.85 * len(further)


def test_one_run_gone_wrong_does_not_bend_the_law():
    points = runs(noise=0.002)
    bent = [replace(points[0], loss=2 * points[0].loss), *points[1:]]
    assert fit(bent).loss(1e6, 1e8) == pytest.approx(fit(points).loss(1e6, 1e8), rel=0.01)


def test_seeds_that_differ_more_make_intervals_wider():
    widths = [high - low for low, high in (fit(runs(noise=noise)).interval(1e6, 1e8) for noise in (0.002, 0.02))]
    assert widths[1] > 4 * widths[0]


@pytest.mark.slow
def test_same_points_in_any_order_give_the_same_law():
    points = runs(noise=0.01)
    assert fit(points) == fit(points)
    assert fit(points[::-1]).loss(1e6, 1e8) == pytest.approx(fit(points).loss(1e6, 1e8), rel=1e-4)


def test_law_knows_what_it_was_fitted_to():
    law = fit(runs())
    assert law.knows(1e6, 1e8)
    assert not law.knows(2e6, 1e8)
    assert not law.knows(1e6, 1e9)


@pytest.mark.parametrize(
    ("left", "found"),
    [
        (lambda p: p.parameters < 1_000_000, "50,000 parameters: 3 seeds, 4 budgets"),
        (lambda p: p.parameters > 50_000 or p.text_tokens < 1e6, "50,000 parameters: 3 seeds, 2 budgets"),
        (lambda p: p.parameters > 50_000 or p.seed == 1, "50,000 parameters: 1 seed, 4 budgets"),
        (lambda p: False, "no runs"),
    ],
)
def test_too_few_runs_are_no_law(left, found):
    with pytest.raises(EvaluationError, match=f"4 sizes, each with 3 budgets and 2 seeds .*{found}"):
        fit([point for point in runs() if left(point)])
