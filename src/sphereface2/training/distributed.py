"""Processes of one run: one, or many, started here or by torchrun."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from sphereface2.console import note
from sphereface2.device import resolve
from sphereface2.errors import Stopped, UserError
from sphereface2.machine import compute_threads, keep_freed_memory
from sphereface2.signals import PARENT, SIGNALS, Stopper, starting_process

T = TypeVar("T")

# A rank that waits longer than this for another takes it for dead and ends the run.
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
# Seconds that ranks have to end by themselves once one of them has failed.
_GRACE = 10.0


@dataclass(frozen=True)
class World:
    """This process's place in the run."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    process_group: dist.ProcessGroup | None = None
    """That the ranks talk in; None: the default one."""
    background: World | None = None
    """The same ranks in a group of their own, on the CPU, for a thread beside the main one."""

    @property
    def is_main(self) -> bool:
        """True on the one rank that logs and writes shared files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier(group=self.process_group)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.process_group)
        return box[0]

    def on_main(self, do: Callable[[], T]) -> T:
        """What ``do`` gives on rank 0, which alone calls it; its UserError is every rank's."""
        result: T | None = None
        failure: UserError | None = None
        if self.is_main:
            try:
                result = do()
            except UserError as error:
                failure = error
            except OSError as error:
                failure = UserError(f"{error.filename}: {error.strerror}")
        result, failure = self.broadcast((result, failure))
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]

    def mean(self, value: float) -> float:
        """Mean over ranks."""
        return self.count(value)[0] / self.size

    def count(self, *values: float) -> list[float]:
        """The sum over ranks of each value, on the CPU: no GPU is waited for."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.process_group)
        return total.tolist()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.process_group)
        return tensor

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copy rank 0's values of floating-point tensors of one type into every rank's."""
        if self.size > 1 and tensors:
            together = torch.cat([tensor.flatten() for tensor in tensors])
            dist.broadcast(together, src=0, group=self.process_group)
            parts = together.split([tensor.numel() for tensor in tensors])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    @property
    def group(self) -> dist.ProcessGroup | None:
        """All ranks; None alone."""
        return dist.group.WORLD if self.size > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        dist.all_gather_object(box, value, group=self.process_group)
        return box


@contextmanager
def world(device: str = "auto", threads: int | None = None) -> Iterator[World]:
    """Join the process group that the environment describes, or be alone; set up the CPU.

    ``gloo`` between CPUs, ``nccl`` between GPUs. The group is destroyed on leaving. Of ranks that
    fail for the same reason, or because another one failed, the first alone says so: the others
    leave with ``SystemExit``.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    place = resolve(device, local_rank)
    torch.set_num_threads(threads or compute_threads(local_size))
    if place.type == "cuda":
        torch.cuda.set_device(place)
    else:
        keep_freed_memory()
    alone = World(rank, size, local_rank, local_size, place)
    if size == 1:
        yield alone
        return
    store: dist.Store | None = None
    try:
        store = _fresh_store(rank, size)
        if place.type == "mps":
            raise UserError(
                f"an Apple GPU trains on one rank, and these are {size}: leave out --ranks, or set "
                "training.device to cpu"
            )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
        )
        beside = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        assert isinstance(beside, dist.ProcessGroup)  # every rank is in it
        yield dataclasses.replace(
            alone, background=dataclasses.replace(alone, process_group=beside)
        )
    except UserError as error:
        _end_as_others(store, error)
    except Stopped as stop:
        if rank == 0:
            raise
        raise SystemExit(stop.status) from stop
    except RuntimeError as error:
        if not _lost(error):
            raise
        _end_as_others(store, error)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        # Gloo's threads end with the last reference to the group, and what was trained is full
        # of cycles. A thread that drops a tensor while Python shuts down aborts the process
        # (pytorch issue 190489).
        gc.collect()


def _lost(error: RuntimeError) -> bool:
    """Whether the error means that another rank, or the way to it, is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _end_as_others(store: dist.Store | None, error: RuntimeError | UserError) -> NoReturn:
    """Raise what is to be said of ``error``, unless another rank has said it."""
    mistake = isinstance(error, UserError)
    sentence = (
        str(error)
        if mistake
        else "lost contact with another rank, which ended or cannot be reached; the last "
        "checkpoint stays: start the same command again to go on"
    )
    key = hashlib.sha256(sentence.encode()).hexdigest()
    try:
        said = store is not None and (
            store.add(key, 1) > 1 or (store.add("said", int(mistake)) > 0 and not mistake)
        )
    except RuntimeError:  # the launcher, which keeps the store, is gone
        said = False
    if said:
        raise SystemExit(2) from error
    raise UserError(sentence) from error


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
    raise UserError(
        f"rank {rank} waited {COLLECTIVE_TIMEOUT.total_seconds():.0f} s for rank 0; "
        "look at the log of rank 0, and whether MASTER_ADDR can be reached from here"
    )


def launch(count: int, words: Sequence[str]) -> None:
    """Run ``python WORDS`` as ``count`` ranks on this machine.

    They are passed the signals that come here, and end when this process dies.

    Raises:
        UserError: a rank failed, and has said why.
        SystemExit: they were stopped by a signal, in order, and have said so.
    """
    store = dist.TCPStore(
        "127.0.0.1",
        0,
        is_master=True,
        wait_for_workers=False,
        use_libuv=sys.platform != "win32",  # for which torch is built without
    )
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here, not in rank 0
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        PARENT: str(os.getpid()),
    }
    environment.setdefault("OMP_NUM_THREADS", str(compute_threads(count)))
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(signum: int) -> None:
        with suppress(ValueError):  # on Windows, whose terminal sends Ctrl-C to the ranks as well
            for rank in ranks:
                rank.send_signal(signum)

    with Stopper("", forward=forward) as stopper, stopper.deferred():
        try:
            for number in range(count):
                own = environment | {"RANK": str(number), "LOCAL_RANK": str(number)}
                with starting_process():
                    ranks.append(subprocess.Popen([sys.executable, *words], env=own))
            failed = _wait(ranks)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
    if stopper.signum is not None and failed is not None:
        if failed[1] == -stopper.signum:  # it had not begun
            note("stopped")
        raise SystemExit(128 + stopper.signum)
    if failed is not None:
        rank_number, status = failed
        if status - 128 in SIGNALS:
            raise SystemExit(status)
        raise UserError(
            f"training ended: rank {rank_number} left with status {status}, see above for why"
        )


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    """Wait for all ranks; the number and status of one that failed, and not for another's sake."""
    deadline = float("inf")
    failed: list[tuple[int, int]] = []
    while True:
        running = [rank for rank in ranks if rank.poll() is None]
        for number, rank in enumerate(ranks):
            if rank.returncode and (number, rank.returncode) not in failed:
                deadline = min(deadline, time.monotonic() + _GRACE)
                failed.append((number, rank.returncode))
        if not running or time.monotonic() > deadline:
            # Who was killed comes before those who then missed it.
            return min(failed, key=lambda one: one[1] > 0, default=None)
        time.sleep(0.05)
