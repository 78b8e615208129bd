import numpy as np
import pytest

from sphereface2.data.pairs import PairSet
from sphereface2.evaluation.all_pairs import evaluate_all_pairs
from sphereface2.evaluation.one_threshold import all_pairs_at, uniform_accuracy
from sphereface2.evaluation.verification import kfold_accuracy
from sphereface2.study.measure import (
    BINS,
    bits,
    describe_pairs,
    measure_pairs,
    measure_people,
    measure_transfer,
)


@pytest.fixture(scope="module")
def people():
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(10, 90), rng.integers(1, 9, 80)))
    centres = rng.standard_normal((100, 16))
    rows = centres[labels] + 1.2 * rng.standard_normal((len(labels), 16))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def test_sums_by_person_are_those_of_all_pairs(people):
    embeddings, labels = people
    found = measure_people(embeddings, labels)
    scores = embeddings @ embeddings.T
    same = labels[:, None] == labels
    upper = np.triu(np.ones_like(same), 1)
    impostors = np.sort(scores[upper & ~same])
    assert found.tar[1e-5] is None  # too few pairs
    for far in (1e-2, 1e-3):
        threshold = found.threshold[far]
        assert (impostors >= threshold).mean() <= far
        assert sum(found.hits[far]) / sum(found.genuine) == pytest.approx(found.tar[far])
        for person, false, own in zip(
            np.unique(labels), found.false_accepts[far], found.own_threshold[far], strict=True
        ):
            others = scores[labels == person][:, labels != person]
            assert false == (others >= threshold).sum()
            allowed = int(far * others.size)
            if own is None:
                assert allowed == 0
            else:
                best = np.sort(others.ravel())[::-1]
                assert best[allowed] < own + 1e-4
                assert own - 1e-4 < best[allowed - 1]
    expected = evaluate_all_pairs(embeddings, labels, [0.01])
    assert found.rank1 == pytest.approx(expected.rank1)
    assert found.tar[1e-2] == expected.tar[0].value
    genuine = scores[upper & same]
    assert found.genuine_scores.mean == pytest.approx(genuine.mean(), abs=1e-5)
    assert found.impostor_scores.std == pytest.approx(impostors.std(), abs=1e-5)
    assert found.impostor_scores.histogram == np.histogram(impostors, BINS)[0].tolist()
    assert found.genuine_scores.histogram == np.histogram(genuine, BINS)[0].tolist()


def test_verdicts_by_pair_are_those_of_the_protocol():
    rng = np.random.default_rng(1)
    pairs = np.arange(120).reshape(60, 2)
    same = rng.random(60) < 0.5
    pair_set = PairSet("made", [b""] * 120, pairs, same, np.arange(60) % 10, np.arange(120) // 3)
    scores = same + 0.6 * rng.standard_normal(60)
    found = measure_pairs(scores, pair_set, "f")
    right = bits(found.right, 60)
    expected = kfold_accuracy(scores, same, pair_set.folds)
    assert found.accuracy == expected.accuracy
    assert [right[pair_set.folds == k].mean() for k in range(10)] == found.fold_accuracy
    facts = describe_pairs(pair_set)
    assert np.array_equal(facts.people, pairs // 3)
    assert np.array_equal(bits(facts.same, 60), same)


def test_a_threshold_on_other_people_is_that_of_all_pairs(people):
    embeddings, labels = people
    limits = [(1e-2, 0.62), (1e-3, 0.8), (None, -1.1)]
    found = measure_transfer("lfw", "f", embeddings, labels, limits)
    expected = all_pairs_at(embeddings, labels, [limit for _, limit in limits])
    assert found.images == np.unique(labels, return_counts=True)[1].tolist()
    for one, (asked, _), other in zip(found.thresholds, limits, expected, strict=True):
        assert one.asked == asked
        assert sum(one.accepts) == (0 if asked is None else 2 * other.accepted)
        assert one.far == pytest.approx(other.far.value)
        assert one.tar == pytest.approx(other.tar.value)
    assert found.thresholds[0].tar > 0 and sum(found.thresholds[0].accepts) > 0
    scores = embeddings @ embeddings.T
    mine, others = labels == 10, labels != 10
    assert found.thresholds[0].accepts[0] == (scores[np.ix_(mine, others)] >= 0.62).sum()
    judged = measure_people(embeddings, labels)
    assert judged.uniform == uniform_accuracy(embeddings, labels).share.value
