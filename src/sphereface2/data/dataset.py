"""Batches: a BatchKey in, images and labels out."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, get_worker_info

from sphereface2.data.sampler import BatchKey
from sphereface2.data.source import Source
from sphereface2.data.transforms import Augmentation
from sphereface2.errors import UserError
from sphereface2.images import decode


class Batch(NamedTuple):
    """``images`` uint8 (B, 3, S, S) RGB in channels-last memory, ``labels`` int64 (B,).

    ``unreadable`` are the source's indices of images that could not be read and were replaced;
    ``positions``, int64 (B,), are those of the images in the data set.
    """

    images: torch.Tensor
    labels: torch.Tensor
    unreadable: list[int]
    positions: torch.Tensor


class FaceDataset(Dataset[Batch]):
    """Whole batches by ``BatchKey``; for ``DataLoader(dataset, sampler, batch_size=None)``.

    Args:
        source: where the images are.
        indices: int64 (n,) indices into the source that belong to the set; default all. A
            BatchKey's indices are positions in this array.
        labels: int64 (n,), the class of each image of the set; default the source's labels.
        augmentation: the random transformation and the size S of its result.
        seed: with a key's epoch, step and place in the global batch it determines the augmentation.
        max_unreadable: the share of ``indices`` that may be unreadable before it is an error.

    An unreadable image's place is taken by the next readable one of its batch (labels follow), so
    that batches keep their size; ``Batch.unreadable`` names it. Each process counts the distinct
    ones that it saw; ``note_unreadable(batch.unreadable)`` in the main process counts them over
    all workers, and raises UserError past ``max_unreadable``, as a worker on its own does.
    """

    def __init__(
        self,
        source: Source,
        indices: npt.ArrayLike | None = None,
        labels: npt.ArrayLike | None = None,
        *,
        augmentation: Augmentation,
        seed: int = 0,
        max_unreadable: float = 0.01,
    ) -> None:
        self.source = source
        self.indices = (
            np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
        )
        #: int64 (n,): the class of each image of the set.
        self.labels = np.asarray(
            np.asarray(source.labels)[self.indices] if labels is None else labels, np.int64
        )
        if self.labels.shape != self.indices.shape:
            raise ValueError(
                f"labels {self.labels.shape} and indices {self.indices.shape} must be equally long"
            )
        self.num_classes = int(self.labels.max()) + 1 if len(self.labels) else 0
        self.augmentation = augmentation
        self.seed = seed
        self.max_unreadable = max_unreadable
        self._unreadable: set[int] = set()
        self._buffers = _Buffers()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: BatchKey) -> Batch:
        """The batch of ``key``."""
        positions = np.asarray(key.indices, np.int64)
        wanted = self.indices[positions]
        rng = np.random.default_rng((self.seed, 1, key.epoch, key.step))
        draws = self.augmentation.draw(key.offset + len(wanted), rng)[key.offset :]
        size = self.augmentation.size
        images = self._buffers.take((len(wanted), size, size, 3))
        bad: list[int] = []
        self.augmentation.apply_into(images, self._decoded(wanted, bad), draws)
        unreadable = wanted[bad].tolist()
        if unreadable:
            self.note_unreadable(unreadable)
            good = np.setdiff1d(np.arange(len(wanted)), bad)
            if not len(good):
                names = ", ".join(self.source.name(i) for i in unreadable[:3])
                raise UserError(f"no image of a batch can be read ({names}, …)")
            stand_in = good[np.searchsorted(good, bad) % len(good)]
            images[torch.as_tensor(bad)] = images[torch.from_numpy(stand_in)]
            positions = positions.copy()
            positions[bad] = positions[stand_in]
        return Batch(
            images.permute(0, 3, 1, 2),
            torch.from_numpy(self.labels[positions]),
            unreadable,
            torch.from_numpy(positions),
        )

    def _decoded(self, wanted: np.ndarray, bad: list[int]) -> Iterator[np.ndarray]:
        """The images ``wanted``; the places of unreadable ones, given as black, go to ``bad``."""
        size = self.augmentation.size
        read = self.source.read
        for place, index in enumerate(wanted.tolist()):
            try:
                image = decode(read(index))
            except (UserError, OSError):
                bad.append(place)
                image = np.zeros((size, size, 3), dtype=np.uint8)
            yield image

    def note_unreadable(self, indices: list[int]) -> None:
        """Count unreadable images (source indices); UserError once their share is too large."""
        self._unreadable.update(indices)
        limit = self.max_unreadable * len(self)
        if len(self._unreadable) > limit:
            names = ", ".join(self.unreadable_names()[:3])
            raise UserError(
                f"{len(self._unreadable)} of {len(self)} images cannot be read ({names}, …), more "
                f"than the allowed share of {self.max_unreadable:g}: repair the data set or raise "
                "max_unreadable"
            )

    def unreadable_names(self) -> list[str]:
        """The names of the unreadable images this process knows of, in the source's order."""
        return [self.source.name(i) for i in sorted(self._unreadable)]


class _Buffers:
    """Memory for batches, used again once nobody holds the last batch in it.

    A fresh megabyte costs hundreds of page faults, a tenth of the decoding time. A tensor made
    from an array holds a reference to it for as long as any view of it lives, so the count of
    references tells when a buffer is free.
    """

    _MOST = 4

    def __init__(self) -> None:
        self._arrays: list[np.ndarray] = [np.empty(0, dtype=np.uint8)]
        self._idle = next(sys.getrefcount(array) for array in self._arrays)
        self._arrays.clear()

    def __reduce__(self) -> tuple[type[_Buffers], tuple[()]]:
        return _Buffers, ()

    def take(self, shape: tuple[int, ...]) -> torch.Tensor:
        """An uninitialised uint8 tensor; in a worker in shared memory, which is sent uncopied."""
        if get_worker_info() is not None:
            return torch.empty(shape, dtype=torch.uint8).share_memory_()
        idle = [count == self._idle for count in (sys.getrefcount(array) for array in self._arrays)]
        for number, free in enumerate(idle):
            if free and self._arrays[number].shape == shape:
                return torch.from_numpy(self._arrays[number])
        array = np.empty(shape, dtype=np.uint8)
        if True in idle:
            self._arrays[idle.index(True)] = array
        elif len(self._arrays) < self._MOST:
            self._arrays.append(array)
        return torch.from_numpy(array)
