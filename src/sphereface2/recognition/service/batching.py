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
    """One thread that owns the network and feeds it batches.

    A batch is closed when it holds ``max_batch`` items, when ``max_wait`` seconds have passed since
    its first, or when nobody else is on the way: a lone client never waits.
    """

    def __init__(
        self,
        forward: Callable[[list[np.ndarray]], np.ndarray],
        *,
        max_batch: int,
        max_wait: float,
        on_the_way: Callable[[], int],
        observe: Callable[[int, float], None] = lambda size, seconds: None,
    ) -> None:
        """Start the thread.

        Args:
            forward: n items to an array of n rows.
            max_batch: items in one call of ``forward``.
            max_wait: maximum batching delay in seconds.
            on_the_way: how many accepted items have no answer yet, those of the batch included.
            observe: told the size and the seconds of each batch.
        """
        self._forward = forward
        self._max_batch = max_batch
        self._max_wait = max_wait
        self._on_the_way = on_the_way
        self._observe = observe
        self._queue: queue.SimpleQueue[tuple[np.ndarray, Future[np.ndarray]] | None]
        self._queue = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="network", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Items in the queue."""
        return self._queue.qsize()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, item: np.ndarray) -> Future[np.ndarray]:
        """Queue one item; the future gives its row, or the exception of its batch."""
        future: Future[np.ndarray] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._queue.put((item, future))
        return future

    def close(self) -> None:
        """Finish what is queued and end the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        last = False
        while not last and (first := self._queue.get()) is not None:
            batch = [first]
            deadline = time.monotonic() + self._max_wait
            while len(batch) < self._max_batch:
                wait = deadline - time.monotonic() if self._on_the_way() > len(batch) else 0.0
                try:
                    following = self._queue.get(timeout=max(wait, 0.0))
                except queue.Empty:
                    break
                if following is None:
                    last = True
                    break
                batch.append(following)
            self._answer([pair for pair in batch if pair[1].set_running_or_notify_cancel()])

    def _answer(self, batch: Sequence[tuple[np.ndarray, Future[Any]]]) -> None:
        if not batch:
            return
        started = time.monotonic()
        try:
            rows = self._forward([item for item, _ in batch])
        except Exception as error:
            for _, future in batch:
                future.set_exception(error)
            return
        self._observe(len(batch), time.monotonic() - started)
        for (_, future), row in zip(batch, rows, strict=True):
            future.set_result(row)
