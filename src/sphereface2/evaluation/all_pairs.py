"""TAR at FAR over every pair of a labelled set, exact, in bounded memory.

N embeddings make N(N-1)/2 pairs: too many to store, and a FAR of 1e-6 asks for one score at an
exact rank among billions. The scores are computed tile by tile and selected as they pass:

1. A sample of pairs brackets, for each FAR, the score at the wanted rank.
2. One pass over all tiles counts the mismatched scores above each bracket and tallies those inside
   it by value. If a bracket missed, or held more distinct values than the tally keeps apart, it is
   replaced by the interval now known to hold the score and the pass repeated (rarely needed).
3. The tiles that hold matched pairs are computed again and compared with the exact bounds.

A tile's scores are the same float32 numbers whenever it is computed, so the passes agree.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from threading import Event, Lock

import numpy as np
from threadpoolctl import ThreadpoolController

from sphereface2.errors import UserError
from sphereface2.evaluation.verification import FARS, Tar, allowed_accepts, ratio_intervals

_SAMPLE = 2_000_000  # pairs drawn to place the brackets
_DISTINCT = 1 << 20  # values that a tally keeps apart
_PENDING = 1 << 21  # scores that it sorts at a time
_LOWEST, _HIGHEST = -(2**31) + 2**23 + 1, 2**31 - 2**23  # the finite floats' keys, end excluded


@cache
def _blas() -> ThreadpoolController:
    return ThreadpoolController()  # looks through the loaded libraries, once


def _keys(scores: np.ndarray) -> np.ndarray:
    """Finite float32 scores as int64 that order alike and are consecutive for neighbours."""
    bits = (scores + np.float32(0)).view(np.int32).astype(np.int64)  # + 0 makes -0.0 one with 0.0
    return np.where(bits >= 0, bits, -(2**31) - bits)


def _value(key: int) -> np.float32:
    """The float32 of a key; infinity for the end of the range."""
    if key >= _HIGHEST:
        return np.float32(np.inf)
    return np.float32(np.int32(key if key >= 0 else -(2**31) - key).view(np.float32))


class _Tally:
    """Counts of scores by value in bounded memory.

    When there are more distinct values than ``_DISTINCT``, neighbouring ones are counted together:
    an entry e then stands for the keys from ``e << shift`` up to ``(e + 1) << shift``, exclusive.
    """

    def __init__(self) -> None:
        self.shift = 0
        self.entries = np.zeros(0, np.int64)
        self.counts = np.zeros(0, np.int64)
        self._pending: list[np.ndarray] = []
        self._waiting = 0

    def add(self, scores: np.ndarray) -> None:
        self._pending.append(scores)
        self._waiting += len(scores)
        if self._waiting >= _PENDING:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        keys, counts = np.unique(_keys(np.concatenate(self._pending)), return_counts=True)
        self._pending, self._waiting = [], 0
        self.entries = np.concatenate([self.entries, keys >> self.shift])
        self.counts = np.concatenate([self.counts, counts])
        self._merge()
        while len(self.entries) > _DISTINCT:
            self.shift += 1
            self.entries >>= 1
            self._merge()

    def _merge(self) -> None:
        order = np.argsort(self.entries, kind="stable")
        entries = self.entries[order]
        starts = np.flatnonzero(np.concatenate([[True], entries[1:] != entries[:-1]]))
        self.entries, self.counts = entries[starts], np.add.reduceat(self.counts[order], starts)


@dataclass
class _Search:
    """The search for the score at one rank: it is known to lie in keys [low, high)."""

    rank: int  # the wanted score has exactly this many mismatched scores before it, from the top
    low: int = _LOWEST
    high: int = _HIGHEST
    bracket: tuple[int, int] = (_LOWEST, _HIGHEST)
    above: int = 0
    tally: _Tally = field(default_factory=_Tally)
    bound: np.float32 | None = None

    def conclude(self) -> None:
        """After a pass: settle the bound, or narrow the interval for the next pass."""
        self.tally.flush()
        before = self.above + np.cumsum(self.tally.counts[::-1])  # down to each entry, inclusive
        if self.above > self.rank:
            self.low = self.bracket[1]
        elif len(before) == 0 or before[-1] <= self.rank:
            self.high = self.bracket[0]
        else:
            entry = int(self.tally.entries[::-1][np.searchsorted(before, self.rank, side="right")])
            if self.tally.shift == 0:
                self.bound = _value(entry)
            self.low = max(self.low, self.bracket[0], entry << self.tally.shift)
            self.high = min(self.high, self.bracket[1], (entry + 1) << self.tally.shift)
        self.bracket = (self.low, self.high)
        self.above, self.tally = 0, _Tally()


@dataclass(frozen=True)
class AllPairs:
    """All-pairs result.

    Attributes:
        tars: one `Tar` a FAR; ``threshold`` is the float32 next above the highest mismatched score
            that must be rejected.
        genuine: number of matched pairs.
        impostors: number of mismatched pairs.
        passes: how often all tiles were computed (1 unless a bracket had to be replaced).
        rank1: share of probes whose nearest other image shows the same person, each image of a
            person with several being a probe once (a tie with somebody else is a miss).
    """

    tars: list[Tar]
    genuine: int
    impostors: int
    passes: int
    rank1: float


def all_pairs_tar(
    embeddings: np.ndarray,
    labels: np.ndarray,
    fars: Sequence[float] = FARS,
    *,
    block: int = 1024,
    seed: int = 0,
    workers: int | None = None,
    replicates: int = 0,
    progress: Callable[[float], None] | None = None,
) -> AllPairs:
    """TAR at each FAR over all N(N-1)/2 pairs, each pair once; same definition as `tar_at_far`.

    Rank-1 identification comes along: it needs each image's best score only.

    Scores are inner products in float32. Memory: a sorted copy of the embeddings, at most about
    ``16 * block**2`` bytes a worker and some tens of megabytes of tallies, whatever the number of
    pairs. Time: the matrix product, N² d / 2 multiply-adds, and a fraction of it for the counting
    (``benchmarks/all_pairs.py`` measures both).

    Args:
        embeddings: float32 (N, d), rows of length 1.
        labels: int (N,), the person of each row.
        fars: each in (0, 1].
        block: rows of a tile.
        seed: of the sample that places the brackets and of the bootstrap; the TARs do not depend
            on it.
        workers: threads; by default the CPUs this process may use.
        replicates: with R > 0 each TAR gets a 95 % interval from R bootstraps over people, with
            the thresholds held fixed.
        progress: called with the share of the work done since the last call.

    Raises:
        UserError: no matched or no mismatched pair, or embeddings that are not finite.
    """
    embeddings, labels = np.asarray(embeddings), np.asarray(labels)
    if embeddings.ndim != 2 or labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"embeddings (N, d) and labels (N,) are needed, not {embeddings.shape}, {labels.shape}."
        )
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block}.")
    people = np.unique(labels, return_inverse=True)[1].astype(np.int32)
    order = np.argsort(people, kind="stable")
    people, rows = people[order], embeddings[order].astype(np.float32, copy=False)
    if not np.isfinite(rows).all():
        raise UserError("the embeddings hold NaN or infinite values")
    per_person = np.bincount(people).astype(np.int64)
    genuine = int((per_person * (per_person - 1) // 2).sum())
    impostors = len(rows) * (len(rows) - 1) // 2 - genuine
    if not genuine or not impostors:
        kind = "matched" if not genuine else "mismatched"
        raise UserError(
            f"the {len(rows)} images of {len(per_person)} people make no {kind} pair: "
            "all-pairs evaluation needs two people and a person with two images"
        )

    ranks = []
    for far in fars:
        if not 0 < far <= 1:
            raise ValueError(f"a FAR lies in (0, 1], not {far}.")
        ranks.append(allowed_accepts(far, impostors))
    searches = {k: _Search(k) for k in set(ranks) if 0 < k < impostors}
    with _blas().limit(limits=1, user_api="blas"):  # many small products
        _bracket(list(searches.values()), rows, people, impostors, np.random.default_rng(seed))

    if workers is None:
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
        workers = len(usable) or os.cpu_count() or 1
    tiles = _Tiles(rows, people, block, workers)
    passes = 0
    while (open_searches := [s for s in searches.values() if s.bound is None]) or not passes:
        passes += 1
        tiles.count(open_searches, progress if passes == 1 else None)
        for search in open_searches:
            search.conclude()

    # The highest mismatched score that must be rejected: none when all may be accepted.
    found = {k: float(s.bound) for k, s in searches.items() if s.bound is not None}
    bounds = np.array([found.get(k, -np.inf if k else np.inf) for k in ranks], np.float32)
    hits = tiles.genuine_hits(bounds, len(per_person))
    pairs_of = per_person * (per_person - 1) // 2
    intervals = (
        ratio_intervals(hits, pairs_of, replicates, np.random.default_rng(seed))
        if replicates
        else None
    )
    tars = []
    for i, far in enumerate(fars):
        if ranks[i] == 0:
            tars.append(Tar(far, None, None))
            continue
        tars.append(
            Tar(
                far,
                float(hits[i].sum() / genuine),
                float(np.nextafter(bounds[i], np.float32(np.inf))) if bounds[i] > -np.inf else -1.0,
                None if intervals is None else intervals[i],
            )
        )
    probes = per_person[people] > 1
    rank1 = float(np.mean(tiles.nearest_same[probes] > tiles.nearest_other[probes]))
    return AllPairs(tars, genuine, impostors, passes, rank1)


def _bracket(
    searches: list[_Search],
    rows: np.ndarray,
    people: np.ndarray,
    impostors: int,
    rng: np.random.Generator,
) -> None:
    """Place each bracket where a sample says the wanted score lies, wide enough to hold it."""
    n = len(rows)
    if impostors <= _SAMPLE:
        return  # the tally alone holds about as much
    # Small random squares of the score matrix: a row serves few pairs, yet each is a product.
    side = min(64, n // 2)
    sample = []
    for _ in range(-(-_SAMPLE // side**2)):
        drawn = rng.choice(n, size=2 * side, replace=False, shuffle=False)
        i, j = drawn[:side], drawn[side:]
        sample.append((rows[i] @ rows[j].T)[people[i, None] != people[j]])
    scores = np.sort(np.concatenate(sample))[::-1]
    for search in searches:
        at = search.rank / impostors * len(scores)
        # Six standard deviations of a random sample's rank, and 3 % since pairs that share a row
        # are not independent. A miss costs a second pass, nothing else.
        margin = 6 * np.sqrt(at) + 0.03 * at + 12
        first, last = int(at - margin), int(at + margin)
        keys = _keys(scores[[max(first, 0), min(last, len(scores) - 1)]])
        search.bracket = (
            int(keys[1]) if last < len(scores) else _LOWEST,
            int(keys[0]) + 1 if first >= 0 else _HIGHEST,
        )


class _Tiles:
    """The upper triangle of the score matrix, block by block, shared out to threads.

    Rows are sorted by person, so matched pairs lie in the few tiles along the diagonal.
    """

    def __init__(self, rows: np.ndarray, people: np.ndarray, block: int, workers: int) -> None:
        self.rows, self.people = rows, people
        self.block, self.workers = min(block, len(rows)), workers
        self.upper = np.triu(np.ones((self.block, self.block), bool), 1)
        starts = range(0, len(rows), self.block)
        self.all = [(i, j) for i in starts for j in starts if j >= i]
        self.mixed = [(i, j) for i, j in self.all if self._holds_matched(i, j)]
        self.nearest_other = np.full(len(rows), -np.inf, np.float32)
        self.nearest_same = np.full(len(rows), -np.inf, np.float32)

    def _holds_matched(self, i: int, j: int) -> bool:
        last_of_i = min(i + self.block, len(self.people)) - 1
        return bool(self.people[last_of_i] >= self.people[j])

    def _matched(self, i: int, j: int) -> np.ndarray:
        return self.people[i : i + self.block, None] == self.people[None, j : j + self.block]

    def _run(
        self,
        tiles: list[tuple[int, int]],
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
        with _blas().limit(limits=1, user_api="blas"), ThreadPoolExecutor(self.workers) as pool:
            try:
                for future in [pool.submit(worker) for _ in range(self.workers)]:
                    future.result()
            finally:
                stop.set()

    @staticmethod
    def _keep_best(best: np.ndarray, i: int, j: int, scores: np.ndarray) -> None:
        for start, found in ((i, scores.max(axis=1)), (j, scores.max(axis=0))):
            np.maximum(best[start : start + len(found)], found, best[start : start + len(found)])

    def count(
        self, searches: list[_Search], progress: Callable[[float], None] | None = None
    ) -> None:
        """Count mismatched scores above each search's bracket and tally those inside it.

        On the way, each row's best mismatched score goes to ``nearest_other``.
        """
        lock = Lock()
        searches = sorted(searches, key=lambda search: search.bracket[0])
        edges = [tuple(_value(key) for key in search.bracket) for search in searches]
        mixed = set(self.mixed)

        def work(i: int, j: int, scores: np.ndarray) -> None:
            if (i, j) in mixed:
                scores[self._matched(i, j)] = -np.inf
            if i == j:
                scores[~self.upper[: len(scores), : len(scores)]] = -np.inf
            with lock:
                self._keep_best(self.nearest_other, i, j, scores)
            left = scores.ravel()
            for search, (low, high) in zip(searches, edges, strict=True):
                left = left[left >= low]
                inside = left[left < high]
                with lock:
                    search.above += len(left) - len(inside)
                    search.tally.add(inside)

        self._run(self.all, work, progress)

    def genuine_hits(self, bounds: np.ndarray, people: int) -> np.ndarray:
        """Matched pairs that score above each bound, by person: int64 (bounds, people).

        On the way, each row's best matched score goes to ``nearest_same``.
        """
        lock = Lock()
        hits = np.zeros((len(bounds), people), np.int64)

        def work(i: int, j: int, scores: np.ndarray) -> None:
            matched = self._matched(i, j)
            if i == j:
                matched &= self.upper[: len(scores), : len(scores)]
            values = scores[matched]
            scores[~matched] = -np.inf
            with lock:
                self._keep_best(self.nearest_same, i, j, scores)
            who = np.repeat(self.people[i : i + self.block], np.count_nonzero(matched, axis=1))
            first = int(self.people[i])
            for bound, total in zip(bounds, hits, strict=True):
                found = np.bincount(who[values > bound] - first)
                with lock:
                    total[first : first + len(found)] += found

        self._run(self.mixed, work)
        return hits
