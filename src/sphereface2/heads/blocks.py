"""Which rows of W are worked on together, and where the samples' own classes lie in them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = {"cpu": 4096, "cuda": 16384}
"""Classes a block by default: on a CPU so few that a block's cosines and prototypes stay in the
cache, on a GPU so many that its kernels are busy."""


@dataclass(frozen=True)
class Block:
    """Some rows of W."""

    rows: slice | Tensor
    """A range, or ascending int64 indices on the CPU."""
    own: tuple[Tensor, Tensor] | None
    """(samples, columns) of the entries of the block that are a sample's own class."""
    weight: float = 1.0
    """Factor of the negatives in the block."""

    def __len__(self) -> int:
        if isinstance(self.rows, slice):
            return int(self.rows.stop - self.rows.start)
        return len(self.rows)


class SortedLabels:
    """A batch's labels in ascending order, on the CPU: one synchronisation with a GPU a step.

    Args:
        labels: (n,) int64 rows of the local W; those outside it never match.
    """

    def __init__(self, labels: Tensor) -> None:
        self.device = labels.device
        self.labels, self.samples = labels.cpu().sort(stable=True)

    def blocks(self, rows: int, chunk: int) -> Iterator[Block]:
        """All of ``rows`` rows in ranges of ``chunk``."""
        for start in range(0, rows, chunk):
            stop = min(start + chunk, rows)
            low, high = self._between(start, stop)
            columns = self.labels[low:high] - start
            yield Block(slice(start, stop), self._own(low, high, columns))

    def blocks_of(self, rows: Tensor, chunk: int, weight: float = 1.0) -> Iterator[Block]:
        """The ascending ``rows`` (k,), each of which may be some samples' own."""
        for part in rows.split(chunk):
            low, high = self._between(int(part[0]), int(part[-1]) + 1)
            labels = self.labels[low:high]
            columns = torch.searchsorted(part, labels)
            inside = part[columns] == labels
            yield Block(part, self._own(low, high, columns, inside), weight)

    def present(self, rows: int) -> Tensor:
        """The rows below ``rows`` that are some sample's own class, ascending, each once."""
        low, high = self._between(0, rows)
        return torch.unique_consecutive(self.labels[low:high])

    def _between(self, start: int, stop: int) -> tuple[int, int]:
        low, high = torch.searchsorted(self.labels, torch.tensor([start, stop])).tolist()
        return low, high

    def _own(
        self, low: int, high: int, columns: Tensor, inside: Tensor | None = None
    ) -> tuple[Tensor, Tensor] | None:
        samples = self.samples[low:high]
        if inside is not None:
            samples, columns = samples[inside], columns[inside]
        if not len(samples):
            return None
        return samples.to(self.device), columns.to(self.device)
