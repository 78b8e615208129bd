"""The two ways to search: a matrix in memory beside SQLite, pgvector on PostgreSQL."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sphereface2.machine import using_faiss
from sphereface2.recognition.gallery.ivf import LEAST, Ivf, Ranked, View, best_people, mostly_gone
from sphereface2.recognition.gallery.rows import SEQ, Rows, bytes_type, person_of
from sphereface2.recognition.gallery.sql import Database
from sphereface2.recognition.gallery.stamps import check_moved, stamp
from sphereface2.recognition.gallery.types import Person, packed

_ROWS = 8_192  # read at a time
_SCORES = 2**24  # of several probes at once
_TOGETHER = 8  # probes, fewer of which are slower by BLAS than by FAISS's own products
_CANDIDATES = 16  # rows of a probe, of which several may show one person
_PEOPLE_KEPT = 100_000  # in memory
_STATE = f"SELECT (SELECT fingerprint FROM stamp), ({SEQ})"

#: A probe's answer: people and cosines, best first.
Found = list[tuple[Person, float]]


class Resident:
    """SQLite's embeddings in memory, brought up to date by what changed and never read twice.

    They are in the column ``vector`` of a table, beside their person's key and their own.
    """

    def __init__(
        self, table: str, owner: str, key: str, vector: str, dim: int, storage: str
    ) -> None:
        self._table, self._owner, self._key, self._vector = table, owner, key, vector
        self._dim, self._type = dim, bytes_type(storage)
        self._lock = threading.Lock()
        self._forget()
        self.ivf: Ivf | None = None

    def _forget(self) -> None:
        none = np.zeros(0, np.int64)
        self._view = View(-1, np.zeros((0, self._dim), np.float32), none, none, none)
        self._show(self._columns(), 0)

    def _columns(self) -> list[np.ndarray]:
        return [self._view.rows, self._view.owners, self._view.ids]

    def _show(self, buffers: list[np.ndarray], count: int) -> None:
        """Have the view show the first ``count`` rows of buffers, which are kept."""
        self._buffers = buffers
        rows, owners, ids = (buffer[:count] for buffer in buffers)
        self._view = replace(self._view, rows=rows, owners=owners, ids=ids)

    def _reserve(self, capacity: int) -> None:
        """Larger buffers, which begin with what the view shows."""
        larger = [np.empty((capacity, *one.shape[1:]), one.dtype) for one in self._columns()]
        for new, old in zip(larger, self._columns(), strict=True):
            new[: len(old)] = old
        self._buffers = larger

    def view(self, connection: sqlite3.Connection, seq: int) -> View | None:
        """The rows as a transaction sees them, up to change ``seq``; None if they are newer."""
        with self._lock:
            if self._view.seq > seq:
                return None
            if self._view.seq < seq:
                before = self._view, self._buffers
                try:
                    self._catch_up(connection, seq)
                except BaseException:  # what was read in part is read again, by the index as well
                    self._view, self._buffers = before
                    raise
            return self._view

    def index(self, make: Callable[[View], Ivf]) -> Ivf:
        """The approximate index, which ``make`` begins; from then on it learns of every change."""
        with self._lock:
            if self.ivf is None:
                self.ivf = make(self._view)
            return self.ivf

    def _load(self, connection: sqlite3.Connection, seq: int) -> None:
        (count,) = connection.execute(f"SELECT count(*) FROM {self._table}").fetchone()
        self._forget()
        self._reserve(count + count // 16 + 64)
        self._append(connection, "TRUE", ())
        self._view = replace(self._view, seq=seq)
        if self.ivf is not None:
            self.ivf.restart(self._view)

    def _catch_up(self, connection: sqlite3.Connection, seq: int) -> None:
        """Drop the rows of the people who changed, and read theirs again."""
        view = self._view
        (oldest,) = connection.execute("SELECT min(seq) FROM changes").fetchone()
        if view.seq < 0 or oldest > view.seq + 1:  # the record of changes goes back no further
            return self._load(connection, seq)
        query = "SELECT DISTINCT person FROM changes WHERE seq > ?"
        changed = [person for (person,) in connection.execute(query, (view.seq,))]
        mine = np.setdiff1d(np.flatnonzero(np.isin(view.owners, changed)), view.dead)
        pairs = zip(view.owners[mine].tolist(), view.ids[mine].tolist(), strict=True)
        there = dict(zip(pairs, mine, strict=True))
        query = f"SELECT {self._owner}, {self._key} FROM {self._table}"
        query += f" WHERE {self._owner} IN (SELECT value FROM json_each(?))"
        now = set(connection.execute(query, (json.dumps(changed),)))
        # An image never changes; a template, a person's one row, does.
        kept = set() if self._owner == self._key else now & there.keys()
        gone = np.array([row for pair, row in there.items() if pair not in kept], np.int64)
        self._view = replace(view, dead=np.concatenate([view.dead, gone]))
        if new := sorted(now - kept):
            pair = "json_extract(value, '$[0]'), json_extract(value, '$[1]')"
            where = f"({self._owner}, {self._key}) IN (SELECT {pair} FROM json_each(?))"
            self._append(connection, where, (json.dumps(new),))
        self._view = replace(self._view, seq=seq)
        if mostly_gone(len(self._view.dead), len(self._view.rows)):
            alive = [np.delete(one, self._view.dead, axis=0) for one in self._columns()]
            self._view = replace(self._view, dead=gone[:0])
            self._show(alive, len(alive[0]))
        if self.ivf is not None:
            self.ivf.update(self._view, len(new), len(gone) > 0)

    def _append(self, connection: sqlite3.Connection, where: str, values: Sequence[str]) -> None:
        columns = f"{self._owner}, {self._key}, {self._vector}"
        cursor = connection.execute(f"SELECT {columns} FROM {self._table} WHERE {where}", values)
        while found := cursor.fetchmany(_ROWS):
            owners, ids, vectors = zip(*found, strict=True)
            start, end = len(self._view.rows), len(self._view.rows) + len(found)
            if end > len(self._buffers[0]):
                self._reserve(end + end // 4)
            rows = np.frombuffer(b"".join(vectors), self._type).reshape(-1, self._dim)
            for buffer, new in zip(self._buffers, (rows, owners, ids), strict=True):
                buffer[start:end] = new
            self._show(self._buffers, end)


def exact(view: View, probes: np.ndarray, k: int, size: int | None = None) -> list[Ranked]:
    """The k best people for each probe, float32 (q, d), by products with every row.

    ``size`` rows are looked for first, of which several may show one person.
    """
    size = min(size or max(_CANDIDATES, 4 * k), len(view.rows))
    if len(probes) > 1 and len(probes) * size > _SCORES:
        return [one for probe in probes for one in exact(view, probe[None], k, size)]
    # One search is not divided among several threads. FAISS reads the rows in less than half of
    # numpy's time.
    with using_faiss(1) as faiss:
        # Of the process; what it is compared with, and its default, differ among FAISS's versions.
        faiss.cvar.distance_compute_blas_threshold = 1 if len(probes) >= _TOGETHER else 1 << 30
        found = faiss.knn(probes, view.rows, size, metric=faiss.METRIC_INNER_PRODUCT)
    answers = []
    for scores, rows in zip(*found, strict=True):
        if len(view.dead):
            alive = np.isin(rows, view.dead, invert=True)
            scores, rows = scores[alive], rows[alive]
        answers.append(best_people(scores, view.owners[rows], k))
    # Rows that no longer count, and several of one person, may stand before others.
    again = [i for i, one in enumerate(answers) if len(one) < k and size < len(view.rows)]
    if again:
        more = exact(view, probes[again], k, 8 * size)
        answers = [more.pop(0) if i in again else one for i, one in enumerate(answers)]
    return answers


class FileSearch:
    """Search of a SQLite gallery; ``row`` is its stamp."""

    def __init__(self, database: Database, rows: Rows, row: Any) -> None:
        self._db, self._description, self._stamp = database, rows.description, row
        residents = (("images", "person", "id", "embedding"), ("people", "id", "id", "template"))
        self._residents = [Resident(*names, row.dim, row.storage) for names in residents]
        self._warm = False
        self._read: tuple[int, dict[int, Any]] = (-1, {})  # a state, and people read in it

    def search(self, probes: np.ndarray, k: int, *, mean: bool, every: bool) -> list[Found]:
        """The k best people for each probe (q, d); ``every``: past an approximate index."""
        with self._view(mean) as (view, snapshot):
            index = None if every or mean else self._index(view)
            if index is None:
                ranked = exact(view, probes, k)
            else:
                ranked = [
                    index.search(view, probe, k) or exact(view, probe[None], k)[0]
                    for probe in probes
                ]
            rows = self._people({key for one in ranked for key, _ in one}, view.seq, snapshot)
        return [[(person_of(rows[key]), score) for key, score in one] for one in ranked]

    def _people(self, keys: set[int], seq: int, snapshot: sqlite3.Connection) -> dict[int, Any]:
        """Rows of people at least of these keys, each read once as long as nothing changes."""
        if self._read[0] != seq or len(self._read[1]) > _PEOPLE_KEPT:
            self._read = (seq, {})
        _, rows = read = self._read
        if read[0] != seq:  # another thread has begun anew meanwhile, with another state
            rows = {}
        query = f"{self._description} WHERE people.id IN (SELECT value FROM json_each(?))"
        if new := [key for key in keys if key not in rows]:
            rows |= {row[0]: row for row in snapshot.execute(query, (json.dumps(new),))}
        return rows

    def warm_up(self) -> None:
        """Read the embeddings, and begin to build or load a large gallery's index."""
        self._warm = True
        with self._view(False) as (view, _):
            exact(view, view.rows[:1], 1)  # loads FAISS
            self._index(view)

    def finish(self) -> None:
        """Write the index's file, or none."""
        self.forget()
        if self._stamp.index_from is not None:
            self.warm_up()
            if (index := self._residents[0].ivf) is not None:
                index.wait()

    def forget(self) -> None:
        """Delete the index's file, which may hold who is removed.

        In the transaction that removes: whatever ends the process, there is never an index of
        somebody who is no longer there.
        """
        assert self._db.path is not None
        for path in self._db.path.parent.iterdir():
            # Versions before 0.1.0 was released called theirs -hnsw-.
            if path.name.startswith((f"{self._db.path.name}-ivf-", f"{self._db.path.name}-hnsw-")):
                path.unlink(missing_ok=True)

    def close(self) -> None:
        """Keep the index for the next process."""
        if (index := self._residents[0].ivf) is not None:
            index.stop()
            index.save()

    @contextmanager
    def _view(self, mean: bool) -> Iterator[tuple[View, sqlite3.Connection]]:
        """The matrix of one state of the database, and the transaction that sees it."""
        while True:
            with self._db.snapshot() as snapshot:
                fingerprint, seq = snapshot.execute(_STATE).fetchone()
                check_moved(self._db, self._stamp, fingerprint)
                view = self._residents[mean].view(snapshot, seq or 0)
                if view is not None:  # else another thread's transaction is newer
                    yield view, snapshot
                    return

    def _index(self, view: View) -> Ivf | None:
        """The approximate index to ask, begun if it is time."""
        least, images = self._stamp.index_from, self._residents[0]
        if not self._warm or least is None or view.images < max(least, LEAST):
            return None
        assert self._db.path is not None
        file = self._db.path.with_name(f"{self._db.path.name}-ivf-{self._stamp.fingerprint[:8]}")
        return images.index(lambda now: Ivf(file, self._keep, now))

    def _keep(self, write: Callable[[int], None]) -> None:
        """Have an index write its file while nothing changes; see `Ivf`."""
        if not self._db.read_only:
            with self._db.write() as connection:
                write(connection.exec_driver_sql(_STATE).one()[1] or 0)


