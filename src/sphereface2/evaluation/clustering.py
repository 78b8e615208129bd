"""Who is who among faces without labels: average linkage, and scores of a clustering.

Of two clusters the similarity is the mean over all pairs of their images, so that one lookalike
does not chain two people together (average linkage; Sokal and Michener, 1958). Clusters are joined
while the most similar two reach a threshold. Two that reach it hold a pair that reaches it, and two
that are each other's most similar are joined by any order of joins: so the pairs above the
threshold alone, joined in rounds, give the exact result ("RAC", Sumengen et al., "Scaling
Hierarchical Agglomerative Clustering to Billion-sized Datasets", 2021).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

import numpy as np

from sphereface2.evaluation import neighbours
from sphereface2.evaluation.verification import embedding_rows

MOST = 32
"""Similar images that each image remembers where there are too many pairs to remember all."""
_MANY = 1 << 24  # pairs, which are always remembered


def cluster(
    rows: np.ndarray,
    threshold: float,
    *,
    workers: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Cluster embeddings by average linkage; int64 (N,), numbered from 0, the largest first.

    A pair above the threshold takes 12 bytes. Where there are more than 16 million and more than 64
    an image, an image forgets all but its `MOST` most similar ones, and the result is not exact.
    Nor is it quite among more than 1,048,576 images, whose pairs `pairs_from` finds by a graph. Of
    many images that are nearly the same, none then knows others of the person: so the clusters
    found are compared anew, by their means, until none are alike.

    Args:
        rows: float32 (N, d), of length 1.
        threshold: mean cosine from which two clusters are one.
        workers: threads; by default the CPUs this process may use.
        progress: called with the share of the work done since the last call.

    Examples:
        >>> rows = np.array([[1, 0], [0, 1], [0.8, 0.6]], np.float32)
        >>> cluster(rows, 0.7).tolist()
        [0, 1, 0]
    """
    rows = embedding_rows(rows).astype(np.float32, copy=False)
    if not len(rows):
        return np.zeros(0, np.int64)
    sums, sizes = rows.copy(), np.ones(len(rows), np.int64)
    parent = np.arange(len(rows))
    a, b, scores, all_known = _pairs(rows, threshold, workers, progress)
    while len(a):
        joined = _mutual(a, b, scores)
        into, gone = a[joined], b[joined]
        sums[into] += sums[gone]
        sizes[into] += sizes[gone]
        now = np.arange(len(rows))
        now[gone] = into
        parent = now[parent]
        touched = np.zeros(len(rows), bool)
        touched[into] = True
        a, b = now[a], now[b]
        a, b = np.minimum(a, b), np.maximum(a, b)
        old = ~(touched[a] | touched[b])
        key = np.unique((a * len(rows) + b)[~old & (a != b)])
        new = key // len(rows), key % len(rows)
        means = _means(sums, sizes, *new)
        reach = means >= threshold
        a = np.concatenate([a[old], new[0][reach]])
        b = np.concatenate([b[old], new[1][reach]])
        scores = np.concatenate([scores[old], means[reach]])
        if not len(a) and not all_known:
            there = np.unique(parent)
            centres = sums[there]
            centres /= sizes[there, None]
            a, b, scores, all_known = _pairs(centres, threshold, workers, None)
            a, b = there[a], there[b]
    _, first, found = np.unique(parent, return_index=True, return_inverse=True)
    order = np.lexsort((first, -np.bincount(found)))
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[found]


def _pairs(
    rows: np.ndarray,
    threshold: float,
    workers: int | None,
    progress: Callable[[float], None] | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
    """Pairs a < b of rows whose product reaches the threshold, sorted, the products, and if all."""
    all_known = len(rows) <= neighbours.ALL
    kept = [(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))]
    lock, many = Lock(), max(_MANY, 2 * MOST * len(rows))

    def keep(a: np.ndarray, b: np.ndarray, scores: np.ndarray) -> None:
        nonlocal all_known
        with lock:
            kept.append((a.astype(np.int32), b.astype(np.int32), scores))
            if sum(len(part[0]) for part in kept) > many:
                all_known = False
                kept[:] = [_best(len(rows), *map(np.concatenate, zip(*kept, strict=True)))]

    neighbours.pairs_from(rows, threshold, keep, workers=workers, progress=progress)
    a, b, scores = map(np.concatenate, zip(*kept, strict=True))
    order = np.lexsort((b, a))
    return a[order].astype(np.int64), b[order].astype(np.int64), scores[order], all_known


def _best(
    count: int, a: np.ndarray, b: np.ndarray, scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs that are among the `MOST` best of one of their images."""
    ends = np.concatenate([a, b])
    order = np.lexsort((-np.concatenate([scores, scores]), ends))
    starts = np.searchsorted(ends[order], np.arange(count))
    rank = np.arange(len(order)) - starts[ends[order]]
    left = np.zeros(len(a), bool)
    left[order[rank < MOST] % len(a)] = True
    return a[left], b[left], scores[left]


def _mutual(a: np.ndarray, b: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The pairs of clusters that are each other's most similar."""
    order = np.argsort(scores, kind="stable")
    best = np.empty(int(max(a.max(), b.max())) + 1, np.int64)
    best[np.stack([a, b], axis=1)[order].ravel()] = np.repeat(order, 2)  # the last one stays
    pairs = np.arange(len(a))
    return np.flatnonzero((best[a] == pairs) & (best[b] == pairs))


def _means(sums: np.ndarray, sizes: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean cosine of all pairs between clusters."""
    found = np.empty(len(a), np.float32)
    for start in range(0, len(a), 65536):
        part = slice(start, start + 65536)
        found[part] = np.einsum("nd,nd->n", sums[a[part]], sums[b[part]])
    return found / (sizes[a] * sizes[b])


@dataclass(frozen=True)
class ClusterScores:
    """How well a clustering agrees with the truth, each in [0, 1].

    Attributes:
        precision, recall, f: of the pairs of images that are in one cluster.
        bcubed_precision, bcubed_recall, bcubed_f: means over images (Bagga and Baldwin,
            "Entity-Based Cross-Document Coreferencing Using the Vector Space Model", 1998): of an
            image's cluster, the share that shows its person; of its person, the share in its
            cluster; itself included.
    """

    precision: float
    recall: float
    f: float
    bcubed_precision: float
    bcubed_recall: float
    bcubed_f: float


def compare(found: np.ndarray, truth: np.ndarray) -> ClusterScores:
    """Score a clustering.

    Args:
        found: int64 (N,), cluster of each image, from 0.
        truth: int64 (N,), person of each image, from 0.

    Examples:
        >>> scores = compare(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 1]))
        >>> scores.precision, scores.recall, scores.bcubed_precision
        (0.5, 0.3333333333333333, 0.75)
    """
    keys, cells = np.unique(found * (int(truth.max()) + 1) + truth, return_counts=True)
    clusters, people = np.bincount(found), np.bincount(truth)
    both, mine, theirs = (float((n * (n - 1.0)).sum()) for n in (cells, clusters, people))
    of_cluster, of_person = clusters[found], people[truth]
    cell = cells[np.searchsorted(keys, found * (int(truth.max()) + 1) + truth)]
    pairs = both / mine if mine else 1.0, both / theirs if theirs else 1.0
    bcubed = float(np.mean(cell / of_cluster)), float(np.mean(cell / of_person))
    return ClusterScores(*pairs, _harmonic(*pairs), *bcubed, _harmonic(*bcubed))


def _harmonic(a: float, b: float) -> float:
    return 2 * a * b / (a + b) if a + b else 0.0
