"""What this process may use of its machine: cores and memory, within its container's limits."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Of glibc's malloc.h: the number of blocks outside the heap, and what stays free at its end.
_MMAP_MAX, _TRIM_THRESHOLD = -4, -1


def cores(root: Path = Path("/")) -> int:
    """CPU cores: those that the process may run on, and no more than its container has time for."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    count = len(usable) or os.cpu_count() or 1
    group = root / "sys" / "fs" / "cgroup"
    for places in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((group / place).read_text() for place in places).split()
            limit = math.ceil(int(quota) / int(period))
        except (OSError, ValueError):  # no such system, or "max": no limit
            continue
        if limit > 0:  # -1: no limit
            count = min(count, limit)
    return count


def share_of_cores(processes: int) -> int:
    """CPU cores for each of so many processes of this machine: one at the least."""
    return max(1, cores() // processes)


def compute_threads(processes: int = 1) -> int:
    """Threads to compute on, for each of so many processes of this machine: its share of the cores.

    Fewer where ``OMP_NUM_THREADS`` says so. torchrun sets it to 1 where the user has not, which
    says nothing.
    """
    share, wanted = share_of_cores(processes), os.environ.get("OMP_NUM_THREADS", "")
    if "TORCHELASTIC_RUN_ID" in os.environ and wanted == "1":
        return share
    return min(share, int(wanted)) if wanted.isdecimal() and int(wanted) else share


def keep_freed_memory() -> None:
    """Have this process use large blocks that it has freed again, by glibc; elsewhere nothing.

    glibc gives them back to the system, and a network on the CPU, which wants the same ones again
    for its next batch, then spends much of its time on the faults of fresh pages: a twentieth of a
    training step, a tenth of embedding. It cannot be undone, and of threads beside the main one it
    keeps blocks below 64 MB.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # another C library
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)


@contextmanager
def using_faiss(threads: int | None = None) -> Iterator[Any]:
    """FAISS, called by this thread in here on so many threads; None: on as many as OpenMP says.

    The number is OpenMP's, which PyTorch shares where it was loaded first: left as it is, a network
    would run on as many from then on. On macOS FAISS and PyTorch have an OpenMP each, the second of
    which would end the process unless it is allowed, and they crash where both have several threads
    (faiss-wheels issue 73): there FAISS has one.
    """
    if sys.platform == "darwin":
        os.environ["KMP_DUPLICATE_LIB_OK"], threads = "TRUE", 1
    import faiss

    before = faiss.omp_get_max_threads()
    if threads is not None:
        faiss.omp_set_num_threads(threads)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


def free_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still have by the system and its container; None: unknown."""
    free: list[int] = []
    try:
        lines = (root / "proc" / "meminfo").read_text().splitlines()
        table = dict(line.split(":") for line in lines)
        free.append(int(table["MemAvailable"].split()[0]) * 1024)
    except (OSError, KeyError, ValueError):
        pass
    for place, limit, used, cached in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        (
            "sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_inactive_file",
        ),
    ):
        try:
            most, now = (int((root / place / name).read_text()) for name in (limit, used))
            # Files that were read, and are forgotten when memory is wanted.
            lines = (root / place / "memory.stat").read_text().splitlines()
            kept = int(dict(line.split() for line in lines)[cached])
        except (OSError, KeyError, ValueError):  # no such system, or "max": no limit
            continue
        free.append(most - now + kept)
    return max(0, min(free)) if free else None
