"""Every test: the workers that run tests side by side share the cores instead of fighting."""

import os
import signal

THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
# For the processes that tests start too, and before torch reads it.
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
# A shell's background jobs ignore Ctrl-C, and so would the programs that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from postgres import server  # noqa: E402, F401  (a fixture: a PostgreSQL server)
