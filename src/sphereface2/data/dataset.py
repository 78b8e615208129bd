"""Batches: a BatchKey in, images and labels out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, get_worker_info

from sphereface2.data.sampler import BatchKey
from sphereface2.data.sources import Source
from sphereface2.data.transforms import Augmentation, decode
from sphereface2.errors import UserError

#: Images decoded and augmented in one go, while they are in the cache.
_CHUNK = 16


class Batch(NamedTuple):
    """``images`` uint8 (B, 3, S, S) RGB in channels-last memory, ``labels`` int64 (B,).

    ``unreadable`` are the source's indices of images that could not be read and were replaced.
    """

    images: torch.Tensor
    labels: torch.Tensor
    unreadable: list[int]


class FaceDataset(Dataset[Batch]):
    """Whole batches by ``BatchKey``; for ``DataLoader(dataset, sampler, batch_size=None)``.

    Parameters
    ----------
    source:
        Where the images are.
    indices:
        int64 (n,) indices into the source that belong to the set; default all. A BatchKey's
        indices are positions in this array.
    label_map:
        int64 over the source's labels: the class of each label; default the labels themselves.
    augmentation:
        The random transformation and the size S of its result.
    seed:
        With a key's epoch, step and place in the global batch it determines the augmentation.
    max_unreadable:
        The share of ``indices`` that may be unreadable before it is an error.

    An unreadable image's place is taken by the next readable one of its batch (labels follow), so
    that batches keep their size; ``Batch.unreadable`` names it. Each process counts the distinct
    ones that it saw; ``note_unreadable(batch.unreadable)`` in the main process counts them over
    all workers, and raises UserError past ``max_unreadable``, as a worker on its own does.
    """

    def __init__(
        self,
        source: Source,
        indices: npt.ArrayLike | None = None,
        label_map: npt.ArrayLike | None = None,
        *,
        augmentation: Augmentation,
        seed: int = 0,
        max_unreadable: float = 0.01,
    ) -> None:
        self.source = source
        self.indices = (
            np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
        )
        labels = np.asarray(source.labels)[self.indices]
        #: int64 (n,): the class of each image of the set.
        self.labels = labels if label_map is None else np.asarray(label_map, np.int64)[labels]
        if len(self.labels) and self.labels.min() < 0:
            raise UserError("the label map leaves some of the chosen images without a class")
        self.num_classes = int(self.labels.max()) + 1 if len(self.labels) else 0
        self.augmentation = augmentation
        self.seed = seed
        self.max_unreadable = max_unreadable
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: BatchKey) -> Batch:
        """The batch of ``key``."""
        wanted = self.indices[key.indices]
        labels = self.labels[key.indices]
        rng = np.random.default_rng((self.seed, 1, key.epoch, key.step))
        draws = self.augmentation.draw(key.offset + len(wanted), rng)[key.offset :]
        size = self.augmentation.size
        images = _empty((len(wanted), size, size, 3))
        unreadable: list[int] = []
        bad: list[int] = []
        for start in range(0, len(wanted), _CHUNK):
            stop = min(start + _CHUNK, len(wanted))
            decoded: list[np.ndarray] = []
            for place in range(start, stop):
                index = int(wanted[place])
                try:
                    decoded.append(decode(self.source.read(index)))
                except (UserError, OSError):
                    unreadable.append(index)
                    bad.append(place)
                    decoded.append(np.zeros((size, size, 3), dtype=np.uint8))
            self.augmentation.apply_into(images[start:stop], decoded, draws[start:stop])
        if unreadable:
            self.note_unreadable(unreadable)
            good = np.setdiff1d(np.arange(len(wanted)), bad)
            if not len(good):
                names = ", ".join(self.source.name(i) for i in unreadable[:3])
                raise UserError(f"no image of a batch can be read ({names}, …)")
            stand_in = good[np.searchsorted(good, bad) % len(good)]
            images[torch.as_tensor(bad)] = images[torch.from_numpy(stand_in)]
            labels = labels.copy()
            labels[bad] = labels[stand_in]
        return Batch(images.permute(0, 3, 1, 2), torch.from_numpy(labels), unreadable)

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


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    """An uninitialised uint8 tensor; in a worker in shared memory, so that it is sent uncopied."""
    if get_worker_info() is None:
        return torch.empty(shape, dtype=torch.uint8)
    return torch.empty(shape, dtype=torch.uint8).share_memory_()
