"""Pairs of rows that are alike: all of them, or among millions of rows nearly all.

Up to `ALL` rows every score is computed; that time grows with the square of their number. Among
more, a row is compared with the `NEAR` rows that a graph of neighbours finds for it (HNSW: Malkov
and Yashunin, "Efficient and Robust Approximate Nearest Neighbor Search Using Hierarchical Navigable
Small World Graphs", PAMI 42, 2020), and the time grows little faster than the number.
`benchmarks/clustering.py --drawn N` measures what that misses. A graph that several threads
build is not quite the same every time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from sphereface2.evaluation.tiles import Tiles
from sphereface2.machine import cores, using_faiss

ALL = 1 << 20
"""Rows whose scores are all computed."""
NEAR = 32
"""Neighbours of a row that are looked at where they are not."""
_BLOCK, _CHUNK = 1024, 2048
_EFFORT, _LINKS = 128, 16  # candidates that the graph keeps as it is built and searched; its links
_SAMPLE = 1 << 16

Pairs = Callable[[np.ndarray, np.ndarray, np.ndarray], None]
"""Takes rows a < b and their scores; called in several threads at once."""


def pairs_from(
    rows: np.ndarray,
    limit: float,
    work: Pairs,
    *,
    workers: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> None:
    """Call ``work(a, b, scores)`` with the pairs of rows that score ``limit``, each once.

    Args:
        rows: float32 (N, d), of length 1 or about that.
        limit: least product of two rows.
        work: takes pairs.
        workers: threads; by default the CPUs this process may use.
        progress: called with the share of the work done since the last call.
    """
    if len(rows) <= ALL:
        Tiles(rows, np.arange(len(rows)), _BLOCK, workers).impostors_from(
            limit, lambda i, j, a, b, scores: work(i + a, j + b, scores), progress
        )
        return
    near = np.empty((len(rows), NEAR + 1), np.int32)  # a row itself is one of them
    for start, found in _found(rows, rows, NEAR + 1, workers, progress):
        near[start : start + len(found)] = found
    for start in range(0, len(rows), _CHUNK):
        part = near[start : start + _CHUNK]
        scores = np.einsum("nd,nkd->nk", rows[start : start + _CHUNK], rows[part])
        one, place = np.nonzero((scores >= limit) & (part >= 0))
        other, scores = part[one, place].astype(np.int64), scores[one, place]
        one += start
        # Where each found the other, the pair is the lower one's.
        mine = (one < other) | ((one > other) & (near[other] != one[:, None]).all(axis=1))
        one, other = one[mine], other[mine]
        work(np.minimum(one, other), np.maximum(one, other), scores[mine])


def nearest_other(
    rows: np.ndarray,
    own: np.ndarray,
    centres: np.ndarray,
    *,
    workers: int | None = None,
    progress: Callable[[float], None] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Best score of each row with a centre that is not its own, and that centre.

    Args:
        rows: float32 (N, d).
        own: int64 (N,), each row's centre.
        centres: float32 (M, d).
        workers: threads that build and search a graph.
        progress: called with the share of the work done since the last call.
    """
    best = np.empty(len(rows), np.float32)
    nearest = np.empty(len(rows), np.int64)
    if len(rows) * len(centres) > ALL**2 // 2:
        for start, found in _found(centres, rows, 8, workers, progress):
            part = slice(start, start + len(found))
            scores = np.einsum("nd,nkd->nk", rows[part], centres[found])
            scores[(found < 0) | (found == own[part, None])] = -1
            place = np.arange(len(found)), scores.argmax(axis=1)
            nearest[part], best[part] = found[place], scores[place]
        return best, nearest
    step = max(1, min(_BLOCK, (1 << 25) // len(centres)))
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        scores = rows[part] @ centres.T
        scores[np.arange(len(scores)), own[part]] = -np.inf
        nearest[part] = scores.argmax(axis=1)
        best[part] = scores[np.arange(len(scores)), nearest[part]]
        if progress is not None:
            progress(len(scores) / len(rows))
    return best, nearest


def _found(
    rows: np.ndarray,
    queries: np.ndarray,
    count: int,
    workers: int | None,
    progress: Callable[[float], None] | None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Of so many queries at a time the first's place, and the nearest rows, int64, -1 for none."""
    threads = workers or cores()
    graph = f"HNSW{_LINKS},SQ8"  # a byte a number
    with using_faiss(threads) as faiss:
        index: Any = faiss.index_factory(rows.shape[1], graph, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = index.hnsw.efSearch = _EFFORT
        index.train(rows[:: -(-len(rows) // _SAMPLE)])  # the range of each number
    all_of_it = len(rows) + len(queries)
    # A person's images come one after the other: in that order the graph leads to few others.
    order = np.random.default_rng(0).permutation(len(rows))
    places = np.append(order, -1)  # of what is not found too
    for start in range(0, len(rows), _CHUNK):
        part = order[start : start + _CHUNK]
        with using_faiss(threads):
            index.add(rows[part])
        if progress is not None:
            progress(len(part) / all_of_it)
    for start in range(0, len(queries), _CHUNK):
        part = queries[start : start + _CHUNK]
        with using_faiss(threads):
            near = index.search(part, count)[1]
        yield start, places[near]
        if progress is not None:
            progress(len(part) / all_of_it)
