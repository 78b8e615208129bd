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

from sphereface2.errors import UserError
from sphereface2.machine import using_faiss

#: A probe's candidates: a person's key and the cosine, best first.
Ranked = list[tuple[int, float]]
_ROWS = 8_192  # added at a time
LEAST = 256  # images: among fewer a product is as quick, and the lists cannot be learned
_SAMPLE = 32  # images a list to learn the lists from
_LISTS = 32  # at least so many, and an eighth of all, are looked through
_CANDIDATES = 256  # of a probe, scored exactly
_GONE = 4_096  # rows that no longer count, fewer of which are not worth a new beginning

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class View:
    """The images of one state of the database. Nothing that it shows is ever overwritten."""

    seq: int  # of the last change that it has
    rows: np.ndarray  # float32 (n, d)
    owners: np.ndarray  # int64 (n,), the person of each row
    ids: np.ndarray  # int64 (n,), the image of each row
    dead: np.ndarray  # rows that no longer count

    @property
    def images(self) -> int:
        """Rows that count."""
        return len(self.rows) - len(self.dead)


def best_people(scores: np.ndarray, owners: np.ndarray, k: int) -> Ranked:
    """The k best owners of scores (n,), which descend, each by the best of theirs."""
    best: dict[int, float] = {}
    for owner, score in zip(owners, scores, strict=True):  # of which few are looked at
        if len(best) == k:
            break
        best.setdefault(int(owner), float(score))
    return list(best.items())


