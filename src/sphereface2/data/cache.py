"""Images decoded once: in memory that loader processes and ranks share, or on the device."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np

from sphereface2.data.source import Source
from sphereface2.errors import UserError
from sphereface2.images import read_image
from sphereface2.machine import free_memory

_AHEAD = 256


class Table(NamedTuple):
    """Decoded images one after another in a file."""

    path: str
    ends: np.ndarray
    """int64 (n,): where each image ends in the file; an unreadable one has no bytes."""
    shapes: np.ndarray
    """int32 (n, 2): height and width."""


class KeptSource:
    """A set whose images are decoded when first read and kept by the process that reads them.

    For a process that uses it many times over.

    Args:
        source: the set.
        change: of an image and its index, once it is decoded.
        keep: False: only the change is wanted.
    """

    def __init__(
        self,
        source: Source,
        change: Callable[[np.ndarray, int], np.ndarray] | None = None,
        *,
        keep: bool = True,
    ) -> None:
        self.labels, self.num_classes = source.labels, source.num_classes
        self.class_names = source.class_names
        self._source, self._change, self._keep = source, change, keep
        self._images: dict[int, np.ndarray] = {}
        #: What data sets of it have put on a device, by the device and the images.
        self.placed: dict[tuple[str, bytes], Any] = {}

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Any:
        """Image ``index``, uint8 (H, W, 3)."""
        if index in self._images:
            return self._images[index]
        image = read_image(self._source.read(index))
        if self._change is not None:
            image = self._change(image, index)
        if self._keep:
            self._images[index] = image
        return image

    def name(self, index: int) -> str:
        """As the set names it."""
        return self._source.name(index)

    def fingerprint(self) -> str:
        """The set's."""
        return self._source.fingerprint()


class DecodedPart:
    """Some images of a set, decoded into a file in memory that lives as long as this object.

    Args:
        source: where the images are.
        indices: int64 (n,) of the images in it.
        of: images of the whole set, for the estimate of its memory.
        threads: that decode.
        free: bytes of memory that can be had; default: what the system says.

    Attributes:
        table: how other processes of this machine find the images.

    Raises:
        UserError: the whole set would need more memory than there is.
    """

    def __init__(
        self,
        source: Source,
        indices: np.ndarray,
        *,
        of: int,
        threads: int = 1,
        free: int | None = None,
    ) -> None:
        self._file = _memory_file(self)
        ends = np.zeros(len(indices), np.int64)
        shapes = np.zeros((len(indices), 2), np.int32)

        def read(index: int) -> np.ndarray | None:
            try:
                return read_image(source.read(index))
            except (UserError, OSError):
                return None

        room = free_memory() if free is None else free
        done = 0
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(indices), _AHEAD):
                chunk = indices[start : start + _AHEAD].tolist()
                for row, image in enumerate(pool.map(read, chunk), start):
                    if image is not None:
                        self._file.write(image)
                        shapes[row] = image.shape[:2]
                        done += image.nbytes
                    ends[row] = done
                check_room(done * of // (start + len(chunk)), room, of, "memory")
        self._file.flush()
        self.table = Table(_path(self._file), ends, shapes)


def check_room(needed: int, room: int | None, images: int, what: str) -> None:
    """UserError if decoded images take more bytes than there are; None: nobody knows."""
    if room is not None and needed > room:
        raise UserError(
            f"data.cache: the {images:,} decoded images take {needed / 1e6:,.0f} MB of {what}, and "
            f"{room / 1e6:,.0f} MB are free; set data.cache to none, or make the images smaller "
            "with sphereface2 data convert --size"
        )


class ImageCache:
    """Decoded images of a set by their number.

    Args:
        tables: of one part for each process that decoded: image i is row i // P of table i mod P.
            The processes must live until this is made, here or by pickling.
        keep: what is to live as long as this.
    """

    def __init__(self, tables: Sequence[Table], keep: Any = None) -> None:
        self.tables = list(tables)
        self._maps = [_mapped(table) for table in tables]
        self._keep = keep  # and let go after the maps: Windows removes no file that is mapped

    def __len__(self) -> int:
        return sum(len(table.ends) for table in self.tables)

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageCache, (self.tables,)

    def __getitem__(self, number: int) -> np.ndarray | None:
        """uint8 (H, W, 3), read-only; None if the image cannot be read."""
        row, part = divmod(number, len(self.tables))
        _, ends, shapes = self.tables[part]
        start, end = int(ends[row - 1]) if row else 0, int(ends[row])
        if start == end:
            return None
        return self._maps[part][start:end].reshape(*shapes[row], 3)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """The different heights and widths of readable images."""
        rows = np.concatenate([table.shapes for table in self.tables])
        return [(int(h), int(w)) for h, w in np.unique(rows[rows[:, 0] > 0], axis=0)]


def _mapped(table: Table) -> np.ndarray:
    size = int(table.ends[-1]) if len(table.ends) else 0
    return np.memmap(table.path, np.uint8, "r", shape=(size,)) if size else np.empty(0, np.uint8)


def _memory_file(owner: object) -> Any:
    """A file in memory, gone with the last process that has it open, however that ends; where there
    is no such thing, a temporary one, gone with its owner."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("images"), "wb", buffering=1 << 20)
    file = tempfile.NamedTemporaryFile(prefix="images", delete=False)  # noqa: SIM115
    weakref.finalize(owner, _remove, file)
    return file


def _remove(file: Any) -> None:
    file.close()
    with suppress(OSError):
        os.unlink(file.name)


def _path(file: Any) -> str:
    """A name under which every process of this machine can open it."""
    if hasattr(os, "memfd_create"):
        return f"/proc/{os.getpid()}/fd/{file.fileno()}"
    return str(file.name)
