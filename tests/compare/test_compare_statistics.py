import math
import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tokenformer.compare.statistics import (
    Estimate,
    crossing,
    estimate,
    holm,
    paired_difference,
    reached,
    value_at,
    verdict,
)

SAMPLES = st.lists(st.integers(-1000, 1000).map(lambda i: i / 256), min_size=2, max_size=6)


def by_seed(values):
    return dict(enumerate(values))


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_interval_and_p_are_scipys(confidence):
    values = np.random.default_rng(0).normal(0.3, size=5)
    got, want = estimate(values, confidence=confidence), stats.ttest_1samp(values, 0.0)
    low, high = want.confidence_interval(confidence)
    assert got.mean == pytest.approx(values.mean(), rel=1e-12)
    assert (got.mean - got.half_width, got.mean + got.half_width) == pytest.approx((low, high), rel=1e-12)
    assert got.p == pytest.approx(want.pvalue, rel=1e-12)


def test_interval_of_three_seeds_by_hand():
    """Student's t of 2 degrees of freedom has a closed form: its 97.5 % point is 0.95·√(2 / (1 − 0.95²)) = 4.303."""
    t = 0.95 * math.sqrt(2 / (1 - 0.95**2))
    got = estimate([1.0, 2.0, 3.0], confidence=0.95)
    assert (got.mean, got.seeds) == (2.0, 3)
    assert got.half_width == pytest.approx(t / math.sqrt(3), rel=1e-9)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    covered = 0
    for values in random.normal(1.5, 0.02, size=(2000, 3)):
        got = estimate(values, confidence=0.9)
        covered += abs(got.mean - 1.5) <= got.half_width
    assert stats.binomtest(covered, 2000, 0.9).pvalue > 0.01


def test_pairing_uses_common_seeds_and_removes_what_they_share():
    a, b = {0: 1.0, 1: 2.01, 2: 3.0, 7: 99.0}, {2: 3.1, 0: 1.12, 1: 2.1, 8: 0.0}
    got, want = paired_difference(a, b, confidence=0.95), stats.ttest_rel([1.0, 2.01, 3.0], [1.12, 2.1, 3.1])
    assert got.seeds == 3
    assert got.p == pytest.approx(want.pvalue)
    assert got.half_width < 0.05 < estimate([1.0, 2.01, 3.0], confidence=0.95).half_width


@pytest.mark.parametrize(("values", "seeds"), [([], 0), ([0.5], 1)])
def test_fewer_than_two_seeds_have_no_interval(values, seeds):
    got = estimate(values, confidence=0.95)
    assert (got.half_width, got.p, got.seeds) == (None, None, seeds)


@given(SAMPLES, st.integers(-8, 8), st.sampled_from([0.25, 2.0, 8.0]))
def test_shift_and_scale(values, shift, scale):
    a, b = by_seed(values), by_seed(values[::-1])
    plain = paired_difference(a, b, confidence=0.95)
    moved = paired_difference(
        by_seed(v + shift for v in values), by_seed(v + shift for v in values[::-1]), confidence=0.95
    )
    assert moved == plain
    scaled = paired_difference(
        {s: v * scale for s, v in a.items()}, {s: v * scale for s, v in b.items()}, confidence=0.95
    )
    assert (scaled.mean, scaled.half_width) == pytest.approx((plain.mean * scale, plain.half_width * scale), rel=1e-12)
    assert scaled.p == pytest.approx(plain.p, rel=1e-9)


@given(SAMPLES)
def test_swapping_arms_negates(values):
    a, b = by_seed(values), by_seed(sorted(values))
    there, back = paired_difference(a, b, confidence=0.95), paired_difference(b, a, confidence=0.95)
    assert (back.mean, back.half_width, back.p) == (-there.mean, there.half_width, there.p)
    kinds = [
        verdict("A", "B", d, p=d.p, threshold=0.01, confidence=0.95, claim=True).kind.replace("worse", "better")
        for d in (there, back)
    ]
    assert kinds[0] == kinds[1]


