"""Batches: a BatchKey in, images and labels out."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset, get_worker_info

from sphereface2.cuda_graph import Graphed
from sphereface2.data.batched import COLUMNS, pinned, table, transformed
from sphereface2.data.cache import ImageCache, check_room
from sphereface2.data.sampler import BatchKey
from sphereface2.data.source import Source, check_indices, check_labels
from sphereface2.data.transforms import FLIP, Augmentation
from sphereface2.device import sent
from sphereface2.errors import UserError
from sphereface2.images import read_image


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

    Raises:
        UserError: indices that the source does not have, or labels that are not whole numbers ≥ 0.
        ValueError: not one label for each index.

    An unreadable image's place is taken by the next readable one of its batch (labels follow), so
    that batches keep their size; ``Batch.unreadable`` names it. Each process counts the distinct
    ones that it saw; ``note_unreadable(batch.unreadable)`` in the main process counts them over
    all workers, and raises UserError past ``max_unreadable``, as a worker on its own does.
    """

    def __init__(
        self,
        source: Source,
        indices: npt.ArrayLike | None = None,
        labels: Sequence[float] | np.ndarray | None = None,
        *,
        augmentation: Augmentation,
        seed: int = 0,
        max_unreadable: float = 0.01,
    ) -> None:
        self.source = source
        count = len(source)
        self.indices = np.arange(count) if indices is None else check_indices(indices, count)
        #: int64 (n,): the class of each image of the set.
        self.labels = check_labels(
            np.asarray(source.labels)[self.indices] if labels is None else labels, "labels"
        )
        if self.labels.shape != self.indices.shape:
            raise ValueError(
                f"labels {self.labels.shape} and indices {self.indices.shape} must be equally long"
            )
        self.num_classes = int(self.labels.max()) + 1 if len(self.labels) else 0
        self.augmentation = augmentation
        self.seed = seed
        self.max_unreadable = max_unreadable
        #: The decoded images, where they are kept.
        self.cache: ImageCache | None = None
        #: uint8 (n, H, W, 3), where they are kept on a device; those that cannot be read are black.
        self.pixels: torch.Tensor | None = None
        #: bool (n,), with ``pixels``: which are no stand-ins.
        self.readable = np.ones(0, bool)
        self._graph: Graphed[torch.Tensor] | None = None
        self._unreadable: set[int] = set()
        self._buffers = _Buffers()

    def __len__(self) -> int:
        return len(self.indices)

    def put_on(self, device: torch.device, cache: ImageCache) -> None:
        """Keep the decoded images on a device, and augment them there.

        Raises:
            UserError: they are of several sizes, or take more memory than there is.
        """
        shapes = cache.shapes
        if len(shapes) != 1:
            sizes = ", ".join(f"{height}×{width}" for height, width in shapes[:3])
            raise UserError(
                f"data.cache device needs images of one size, and there are {len(shapes)} ({sizes}"
                ", …): set it to ram, or make them alike with sphereface2 data convert --size"
            )
        shape = (len(self), *shapes[0], 3)
        room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
        check_room(math.prod(shape), room, len(self), f"the memory of {device}")
        self.pixels = torch.zeros(shape, dtype=torch.uint8, device=device)
        self.readable = np.ones(len(self), bool)
        chunk = np.empty((1024, *shape[1:]), np.uint8)
        for start in range(0, len(self), len(chunk)):
            count = min(len(chunk), len(self) - start)
            for row in range(count):
                image = cache[start + row]
                self.readable[start + row] = image is not None
                chunk[row] = 0 if image is None else image
            self.pixels[start : start + count] = torch.from_numpy(chunk[:count]).to(device)

    def record(self) -> None:
        """Make batches of the images on the device by a CUDA graph.

        The images of a batch are then overwritten by the next one.
        """
        assert self.pixels is not None
        self._graph = Graphed(self._made, self.pixels.device, "the augmentation")

    def __getitem__(self, key: BatchKey) -> Batch:
        """The batch of ``key``."""
        positions = np.asarray(key.indices, np.int64)
        wanted = self.indices[positions]
        rng = np.random.default_rng((self.seed, 1, key.epoch, key.step))
        draws = self.augmentation.draw(key.offset + len(wanted), rng)[key.offset :]
        if self.augmentation.alternate_flip:
            draws[:, FLIP] = _alternate(positions, key.epoch + self.seed)
        if self.pixels is not None:
            bad = np.flatnonzero(~self.readable[positions]).tolist()
        else:
            size = self.augmentation.size
            images = self._buffers.take((len(wanted), size, size, 3))
            bad = []
            self.augmentation.apply_into(images, self._decoded(key.indices, bad), draws)
        unreadable = wanted[bad].tolist()
        if unreadable:
            self.note_unreadable(unreadable)
            good = np.setdiff1d(np.arange(len(wanted)), bad)
            if not len(good):
                names = ", ".join(self.source.name(i) for i in unreadable[:3])
                raise UserError(f"no image of a batch can be read ({names}, …)")
            stand_in = good[np.searchsorted(good, bad) % len(good)]
            positions, draws = positions.copy(), draws.copy()
            positions[bad], draws[bad] = positions[stand_in], draws[stand_in]
            if self.pixels is None:
                images[torch.as_tensor(bad)] = images[torch.from_numpy(stand_in)]
        on_device = self.pixels is not None
        return Batch(
            self._on_device(positions, draws) if on_device else images.permute(0, 3, 1, 2),
            torch.from_numpy(self.labels[positions]),
            unreadable,
            torch.from_numpy(positions),
        )

    def _on_device(self, positions: np.ndarray, draws: np.ndarray) -> torch.Tensor:
        """The images at ``positions``, augmented where they are kept."""
        assert self.pixels is not None
        numbers = table(self.augmentation, draws, *self.pixels.shape[1:3])
        # One copy to the device: the bits of pairs of float32 as int64.
        packed = np.concatenate([positions, numbers.view(np.int64).ravel()])
        return (self._graph or self._made)(pinned(packed, self.pixels.device))

    def _made(self, packed: torch.Tensor) -> torch.Tensor:
        """The images of what `_on_device` has packed."""
        assert self.pixels is not None
        packed = sent(packed, self.pixels.device)
        count = len(packed) // (1 + COLUMNS // 2)
        kept = self.pixels.index_select(0, packed[:count]).permute(0, 3, 1, 2)
        numbers = packed[count:].view(torch.float32).view(count, COLUMNS)
        return transformed(self.augmentation, kept, numbers)

    def _decoded(self, positions: np.ndarray, bad: list[int]) -> Iterator[np.ndarray]:
        """Images by position; the places of unreadable ones, given as black, go to ``bad``."""
        black = np.zeros((self.augmentation.size, self.augmentation.size, 3), dtype=np.uint8)
        for place, position in enumerate(positions.tolist()):
            image: np.ndarray | None = None
            if self.cache is not None:
                image = self.cache[position]
            else:
                with contextlib.suppress(UserError, OSError):
                    image = read_image(self.source.read(int(self.indices[position])))
            if image is None:
                bad.append(place)
            yield black if image is None else image

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


def _alternate(positions: np.ndarray, epoch: int) -> np.ndarray:
    """Draws of ``flip``, 0 or 1, that differ from one pass to the next; of neighbouring images,
    which show one person, about half are mirrored."""
    golden = np.uint64(0x9E3779B97F4A7C15)  # 2^64 over the golden ratio: multiples spread evenly
    first = (positions.astype(np.uint64) * golden) >> np.uint64(63)
    return (first + np.uint64(epoch)) % np.uint64(2)


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
