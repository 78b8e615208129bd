"""A fixed threshold over all pairs, against every pair written out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphereface2.evaluation import one_threshold
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.one_threshold import (
    AtThreshold,
    all_pairs_at,
    by_group,
    judge_thresholds,
    uniform_accuracy,
)
from sphereface2.evaluation.results import Estimate


def drawn(seed, people=7, most=5, dim=6):
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(people), rng.integers(1, most, people))
    labels = np.append(labels, [0, 0, 1])
    rows = rng.normal(size=(people, dim))[labels] + 0.8 * rng.normal(size=(len(labels), dim))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    order = rng.permutation(len(labels))
    return rows[order].astype(np.float32), labels[order] * 3


def pairs(rows, labels):
    i, j = np.triu_indices(len(rows), 1)
    return (rows @ rows.T)[i, j], labels[i] == labels[j]


@given(seed=st.integers(0, 10**6), block=st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_rates_are_those_of_every_pair(seed, block):
    rows, labels = drawn(seed)
    scores, same = pairs(rows, labels)
    found = all_pairs_at(rows, labels, {0.1: 0.2, 0.01: 0.6}, block=block, workers=2)
    for one, limit, far in zip(found, (0.2, 0.6), (0.1, 0.01), strict=True):
        assert one.far.value == pytest.approx((scores[~same] >= limit).mean())
        assert one.tar.value == pytest.approx((scores[same] >= limit).mean())
        assert (one.genuine, one.impostor) == (same.sum(), (~same).sum())
        assert one.asked == far
        reached = max(one.far.value, min(0.5 / one.impostor, far))
        assert one.transfer.value == pytest.approx(np.log10(reached / far))


def test_a_set_too_small_to_tell_says_so():
    for impostor, decades in ((9, 0.0), (5000, -2.0)):
        found = AtThreshold(0.4, Estimate(0.0, (0.0, 0.0)), Estimate(1.0), 2, impostor, 0, 1e-2)
        assert found.transfer.value == found.transfer.ci[0] == pytest.approx(decades)
        assert found.transfer.ci[1] == pytest.approx(np.log10(3 / impostor / 1e-2))


def test_false_accepts_are_counted_alike_however_often_they_are_tallied(monkeypatch):
    rows, labels = drawn(1, people=20)
    expected = all_pairs_at(rows, labels, [0.0], bootstrap=Bootstrap(50))
    monkeypatch.setattr(one_threshold, "_KEPT", 3)
    assert all_pairs_at(rows, labels, [0.0], block=4, bootstrap=Bootstrap(50)) == expected


def test_the_interval_of_a_far_resamples_people():
    """Beside a bootstrap that copies each drawn person's images."""
    rows, labels = drawn(5, people=25)
    (found,) = all_pairs_at(rows, labels, [0.3], bootstrap=Bootstrap(2000, 1))
    people, rng, rates = np.unique(labels), np.random.default_rng(2), []
    scores, same = rows @ rows.T, labels[:, None] == labels[None]
    for _ in range(2000):
        chosen = rng.choice(people, len(people))
        at = np.concatenate([np.flatnonzero(labels == person) for person in chosen])
        impostor = ~same[np.ix_(at, at)]
        rates.append((scores[np.ix_(at, at)][impostor] >= 0.3).mean())
    assert found.far.ci == pytest.approx(np.quantile(rates, [0.025, 0.975]), rel=0.08)
    assert found.tar.ci[0] < found.tar.value < found.tar.ci[1]


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_uniform_accuracy_is_the_best_over_every_threshold(seed):
    rows, labels = drawn(seed)
    scores = rows @ rows.T
    several = [i for i in range(len(rows)) if (labels == labels[i]).sum() > 1]

    def served(limit):
        count = 0
        for i in several:
            others = np.delete(np.arange(len(rows)), i)
            own = labels[others] == labels[i]
            count += (scores[i, others[own]] >= limit).all() and (
                scores[i, others[~own]] < limit
            ).all()
        return count / len(several)

    found = uniform_accuracy(rows, labels, block=8)
    assert found.images == len(several)
    # Products of blocks and of the whole differ in their last bits.
    assert found.share.value == pytest.approx(max(served(t) for t in np.unique(scores)), abs=0.06)
    assert served(found.threshold - 1e-6) == pytest.approx(found.share.value)


def test_an_easy_set_is_served_wholly_and_its_interval_says_so():
    rows, labels = np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 2, 2]], np.array([0, 0, 1, 1, 2, 2])
    found = uniform_accuracy(rows, labels, bootstrap=Bootstrap(100))
    assert found.share.value == 1.0
    assert found.share.ci == (1.0, 1.0)


def test_groups_are_judged_within_themselves_at_one_threshold():
    rows, labels = drawn(3, people=12)
    groups = [None if person == 0 else ("a", "b")[person % 2] for person in labels // 3]
    found = by_group(groups, rows, labels, {0.1: 0.25})
    assert list(found) == ["a", "b"]
    for name, (one,) in found.items():
        inside = np.array([group == name for group in groups])
        scores, same = pairs(rows[inside], labels[inside])
        assert one.far.value == pytest.approx((scores[~same] >= 0.25).mean())
        assert one.tar.value == pytest.approx((scores[same] >= 0.25).mean())
    with pytest.raises(ValueError, match=r"group 'b' cannot be judged: .* no impostor pair"):
        by_group([*"aaabb"], np.eye(5), np.array([0, 0, 5, 1, 1]), {0.1: 0.5})
    with pytest.raises(ValueError, match="4 groups were given for 5 images"):
        by_group([*"aaab"], np.eye(5), np.array([0, 0, 5, 1, 1]), {0.1: 0.5})
    judged = judge_thresholds(rows, labels, {0.1: 0.25}, name="set", groups=np.array(groups))
    assert judged.groups == found
