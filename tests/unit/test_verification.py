"""Verification metrics against brute force and scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from sphereface2.data.pairs import PairSet
from sphereface2.errors import UserError
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.pairs import evaluate_pairs
from sphereface2.evaluation.results import far_key
from sphereface2.evaluation.verification import (
    allowed_accepts,
    auc,
    curve_figures,
    eer,
    kfold_accuracy,
    pair_scores,
    roc,
    tar_at_far,
)


@st.composite
def scored(draw, smallest=2, largest=60):
    """Scores, often equal ones, with pairs of both kinds."""
    count = draw(st.integers(smallest, largest))
    levels = draw(st.sampled_from([1, 3, 10, 1000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    same = rng.random(count) < draw(st.sampled_from([0.1, 0.5, 0.9]))
    same[0], same[-1] = True, False
    scores = rng.integers(-levels, levels + 1, count) / levels + 0.5 * same * rng.integers(0, 2)
    return scores, same


def best_on(scores, same):
    """Brute force: every observed score and one just above them all, the lowest of the best."""
    candidates = [*np.unique(scores), np.nextafter(scores.max(), np.inf)]
    accuracies = [np.mean((scores >= t) == same) for t in candidates]
    return candidates[int(np.argmax(accuracies))]


@given(scored(smallest=4), st.integers(2, 10), st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_kfold_is_brute_force(pairs, count, seed):
    scores, same = pairs
    folds = np.random.default_rng(seed).integers(count, size=len(scores))
    folds[:2] = [0, 1]
    found = kfold_accuracy(scores, same, folds)
    expected = []
    for fold in np.unique(folds):
        t = best_on(scores[folds != fold], same[folds != fold])
        expected.append(np.mean((scores[folds == fold] >= t) == same[folds == fold]))
    np.testing.assert_array_equal(found.fold_accuracy, expected)
    assert found.accuracy == np.mean(expected)
    assert found.accuracy_std == np.std(expected, ddof=0)
    assert np.isfinite(found.fold_threshold).all()


def test_kfold_judges_a_fold_by_the_others():
    """Ten folds whose own best threshold differs: using it would give accuracy 1."""
    folds = np.repeat(np.arange(10), 2)
    same = np.tile([True, False], 10)
    scores = np.where(same, 0.1, -0.1) + np.arange(10).repeat(2)
    assert kfold_accuracy(scores, same, folds).accuracy == pytest.approx(0.5)


@given(scored())
@settings(deadline=None)
def test_roc_and_auc_are_those_of_scikit_learn(pairs):
    scores, same = pairs
    far, tar, thresholds = roc(scores, same)
    expected = roc_curve(same, scores, drop_intermediate=False)
    np.testing.assert_allclose(far, expected[0])
    np.testing.assert_allclose(tar, expected[1])
    np.testing.assert_array_equal(thresholds[1:], expected[2][1:])
    assert auc(scores, same) == pytest.approx(roc_auc_score(same, scores))


@given(scored())
@settings(deadline=None)
def test_eer_lies_on_the_curve(pairs):
    """Crossing of the interpolated ROC with FAR = FRR, found by bisection."""
    scores, same = pairs
    far, tar, _ = roc(scores, same)
    # Bisection along the curve itself, which may be vertical.
    low, high = 0.0, float(len(far) - 1)
    for _ in range(80):
        middle = (low + high) / 2
        f, t = (np.interp(middle, np.arange(len(far)), values) for values in (far, tar))
        low, high = (middle, high) if f < 1 - t else (low, middle)
    assert eer(scores, same) == pytest.approx(np.interp(low, np.arange(len(far)), far), abs=1e-9)


def test_eer_by_hand():
    # Thresholds 3 and 2 give (FAR, FRR) = (1/4, 1/2) and (1/2, 0): they meet at FAR 1/3.
    scores = np.array([4, 3, 2, 2, 4.5, 2, 1, 0])
    same = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    assert eer(scores, same) == pytest.approx(1 / 4 + 1 / 4 * (1 / 4) / (3 / 4))


@given(scored(), st.sampled_from([1e-3, 0.01, 0.05, 0.1, 1 / 3, 0.5, 0.7, 1.0]))
@settings(max_examples=200, deadline=None)
def test_tar_at_far_is_brute_force(pairs, far):
    scores, same = pairs
    (found,) = tar_at_far(scores, same, [far])
    if far < 1 / (~same).sum():
        assert found.value is None
        return
    fitting = [t for t in np.unique(scores) if np.mean(scores[~same] >= t) <= far]
    if fitting:
        assert found.threshold == min(fitting)
        assert found.value == np.mean(scores[same] >= min(fitting))
    else:
        assert found.threshold is None
        assert found.value == 0


@given(st.integers(1, 10**7), st.sampled_from([1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 0.29, 0.7]))
@settings(deadline=None)
def test_allowed_accepts_is_exact(impostors, far):
    k = allowed_accepts(far, impostors)
    assert k / impostors <= far
    assert k == impostors or (k + 1) / impostors > far


def test_far_keys():
    assert [far_key(f) for f in (1e-1, 1e-3, 1e-6, 0.05, 1.0)] == [
        "1e-1",
        "1e-3",
        "1e-6",
        "5e-2",
        "1e0",
    ]


def test_pair_scores_are_cosines():
    rng = np.random.default_rng(0)
    e = rng.standard_normal((50, 16)).astype(np.float32)
    e /= np.linalg.norm(e, axis=1, keepdims=True)
    pairs = rng.integers(50, size=(40_000, 2))
    np.testing.assert_allclose(
        pair_scores(e, pairs), (e @ e.T)[pairs[:, 0], pairs[:, 1]], atol=1e-6
    )


def test_sets_that_cannot_be_scored():
    with pytest.raises(UserError, match="two folds or more, and 9 pairs in one"):
        kfold_accuracy(np.zeros(9), np.ones(9, bool), np.zeros(9, int))
    with pytest.raises(UserError, match="only genuine pairs"):
        eer(np.zeros(9), np.ones(9, bool))
    with pytest.raises(ValueError, match="finite"):
        tar_at_far(np.array([np.nan, 1]), np.array([True, False]))
    with pytest.raises(ValueError, match="FAR"):
        tar_at_far(np.array([0, 1]), np.array([True, False]), [0])
    with pytest.raises(ValueError, match="True for genuine"):
        kfold_accuracy(np.zeros(20), np.where(np.arange(20) % 2, 1, -1), np.arange(20))
    with pytest.raises(ValueError, match=r"shape \(4, 2\), got \(5, 2\)"):
        curve_figures(np.arange(4), [0, 0, 1, 1], people=np.ones((5, 2)), bootstrap=Bootstrap(2))


def test_pairs_that_tell_nothing_new_are_noted():
    pairs = np.array([[0, 1], [1, 0], [2, 2], [3, 4], [0, 1], [3, 4]])
    same = np.array([1, 1, 1, 0, 1, 0], bool)
    pair_set = PairSet("s", [b""] * 5, pairs, same, np.arange(6) // 3)
    notes = evaluate_pairs(np.where(same, 0.5, 0.1), pair_set, fars=[0.5]).notes
    assert notes[-2:] == [
        "pairs that compare an image with itself: 1",
        "pairs that the set holds already and that count again: 3",
    ]


# --- the bootstrap -------------------------------------------------------------------------------


def clustered(people=50, images=4, seed=0):
    """All pairs of people some of whom are hard: scores, same, who."""
    rng = np.random.default_rng(seed)
    spread = 0.4 * np.exp(0.4 * rng.standard_normal(people))
    e = rng.standard_normal((people, 1, 8)) + spread[:, None, None] * rng.standard_normal(
        (people, images, 8)
    )
    e = (e / np.linalg.norm(e, axis=2, keepdims=True)).reshape(-1, 8)
    y = np.repeat(np.arange(people), images)
    i, j = np.triu_indices(len(y), 1)
    return (e @ e.T)[i, j], y[i] == y[j], np.stack([y[i], y[j]], 1)


def test_bootstrap_weights_are_copies_of_people():
    """One replicate, done by hand: copy each person as often as drawn, score all pairs."""
    scores, same, who = clustered(people=12)
    found = curve_figures(scores, same, [0.1], people=who, bootstrap=Bootstrap(1, 3))
    copies = np.random.default_rng(3).integers(12, size=12)
    table = {}
    for s, (a, b) in zip(scores, who, strict=True):
        table.setdefault((a, b), []).append(s)
    genuine = [s for a in copies for s in table[(a, a)]]
    impostor = [
        s
        for i, a in enumerate(copies)
        for b in copies[i + 1 :]
        if a != b
        for s in table[(min(a, b), max(a, b))]
    ]
    all_scores = np.array(genuine + impostor)
    kind = np.arange(len(all_scores)) < len(genuine)
    assert found.tar[0].ci[0] == pytest.approx(tar_at_far(all_scores, kind, [0.1])[0].value)
    assert found.auc.ci[0] == pytest.approx(auc(all_scores, kind))
    assert found.eer.ci[0] == pytest.approx(eer(all_scores, kind))


def test_people_give_wider_intervals_than_their_many_pairs():
    scores, same, who = clustered()
    over_people = curve_figures(scores, same, [0.1], people=who, bootstrap=Bootstrap(200))
    over_pairs = curve_figures(scores, same, [0.1], bootstrap=Bootstrap(200))
    for a, b in [
        (over_people.tar[0], over_pairs.tar[0]),
        (over_people.auc, over_pairs.auc),
    ]:
        assert a.ci[1] - a.ci[0] > 1.3 * (b.ci[1] - b.ci[0])


def test_over_pairs_the_interval_is_the_binomial_one():
    """TAR at a FAR fixed by many impostor pairs is a share of independent genuine ones."""
    rng = np.random.default_rng(0)
    same = np.arange(5000) < 400
    scores = rng.standard_normal(5000) + 1.5 * same
    tar = tar_at_far(scores, same, [0.1])[0].value
    low, high = curve_figures(scores, same, [0.1], bootstrap=Bootstrap(500)).tar[0].ci
    width = 2 * 1.96 * np.sqrt(tar * (1 - tar) / 400)
    assert low < tar < high
    assert high - low == pytest.approx(width, rel=0.25)


def test_bootstrap_is_seeded_and_gives_none_where_the_set_cannot_tell():
    scores, same, who = clustered(people=10, images=2)
    first = curve_figures(scores, same, [0.1, 1e-4], people=who, bootstrap=Bootstrap(50, 1))
    assert first == curve_figures(scores, same, [0.1, 1e-4], people=who, bootstrap=Bootstrap(50, 1))
    assert first != curve_figures(scores, same, [0.1, 1e-4], people=who, bootstrap=Bootstrap(50, 2))
    assert first.tar[1].ci is None


@pytest.mark.slow
def test_coverage_of_the_intervals():
    """95 % intervals over people hold the truth about that often; over pairs far less often."""
    truth = np.mean([tar_at_far(*clustered(400, 4, s)[:2], [0.1])[0].value for s in range(20)])
    hits = np.zeros(2)
    for seed in range(100, 200):
        scores, same, who = clustered(seed=seed)
        for k, people in enumerate([who, None]):
            low, high = (
                curve_figures(scores, same, [0.1], people=people, bootstrap=Bootstrap(200))
                .tar[0]
                .ci
            )
            hits[k] += low <= truth <= high
    assert hits[0] >= 88
    assert hits[1] <= 85
