"""Which images make a batch: seeded, split over ranks, and able to continue mid-epoch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from sphereface2.errors import UserError, check_count


class BatchKey(NamedTuple):
    """One rank's share of one global batch: what a worker needs to build it.

    ``indices`` are int64 positions in the data set; the share begins at ``offset`` in the global
    batch. Augmentation is drawn from (seed, epoch, step, place in the global batch), so it
    depends neither on the number of workers nor on the number of ranks.
    """

    epoch: int
    step: int
    indices: np.ndarray
    offset: int = 0


class BatchSampler(Sampler[BatchKey]):
    """Yields the epoch's BatchKeys of one rank; for ``DataLoader(sampler=…, batch_size=None)``.

    Args:
        labels: int64 (N,) class of each image of the data set.
        batch_size: images in the global batch, over all ranks; a multiple of ``world_size``.
        rank: this process, 0 to ``world_size`` - 1.
        world_size: how many processes share a batch.
        seed: of the order.
        shuffle: a permutation drawn from (seed, epoch), the same on every rank; else the given
            order.
        drop_last: drop the incomplete batch at the end of an epoch; else fill it up from the
            epoch's beginning to a multiple of ``world_size``, so that every rank has the same
            share.
        people_per_batch: P: with K = ``images_per_person`` and P·K = ``batch_size`` each batch
            holds K images of each of P different people. A person's images are dealt out K at a
            time, and one with fewer than K repeats. Each epoch leaves out what does not fill a
            batch: fewer than P hands of K images, unless a few people own so much of the set that
            they cannot be spread over enough batches.
        images_per_person: K.

    Every iteration is the next epoch, counted once its first key is taken; `start` says otherwise.
    """

    def __init__(
        self,
        labels: npt.ArrayLike,
        batch_size: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        people_per_batch: int | None = None,
        images_per_person: int | None = None,
    ) -> None:
        self._labels = np.asarray(labels, dtype=np.int64)
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("world_size", world_size, 1),
            ("rank", rank, 0),
            ("people_per_batch", people_per_batch, 1),
            ("images_per_person", images_per_person, 1),
        ):
            if value is not None:
                check_count(name, value, least)
        if batch_size % world_size:
            raise UserError(
                f"batch size {batch_size} must be a multiple of the {world_size} processes"
            )
        if rank >= world_size:
            raise UserError(f"rank {rank} is outside 0…{world_size - 1}")
        if (people_per_batch is None) != (images_per_person is None):
            raise UserError("people per batch and images per person must be given together")
        self.batch_size = batch_size
        self.rank, self.world_size = rank, world_size
        self.seed, self.shuffle, self.drop_last = seed, shuffle, drop_last
        self.people_per_batch, self.images_per_person = people_per_batch, images_per_person
        if people_per_batch is not None and images_per_person is not None:
            if people_per_batch * images_per_person != batch_size:
                raise UserError(
                    f"{people_per_batch} people × {images_per_person} images make "
                    f"{people_per_batch * images_per_person}, not the batch size {batch_size}"
                )
            people = len(np.unique(self._labels))
            if people < people_per_batch:
                raise UserError(
                    f"a batch of {people_per_batch} people needs as many, but there are {people}: "
                    "give fewer people per batch"
                )
        elif not len(self._labels):
            raise UserError("there are no images to make batches of")
        elif drop_last and len(self._labels) < batch_size:
            raise UserError(
                f"a batch of {batch_size} images needs as many, but there are "
                f"{len(self._labels)}: give a smaller batch size"
            )
        self._steps = self._count_steps()
        self._next = 0, 0
        self._order_of: tuple[int, np.ndarray] | None = None

    def start(self, epoch: int, step: int = 0) -> None:
        """Let the next iteration begin at ``step`` of ``epoch``; the one after it is the next."""
        self._next = epoch, step

    def __len__(self) -> int:
        """Steps in an epoch; the same every epoch."""
        return self._steps

    def __iter__(self) -> Iterator[BatchKey]:
        # A generator: what follows runs when a key is taken. A DataLoader makes iterators that it
        # takes none of.
        epoch, first = self._next
        self._next = epoch + 1, 0
        order = self._order(epoch)
        for step in range(first, self._steps):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            share = len(batch) // self.world_size
            offset = self.rank * share
            yield BatchKey(epoch, step, batch[offset : offset + share], offset)

    def _order(self, epoch: int) -> np.ndarray:
        """int64 image positions of the whole epoch, batch after batch, the same on all ranks."""
        if self._order_of is None or self._order_of[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch))
            if self.people_per_batch is None:
                order = self._plain_order(rng)
            else:
                order = self._people_order(rng)
            self._order_of = epoch, order
        return self._order_of[1]

    def _plain_order(self, rng: np.random.Generator) -> np.ndarray:
        count = len(self._labels)
        order = rng.permutation(count) if self.shuffle else np.arange(count)
        rest = count % self.batch_size
        if self.drop_last:
            return order[: count - rest]
        short = -rest % self.world_size
        return np.concatenate([order, np.resize(order, short)]) if short else order

    def _people_order(self, rng: np.random.Generator) -> np.ndarray:
        assert self.people_per_batch is not None
        assert self.images_per_person is not None
        k, steps = self.images_per_person, self._steps
        count = len(self._labels)
        shuffled = rng.permutation(count) if self.shuffle else np.arange(count)
        by_person = shuffled[np.argsort(self._labels[shuffled], kind="stable")]
        _, first, sizes = np.unique(self._labels[by_person], return_index=True, return_counts=True)
        people = rng.permutation(len(sizes)) if self.shuffle else np.arange(len(sizes))
        # Deal each person's shuffled images out in hands of K; the last hand wraps around.
        hands = np.minimum(-(-sizes // k), steps)[people]
        owner = np.repeat(people, hands)
        hand = np.arange(len(owner)) - np.repeat(np.cumsum(hands) - hands, hands)
        places = (hand[:, None] * k + np.arange(k)) % sizes[owner, None]
        images = by_person[first[owner, None] + places]
        # Hand j goes to batch j mod steps: a person's hands lie side by side and number at most
        # `steps`, so no two of them meet. Each row of that table (place p of all batches) is then
        # shuffled by itself, which keeps this true but for the person who runs over from the row
        # above: that one's hands choose first, among the batches it is not in yet.
        room = self.people_per_batch * steps
        table = images[:room].reshape(self.people_per_batch, steps, k)
        if self.shuffle:
            owners = owner[:room].reshape(self.people_per_batch, steps)
            where = rng.permutation(steps)
            table[0, where] = table[0].copy()
            for row in range(1, len(table)):
                before = where[owners[row - 1] == owners[row, 0]]
                first_hands = int((owners[row] == owners[row, 0]).sum())
                free = np.ones(steps, dtype=bool)
                free[before] = False
                chosen = rng.permutation(np.flatnonzero(free))[:first_hands]
                free[:] = True
                free[chosen] = False
                where = np.concatenate([chosen, rng.permutation(np.flatnonzero(free))])
                table[row, where] = table[row].copy()
        return table.swapaxes(0, 1).reshape(-1)

    def _count_steps(self) -> int:
        if self.people_per_batch is None or self.images_per_person is None:
            full, rest = divmod(len(self._labels), self.batch_size)
            return full + (0 if self.drop_last or not rest else 1)
        # The most batches of P different people: the largest T with Σ min(hands, T) >= P·T.
        sizes = np.unique(self._labels, return_counts=True)[1]
        hands = -(-sizes // self.images_per_person)
        low, high = 1, int(hands.sum()) // self.people_per_batch
        while low < high:
            middle = (low + high + 1) // 2
            if int(np.minimum(hands, middle).sum()) >= self.people_per_batch * middle:
                low = middle
            else:
                high = middle - 1
        return low
