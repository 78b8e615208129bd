"""Blocks of rows of W that are worked on together, and where samples' own classes lie in them.

A plan of all rows has shapes that do not depend on the labels' values, so that making it waits for
no device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sphereface2.margins import Own

CPU_CHUNK = 4096
"""Classes a block on a CPU: so few that a block's cosines and prototypes stay in the cache."""
GPU_NUMBERS = 1 << 26
"""Cosines, and numbers of prototypes, that a block on a GPU holds at most: a block's kernels wait
for a host that needs a third of a millisecond to start them (benchmarks/gpu/NOTES.md)."""


def default_chunk(device_type: str, batch: int, dim: int) -> int:
    """Classes a block for the samples of all ranks, ``batch``, and embeddings of ``dim`` numbers.

    Example:
        >>> default_chunk("cpu", 1024, 512), default_chunk("cuda", 1024, 512)
        (4096, 65536)
    """
    if device_type == "cpu":
        return CPU_CHUNK
    return max(CPU_CHUNK, GPU_NUMBERS // max(batch, dim))


@dataclass(frozen=True)
class Block:
    """Some rows of W.

    Attributes:
        rows: a range, or int64 indices.
        own: the column of each sample's own class among them.
        weight: factor of the negatives in the block.
        skip: (c,) bool, rows that do not count and are not trained: a plan whose shapes depend on
            no value may name a row twice and skip it once. None: all count.
    """

    rows: slice | Tensor
    own: Own
    weight: float = 1.0
    skip: Tensor | None = None

    def __len__(self) -> int:
        if isinstance(self.rows, slice):
            return int(self.rows.stop - self.rows.start)
        return len(self.rows)


class RowUpdate(Protocol):
    """An optimiser that consumes the gradient of W block by block."""

    def begin_step(self) -> None:
        """A pass over the blocks begins."""

    def update_(self, block: Block, unit: Tensor | None, gradient: Tensor) -> None:
        """Take a step with the block's rows of W.

        Args:
            block: rows among this rank's.
            unit: (c, d) those rows after normalisation, may be overwritten; None where the
                kernels are used, which normalise the rows on their way.
            gradient: (c, d) gradient by the normalised rows, may be overwritten.
        """


def all_rows(labels: Tensor, rows: int, chunk: int) -> Iterator[Block]:
    """All of ``rows`` rows in ranges of ``chunk``.

    Args:
        labels: (B,) int64 rows of the local W; those outside it are in no block.

    Example:
        >>> import torch
        >>> for block in all_rows(torch.tensor([0, 5]), rows=6, chunk=4):
        ...     print(block.rows, block.own.present.tolist())
        slice(0, 4, None) [True, False]
        slice(4, 6, None) [False, True]
    """
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        yield Block(slice(start, stop), Own(labels, start, stop - start))


def chosen_rows(
    places: Tensor,
    rows: Tensor,
    chunk: int,
    weight: float = 1.0,
    skip: Tensor | None = None,
) -> Iterator[Block]:
    """The ``rows`` (k,) in blocks of ``chunk``.

    Args:
        places: (B,) int64, where each sample's own class lies among ``rows``; -1: nowhere.
        skip: (k,) bool, as in `Block`.
    """
    for start in range(0, len(rows), chunk):
        part = rows[start : start + chunk]
        own = Own(places, start, len(part))
        yield Block(part, own, weight, None if skip is None else skip[start : start + chunk])
