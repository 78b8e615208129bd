"""SQLite's embeddings in memory, and the people most like a probe among them."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sphereface2.recognition.gallery.ivf import Ivf, Ranked, View, best_people
from sphereface2.recognition.gallery.rows import bytes_type, parts

_ROWS = 8_192  # read at a time
_SCORES = 2**25  # in one product of probes and images: 128 MB
_NEAREST = 16  # rows of a probe, of which several may show one person
_COMPACT_FROM = 4_096  # rows of people who changed, before the matrix is written anew


class Resident:
    """SQLite's embeddings in memory, brought up to date by what changed and never read twice.

    Args:
        table, owner, key, vector: names of the table and its columns.
        dim: numbers in an embedding.
        storage: how the table holds them.
    """

    def __init__(
        self, table: str, owner: str, key: str, vector: str, dim: int, storage: str
    ) -> None:
        self._select = f"SELECT {owner}, {key}, {vector} FROM {table}"
        self._keys = f"SELECT {owner}, {key} FROM {table}"
        self._count = f"SELECT count(*) FROM {table}"
        self._owner, self._key = owner, key
        self._changes = owner == key  # a person's one row, which changes; images come and go
        self.dim = dim
        self._type = bytes_type(storage)
        self._lock = threading.Lock()
        self._buffers: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
        self._view: View | None = None
        self.ivf: Ivf | None = None

    def view(self, connection: sqlite3.Connection, seq: int) -> View | None:
        """The rows as ``connection``'s transaction sees them; None if they are newer already.

        Args:
            connection: in a transaction.
            seq: of the last change that the transaction sees.
        """
        with self._lock:
            if self._view is None:
                self._load(connection, seq)
            elif self._view.seq > seq:
                return None
            elif self._view.seq < seq:
                self._catch_up(connection, seq)
            return self._view

    def _load(self, connection: sqlite3.Connection, seq: int) -> None:
        (count,) = connection.execute(self._count).fetchone()
        self._allocate(count + count // 16 + 64)
        none = np.zeros(0, np.int64)
        assert self._buffers is not None
        rows, owners, ids = (buffer[:0] for buffer in self._buffers)
        self._view = View(-1, rows, owners, ids, none)
        self._append(connection, self._select, ())
        self._view = replace(self._view, seq=seq)
        if self.ivf is not None:
            self.ivf.restart(self._view)

    def _catch_up(self, connection: sqlite3.Connection, seq: int) -> None:
        """Drop the rows of the people who changed, and read theirs again."""
        assert self._view is not None
        since = self._view.seq
        (oldest,) = connection.execute("SELECT min(seq) FROM changes").fetchone()
        if oldest > since + 1:  # the record of changes goes back no further
            return self._load(connection, seq)
        changed = np.array(
            connection.execute(
                "SELECT DISTINCT person FROM changes WHERE seq > ?", (since,)
            ).fetchall(),
            np.int64,
        )[:, 0]
        view = self._view
        mine = np.setdiff1d(np.flatnonzero(np.isin(view.owners, changed)), view.dead)
        pairs = zip(view.owners[mine].tolist(), view.ids[mine].tolist(), strict=True)
        there = dict(zip(pairs, mine, strict=True))
        now: set[tuple[int, int]] = set()
        for some in parts(changed.tolist()):
            query = f"{self._keys} WHERE {self._owner} IN ({_marks('?', some)})"
            now |= set(connection.execute(query, some))
        # An image never changes; a template does.
        kept = set() if self._changes else now & there.keys()
        gone = np.array([row for pair, row in there.items() if pair not in kept], np.int64)
        self._view = replace(view, dead=np.concatenate([view.dead, gone]))
        before = len(view.rows)
        for some in parts(sorted(now - kept)):
            chosen = f"({self._owner}, {self._key}) IN (VALUES {_marks('(?,?)', some)})"
            values = tuple(value for pair in some for value in pair)
            self._append(connection, f"{self._select} WHERE {chosen}", values)
        self._view = replace(self._view, seq=seq)
        if self.ivf is not None:
            self.ivf.update(len(gone) > 0, self._view, before)
        if len(self._view.dead) >= max(_COMPACT_FROM, len(self._view.rows) // 4):
            self._compact()
            if self.ivf is not None:
                self.ivf.moved(self._view)

    def _allocate(self, capacity: int) -> None:
        self._buffers = (
            np.empty((capacity, self.dim), np.float32),
            np.empty(capacity, np.int64),
            np.empty(capacity, np.int64),
        )

    def _append(self, connection: sqlite3.Connection, query: str, values: Sequence[int]) -> None:
        assert self._view is not None and self._buffers is not None
        cursor = connection.execute(query, values)
        while found := cursor.fetchmany(_ROWS):
            owners, ids, vectors = zip(*found, strict=True)
            start, end = len(self._view.rows), len(self._view.rows) + len(found)
            if end > len(self._buffers[0]):
                self._allocate(end + end // 4)
                for new, old in zip(
                    self._buffers, (self._view.rows, self._view.owners, self._view.ids), strict=True
                ):
                    new[:start] = old
            rows = np.frombuffer(b"".join(vectors), self._type).reshape(-1, self.dim)
            for buffer, values_ in zip(self._buffers, (rows, owners, ids), strict=True):
                buffer[start:end] = values_
            self._show(end)

    def _show(self, count: int) -> None:
        """Have the view show the first rows of the buffers."""
        assert self._view is not None and self._buffers is not None
        rows, owners, ids = (buffer[:count] for buffer in self._buffers)
        self._view = replace(self._view, rows=rows, owners=owners, ids=ids)

    def _compact(self) -> None:
        assert self._view is not None
        view = self._view
        alive = np.ones(len(view.rows), bool)
        alive[view.dead] = False
        self._allocate(int(alive.sum()) + len(view.rows) // 16 + 64)
        assert self._buffers is not None
        count = int(alive.sum())
        for buffer, old in zip(self._buffers, (view.rows, view.owners, view.ids), strict=True):
            np.compress(alive, old, axis=0, out=buffer[:count])
        self._view = replace(view, dead=np.zeros(0, np.int64))
        self._show(count)


def _marks(mark: str, values: list[Any]) -> str:
    return ",".join([mark] * len(values))


def exact(view: View, probes: np.ndarray, k: int) -> list[Ranked]:
    """The k best people for each probe (q, d), by products with every row."""
    answers: list[Ranked] = []
    if not view.images:
        return [[] for _ in probes]
    step = max(1, _SCORES // len(view.rows))
    for start in range(0, len(probes), step):
        some = probes[start : start + step]
        if len(some) == 1:
            answers.append(_exact_one(view, some, k))
            continue
        scores = some @ view.rows.T
        if len(view.dead):
            scores[:, view.dead] = -np.inf
        answers += [best_people(row, view.owners, k) for row in scores]
    return answers


def _exact_one(view: View, probe: np.ndarray, k: int) -> Ranked:
    """As `exact` for one probe (1, d): FAISS reads the rows in less than half of numpy's time."""
    import faiss

    faiss.omp_set_num_threads(1)  # of this thread: one probe is not divided among several
    size = max(_NEAREST, 4 * k)
    while True:
        size = min(size, len(view.rows))
        found = faiss.knn(probe, view.rows, size, metric=faiss.METRIC_INNER_PRODUCT)
        scores, rows = (one[0] for one in found)
        alive = np.isin(rows, view.dead, invert=True)
        ranked = best_people(scores[alive], view.owners[rows[alive]], k) if alive.any() else []
        # Rows that no longer count, and several of one person, may stand before others.
        if len(ranked) == k or size == len(view.rows):
            return ranked
        size *= 8
