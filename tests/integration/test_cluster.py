"""Two nodes of one job, played by two torchrun agents on this machine: one dies and comes back."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from killing import SETTINGS, Run, metrics, unpack_faces, words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


# With the agents' shared store, a node that joins a job later waits for ever for the address that
# the first one has told before.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Node:
    """A torchrun agent and its ranks, which die together as a machine does."""

    def __init__(self, port: int, folder: Path, settings: dict[str, object], log: Path) -> None:
        launcher = [
            "--nnodes=1:2",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=127.0.0.1:{port}",
            "--rdzv-id=job",
            "--rdzv-conf=last_call_timeout=10,keep_alive_interval=2,keep_alive_max_attempt=10",
            "--max-restarts=9",
        ]
        fit = ["-m", "sphereface2", "fit", "--run-folder", str(folder), *words(settings)]
        with log.open("ab") as file:
            self.agent = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *launcher, *fit],
                stdout=file,
                stderr=file,
                env=ENVIRONMENT,
                start_new_session=True,
            )

    def die(self) -> None:
        children = ""
        with contextlib.suppress(FileNotFoundError):
            children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text()
        for process in [self.agent.pid, *map(int, children.split())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.agent.wait()


def until(ready: Callable[[], bool], log: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        time.sleep(0.05)


def test_a_node_dies_and_comes_back(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    settings: dict[str, object] = {
        **SETTINGS,
        "data.train": unpack_faces(tmp_path),
        "training.epochs": 100_000,
        "validation.every": 0,
    }

    def starts() -> list[tuple[int, int]]:
        """Ranks and first step of each start."""
        with contextlib.suppress(FileNotFoundError):
            record = json.loads((folder / "environment.json").read_text())
            return [(start["ranks"], start["step"]) for start in record["starts"]]
        return []

    def trains_on(ranks: int) -> bool:
        """Whether the last start has that many ranks and has gone on for some steps."""
        return bool(starts()) and starts()[-1][0] == ranks and step() >= starts()[-1][1] + 6

    def step() -> float:
        lines = metrics(folder)
        return lines[-1]["step"] if lines else 0

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first = Node(port, folder, settings, log)  # which keeps the job's store
    time.sleep(1)
    second = Node(port, folder, settings, log)
    try:
        until(lambda: trains_on(2), log)
        second.die()
        until(lambda: trains_on(1), log)
        second = Node(port, folder, settings, log)
        until(lambda: trains_on(2) and len(starts()) > 2, log)
        first.agent.terminate()  # as Slurm and Kubernetes end a job
        second.agent.terminate()
        first.agent.wait(60), second.agent.wait(60)
    finally:
        first.die()
        second.die()
    told = log.read_text()
    assert "stopped at step" in told
    stopped = json.loads((folder / "checkpoints/last/progress.json").read_text())
    assert stopped["world_size"] == 2
    ranks = [count for count, _ in starts()]
    assert [now for before, now in zip([0, *ranks], ranks, strict=False) if now != before] == [
        2, 1, 2,
    ]  # fmt: skip
    begun = [at for _, at in starts()]
    assert begun == sorted(begun), "a start went back behind the one before"
    # Whatever happened, the log tells each step once, and one process can finish the job.
    epochs = stopped["step"] / 3 + 2
    last = Run(folder, {"training.epochs": epochs}, command=["--resume", folder])
    assert last.wait() == [0], last.told()
    steps = [line["step"] for line in metrics(folder) if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
