"""Ranks in processes that start in a moment: runs of ``fit``, to be killed and resumed.

A fork server imports torch once; each rank is a child of it in a session of its own.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import multiprocessing
import os
import resource
import signal
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "sphereface2.cli",
        "sphereface2.training.fit",
        "torch._dynamo",  # which the first step imports, in seconds
        "torch.distributed.tensor",
        "torch.utils.tensorboard",
    ]
)
ARCHIVE = Path(__file__).parents[1] / "assets" / "0.1.0.tar.xz"
STEPS = 24
SETTINGS = {
    "backbone.name": "sfnet4",
    "backbone.width": 0.0625,
    "backbone.batch_norm": "true",
    "backbone.input_size": 64,
    "backbone.embedding_dim": 8,
    "backbone.dropout": 0.2,
    "head.r": 10,
    "head.loss_weight": 5,
    "data.validation_people": 2,
    "data.augmentation.affine": 0.5,
    "training.epochs": 8,
    "training.batch_size": 12,
    "training.lr": 0.05,
    "training.checkpoint_every": 2,
    "training.log_every": 1,
    "training.device": "cpu",
    "training.threads": 1,
    "validation.every": 3,
    "validation.pairs": "[]",
    "validation.fars": "[0.1]",
}


def unpack_faces(folder: Path) -> Path:
    """The 48 faces (8 people) that the tests of older versions keep."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "0.1.0" / "faces"


def words(settings: dict[str, object]) -> list[str]:
    return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]


class Run:
    """One start of ``fit`` on some ranks: with ``--run-folder``, or as ``command`` says."""

    def __init__(
        self,
        folder: Path,
        settings: dict[str, object] | None = None,
        ranks: int = 1,
        command: Sequence[object] | None = None,
        *,
        largest_file: int | None = None,
        links: bool = True,
        encoding: str = "utf-8",
        log: Path | None = None,
    ) -> None:
        self.folder, self.log = folder, log or folder.with_name(f"{folder.name}.log")
        given = ["--run-folder", folder] if command is None else command
        arguments = [*map(str, given), *words(settings or {})]
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._store = store
        options = (store.port, arguments, self.log, list(sys.path), largest_file, links, encoding)
        self.processes = [
            CONTEXT.Process(target=_rank, args=(rank, ranks, *options)) for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    def wait(self, timeout: float = 120) -> list[int | None]:
        """The ranks' exit codes."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.signal(signal.SIGKILL)
        return codes

    def signal(self, signum: int) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signum)

    def signal_when(self, signum: int, ready: Callable[[], bool], delay: float) -> bool:
        """Send a signal ``delay`` seconds after ``ready``; whether the run was still going on."""
        while not ready():
            if all(process.exitcode is not None for process in self.processes):
                return False
            time.sleep(0.001)
        time.sleep(delay)
        alive = any(process.exitcode is None for process in self.processes)
        self.signal(signum)
        return alive

    def steps(self) -> int:
        """Steps logged so far."""
        return sum(line["kind"] == "train" for line in metrics(self.folder))

    def is_writing(self) -> bool:
        """Whether a checkpoint is being written at this moment."""
        return any((self.folder / "checkpoints").glob(".step-*.tmp"))

    def told(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def tell(log: Path, encoding: str = "utf-8") -> None:
    """Standard output and errors of this process go to the end of a file."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = (
        os.fdopen(os.dup(output), "w", buffering=1, encoding=encoding) for _ in range(2)
    )


def join(rank: int, ranks: int, port: int) -> None:
    """Say of this process what torchrun would: one of so many, around a store at this port."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _rank(
    rank: int,
    ranks: int,
    port: int,
    arguments: list[str],
    log: Path,
    path: list[str],
    largest_file: int | None,
    links: bool,
    encoding: str,
) -> None:
    os.setsid()
    # Loader processes start as from the command line: here the default is another fork server.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    if not links:
        os.symlink = _no_symlink
    sys.path[:] = path
    tell(log, encoding)
    if ranks > 1:
        join(rank, ranks, port)
    from sphereface2.cli import main
    from sphereface2.training.fit import fit
    from sphereface2.training.report import report

    defaults = inspect.unwrap(fit).__kwdefaults__
    assert defaults["conclude"] is report
    defaults["conclude"] = lambda *_: None  # not part of what is killed, and slow
    sys.argv = ["sphereface2", "fit", *arguments]
    sys.exit(main())


def _no_symlink(*_: object, **__: object) -> None:
    raise OSError(errno.EPERM, "Operation not permitted")


def metrics(folder: Path) -> list[dict[str, float]]:
    """What ``metrics.jsonl`` says, without times and without a line that is being written."""
    timed = ("seconds", "images_per_second", "seconds_per_step")
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append({k: v for k, v in json.loads(line).items() if k not in timed})
    return found


def weights(folder: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "checkpoints" / which / "model.safetensors")


def stored_network(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """The network in ``state/`` of the last checkpoint: under ``backbone`` or ``average``."""
    reader = dcp.FileSystemReader(folder / "checkpoints" / "last" / "state")
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if key.startswith(f"{prefix}.")
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [key for key in expected if not torch.equal(found[key], expected[key])]
    assert not different, different


def left_behind(folder: Path) -> Iterator[str]:
    """Names in the checkpoints' folder that are neither checkpoints nor links."""
    for path in (folder / "checkpoints").iterdir():
        if not path.name.startswith(("step-", "last", "best")):
            yield path.name
