"""An approximate index beside the embeddings in memory."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

#: A probe's candidates: a person's key and the cosine, best first.
Ranked = list[tuple[int, float]]
_ROWS = 8_192  # added at a time
# usearch on 8-bit numbers: half the memory and time of building of 16-bit ones, and the same
# recall, because candidates are scored again exactly (benchmarks/gallery.py --tune).
_CONNECTIVITY, _EXPANSION_ADD = 16, 128
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


def best_people(scores: np.ndarray, owners: np.ndarray, k: int) -> Ranked:
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

    def __init__(self, file: Path, keep: Callable[[Path, Path, int], None]) -> None:
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
            size = max(_CANDIDATES, 4 * k)
            found = self._index.search(probe, size, threads=1).keys.astype(np.int64)
            rows = self._order[np.searchsorted(self._ids, found).clip(max=len(self._ids) - 1)]
        rows = rows[view.ids[rows] == found]
        ranked = best_people(view.rows[rows] @ probe, view.owners[rows], k) if len(rows) else []
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
            index.expansion_search = _effort(view.images)
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
                temporary.touch(0o600)  # as the gallery itself: these are people's faces
                self._index.save(temporary)
                self._keep(temporary, self._file, self._seq)
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
    )


def _effort(images: int) -> int:
    """How many candidates a search keeps: more among more, for the same recall."""
    return round(160 * max(1.0, images / 100_000) ** 0.6)
