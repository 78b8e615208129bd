"""Who is most like a probe: a matrix in memory beside SQLite, pgvector's index on PostgreSQL."""

from __future__ import annotations

import logging
import secrets
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sphereface2.recognition.gallery.sql import bytes_type

#: A probe's candidates: a person's key and the cosine, best first.
Ranked = list[tuple[int, float]]
_ROWS = 8_192  # read at a time
_SCORES = 2**25  # in one product of probes and images: 128 MB
_COMPACT_FROM = 4_096  # rows of people who changed, before the matrix is written anew

# usearch on 8-bit numbers: half the memory and time of building of 16-bit ones, and the same
# recall, because candidates are scored again exactly (benchmarks/gallery.py --tune).
_CONNECTIVITY, _EXPANSION_ADD, _EXPANSION_SEARCH = 16, 128, 256
_CANDIDATES = 16

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class View:
    """The images of one state of the database. Nothing that it shows is ever overwritten.

    Attributes:
        seq: of the last change that it has.
        rows: (n, d) float32.
        owners: (n,) int64, the person of each row.
        ids: (n,) int64, the image of each row.
        dead: rows that no longer count.
    """

    seq: int
    rows: np.ndarray
    owners: np.ndarray
    ids: np.ndarray
    dead: np.ndarray

    @property
    def images(self) -> int:
        """Rows that count."""
        return len(self.rows) - len(self.dead)


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
        self.hnsw: Hnsw | None = None

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
        if self.hnsw is not None:
            self.hnsw.restart(self._view)

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
        for some in _parts(changed.tolist()):
            query = f"{self._keys} WHERE {self._owner} IN ({_marks('?', some)})"
            now |= set(connection.execute(query, some))
        # An image never changes; a template does.
        kept = set() if self._changes else now & there.keys()
        gone = np.array([row for pair, row in there.items() if pair not in kept], np.int64)
        self._view = replace(view, dead=np.concatenate([view.dead, gone]))
        before = len(view.rows)
        for some in _parts(sorted(now - kept)):
            chosen = f"({self._owner}, {self._key}) IN (VALUES {_marks('(?,?)', some)})"
            values = tuple(value for pair in some for value in pair)
            self._append(connection, f"{self._select} WHERE {chosen}", values)
        self._view = replace(self._view, seq=seq)
        if self.hnsw is not None:
            self.hnsw.update(view.ids[gone], self._view, before)
        if len(self._view.dead) >= max(_COMPACT_FROM, len(self._view.rows) // 4):
            self._compact()
            if self.hnsw is not None:
                self.hnsw.moved(self._view)

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


def _parts(values: list[Any]) -> list[list[Any]]:
    return [values[start : start + 500] for start in range(0, len(values), 500)]


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
        # One probe is a product of a matrix and a vector, which reads the matrix once.
        scores = (view.rows @ some[0])[None] if len(some) == 1 else some @ view.rows.T
        if len(view.dead):
            scores[:, view.dead] = -np.inf
        answers += [_people(row, view.owners, k) for row in scores]
    return answers


def _people(scores: np.ndarray, owners: np.ndarray, k: int) -> Ranked:
    """The k best owners of scores (n,), each by the best of theirs; -inf does not count."""
    if k == 1:
        first = int(scores.argmax())
        return [(int(owners[first]), float(scores[first]))]
    # Several of the best rows may show one person, so that k people need more than k rows.
    size = min(len(scores), max(16, 4 * k))
    while True:
        best = np.argpartition(scores, len(scores) - size)[len(scores) - size :]
        best = best[np.argsort(-scores[best], kind="stable")]
        best = best[np.isfinite(scores[best])]
        firsts = np.sort(np.unique(owners[best], return_index=True)[1])
        if len(firsts) >= k or size == len(scores):
            chosen = best[firsts[:k]]
            return list(zip(owners[chosen].tolist(), scores[chosen].tolist(), strict=True))
        size = min(len(scores), 8 * size)


class Hnsw:
    """An approximate index of a `Resident`'s images: built beside it, never the truth.

    A thread loads or builds it. Until it is there, while it lags behind and where it finds too few
    people, `search` answers None and the caller looks at every row.

    Args:
        file: where the index is kept between processes.
        keep: moves a finished file into place if the database still has the state of its number
            of changes; see `Gallery`.
    """

    def __init__(self, file: Path, keep: Callable[[Path, int], None]) -> None:
        self._file, self._keep = file, keep
        self._lock = threading.Lock()
        self._index: Any = None
        self._seq = -1
        self._updates: list[tuple[np.ndarray, np.ndarray, np.ndarray, int]] = []
        self._removed = False  # the index may hold bytes of what was removed
        self._order = np.zeros(0, np.int64)  # rows by id, and their ids
        self._ids = np.zeros(0, np.int64)
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    @property
    def ready(self) -> bool:
        """Whether searches use it."""
        return self._index is not None

    def start(self, view: View) -> None:
        """Load or build the index in a thread; nothing happens if that was done before."""
        if self._thread is None:
            self._seq = view.seq
            self._find(view)
            self._thread = threading.Thread(target=self._make, args=(view,), daemon=True)
            self._thread.start()

    def restart(self, view: View) -> None:
        """Begin anew with other rows."""
        if self._thread is not None:
            self.stop()
            self.__init__(self._file, self._keep)  # type: ignore[misc]
            self.start(view)

    def wait(self) -> None:
        """Until the index is there."""
        if self._thread is not None:
            self._thread.join()

    def stop(self) -> None:
        """End the thread; an unfinished index is dropped."""
        self._stop.set()
        self.wait()

    def update(self, gone: np.ndarray, view: View, since: int) -> None:
        """Take away images by id, add the rows of ``view`` from ``since`` on."""
        if self._thread is None:
            return
        with self._lock:
            change = (gone, view.ids[since:], view.rows[since:], view.seq)
            self._removed |= len(gone) > 0
            self._find(view)
            if self._index is None:
                self._updates.append(change)
            else:
                self._apply(self._index, *change)

    def _find(self, view: View) -> None:
        """Note where each image's row is."""
        self._order = np.argsort(view.ids, kind="stable")
        self._ids = view.ids[self._order]

    def moved(self, view: View) -> None:
        """The rows have other places now."""
        with self._lock:
            self._find(view)

    def search(self, view: View, probe: np.ndarray, k: int) -> Ranked | None:
        """The k best people for a probe (d,), their scores exact; None: look at every row."""
        with self._lock:
            if self._index is None or self._seq != view.seq:
                return None
            found = self._index.search(probe, max(_CANDIDATES, 4 * k)).keys.astype(np.int64)
            rows = self._order[np.searchsorted(self._ids, found).clip(max=len(self._ids) - 1)]
        rows = rows[view.ids[rows] == found]
        ranked = _people(view.rows[rows] @ probe, view.owners[rows], k) if len(rows) else []
        return ranked if len(ranked) == k else None

    def _make(self, view: View) -> None:
        try:
            index = self._load(view)
            if index is None:
                index = _new_index(view.rows.shape[1])
                alive = np.setdiff1d(np.arange(len(view.rows)), view.dead)
                for start in range(0, len(alive), _ROWS):
                    if self._stop.is_set():
                        return
                    some = alive[start : start + _ROWS]
                    index.add(view.ids[some], view.rows[some])
            with self._lock:
                for change in self._updates:
                    self._apply(index, *change)
                self._updates.clear()
                self._index = index
            self.save()
        except Exception:  # searches look at every row instead
            _log.exception("the index %s could not be built", self._file)

    def _load(self, view: View) -> Any:
        """The index of the file with what changed since; None if it is better built anew."""
        if not self._file.exists():
            return None
        from usearch.index import Index

        index = Index.restore(self._file)
        if index is None or index.ndim != view.rows.shape[1]:
            return None
        kept, there = np.asarray(index.keys).astype(np.int64), np.delete(view.ids, view.dead)
        new = np.flatnonzero(np.isin(view.ids, np.setdiff1d(there, kept)))
        gone = np.setdiff1d(kept, there)
        if len(new) + len(gone) > len(there) // 2:
            return None
        index.expansion_search = _EXPANSION_SEARCH  # type: ignore[misc]
        self._removed |= len(gone) > 0
        self._apply(index, gone, view.ids[new], view.rows[new], view.seq)
        return index

    def _apply(
        self, index: Any, gone: np.ndarray, ids: np.ndarray, rows: np.ndarray, seq: int
    ) -> None:
        if len(gone):
            index.remove(gone)
        if len(ids):
            index.add(ids, rows)
        self._seq = seq

    def save(self) -> None:
        """Write the file, unless the index holds bytes of what was removed."""
        with self._lock:
            if self._index is None or self._removed:
                return
            temporary = self._file.with_name(f"{self._file.name}.{secrets.token_hex(4)}.tmp")
            try:
                self._index.save(temporary)
                self._keep(temporary, self._seq)
            finally:
                temporary.unlink(missing_ok=True)


def _new_index(dim: int) -> Any:
    from usearch.index import Index

    return Index(
        ndim=dim,
        metric="ip",
        dtype="i8",
        connectivity=_CONNECTIVITY,
        expansion_add=_EXPANSION_ADD,
        expansion_search=_EXPANSION_SEARCH,
    )


def pgvector(
    connection: Connection, probe: np.ndarray, k: int, *, mean: bool, every: bool
) -> Ranked:
    """The k best people for a probe (d,), by pgvector, scored in float32.

    Args:
        connection: in a transaction of PostgreSQL.
        probe: float32, of length 1.
        k: people.
        mean: compare with people's templates, not with their images.
        every: look at every row, not at the index.
    """
    dim = len(probe)
    text = "[" + ",".join(map(repr, probe.tolist())) + "]"
    # Two parameters, or PostgreSQL would round the one to halfvec before it scores.
    values = {"probe": text, "coarse": text, "k": k}
    similar = "-(%s::vector <#> CAST(:probe AS vector))"
    if mean:
        score, rows = similar % "template", "people"
        if not every:
            values["size"] = k + _CANDIDATES
            rows = (
                f"(SELECT id, template FROM people WHERE vector_dims(template) = {dim} ORDER BY "
                f"template::halfvec({dim}) <#> CAST(:coarse AS halfvec({dim})) LIMIT :size) AS near"
            )
        query = f"SELECT id, {score} AS score FROM {rows} ORDER BY score DESC LIMIT :k"
        return [(key, score) for key, score in connection.execute(sa.text(query), values)]
    best = (
        f"SELECT person, max({similar % 'embedding'}) AS score FROM images %s "
        "GROUP BY person ORDER BY score DESC LIMIT :k"
    )
    if every:
        return [tuple(row) for row in connection.execute(sa.text(best % ""), values)]
    near = (
        "WITH near AS MATERIALIZED (SELECT person FROM images "
        f"WHERE vector_dims(embedding) = {dim} ORDER BY "
        f"embedding::halfvec({dim}) <#> CAST(:coarse AS halfvec({dim})) LIMIT :size), "
        f"best AS ({best % 'WHERE person IN (SELECT person FROM near)'}) "
        "SELECT person, score, (SELECT count(*) FROM near) FROM best ORDER BY score DESC"
    )
    size = max(_CANDIDATES, 4 * k)
    while True:
        found = connection.execute(sa.text(near), {**values, "size": size}).all()
        if len(found) == k:
            return [(person, score) for person, score, _ in found]
        if not found or found[0][2] < size:  # the index has no more
            return [tuple(row) for row in connection.execute(sa.text(best % ""), values)]
        size *= 8
