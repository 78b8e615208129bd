"""SIGINT, SIGTERM and SIGHUP: an orderly end at the first, an immediate one at the second."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any, Self

from sphereface2.errors import Stopped

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
# A terminal's Ctrl-C reaches a process itself and again through its launcher: that is one.
_SAME = 1.0
STOPPED = "stopped; what is done is kept: run the same command again to go on"
"""Said by commands whose work is many small parts."""

# Seconds in which a process ends once its parent has died.
_ORPHAN = 20.0


PARENT = "SPHEREFACE2_PARENT"
"""Environment variable: the process without which its child must not go on."""


def parent() -> int | None:
    """The process whose death ends this one: who set `PARENT`, or torchrun; None otherwise."""
    if PARENT in os.environ:
        return int(os.environ[PARENT])
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None


class Stopper:
    """A block of code that signals end in order.

    The first signal raises `Stopped` in the main thread, at once or, within `deferred`, at the next
    `check`. A second one, a second or more later, ends the process at once, also while it waits
    inside a library. Signals that the process was started to ignore stay ignored. Off the main
    thread, which alone receives signals, it does nothing.

    Args:
        message: what is kept and how to go on, for `Stopped`.
        forward: also called with each signal's number, in a thread.
        parent: the process whose death counts as SIGTERM.
    """

    def __init__(
        self,
        message: str,
        *,
        forward: Callable[[int], None] | None = None,
        parent: int | None = None,
    ) -> None:
        self.message = message
        #: The first signal's number.
        self.signum: int | None = None
        self._forward, self._parent = forward, parent
        self._deferred = 0
        self._before: dict[int, Any] = {}
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for signum in SIGNALS:
            if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                self._before[signum] = signal.signal(signum, self._handle)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._before)  # see `starting_process`
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is None:
            return
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._writer.send(b"\0")
        self._thread.join()
        self._reader.close()
        self._writer.close()

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Let a signal wait for the next `check`."""
        self._deferred += 1
        try:
            yield
        finally:
            self._deferred -= 1

    def check(self) -> None:
        """Raise `Stopped` if a signal has come."""
        if self.signum is not None:
            raise Stopped(self.message, self.signum)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        first = self.signum is None
        if first:
            self.signum = signum
        if first and not self._deferred:
            self.check()

    def _watch(self) -> None:
        """In a thread: the main one may be waiting in a library, where no handler runs."""
        began: float | None = None
        orphan = False
        while True:
            ready, _, _ = select.select([self._reader], [], [], 0.5)
            now = time.monotonic()
            if self._parent is not None and not orphan and os.getppid() != self._parent:
                orphan = True
                began = now
                os.kill(os.getpid(), signal.SIGTERM)
            if orphan and began is not None and now > began + _ORPHAN:
                os._exit(128 + signal.SIGTERM)
            for signum in self._reader.recv(64) if ready else b"":
                if not signum:
                    return
                if signum not in SIGNALS:
                    continue
                if self._forward is not None:
                    self._forward(signum)
                if began is None:
                    began = now
                elif now > began + _SAME and not orphan:
                    os._exit(128 + signum)


def starting_workers() -> contextlib.AbstractContextManager[None]:
    """Where worker processes are started: signals wait in them until `in_worker`.

    A worker that is not forked imports for seconds before that, and a Ctrl-C would end it in the
    middle: its parent would tell of a worker that was killed.
    """
    if hasattr(signal, "pthread_sigmask"):
        from multiprocessing import resource_tracker

        # It starts with the first worker, and lets signals through again where it does.
        resource_tracker.ensure_running()
    return _blocking(SIGNALS)


def starting_process() -> contextlib.AbstractContextManager[None]:
    """Where Python is started anew: Ctrl-C waits in it until its `Stopper`, or until `in_rank`.

    It would tell in a traceback which import was interrupted.
    """
    return _blocking([signal.SIGINT])


def in_rank() -> None:
    """For the start of a command that `starting_process` started: until its `Stopper` it dies."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


@contextlib.contextmanager
def _blocking(signums: Iterable[int]) -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signums)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def in_worker() -> None:
    """For the start of a worker process: its parent alone takes signals, and decides its end.

    A signal to the whole process group would end workers in the middle of a step. They end when
    their parent ends them (`Process.terminate`) or dies, however that happens.
    """
    signal.set_wakeup_fd(-1)
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if hasattr(signal, "sigwaitinfo"):  # elsewhere nobody can tell who sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        # Of a worker that a server has forked, the default from Python 3.14 on, the system's parent
        # is that server.
        pid = os.getppid() if parent is None else parent.pid
        threading.Thread(target=_obey, args=(pid,), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    if parent is not None:
        threading.Thread(target=_follow, args=(parent.sentinel,), daemon=True).start()


def _obey(parent: int | None) -> None:
    while True:
        if signal.sigwaitinfo([signal.SIGTERM]).si_pid == parent:
            os._exit(0)


def _follow(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
