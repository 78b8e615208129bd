"""Blocks of rows of W that are worked on together, and where samples' own classes lie in them.

A plan of all rows has shapes that do not depend on the labels' values, so that making it waits for
no device.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sphereface2.margins import Own

CHUNK = {"cpu": 4096, "cuda": 16384}
"""Classes a block by default: on a CPU so few that a block's cosines and prototypes stay in the
cache, on a GPU so many that its kernels are busy."""


@dataclass(frozen=True)
class Block:
    """Some rows of W.

    Attributes:
        rows: a range, or ascending int64 indices.
        own: the column of each sample's own class among them.
        weight: factor of the negatives in the block.
    """

    rows: slice | Tensor
    own: Own
    weight: float = 1.0

    def __len__(self) -> int:
        if isinstance(self.rows, slice):
            return int(self.rows.stop - self.rows.start)
        return len(self.rows)


class RowUpdate(Protocol):
    """An optimiser that consumes the gradient of W block by block."""

    def begin_step(self) -> None:
        """A pass over the blocks begins."""

    def update_(self, rows: slice | Tensor, unit: Tensor, gradient: Tensor) -> None:
        """Take a step with the rows ``rows`` of W, which are ``unit`` (c, d) after normalisation.

        Args:
            rows: a range or indices among this rank's rows.
            unit: (c, d), may be overwritten.
            gradient: (c, d) gradient by these rows, may be overwritten.
        """


def all_rows(labels: Tensor, rows: int, chunk: int) -> Iterator[Block]:
    """All of ``rows`` rows in ranges of ``chunk``.

    Args:
        labels: (B,) int64 rows of the local W; those outside it are in no block.

    Example:
        >>> for block in all_rows(torch.tensor([0, 5]), rows=6, chunk=4):
        ...     print(block.rows, block.own.present.tolist())
        slice(0, 4, None) [True, False]
        slice(4, 6, None) [False, True]
    """
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        present = (labels >= start) & (labels < stop)
        columns = (labels - start).clamp(0, stop - start - 1)
        yield Block(slice(start, stop), Own(columns, present))


def chosen_rows(labels: Tensor, rows: Tensor, chunk: int, weight: float = 1.0) -> Iterator[Block]:
    """The ascending ``rows`` (k,), each of which may be some samples' own.

    Args:
        labels: (B,) int64 rows of the local W, on the device of ``rows``.
    """
    for part in rows.split(chunk):
        columns = torch.searchsorted(part, labels).clamp_max(len(part) - 1)
        yield Block(part, Own(columns, part[columns] == labels), weight)
