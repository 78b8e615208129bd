"""The two ways to search: a matrix in memory beside SQLite, pgvector on PostgreSQL."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sphereface2.recognition.gallery.ivf import LEAST, Ivf, Ranked, View
from sphereface2.recognition.gallery.rows import SEQ, Rows, parts, person_of
from sphereface2.recognition.gallery.search import Resident, exact
from sphereface2.recognition.gallery.sql import Database
from sphereface2.recognition.gallery.stamps import check_moved, stamp
from sphereface2.recognition.gallery.types import Person, packed

_CANDIDATES = 16
_PEOPLE_KEPT = 100_000  # in memory
_STATE = f"SELECT (SELECT fingerprint FROM stamp), ({SEQ})"

#: A probe's answer: people and cosines, best first.
Found = list[tuple[Person, float]]


class FileSearch:
    """Search of a SQLite gallery.

    Args:
        database: the gallery's.
        rows: its tables.
        row: its stamp.
    """

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
        for some in parts([key for key in keys if key not in rows]):
            marks = ",".join("?" * len(some))
            query = f"{self._description} WHERE people.id IN ({marks})"
            rows |= {row[0]: row for row in snapshot.execute(query, some)}
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
        if images.ivf is None:
            assert self._db.path is not None
            name = f"{self._db.path.name}-ivf-{self._stamp.fingerprint[:8]}"
            images.ivf = Ivf(self._db.path.with_name(name), self._keep)
            images.ivf.start(view)
        return images.ivf

    def _keep(self, write: Callable[[int], None]) -> None:
        """Have an index write its file while nothing changes; see `Ivf`."""
        if not self._db.read_only:
            with self._db.write() as connection:
                write(connection.exec_driver_sql(_STATE).one()[1] or 0)


class ServerSearch:
    """Search of a PostgreSQL gallery; arguments as `FileSearch`."""

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
    """The k best people for a probe (d,), by pgvector, scored in float32.

    Args:
        connection: in a transaction of PostgreSQL.
        probe: float32, of length 1.
        k: people.
        mean: compare with people's templates, not with their images.
        every: look at every row, not at the index.
    """
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
