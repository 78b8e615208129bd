"""What a training set is to the rest of the package, and what its formats have in common."""

from __future__ import annotations

import os
import threading
import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from sphereface2.errors import UserError
from sphereface2.files import read_text, visible

#: Labels and numbers of people end here: tables by person stay affordable.
MAX_PEOPLE = 1 << 26


class NoImagesError(UserError):
    """A place holds no set of images."""


@runtime_checkable
class Source(Protocol):
    """A labelled set of encoded images with random access.

    A source pickles (workers reopen its files) and its order is stable: image ``i`` is the same
    image in every process and every run, as long as the files are. Threads may share it.
    """

    #: int64 (N,): the person of each image, in ``[0, num_classes)``.
    labels: np.ndarray
    #: One more than the largest label a head must know.
    num_classes: int
    #: The name of each person, where the format has one.
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded bytes of image ``index``; OSError or UserError if they cannot be had."""
        ...

    def name(self, index: int) -> str:
        """What to call image ``index`` in a message."""
        ...

    def fingerprint(self) -> str:
        """sha256 over what identifies the set (names, labels, sizes), cheap to compute."""
        ...


@dataclass
class Subset:
    """Images of a source, perhaps under other labels; a `Source`.

    Attributes:
        source: that the images are of.
        index: int64 (n,), which.
        labels: int64 (n,), of these images.
        class_names: names of the labels.
    """

    source: Source
    index: np.ndarray
    labels: np.ndarray
    class_names: list[str] | None

    def __post_init__(self) -> None:
        self.num_classes = int(self.labels.max()) + 1 if len(self.labels) else 0

    def __len__(self) -> int:
        return len(self.index)

    def read(self, index: int) -> bytes:
        """The bytes of an image."""
        return self.source.read(int(self.index[index]))

    def name(self, index: int) -> str:
        """The name of an image."""
        return self.source.name(int(self.index[index]))

    def fingerprint(self) -> str:
        """Of the whole source."""
        return self.source.fingerprint()


def check_labels(labels: Sequence[float] | np.ndarray, where: str | Path) -> np.ndarray:
    """Labels as int64 (N,); UserError naming the first that is no whole number in range."""
    values = np.asarray(labels)
    if values.dtype.kind not in "iu":
        values = values.astype(np.float64)
    bad = np.flatnonzero(~((values >= 0) & (values < MAX_PEOPLE) & (values == np.floor(values))))
    if len(bad):
        raise UserError(
            f"{where}: label {values[bad[0]]:.15g} of image {int(bad[0])} is not a whole number in "
            f"[0, {MAX_PEOPLE:,}); number the people from 0"
        )
    return values.astype(np.int64, copy=False)


def check_indices(indices: npt.ArrayLike, count: int) -> np.ndarray:
    """Indices of ``count`` images as int64 (n,); UserError unless they are whole numbers below it.

    A mask is none: NumPy would make it the images 0 and 1, many times.
    """
    found = np.asarray(indices)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise UserError(
            f"indices must be whole numbers (n,), got {found.dtype} {found.shape}: of a mask give "
            "np.flatnonzero(mask)"
        )
    if found.size and not 0 <= found.min() <= found.max() < count:
        raise UserError(f"indices must lie in 0 … {count - 1}, got {found.min()} … {found.max()}")
    return found.astype(np.int64, copy=False)


def read_names(folder: Path, num_classes: int) -> list[str] | None:
    """The people's names from ``names.txt`` in ``folder``, one a line; None if it is not there.

    One with too few lines is not used, with a warning; lines past the last label are left out.
    """
    path = folder / "names.txt"
    if not path.is_file():
        return None
    names = read_text(path).splitlines()
    if len(names) < num_classes:
        warnings.warn(
            f"{path} is not used: it names {len(names):,} of {num_classes:,} people", stacklevel=4
        )
        return None
    return names[:num_classes]


def write_names(folder: Path, names: Sequence[str] | None) -> None:
    """Write what `read_names` reads, if there are names."""
    if names is not None:
        lines = "".join(f"{visible(name)}\n" for name in names)
        (folder / "names.txt").write_text(lines, encoding="utf-8")


class _Descriptor:
    """A file open for reading, until nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self.number, size, offset)
        with self._lock:  # Windows, where no other process shares the place in the file
            os.lseek(self.number, offset, os.SEEK_SET)
            return os.read(self.number, size)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


_MOST_OPEN = (
    128  # files at a time: a set may have thousands of shards, a process mostly 1,024 files
)
_opened: deque[weakref.ref[OpenFile]] = deque()


class OpenFile:
    """A file read at any place, by threads and by processes that share it; pickles as its path.

    Where a process reads many, the ones opened first are closed, and opened again when read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._open: _Descriptor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_open": None}

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from ``offset``; UserError if the file ends before."""
        file = self._open  # which stays open while this thread reads, whoever lets go of it
        if file is None:
            file = self._open = _Descriptor(self.path)
            _opened.append(weakref.ref(self))
            while len(_opened) > _MOST_OPEN:
                if (first := _opened.popleft()()) is not None:
                    first._open = None
        data = file.read(offset, size)
        if len(data) != size:
            raise UserError(
                f"{self.path} ends before byte {offset + size:,}: it was cut since it was opened; "
                "copy the set again"
            )
        return data
