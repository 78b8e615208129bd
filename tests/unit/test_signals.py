"""Workers obey their parent alone, however they were started."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing.synchronize import Event

import pytest

from sphereface2.signals import in_worker, starting_workers


def work(ready: Event) -> None:
    in_worker()
    ready.set()
    time.sleep(60)


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_a_worker_ends_when_its_parent_says_so_and_for_nobody_else(method: str) -> None:
    context = multiprocessing.get_context(method)
    ready = context.Event()
    worker = context.Process(target=work, args=(ready,))
    with starting_workers():
        worker.start()
    try:
        assert ready.wait(60)
        if hasattr(signal, "sigwaitinfo"):
            stranger = f"import os; os.kill({worker.pid}, {signal.SIGTERM:d})"
            subprocess.run([sys.executable, "-S", "-c", stranger], check=True)
            worker.join(0.5)
            assert worker.is_alive()
        worker.terminate()
        worker.join(10)
        assert worker.exitcode in (0, -signal.SIGTERM)
    finally:
        assert worker.pid is not None
        if worker.is_alive():
            os.kill(worker.pid, signal.SIGKILL)
            worker.join()
