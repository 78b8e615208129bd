"""One rank's share of the classes, and the only communication a sharded head needs.

Every rank owns a contiguous range of the rows of W. A step gathers the embeddings and labels of all
ranks and returns sums over shards to the ranks that own the samples: O(B·d) bytes, whatever C.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.distributed.tensor import Shard as SplitRows

from sphereface2.errors import UserError

# Under their names since torch 2.14, or those before it.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_COUNT_BITS = 31  # of an int64, for the samples of a rank; a checksum has 32


@dataclass(frozen=True)
class Shard:
    """The rows ``start`` … ``stop`` - 1 of W that this rank owns; all of them without a group.

    Ranges are those of a DTensor split by rows: ⌈C/ranks⌉ rows a rank, the last ranks fewer or
    none. ``classes`` is C.
    """

    start: int
    stop: int
    classes: int
    group: dist.ProcessGroup | None = None
    size: int = 1

    @classmethod
    def of(cls, num_classes: int, group: dist.ProcessGroup | None) -> Shard:
        """This rank's share of ``num_classes`` within ``group``."""
        if group is None:
            return cls(0, num_classes, num_classes)
        size = dist.get_world_size(group)
        rows = math.ceil(num_classes / size)
        start = min(dist.get_rank(group) * rows, num_classes)
        return cls(start, min(start + rows, num_classes), num_classes, group, size)

    def __deepcopy__(self, memo: dict[int, Any]) -> Shard:
        return self  # a module's copy talks in the same group, which cannot be copied

    @property
    def rows(self) -> int:
        """Number of classes owned."""
        return self.stop - self.start

    def distribute(self, rows: Tensor, num_classes: int) -> Tensor:
        """The (C, …) DTensor of which ``rows`` are this rank's; ``rows`` itself when alone."""
        if self.group is None:
            return rows
        mesh = DeviceMesh.from_group(self.group, rows.device.type)
        # torch's caches of DTensor operations keep the mesh for ever, and the mesh the group, for
        # tracing only. Gloo's threads would outlive dist.destroy_process_group, and one that drops
        # its last tensor while Python shuts down aborts the process (pytorch issue 190489).
        getattr(mesh, "_pg_registry", {}).clear()
        shape = torch.Size((num_classes, *rows.shape[1:]))
        return DTensor.from_local(
            rows, mesh, [SplitRows(0)], run_check=False, shape=shape, stride=rows.stride()
        )

    def gather(
        self,
        x: Tensor,
        labels: Tensor,
        *,
        even: bool = False,
        terms: dict[str, Any] | None = None,
    ) -> Batch:
        """Every rank's unit embeddings (B, d) and labels (B,), in rank order.

        Args:
            even: all ranks have equally many and agree, so that nothing needs to be asked and
                waited for.
            terms: JSON-able, what must be the same on all ranks besides the shapes, by its name.

        Raises:
            UserError: alike on all ranks: it is not.
        """
        if self.group is None:
            return Batch(x, labels, [len(x)], 0)
        counts = [len(x)] * self.size
        if not even:
            sizes = {"num_classes": self.classes, "embedding_dim": x.shape[1]}
            terms = {**sizes, "dtype": str(x.dtype), **(terms or {})}
            counts = self._gather_counts(len(x), json.dumps(terms), x.device)
        # Labels travel as the bit patterns of as many floating-point columns as they need: one
        # message instead of two.
        packed = x.new_zeros(max(counts), x.shape[1] + 8 // x.element_size())
        packed[: len(x), : x.shape[1]] = x
        packed[: len(x), x.shape[1] :] = labels[:, None].contiguous().view(x.dtype)
        everybody = x.new_empty(self.size * max(counts), packed.shape[1])
        all_gather(everybody, packed, group=self.group)
        if min(counts) < max(counts):
            everybody = torch.cat(
                [part[:n] for part, n in zip(everybody.split(max(counts)), counts, strict=True)]
            )
        return Batch(
            everybody[:, : x.shape[1]].contiguous(),
            everybody[:, x.shape[1] :].contiguous().view(torch.int64)[:, 0],
            counts,
            dist.get_rank(self.group),
        )

    def scatter_sum(self, partial: Tensor, batch: Batch) -> Tensor:
        """Sum of the ranks' ``partial`` (samples of all ranks, k); this rank's samples of it."""
        if self.group is None:
            return partial
        largest = max(batch.counts)
        if min(batch.counts) < largest:
            parts = partial.split(batch.counts)
            partial = torch.cat(
                [torch.nn.functional.pad(p, (0, 0, 0, largest - len(p))) for p in parts]
            )
        own = partial.new_empty(largest, partial.shape[1])
        reduce_scatter(own, partial, group=self.group)
        return own[: batch.counts[batch.rank]]

    def sum(self, value: Tensor) -> Tensor:
        """Sum of the ranks' values, in place."""
        if self.group is not None:
            dist.all_reduce(value, group=self.group)
        return value

    def logsumexp(self, value: Tensor) -> Tensor:
        """log Σ exp of the ranks' values (n,)."""
        if self.group is None:
            return value
        everybody = value.new_empty(self.size * len(value))
        all_gather(everybody, value, group=self.group)
        return everybody.view(self.size, -1).logsumexp(0)

    def _gather_counts(self, count: int, terms: str, device: torch.device) -> list[int]:
        # A checksum of the terms travels above the count, in the same 8 bytes.
        checked = self._gather_numbers(zlib.crc32(terms.encode()) << _COUNT_BITS | count, device)
        if len({one >> _COUNT_BITS for one in checked}) > 1:
            self._tell_apart(terms.encode(), device)
        return [one & ((1 << _COUNT_BITS) - 1) for one in checked]

    def _gather_numbers(self, number: int, device: torch.device) -> list[int]:
        numbers = torch.empty(self.size, dtype=torch.int64, device=device)
        all_gather(numbers, torch.tensor([number], device=device), group=self.group)
        return numbers.tolist()

    def _tell_apart(self, terms: bytes, device: torch.device) -> None:
        """UserError that names the first of the terms that differs between ranks."""
        length = max(self._gather_numbers(len(terms), device))
        own = torch.tensor(list(terms.ljust(length)), dtype=torch.uint8, device=device)
        everybody = own.new_empty(self.size * length)
        all_gather(everybody, own, group=self.group)
        told = [json.loads(bytes(part.tolist())) for part in everybody.split(length)]
        for rank, name, here, there in differences(told):
            raise UserError(
                f"a module that is sharded over ranks must be the same on each, and {name} is "
                f"{here} on rank 0 and {there} on rank {rank}: give all ranks the same options, "
                "and the number of people of the whole set"
            )


def differences(told: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str, Any, Any]]:
    """Where what ranks tell, in rank order, is not what rank 0 tells: rank, name, both values.

    Example:
        >>> list(differences([{"m": 0.3}, {"m": 0.3}, {"m": 0.2, "s": 64}]))
        [(2, 'm', 0.3, 0.2), (2, 's', None, 64)]
    """
    first, *others = told
    for rank, other in enumerate(others, 1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                yield rank, name, first.get(name), other.get(name)


@dataclass(frozen=True)
class Batch:
    """The samples of all ranks: embeddings (n, d), labels (n,), samples of each rank."""

    x: Tensor
    labels: Tensor
    counts: list[int]
    rank: int


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a tensor that may be sharded, with gradient."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