class ServerSearch:
    """Search of a PostgreSQL gallery; ``row`` is its stamp."""

    def __init__(self, database: Database, rows: Rows, row: Any) -> None:
        self._db, self._rows, self._stamp = database, rows, row

    def search(self, probes: np.ndarray, k: int, *, mean: bool, every: bool) -> list[Found]:
        """As `FileSearch.search`."""
        every = every or self._stamp.index_from is None
        with self._db.read() as connection:
            fingerprint = connection.scalar(sa.select(stamp.c.fingerprint))
            check_moved(self._db, self._stamp, fingerprint)
            ranked = [_pgvector(connection, probe, k, mean=mean, every=every) for probe in probes]
            keys = {key for one in ranked for key, _ in one}
            people = self._rows.describe(connection, keys)
        return [[(people[key], score) for key, score in one] for one in ranked]

    def warm_up(self) -> None:
        """Nothing: the server is warm or not."""

    finish = forget = close = warm_up


def _pgvector(
    connection: Connection, probe: np.ndarray, k: int, *, mean: bool, every: bool
) -> Ranked:
    """The k best people for a probe (d,), by pgvector, scored in float32: `FileSearch.search`."""
    values = {"probe": packed(probe, "float32"), "coarse": packed(probe, "float16"), "k": k}
    table, owner, vector = (
        ("people", "id", "template") if mean else ("images", "person", "embedding")
    )
    best = (
        f"SELECT {owner} AS person, max(-({vector}::vector <#> CAST(:probe AS vector))) AS score "
        f"FROM {table} %s GROUP BY person ORDER BY score DESC LIMIT :k"
    )
    near = (
        f"WITH near AS MATERIALIZED (SELECT {owner} AS person FROM {table} "
        f"WHERE vector_dims({vector}) = {len(probe)} ORDER BY {vector}::halfvec({len(probe)}) <#> "
        f"CAST(:coarse AS halfvec({len(probe)})) LIMIT :size), "
        f"best AS ({best % f'WHERE {owner} IN (SELECT person FROM near)'}) "
        "SELECT person, score, (SELECT count(*) FROM near) FROM best ORDER BY score DESC"
    )
    size = max(_CANDIDATES, 4 * k)
    while not every:
        found = connection.execute(sa.text(near), {**values, "size": size}).all()
        if len(found) == k:
            return [(person, score) for person, score, _ in found]
        # The index has no more, be it that there is nobody else or that it lost sight of them.
        every = not found or found[0][2] < size
        size *= 8
    return [tuple(row) for row in connection.execute(sa.text(best % ""), values)]
