"""Dynamic batching: what arrives while the network is busy goes through it together."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np


class Batcher:
    """Threads that feed batches to the network.

    A batch is closed when it holds ``max_batch`` items, when ``max_wait`` seconds have passed since
    its first, or when nobody else is on the way: a lone client never waits.

    On a processor several batches at once, of few cores each, take less time than one after the
    other of all cores, and leave none idle while a batch is gathered.

    Args:
        forward: n items, and how many batches are in the network with them, to an array of n rows.
        max_batch: items in one call of ``forward``.
        max_wait: maximum batching delay in seconds.
        on_the_way: how many accepted items are still to be submitted.
        workers: threads, and batches at once.
        observe: is told the size and the seconds of each batch.
    """

    def __init__(
        self,
        forward: Callable[[list[np.ndarray], int], np.ndarray],
        *,
        max_batch: int,
        max_wait: float,
        on_the_way: Callable[[], int],
        workers: int = 1,
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        self._forward = forward
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._on_the_way = on_the_way
        self._observe = observe
        self._queue: queue.SimpleQueue[tuple[np.ndarray, Future[np.ndarray]] | None]
        self._queue = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._gathering = threading.Lock()  # two idle threads would halve each other's batches
        self._busy = 0
        self._threads = [
            threading.Thread(target=self._run, name="network", daemon=True) for _ in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return self._queue.qsize()

    @property
    def alive(self) -> bool:
        """Whether every thread runs."""
        return all(thread.is_alive() for thread in self._threads)

    def submit(self, item: np.ndarray) -> Future[np.ndarray]:
        """Queue one item; the future gives its row, or the exception of its batch."""
        future: Future[np.ndarray] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._queue.put((item, future))
        return future

    def close(self) -> None:
        """Finish what is queued and end the threads."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while True:
            with self._gathering:
                batch = self._gather()
            if batch is None:
                return
            batch = [pair for pair in batch if pair[1].set_running_or_notify_cancel()]
            if batch:
                self._answer(batch)

    def _gather(self) -> list[tuple[np.ndarray, Future[np.ndarray]]] | None:
        """The next batch; None at the end, which stays in the queue for the other threads."""
        batch: list[tuple[np.ndarray, Future[np.ndarray]]] = []
        until = float("inf")
        while len(batch) < self._max_batch:
            wait = max(0.0, until - time.monotonic()) if self._on_the_way() else 0.0
            try:
                item = self._queue.get(timeout=wait if batch else None)
            except queue.Empty:
                break
            if item is None:
                self._queue.put(None)
                return batch or None
            if not batch:
                until = time.monotonic() + self._max_wait
            batch.append(item)
        return batch

    def _answer(self, batch: Sequence[tuple[np.ndarray, Future[Any]]]) -> None:
        with self._lock:
            self._busy += 1
            busy = self._busy
        started = time.monotonic()
        try:
            rows = self._forward([item for item, _ in batch], busy)
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
            return
        finally:
            with self._lock:
                self._busy -= 1
        self._observe(len(batch), time.monotonic() - started)
        for (_, future), row in zip(batch, rows, strict=True):
            future.set_result(row)
