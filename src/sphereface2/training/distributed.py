"""Processes of one run: one, or many started by torchrun."""

from __future__ import annotations

import gc
import os
import time
import uuid
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
        store = _fresh_store(rank, size)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=COLLECTIVE_TIMEOUT
        )
    try:
        yield World(rank, size, local_rank, local_size, place)
    finally:
        if size > 1:
            dist.destroy_process_group()
            # Gloo's threads end with the last reference to the group, and what was trained is full
            # of cycles. A thread that drops a tensor while Python shuts down aborts the process
            # (pytorch issue 190489).
            gc.collect()


def _fresh_store(rank: int, size: int) -> dist.Store:
    """The launcher's store under a prefix that no earlier start of these ranks has used.

    torchrun keeps one store over its restarts, so a restarted rank can read the address of a peer
    that is dead. Rank 0 names the start; a rank that reads the name of an older one finds no mark
    of its own in the answer and asks again. (Restart counts do not serve: they may differ between
    the nodes of one job.)
    """
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=COLLECTIVE_TIMEOUT))
    mark = uuid.uuid4().hex
    if rank == 0:
        store.set("start", mark)
        answers = [f"{mark}/{other}" for other in range(1, size)]
        store.wait(answers, COLLECTIVE_TIMEOUT)
        store.set(f"{mark}/all", b" ".join(store.get(answer) for answer in answers))
        return dist.PrefixStore(mark, store)
    deadline = time.monotonic() + COLLECTIVE_TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        start = store.get("start").decode()
        store.set(f"{start}/{rank}", mark)
        if store.check([f"{start}/all"]) and mark in store.get(f"{start}/all").decode().split():
            return dist.PrefixStore(start, store)
        time.sleep(0.02)
    raise TimeoutError(
        f"rank {rank} waited {COLLECTIVE_TIMEOUT.total_seconds():.0f} s for rank 0; "
        "look at the log of rank 0, and whether MASTER_ADDR can be reached from here"
    )