def mostly_gone(gone: int, rows: int) -> bool:
    """Whether so many of the rows no longer count that they are better written anew."""
    return gone >= max(_GONE, rows // 4)


class Ivf:
    """An approximate index of a `Resident`'s images: built beside it, never the truth.

    An inverted file with product quantisation (Jégou, Douze and Schmid, "Product Quantization for
    Nearest Neighbor Search", PAMI 33, 2011) by FAISS: a probe is compared with the codes, half a
    byte for two numbers, of the images in the lists whose centres are most like it.

    A thread loads or builds it. Until it is there, while it lags behind and where it finds too few
    people, `search` answers None and the caller looks at every row.

    Args:
        file: where the index is kept between processes.
        keep: calls what it is given with the number of the database's last change, and nothing
            changes meanwhile.
        view: the images.
    """

    def __init__(
        self, file: Path, keep: Callable[[Callable[[int], None]], None], view: View
    ) -> None:
        self._file, self._keep = file, keep
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._start(view)

    def _start(self, view: View) -> None:
        self._index: Any = None
        self._removed = False  # the index holds codes of what was removed
        self._follow(view)
        self._stop.clear()
        self._thread = threading.Thread(target=self._make, args=(view,), daemon=True)
        self._thread.start()

    def restart(self, view: View) -> None:
        """Begin anew with other rows."""
        self.stop()
        with self._lock:  # searches end first
            self._start(view)

    def wait(self) -> None:
        """Until the index is there."""
        self._thread.join()

    def stop(self) -> None:
        """End the thread; an unfinished index is dropped."""
        self._stop.set()
        self.wait()

    def update(self, view: View, new: int, removed: bool) -> None:
        """Add the last ``new`` rows of ``view``; ``removed``: some others count no more.

        Those stay in the index, where `search` passes over them, until they are a good part of it:
        FAISS 1.15 damages a list of packed codes to which it adds after it removed from it.
        """
        if self._index is not None:
            codes = self._index.ntotal + new
            if mostly_gone(codes - view.images, codes):
                return self.restart(view)
        with self._lock:
            self._removed |= removed
            if self._index is not None:  # else `_make` adds them
                _add(self._index, view, np.arange(len(view.rows) - new, len(view.rows)))
            self._follow(view)

    def _follow(self, view: View) -> None:
        """Note where each image's row is."""
        self._view = view
        order = np.argsort(view.ids, kind="stable")
        counts = np.ones(len(order), bool)
        counts[view.dead] = False
        self._order = order[counts[order]]
        self._ids = view.ids[self._order]

    def search(self, view: View, probe: np.ndarray, k: int) -> Ranked | None:
        """The k best people for a probe (d,), their scores exact; None: look at every row."""
        with self._lock:
            if self._index is None or self._view.seq != view.seq:
                return None
            with using_faiss(1):  # more wait for each other longer
                found = self._index.search(probe[None], max(_CANDIDATES, 4 * k))[1][0]
            rows = self._order[np.searchsorted(self._ids, found).clip(max=len(self._ids) - 1)]
        there = view.ids[rows] == found
        if 2 * there.sum() < (found >= 0).sum():  # the removed stand before others
            return None
        rows = rows[there]
        scores = view.rows[rows] @ probe
        order = np.argsort(-scores)
        ranked = best_people(scores[order], view.owners[rows[order]], k)
        return ranked if len(ranked) == k else None

    def _make(self, view: View) -> None:
        try:
            index = self._load(view)
            if index is None:
                alive = np.setdiff1d(np.arange(len(view.rows)), view.dead)
                index = _trained(view, alive)
                for start in range(0, len(alive), _ROWS):
                    if self._stop.is_set():
                        return
                    _add(index, view, alive[start : start + _ROWS])
            index.nprobe = max(_LISTS, index.nlist // 8)
            with self._lock:
                if self._view is not view:  # of which images came meanwhile
                    new = np.isin(self._view.ids, view.ids, invert=True)
                    _add(index, self._view, np.flatnonzero(new))
                self._index = index
            self.save()
        except Exception:  # searches look at every row instead
            _log.exception("the index %s could not be built", self._file)

    def _load(self, view: View) -> Any:
        """The index of the file with what changed since; None if it is better built anew."""
        try:
            with using_faiss() as faiss:
                index = faiss.read_index(str(self._file))
        except RuntimeError:  # it is not there, or damaged
            return None
        if not isinstance(index, faiss.IndexIVFPQFastScan) or index.d != view.rows.shape[1]:
            return None
        lists: Any = index.invlists
        sizes = [(number, lists.list_size(number)) for number in range(index.nlist)]
        kept = np.concatenate(
            [faiss.rev_swig_ptr(lists.get_ids(number), size) for number, size in sizes if size]
        )
        there = np.delete(view.ids, view.dead)
        new = np.flatnonzero(np.isin(view.ids, np.setdiff1d(there, kept)))
        gone = len(np.setdiff1d(kept, there))
        if len(new) + gone > len(there) // 2:
            return None
        if gone:  # `update` may note as much meanwhile
            self._removed = True
        _add(index, view, new)
        return index

    def save(self) -> None:
        """Write the file, unless the index holds codes of what was removed, or lags behind.

        The file that is not whole yet is there during the transaction only, so that the next
        removal finds one of a process that was killed.
        """
        if self._index is None or self._removed:
            return
        try:
            self._keep(self._write)
        except (OSError, RuntimeError, UserError) as error:  # the next process builds it
            _log.warning("the index %s could not be kept: %s", self._file, error)

    def _write(self, seq: int) -> None:
        with self._lock:
            if self._index is None or self._removed or self._view.seq != seq:
                return
            temporary = self._file.with_name(f"{self._file.name}.{secrets.token_hex(4)}.tmp")
            try:
                temporary.touch(0o600)  # as the gallery itself: these are people's faces
                with using_faiss() as faiss:
                    faiss.write_index(self._index, str(temporary))
                temporary.replace(self._file)
            finally:
                temporary.unlink(missing_ok=True)


def _add(index: Any, view: View, rows: np.ndarray) -> None:
    if len(rows):
        with using_faiss():
            index.add_with_ids(view.rows[rows], view.ids[rows])


def _trained(view: View, alive: np.ndarray) -> Any:
    """An empty index whose lists and codes are learned from a part of the rows that count."""
    dim, lists = view.rows.shape[1], round(2 * len(alive) ** 0.5)
    parts = dim // 2 if dim % 2 == 0 else dim
    kind = f"IVF{lists},PQ{parts}x4fs"
    with using_faiss() as faiss:
        index: Any = faiss.index_factory(dim, kind, faiss.METRIC_INNER_PRODUCT)
        for learned in (index, index.pq):  # few images are no reason for a warning
            learned.cp.min_points_per_centroid = 1
        index.train(view.rows[alive[:: max(1, len(alive) // (_SAMPLE * lists))]])
    return index
