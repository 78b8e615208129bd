"""Pairs of similar rows, by all scores and by the graph of neighbours, against NumPy's."""

import numpy as np
import pytest

from sphereface2.evaluation import neighbours
from sphereface2.evaluation.neighbours import nearest_other, pairs_from


def drawn(people: int, images: int = 5) -> np.ndarray:
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(people), images)
    rows = rng.normal(size=(people, 32))[truth] + 0.6 * rng.normal(size=(len(truth), 32))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def found(rows: np.ndarray, limit: float) -> dict[tuple[int, int], float]:
    result: dict[tuple[int, int], float] = {}

    def keep(a: np.ndarray, b: np.ndarray, scores: np.ndarray) -> None:
        pairs = list(zip(a.tolist(), b.tolist(), strict=True))
        assert (a < b).all() and len(set(pairs)) == len(pairs) and not result.keys() & set(pairs)
        result.update(zip(pairs, scores.tolist(), strict=True))

    pairs_from(rows, limit, keep, workers=1)
    return result


@pytest.mark.parametrize("most", [neighbours.ALL, 0])
@pytest.mark.parametrize("limit", [0.5, -1.0])
def test_pairs_are_those_of_all_scores(
    most: int, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "ALL", most)
    monkeypatch.setattr(neighbours, "_CHUNK", 100)
    monkeypatch.setattr(neighbours, "_BLOCK", 61)  # whose tiles' last scores fill no eight
    rows = drawn(100 if limit > 0 else 6)  # of 30 rows each has all others near
    scores = rows @ rows.T
    a, b = np.nonzero(np.triu(scores >= limit, 1))
    wanted = dict(zip(zip(a.tolist(), b.tolist(), strict=True), scores[a, b], strict=True))
    got = found(rows, limit)
    assert not got.keys() - wanted.keys()
    assert len(got) == len(wanted) if most or limit < 0 else len(got) > 0.98 * len(wanted)
    assert all(got[pair] == pytest.approx(wanted[pair], abs=1e-5) for pair in got)


def test_the_graph_finds_nearly_the_nearest_other_centre(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, own = drawn(300), np.repeat(np.arange(300), 5)
    centres = rows.reshape(300, 5, -1).sum(axis=1)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    whole = rows @ centres.T
    whole[np.arange(len(rows)), own] = -1
    shares: list[float] = []
    best, nearest = nearest_other(rows, own, centres)
    assert (nearest == whole.argmax(axis=1)).all()
    np.testing.assert_allclose(best, whole.max(axis=1), atol=1e-5)
    monkeypatch.setattr(neighbours, "ALL", 0)
    best, nearest = nearest_other(rows, own, centres, workers=1, progress=shares.append)
    assert (nearest != own).all() and sum(shares) == pytest.approx(1)
    assert np.mean(best > whole.max(axis=1) - 1e-5) > 0.98
