"""Processes of one run: one, or many started by torchrun."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sphereface2.device import resolve

# A rank that waits longer than this for another takes it for dead and ends the run.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that logs and writes shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def mean(self, value: float) -> float:
        """Mean over ranks."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item() / self.size

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks; None alone."""
        return dist.group.WORLD if self.size > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value)
        return box


@contextmanager
def world(device: str = "auto", threads: int | None = None) -> Iterator[World]:
    """Join the process group that torchrun describes, or be alone; set the CPU threads.

    ``nccl`` on GPUs, ``gloo`` elsewhere. The group is destroyed on leaving.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    place = resolve(device, local_rank)
    torch.set_num_threads(threads or max(1, (os.cpu_count() or 1) // local_size))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if size > 1:
        backend = "nccl" if place.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
    try:
        yield World(rank, size, local_rank, local_size, place)
    finally:
        if size > 1:
            dist.destroy_process_group()
