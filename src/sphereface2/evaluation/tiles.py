"""All scores of a labelled set, tile by tile in several threads; none is kept."""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import cache
from threading import Event, Lock

import numpy as np
from threadpoolctl import ThreadpoolController

from sphereface2.errors import UserError, counted
from sphereface2.evaluation.selection import Search, value_of
from sphereface2.evaluation.verification import ROUNDING, embedding_rows
from sphereface2.machine import cores


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # looks through the loaded libraries, once


def one_thread() -> AbstractContextManager[object]:
    """While it lasts, matrix products take one thread each."""
    return _blas().limit(limits=1, user_api="blas")


def _reaching(scores: np.ndarray, limit: float) -> tuple[np.ndarray, np.ndarray]:
    """``np.nonzero(scores >= limit)``, eight at a time: where few reach it, far quicker."""
    hit = np.zeros(-(-scores.size // 8) * 8, bool)
    np.greater_equal(scores.reshape(-1), limit, out=hit[: scores.size])
    places = (8 * np.flatnonzero(hit.view(np.uint64))[:, None] + np.arange(8)).ravel()
    a, b = np.divmod(places[hit[places]], scores.shape[1])
    return a, b


def sorted_rows(embeddings: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings, float32, and people numbered from 0, sorted by person."""
    embeddings, labels = embedding_rows(embeddings), np.asarray(labels)
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings (N, d) and labels (N,) are needed, not {embeddings.shape}, {labels.shape}."
        )
    people = np.unique(labels, return_inverse=True)[1].astype(np.int32)
    order = np.argsort(people, kind="stable")
    return embeddings[order].astype(np.float32, copy=False), people[order]


def count_pairs(labels: np.ndarray) -> tuple[int, int]:
    """Genuine and impostor pairs of labelled images; UserError unless there are both."""
    images = np.unique(labels, return_counts=True)[1].astype(np.int64)
    genuine = int((images * (images - 1) // 2).sum())
    impostors = len(labels) * (len(labels) - 1) // 2 - genuine
    if not genuine or not impostors:
        raise UserError(
            f"{counted(len(labels), 'image')} of {counted(len(images), 'person')} make no "
            f"{'impostor' if genuine else 'genuine'} pair: all-pairs evaluation needs two people "
            "and a person with two images"
        )
    return genuine, impostors


class Accepted:
    """Of each image, the impostor pairs that reach each of K limits: ``counts``, int64 (K, N)."""

    def __init__(self, limits: np.ndarray, images: int) -> None:
        self.limits, self.lowest = limits, float(limits.min(initial=np.inf))
        self.counts = np.zeros((len(limits), images), np.int64)
        self._lock, self._order = Lock(), np.argsort(limits, kind="stable")

    def add(self, i: int, j: int, scores: np.ndarray) -> None:
        """Count the impostor pairs of a tile, the others struck."""
        edges, flat = np.arange(len(scores) + 1) * scores.shape[1], scores.reshape(-1)
        places = np.flatnonzero(flat >= self.lowest)
        values = flat[places]
        for k in self._order:
            inside = values >= self.limits[k]
            places, values = places[inside], values[inside]
            left = np.diff(np.searchsorted(places, edges))
            right = np.bincount(places - np.repeat(edges[:-1], left))
            with self._lock:
                self.counts[k, i : i + len(left)] += left
                self.counts[k, j : j + len(right)] += right


class Tiles:
    """The upper triangle of the score matrix, block by block, shared out to threads.

    Rows are sorted by person, so genuine pairs lie in the few tiles along the diagonal.
    """

    def __init__(
        self, rows: np.ndarray, people: np.ndarray, block: int, workers: int | None
    ) -> None:
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}.")
        self.rows, self.people = rows, people
        self.block, self.workers = min(block, len(rows)), workers or cores()
        self.upper = np.triu(np.ones((self.block, self.block), bool), 1)
        starts = range(0, len(rows), self.block)
        self.all = [(i, j) for i in starts for j in starts if j >= i]
        self.mixed = dict.fromkeys(tile for tile in self.all if self._holds_genuine(*tile))
        self.nearest_other = np.full(len(rows), -np.inf, np.float32)
        self.nearest_same = np.full(len(rows), -np.inf, np.float32)

    @classmethod
    def of(
        cls, embeddings: np.ndarray, labels: np.ndarray, block: int, workers: int | None
    ) -> tuple[Tiles, int, int]:
        """Of labelled images, with the numbers of genuine and impostor pairs.

        Raises:
            UserError: no genuine or no impostor pair, or embeddings that are not of length 1.
        """
        rows, people = sorted_rows(embeddings, labels)
        pairs = count_pairs(people)  # before the work, and before a tile of no rows
        return cls(rows, people, block, workers), *pairs

    def _holds_genuine(self, i: int, j: int) -> bool:
        last_of_i = min(i + self.block, len(self.people)) - 1
        return bool(self.people[last_of_i] >= self.people[j])

    def _genuine(self, i: int, j: int) -> np.ndarray:
        return self.people[i : i + self.block, None] == self.people[None, j : j + self.block]

    def _strike_genuine(self, i: int, j: int, scores: np.ndarray) -> None:
        """Leave the impostor pairs of a tile, each once."""
        if (i, j) in self.mixed:
            scores[self._genuine(i, j)] = -np.inf
        if i == j:
            scores[~self.upper[: len(scores), : len(scores)]] = -np.inf

    def _run(
        self,
        tiles: Collection[tuple[int, int]],
        work: Callable[[int, int, np.ndarray], None],
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Call ``work(i, j, scores)`` for every tile; it runs in several threads at once."""
        queue, lock, stop = iter(tiles), Lock(), Event()

        def worker() -> None:
            buffer = np.empty(self.block * self.block, np.float32)
            while not stop.is_set():
                with lock:
                    tile = next(queue, None)
                if tile is None:
                    return
                i, j = tile
                a, b = self.rows[i : i + self.block], self.rows[j : j + self.block]
                scores = buffer[: len(a) * len(b)].reshape(len(a), len(b))
                work(i, j, np.matmul(a, b.T, out=scores))
                if progress is not None:
                    with lock:
                        progress(1 / len(tiles))

        # One thread a tile, each with a sequential product: the counting then runs in parallel too.
        with one_thread(), ThreadPoolExecutor(self.workers) as pool:
            try:
                for future in [pool.submit(worker) for _ in range(self.workers)]:
                    future.result()
            finally:
                stop.set()

    @staticmethod
    def _keep_best(best: np.ndarray, i: int, j: int, scores: np.ndarray) -> None:
        for start, found in ((i, scores.max(axis=1)), (j, scores.max(axis=0))):
            part = best[start : start + len(found)]
            np.maximum(part, found, out=part)

    def count(
        self,
        searches: list[Search],
        progress: Callable[[float], None] | None = None,
        accepted: Accepted | None = None,
    ) -> None:
        """Count impostor scores above each search's bracket and tally those inside it.

        On the way, each row's best impostor score goes to ``nearest_other``, and the pairs that
        reach a limit of ``accepted`` go there.
        """
        lock = Lock()
        searches = sorted(searches, key=lambda search: search.bracket[0])
        edges = [tuple(value_of(key) for key in search.bracket) for search in searches]

        def work(i: int, j: int, scores: np.ndarray) -> None:
            self._strike_genuine(i, j, scores)
            with lock:
                self._keep_best(self.nearest_other, i, j, scores)
            left = scores.ravel()
            for search, (low, high) in zip(searches, edges, strict=True):
                left = left[left >= low]
                inside = left[left < high]
                with lock:
                    search.above += len(left) - len(inside)
                    search.tally.add(inside)
            if accepted is not None:
                accepted.add(i, j, scores)

        self._run(self.all, work, progress)

    def impostors_from(
        self,
        limit: float,
        work: Callable[[int, int, np.ndarray, np.ndarray, np.ndarray], None],
        progress: Callable[[float], None] | None = None,
    ) -> None:
        """Call ``work(i, j, a, b, scores)`` with a tile's impostor pairs that score ``limit``.

        Pair k is of rows ``i + a[k]`` and ``j + b[k]``; it runs in several threads at once.
        """

        def select(i: int, j: int, scores: np.ndarray) -> None:
            self._strike_genuine(i, j, scores)
            a, b = _reaching(scores, limit)
            work(i, j, a, b, scores[a, b])

        self._run(self.all, select, progress)

    def accepted(self, limits: np.ndarray) -> np.ndarray:
        """Of each image, the impostor pairs that reach each limit, int64 (limits, N), by a pass.

        Few images have one where limits are high, and only theirs are scored again: in other tiles
        than before, so that a score may differ in its last bit. All is counted before.
        """
        found = np.zeros((len(limits), len(self.rows)), np.int64)
        chosen = np.flatnonzero(self.nearest_other >= limits.min(initial=np.inf))
        if len(chosen):
            part = Tiles(self.rows[chosen], self.people[chosen], self.block, self.workers)
            part.count([], accepted=(counts := Accepted(limits, len(chosen))))
            found[:, chosen] = counts.counts
        return found

    def genuine_hits(self, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Genuine pairs that score above each bound, int64 (bounds, people), and all, (people,).

        On the way, each row's best genuine score goes to ``nearest_same``.
        """
        lock = Lock()
        images = np.bincount(self.people).astype(np.int64)
        hits = np.zeros((len(bounds), len(images)), np.int64)

        def work(i: int, j: int, scores: np.ndarray) -> None:
            genuine = self._genuine(i, j)
            if i == j:
                genuine &= self.upper[: len(scores), : len(scores)]
            values = scores[genuine]
            scores[~genuine] = -np.inf
            with lock:
                self._keep_best(self.nearest_same, i, j, scores)
            who = np.repeat(self.people[i : i + self.block], np.count_nonzero(genuine, axis=1))
            first = int(self.people[i])
            for bound, total in zip(bounds, hits, strict=True):
                found = np.bincount(who[values > bound] - first)
                with lock:
                    total[first : first + len(found)] += found

        self._run(self.mixed, work)
        return hits, images * (images - 1) // 2

    def rank1(self) -> float:
        """Share of images whose nearest other image shows the same person, once all is counted.

        One of somebody else that is as near to rounding is nearer.
        """
        probes = np.bincount(self.people)[self.people] > 1
        return float(np.mean(self.nearest_same[probes] > self.nearest_other[probes] + ROUNDING))
