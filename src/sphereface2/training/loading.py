"""Batches from loader processes, whose failures are one sentence here."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from sphereface2.data.cache import DecodedPart, ImageCache, KeptSource
from sphereface2.data.dataset import Batch, FaceDataset
from sphereface2.data.sampler import BatchKey, BatchSampler
from sphereface2.errors import UserError
from sphereface2.machine import share_of_cores
from sphereface2.signals import in_worker, starting_workers
from sphereface2.training.distributed import World

_SHARED = Path("/dev/shm")


class EveryEpoch(Sampler[BatchKey]):
    """The keys of one epoch after another without end, so that loader processes live as long as
    the run: to end and start them takes as long as dozens of steps of a fast device.

    Args:
        sampler: this rank's.
        per_epoch: keys to take of each epoch.
    """

    def __init__(self, sampler: BatchSampler, per_epoch: int) -> None:
        self.sampler, self.per_epoch = sampler, per_epoch
        #: Keys of the run to leave out; the next iteration begins there.
        self.consumed = 0

    def __iter__(self) -> Iterator[BatchKey]:
        epoch, position = divmod(self.consumed, self.per_epoch)
        while True:
            self.sampler.start(epoch, position)
            yield from islice(self.sampler, self.per_epoch - position)
            epoch, position = epoch + 1, 0


def cache_images(dataset: FaceDataset, kind: str, world: World) -> str:
    """Decode the images of a set, each on one rank of this machine; every rank calls it.

    Args:
        dataset: training images.
        kind: ``ram`` or ``device``.
        world: this rank's place.

    Returns:
        What was done, for people.

    Raises:
        UserError: alike on all ranks: they take more memory than there is; for the device, they
            are of several sizes.
    """
    kept = dataset.source.placed if isinstance(dataset.source, KeptSource) else {}
    key = str(world.device), dataset.indices.tobytes()
    if kind == "device" and key in kept:
        dataset.pixels, dataset.readable = kept[key]
        return "that of the last run of this process"
    started = time.monotonic()
    ranks = world.local_size
    part = failure = None
    try:
        part = DecodedPart(
            dataset.source,
            dataset.indices[world.local_rank :: ranks],
            of=len(dataset),
            threads=share_of_cores(ranks),
        )
    except UserError as error:
        failure = str(error)
    found = world.gather((part and part.table, failure))
    tables = [table for table, _ in found]
    if failure := next((why for _, why in found if why), None):
        raise UserError(failure)
    first = world.rank - world.local_rank
    cache = ImageCache(tables[first : first + ranks], keep=part)
    world.barrier()
    if kind == "ram":
        dataset.cache = cache
    else:
        dataset.put_on(world.device, cache)
        kept.clear()
        kept[key] = dataset.pixels, dataset.readable
    size = sum(int(table.ends[-1]) for table in cache.tables if len(table.ends))
    seconds = time.monotonic() - started
    return f"{size / 1e6:,.0f} MB of pixels ({kind}), decoded in {seconds:.1f} s"


def build_loader(
    dataset: FaceDataset, keys: EveryEpoch, world: World, workers: int, *, placed: bool = False
) -> DataLoader[Batch | UserError]:
    """A loader of this rank's batches.

    Args:
        dataset: training images.
        keys: of the batches.
        world: its place.
        workers: loader processes a rank; 0: this one loads.
        placed: whether the images will lie on the device.

    Raises:
        UserError: there is too little shared memory for the loader processes, which the system
            would kill.
    """
    if workers and _SHARED.is_dir():
        side = dataset.augmentation.size
        batch = keys.sampler.batch_size // world.size * side * side * 3
        # Each has two batches ahead and one in the making.
        needed, free = world.local_size * workers * 3 * batch, shutil.disk_usage(_SHARED).free
        if needed > free:
            raise UserError(
                f"data.workers = {workers}: loader processes need {needed / 1e6:,.0f} MB of shared "
                f"memory and {_SHARED} has {free / 1e6:,.0f} MB; give the container more (docker "
                "run --shm-size 1g) or lower data.workers, 0 needs none"
            )
    return DataLoader(
        _Told(dataset),
        sampler=keys,
        batch_size=None,
        num_workers=workers,
        pin_memory=world.device.type == "cuda" and not placed,
        # Its own generator: starting must not draw from the one that dropout uses.
        generator=torch.Generator(),
        worker_init_fn=_start_worker if workers else None,
    )


def loaded(loader: DataLoader[Batch | UserError]) -> Iterator[Batch]:
    """The run's batches, without end.

    Raises:
        UserError: of the data set, or a batch broke off on its way from a loader process.
    """
    with starting_workers():
        batches = iter(loader)
    try:
        for batch in batches:
            if isinstance(batch, UserError):
                raise batch
            yield batch
    except (ConnectionError, EOFError) as error:
        if not loader.num_workers:
            raise
        raise _lost(loader) from error


@contextmanager
def lost_workers(loader: DataLoader[Batch | UserError]) -> Iterator[None]:
    """Where a loader process may be ended; UserError if one is.

    torch raises that wherever the main thread is, in the next batch or in the middle of a step.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _lost(loader) from error


def _lost(loader: DataLoader[Batch | UserError]) -> UserError:
    return UserError(
        "a loader process was ended from outside, perhaps for want of memory or of shared memory "
        f"({_SHARED}): lower data.workers ({loader.num_workers})"
    )


class _Told(Dataset[Batch | UserError]):
    """A data set whose UserErrors are items, which loader processes pass on as they are."""

    def __init__(self, dataset: FaceDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, key: BatchKey) -> Batch | UserError:
        try:
            return self.dataset[key]
        except UserError as error:
            return error


def _start_worker(_number: int) -> None:
    in_worker()
