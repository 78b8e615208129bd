"""Resamples against drawing people one by one."""

import numpy as np
import pytest

from sphereface2.evaluation import bootstrap
from sphereface2.evaluation.bootstrap import (
    NONE,
    Bootstrap,
    at_own_threshold,
    draws,
    interval,
    pair_weights,
    ratio_intervals,
    ratios,
)


def test_pairs_count_as_often_as_their_people_are_drawn():
    people = np.array([[0, 0], [0, 1], [1, 2], [2, 2]])
    same = people[:, 0] == people[:, 1]
    drawn = np.random.default_rng(0).integers(3, size=(5, 3))
    expected = []
    for chosen in drawn:
        times = [list(chosen).count(p) for p in range(3)]
        expected.append([times[a] if a == b else times[a] * times[b] for a, b in people.tolist()])
    counts = next(draws(3, 5))
    np.testing.assert_array_equal(pair_weights(counts, same, people), expected)
    np.testing.assert_array_equal(pair_weights(counts, same[:3], None), counts)


def test_chunks_do_not_change_the_draws(monkeypatch):
    whole = np.concatenate([*draws(7, 40, seed=3)])
    monkeypatch.setattr(bootstrap, "_NUMBERS", 50)
    chunks = [*draws(7, 40, seed=3, numbers=10)]
    assert len(chunks) == 8
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    rng = np.random.default_rng(3)
    for row in whole:
        assert row.tolist() == np.bincount(rng.integers(7, size=7), minlength=7).tolist()


def test_ratios_are_those_of_copied_people():
    hits, trials = np.array([[1, 0, 4, 2], [0, 0, 1, 0]]), np.array([2, 0, 5, 3])
    rng = np.random.default_rng(1)
    again = []
    for _ in range(200):  # the person without a trial is not drawn
        people = np.array([0, 2, 3])[rng.integers(3, size=3)]
        again.append(hits[:, people].sum(axis=1) / trials[people].sum())
    expected = np.quantile(again, [0.025, 0.975], axis=0).T
    np.testing.assert_allclose(ratio_intervals(hits, trials, Bootstrap(200, 1)), expected)
    assert ratio_intervals(hits, trials, NONE) == [None, None]


def test_what_no_resample_has_is_none():
    found = ratios(np.array([[0.0, 2], [1, 1]]), np.array([3, 0]), np.array([4, 0]))
    assert np.isnan(found[0]) and found[1] == pytest.approx(0.75)
    assert interval(found) == (0.75, 0.75)
    assert interval(np.array([np.nan])) is None


def test_a_resample_goes_back_to_the_asked_far_along_the_roc():
    hits = np.array([[1, 2, 4], [1, 2, 2], [0, 2, 2]])  # TAR 2, 6 and 8 of 10 at FARs 1, 2 and 4
    trials, impostors = np.array([4, 3, 3]), np.array([50, 50, 50])
    accepted = np.array([[1, 2, 4], [1, 1, 2], [0, 1, 2]])
    counts = np.array([[1.0, 1, 1], [2, 1, 0], [1, 1, 1], [0, 0, 3]])
    found = at_own_threshold(counts, hits, trials, accepted, impostors)
    np.testing.assert_allclose(found[0], [0.2, 0.6, 0.8])
    twice = np.log(2)
    slopes = np.array([0.4 / twice, 0.6 / (2 * twice), 0.2 / twice])
    far = np.array([3 / 2, 5 / 4, 10 / 8])
    expected = np.array([3, 6, 10]) / 11 - slopes * 2 * np.log(far)
    np.testing.assert_allclose(found[1], np.clip(expected, 0, 1))
    # A share of probes, which have one person each, is linear.
    once = at_own_threshold(counts, hits, trials, accepted, impostors, sides=1)
    np.testing.assert_allclose(once[1], np.array([3, 6, 10]) / 11 - slopes * np.log(far))
    assert found[3, 0] == 1  # none accepted is drawn: the threshold may be anywhere


def test_without_a_slope_the_threshold_is_kept():
    counts, trials = next(draws(3, 20)), np.array([4, 3, 3])
    hits, accepted = np.array([[1], [2], [3]]), np.array([[2], [1], [1]])
    expected = ratios(counts, hits, trials)
    for some in (accepted, 0 * accepted):
        found = at_own_threshold(counts, hits, trials, some, np.full(3, 9))
        np.testing.assert_array_equal(found, expected)


def test_a_flat_roc_has_no_slope():
    """Rounding left one of 1e-17, which a resample without an accepted pair took to 0 or 1."""
    hits, trials = np.full((40, 4), 5.0), np.full(40, 7.0)
    accepted, impostors = np.zeros((40, 4)), np.full(40, 1911.0)
    accepted[:2] = 1, 4, 100, 1000
    for counts in draws(40, 50):
        found = at_own_threshold(counts, hits, trials, accepted, impostors)
        np.testing.assert_allclose(found, 5 / 7)
