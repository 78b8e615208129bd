"""Every test: the workers that run tests side by side share the cores instead of fighting."""

import os
import signal
import sys

# A worker of pytest-xdist inherits what the process that started it has set here for itself.
threads = int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
# For the processes that tests start too, and before torch reads it.
os.environ["OMP_NUM_THREADS"] = str(max(1, threads // workers))
# A shell's background jobs ignore Ctrl-C, those of nohup the hangup, and so would the programs that
# tests start and interrupt. A handler of any kind is not inherited by them.
for ignored, handler in {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: lambda *_: None,
}.items():
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, handler)

import pytest  # noqa: E402

from postgres import server  # noqa: E402, F401  (a fixture: a PostgreSQL server)


@pytest.fixture(autouse=True)
def _threads():
    """Torch's threads, which a test that serves may set, are for those after it as before."""
    before = torch.get_num_threads() if (torch := sys.modules.get("torch")) else None
    yield
    if before:
        torch.set_num_threads(before)