def test_holm_by_hand():
    """0.005·4, 0.01·3, 0.03·2, and 0.04·1, which may not fall below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_the_closed_test_over_bonferronis(p_values):
    """Largest Bonferroni p of any subset of hypotheses that holds the one asked for (Marcus, Peritz, Gabriel 1976)."""
    n = len(p_values)
    subsets = [s for size in range(1, n + 1) for s in combinations(range(n), size)]
    want = [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in subsets if i in s) for i in range(n)]
    assert holm(p_values) == pytest.approx(want)


def test_holm_keeps_false_findings_rare():
    random = np.random.default_rng(2)
    families = stats.ttest_1samp(random.normal(size=(3, 1000, 8)), 0.0).pvalue
    assert np.mean([min(p) < 0.1 for p in families]) > 0.5
    assert np.mean([min(holm(p)) < 0.1 for p in families]) < 0.12


@pytest.mark.parametrize(
    ("mean", "half_width", "p", "kind", "sentence"),
    [
        (-0.03, 0.004, 0.001, "better", "A is better than B by 0.0300 ± 0.0040 bits per byte"),
        (0.03, 0.004, 0.001, "worse", "A is worse than B by 0.0300 ± 0.0040 bits per byte"),
        (-0.012, 0.004, 0.01, "better", "A is better than B by 0.0120 ± 0.0040 bits per byte, which may be less than"),
        (-0.005, 0.004, 0.01, "slightly better", "bits per byte, but by less than the 0.01 that matters"),
        (0.002, 0.004, 0.3, "equivalent", "A and B differ by less than the 0.01 that matters: by +0.0020 ± 0.0040"),
        (0.002, 0.04, 0.8, "cannot tell", "differ by +0.0020 ± 0.0400 bits per byte, which may be nothing"),
        (-0.03, 0.02, 0.2, "perhaps better", "better than B, by 0.0300 ± 0.0200 bits per byte: not significant"),
        (0.0, 0.0, 1.0, "same", "equal to the last bit with every seed"),
        (-0.03, None, None, "no interval", "there is no interval; A came out better than B by 0.0300 bits per byte"),
    ],
)  # fmt: skip
def test_verdicts(mean, half_width, p, kind, sentence):
    seeds = 1 if half_width is None else 3
    difference = Estimate(mean, half_width, p, seeds)
    got = verdict("A", "B", difference, p=p, threshold=0.01, confidence=0.95, claim=True)
    assert got.kind == kind
    assert sentence in got.sentence
    look = verdict("A", "B", difference, p=p, threshold=0.01, confidence=0.95, claim=False)
    assert look.kind == kind.replace("better", "ahead").replace("worse", "behind")
    assert not re.search("better|worse", look.sentence)


@pytest.mark.parametrize(
    ("mean", "half_width", "p", "sentence"),
    [
        (-0.03, 0.004, 0.001, "A is ahead of B in this first look, by 0.0300 ± 0.0040 bits per byte"),
        (0.03, 0.004, 0.001, "A is behind B in this first look, by 0.0300 ± 0.0040 bits per byte"),
        (
            0.03,
            0.02,
            0.2,
            "A is perhaps behind B in this first look, by 0.0300 ± 0.0200 bits per byte: not significant",
        ),
        (-0.03, None, None, "A came out ahead of B in this first look, by 0.0300 bits per byte"),
    ],
)
def test_words_of_a_first_look(mean, half_width, p, sentence):
    difference = Estimate(mean, half_width, p, 3)
    assert sentence in verdict("A", "B", difference, p=p, threshold=0.01, confidence=0.95, claim=False).sentence


def test_no_seed_in_common():
    difference = paired_difference({0: 1.0}, {1: 1.0}, confidence=0.95)
    found = verdict("A", "B", difference, p=None, threshold=0.01, confidence=0.95, claim=True)
    assert "no seed in common" in found.sentence
    assert str(difference) == "–"


FALLING = [(1e11, 2.0), (1e12, 1.5), (1e13, 1.25)]


def test_reached_is_linear_in_the_logarithm_of_cost():
    assert reached(FALLING, 1.75) == pytest.approx(math.sqrt(1e11 * 1e12))
    assert reached(FALLING, 1.5) == pytest.approx(1e12)
    assert reached(FALLING, 2.5) == 1e11
    assert reached(FALLING, 1.2) is None
    assert reached([], 1.2) is None


def test_reached_takes_the_first_time():
    assert reached([(1.0, 2.0), (math.e, 1.0), (9.0, 3.0), (10.0, 0.5)], 1.5) == pytest.approx(math.sqrt(math.e))


def test_crossing_by_hand():
    flat = [(1e11, 1.75), (1e13, 1.75)]
    assert crossing(FALLING, flat) == pytest.approx(math.sqrt(1e11 * 1e12))
    assert crossing(flat, FALLING) is None
    assert crossing(FALLING, [(x, y + 1) for x, y in FALLING]) == 1e11
    assert crossing(FALLING, FALLING) is None
    assert crossing(FALLING, []) is None
    assert crossing(FALLING, [(1.0, 5.0), (2.0, 5.0)]) is None


def test_crossing_is_the_last_one():
    wave, flat = [(1.0, 0.5), (2.0, 1.5), (4.0, 1.2), (8.0, 0.8)], [(0.5, 1.0), (16.0, 1.0)]
    assert crossing(wave, flat) == pytest.approx(4 * math.sqrt(2))


@given(st.lists(st.tuples(st.integers(2, 20), st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=6))
def test_curves_meet_where_they_cross(points):
    rows = sorted({x: (y, z) for x, y, z in points}.items())
    a, b = [(float(x), float(y)) for x, (y, _) in rows], [(float(x), float(z)) for x, (_, z) in rows]
    cost = crossing(a, b)
    if cost is not None and cost > a[0][0]:
        assert value_at(a, cost) == pytest.approx(value_at(b, cost), abs=1e-9)
    assert cost is None or crossing(b, a) is None
