"""Planted wrong labels and split people among drawn embeddings, and scores by their definitions."""

import numpy as np
import pytest

from sphereface2.evaluation.label_errors import alike_labels, false_discovery_rate, score_labels

PEOPLE, IMAGES, DIM = 400, 5, 32


def drawn(seed: int = 0, noise: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(PEOPLE), IMAGES)
    rows = rng.normal(size=(PEOPLE, DIM))[labels] + noise * rng.normal(size=(len(labels), DIM))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), labels


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2])
def test_wrong_labels_are_found_at_their_share(share: float) -> None:
    rows, truth = drawn()
    rng = np.random.default_rng(1)
    labels = truth.copy()
    chosen = rng.permutation(len(labels))[: round(share * len(labels))]
    labels[chosen] = (labels[chosen] + rng.integers(1, PEOPLE, len(chosen))) % PEOPLE
    bad = labels != truth
    found = score_labels(rows, labels)
    assert abs(found.share - share) < 0.02
    assert (found.wrong > 0.5).sum() == pytest.approx(bad.sum(), abs=0.03 * len(rows))
    # A probability of p is right p of the time.
    assert found.wrong.sum() == pytest.approx(bad.sum(), abs=0.02 * len(rows))
    if share:
        assert (found.wrong[bad] > 0.5).mean() > 0.9
        assert bad[found.wrong > 0.5].mean() > 0.9
        moved = found.moves > 0.5
        right = (found.nearest[moved] == truth[moved]).mean()
        assert right == pytest.approx(found.moves[moved].mean(), abs=0.1)


def test_wrong_labels_are_found_among_few_people() -> None:
    planted = named = hit = 0
    for seed in range(4):
        rows, truth = drawn(seed, noise=0.8)
        rows, truth = rows[:100], truth[:100]
        rng = np.random.default_rng(seed)
        labels = truth.copy()
        chosen = rng.permutation(100)[:5]
        labels[chosen] = (labels[chosen] + rng.integers(1, 20, 5)) % 20
        found = score_labels(rows, labels).wrong > 0.5
        planted, named = planted + 5, named + int(found.sum())
        hit += int(found[chosen].sum())
    assert hit > 0.85 * planted and hit > 0.8 * named


def test_own_and_nearest_scores_by_their_definition() -> None:
    rows, labels = drawn()
    found = score_labels(rows, labels, rounds=1)
    for i in (0, 7, 1234):
        rest = rows[(labels == labels[i]) & (np.arange(len(rows)) != i)].mean(axis=0)
        assert found.own[i] == pytest.approx(rows[i] @ rest / np.linalg.norm(rest), abs=1e-5)
        centres = np.stack([rows[labels == p].mean(axis=0) for p in range(PEOPLE)])
        scores = centres @ rows[i] / np.linalg.norm(centres, axis=1)
        scores[labels[i]] = -1
        assert found.nearest[i] == scores.argmax()
        assert found.other[i] == pytest.approx(scores.max(), abs=1e-5)


def test_an_image_alone_with_its_label_is_not_judged() -> None:
    rows, labels = drawn()
    labels = np.append(labels, PEOPLE)
    rows = np.concatenate([rows, -rows[:1]])
    found = score_labels(rows, labels)
    assert np.isnan(found.own[-1]) and found.wrong[-1] == 0


def test_split_people_stand_first_and_others_are_not_taken_for_them() -> None:
    rows, truth = drawn(noise=0.6)
    labels = truth.copy()
    for number, person in enumerate(range(0, PEOPLE, 20)):
        labels[np.flatnonzero(truth == person)[:2]] = PEOPLE + number
    found = alike_labels(rows, labels, np.ones(len(rows)))
    named = found.pairs[found.rate <= 0.1]
    right = [b >= PEOPLE and a == 20 * (b - PEOPLE) for a, b in named.tolist()]
    assert sum(right) >= 18 and np.mean(right) >= 0.8
    nothing = alike_labels(rows, truth, np.ones(len(rows)))
    assert (nothing.rate <= 0.1).sum() <= 1


def test_scores_of_pairs_of_labels_by_their_definition() -> None:
    rows, labels = drawn()
    weights = np.random.default_rng(0).uniform(0.2, 1, len(rows))
    found = alike_labels(rows, labels, weights)
    cosines = (rows @ rows.T).astype(np.float64) * np.outer(weights, weights)
    pairs = np.outer(weights, weights)
    np.fill_diagonal(cosines, 0)
    np.fill_diagonal(pairs, 0)
    parts = [np.flatnonzero(labels == person) for person in range(PEOPLE)]
    inner = np.array([[m[np.ix_(p, p)].sum() for m in (cosines, pairs)] for p in parts])
    within = (inner[:, 0] + 10 * inner[:, 0].sum() / inner[:, 1].sum()) / (inner[:, 1] + 10)
    for k in (0, 17, 900):
        a, b = found.pairs[k]
        across = [m[np.ix_(parts[a], parts[b])].sum() for m in (cosines, pairs)]
        expected = across[0] / across[1] / np.sqrt(within[a] * within[b])
        assert found.scores[k] == pytest.approx(expected, abs=1e-4)


def test_the_false_discovery_rate_of_a_normal_tail_with_some_genuine_scores() -> None:
    impostors = np.random.default_rng(0).normal(0, 0.1, 1_000_000)
    tail = np.sort(impostors)[::-1][:5000]
    assert false_discovery_rate(tail)[:20].min() > 0.3
    rates = false_discovery_rate(np.concatenate([np.linspace(0.9, 0.7, 50), tail]))
    assert rates[49] < 0.05 < 0.3 < rates[200]
    assert (np.diff(rates) >= 0).all()
