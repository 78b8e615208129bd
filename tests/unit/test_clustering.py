"""Average linkage against SciPy's, scores against their definitions, the threshold of a set."""

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from sklearn.metrics.cluster import pair_confusion_matrix

from sphereface2.evaluation import clustering, neighbours
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.calibration import Calibration
from sphereface2.evaluation.clustering import cluster, compare
from sphereface2.recognition.audit.cluster import STRANGERS, threshold_for


def drawn(people: int = 60, images: int = 5, noise: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(people), images)
    rows = rng.normal(size=(people, 16))[truth] + noise * rng.normal(size=(len(truth), 16))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32), truth


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.7])
def test_clusters_are_those_of_average_linkage(
    threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "_BLOCK", 64)  # pairs of many tiles
    rows, _ = drawn()
    tree = linkage(pdist(rows.astype(np.float64), "cosine"), "average")
    oracle = fcluster(tree, 1 - threshold, "distance") - 1
    found = cluster(rows, threshold)
    assert compare(found, oracle).f == 1 and compare(found, oracle).bcubed_f == 1
    sizes = np.bincount(found)
    assert (np.diff(sizes) <= 0).all() and sizes.min() > 0
    assert (cluster(rows, threshold, workers=3) == found).all()


def test_forgotten_pairs_change_little(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, truth = drawn(30, 20, 0.4)
    whole = cluster(rows, 0.5)
    monkeypatch.setattr(clustering, "_MANY", 100)
    monkeypatch.setattr(clustering, "MOST", 4)
    monkeypatch.setattr(neighbours, "_BLOCK", 64)
    assert len(clustering._pairs(rows, 0.5, None, None)[0]) < 600 * 9 < 30 * 190
    found = cluster(rows, 0.5)
    assert compare(found, truth).bcubed_f > compare(whole, truth).bcubed_f - 0.03


@pytest.mark.parametrize("by_graph", [True, False])
def test_somebody_in_several_videos_is_one_cluster(
    by_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose frames have more frames of the same video near than neighbours are remembered."""
    if by_graph:
        monkeypatch.setattr(neighbours, "ALL", 0)
    else:
        monkeypatch.setattr(clustering, "_MANY", 1000)
        monkeypatch.setattr(neighbours, "_BLOCK", 64)
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(12), 4 * 40)
    rows = rng.normal(size=(12, 32))[truth] + 0.1 * rng.normal(size=(len(truth), 32))
    rows += np.repeat(0.6 * rng.normal(size=(12 * 4, 32)), 40, axis=0)
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    assert compare(cluster(rows, 0.5, workers=1), truth).f == 1


def test_scores_are_those_of_their_definitions() -> None:
    rng = np.random.default_rng(0)
    found, truth = rng.integers(9, size=300), rng.integers(7, size=300)
    scores = compare(found, truth)
    (_, false), (missed, both) = pair_confusion_matrix(truth, found)
    assert scores.precision == pytest.approx(both / (both + false))
    assert scores.recall == pytest.approx(both / (both + missed))
    same = (found[:, None] == found) & (truth[:, None] == truth)
    precision = np.mean(same.sum(1) / (found[:, None] == found).sum(1))
    recall = np.mean(same.sum(1) / (truth[:, None] == truth).sum(1))
    assert (scores.bcubed_precision, scores.bcubed_recall) == pytest.approx((precision, recall))
    assert scores.bcubed_f == pytest.approx(2 * precision * recall / (precision + recall))
    assert compare(np.arange(4), np.zeros(4, int)).f == 0


@pytest.mark.parametrize("fars", [[1e-3], [1e-2, 1e-3], [1e-2, 1e-3, 1e-4]])
def test_the_threshold_leaves_an_image_few_similar_strangers(fars: list[float]) -> None:
    rng = np.random.default_rng(0)
    same = np.arange(500_000) < 50_000
    scores = rng.normal(np.where(same, 0.6, 0.1), 0.12)
    fitted = Calibration.fit(scores, same, fingerprint="", fars=fars, bootstrap=Bootstrap(2))
    impostors = np.sort(scores[~same])
    limits = [threshold_for(fitted, images) for images in (500, 2000, 20_000)]
    assert limits == sorted(limits)
    assert limits[1] == pytest.approx(fitted.threshold(1e-3))
    strangers = len(impostors) - np.searchsorted(impostors, limits[0])
    expected = STRANGERS / 500 * len(impostors)
    assert expected / 3 < strangers < 3 * expected
    assert impostors[-1] > limits[2] or len(fars) == 1
