"""Intervals against other libraries and against resampling spelt out; spreads known by hand."""

import numpy as np
import pytest
from scipy import stats

from sphereface2.evaluation.bootstrap import draws, ratios
from sphereface2.study import statistics
from sphereface2.study.statistics import Figure, contrast, gini, half_width


def test_interval_over_seeds_is_students():
    values = [0.71, 0.74, 0.69, 0.77]
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert np.mean(values) - half_width(values) == pytest.approx(low)
    assert np.mean(values) + half_width(values) == pytest.approx(high)
    assert half_width([0.7]) is None


def test_differences_over_seeds_are_paired():
    a, b = [0.80, 0.85, 0.78], [0.70, 0.74, 0.69]
    mine = {seed: Figure(value) for seed, value in enumerate(a)} | {9: Figure(0.0)}
    found = contrast((1, mine), (-1, {seed: Figure(value) for seed, value in enumerate(b)}))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.count == 3
    assert found.value == pytest.approx(np.mean(a) - np.mean(b))
    assert found.seeds == pytest.approx((expected.low, expected.high))
    assert found.people is None
    assert contrast((1, mine), (-1, {5: Figure(0.5)})) is None


def test_difference_over_people_is_that_of_a_loop_that_draws_people():
    rng = np.random.default_rng(1)
    people, seeds = 30, (0, 1)
    trials = rng.integers(0, 20, people)
    hits = {(arm, s): rng.binomial(trials, 0.6 + 0.1 * arm) for arm in (0, 1) for s in seeds}
    counts = next(draws(people, 2000))
    figures = [
        {
            s: Figure(
                hits[arm, s].sum() / trials.sum(),
                ratios(counts, hits[arm, s], trials),
                "test people",
            )
            for s in seeds
        }
        for arm in (0, 1)
    ]
    found = contrast((1, figures[1]), (-1, figures[0]))

    drawn = np.random.default_rng(0).integers(people, size=(2000, people))
    again = []
    for chosen in drawn:
        total = sum(trials[p] for p in chosen)
        tars = [
            np.mean([sum(hits[arm, s][p] for p in chosen) / total for s in seeds]) for arm in (0, 1)
        ]
        again.append(tars[1] - tars[0])
    assert found.people == pytest.approx(tuple(np.quantile(again, [0.025, 0.975])))
    assert found.marked == (not found.people[0] <= 0 <= found.people[1])


def test_people_drawn_differently_are_not_compared():
    replicates = np.linspace(0, 1, 50)
    a, b = Figure(0.5, replicates, "these"), Figure(0.4, replicates, "those")
    assert contrast((1, {0: a}), (-1, {0: b})).people is None
    assert contrast((1, {0: a}), (-1, {0: Figure(0.4, None, "these")})).people is None


def test_spreads_of_resamples_are_those_of_the_drawn_values():
    rng = np.random.default_rng(2)
    values = rng.exponential(size=12)
    values[3] = np.nan
    counts = next(draws(12, 40))
    full = np.nan_to_num(values)
    for row, spread, share in zip(
        counts.astype(int),
        statistics.spreads(counts, values),
        statistics.ginis(counts, full),
        strict=True,
    ):
        copies = np.repeat(values, row)
        assert spread == pytest.approx(np.nanstd(copies, ddof=1))
        copies = np.repeat(full, row)
        apart = np.abs(copies[:, None] - copies).mean()  # the mean absolute difference
        assert share == pytest.approx(apart / 2 / copies.mean())


@pytest.mark.parametrize(
    ("values", "expected"),
    [([2, 2, 2, 2], 0), ([0, 0, 0, 5], 0.75), ([1, 3], 0.25), ([1, 2, 3, 4], 0.25)],
)
def test_gini_by_hand(values, expected):
    assert gini(np.array(values, float)) == pytest.approx(expected)


def test_gini_of_nothing_does_not_exist():
    assert np.isnan(gini(np.zeros(4)))
