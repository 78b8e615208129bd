"""The database of a gallery: SQLite or PostgreSQL, its transactions, its errors in one sentence."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError

from sphereface2.errors import UserError
from sphereface2.extras import require
from sphereface2.recognition.gallery.types import GalleryUnavailableError, Packed

BUSY_SECONDS = 30  # to wait for another process's change
CONNECT_SECONDS = 10  # to wait for a server
ERASE_SECONDS = 5  # to wait for other processes' reads before bytes can be overwritten
# An image's row of 512 float32 fills half a page of 4 KB, the default, and wastes the rest.
_PAGE_BYTES = 16_384
# PostgreSQL's codes: a lock was not to be had in time, a deadlock, two changes of the same rows.
_HELD = ("55P03", "40P01", "40001")


@dataclass
class Database:
    """An engine with the gallery's transactions; errors of the database become one sentence."""

    engine: Engine
    name: str  # the address without its password, for messages
    path: Path | None = None  # SQLite's file; None on a server
    read_only: bool = False  # whether the file can only be read
    _new: bool = False  # whether the file was created here
    _writing: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def connect(cls, uri: str | Path, *, create: bool) -> Database:
        """An engine for an address; a server is not asked anything yet.

        Args:
            uri: a file, or ``postgresql+psycopg://user:password@host/database``.
            create: whether a file that does not exist is created, empty.

        Raises:
            UserError: an address or a path that cannot be a gallery's.
        """
        text = str(uri).removeprefix("sqlite:///")
        if "://" not in text:
            return cls._file(Path(text), create)
        scheme = text.partition("://")[0]
        if scheme not in ("postgresql", "postgresql+psycopg"):
            raise UserError(f"a gallery is a file or postgresql+psycopg://…, not {scheme}://…")
        require("galleries on PostgreSQL", "psycopg", "pgvector")
        try:
            url = sa.make_url(text).set(drivername="postgresql+psycopg")
            # Unless the address says otherwise: a server that is cut off would hang for minutes.
            patience = {"connect_timeout": CONNECT_SECONDS, "tcp_user_timeout": 1000 * BUSY_SECONDS}
            engine = sa.create_engine(
                url,
                connect_args={key: patience[key] for key in patience.keys() - url.query.keys()},
                pool_pre_ping=True,
                pool_size=8,
                max_overflow=24,
            )
        except (ArgumentError, ValueError) as error:  # of hosts and ports in it as well
            raise UserError(
                "the gallery's address cannot be read; give a file or "
                "postgresql+psycopg://user:password@host/database"
            ) from error
        sa.event.listen(engine, "connect", _tune)
        return cls(engine, url.render_as_string(hide_password=True))

    @classmethod
    def _file(cls, path: Path, create: bool) -> Database:
        if path.is_dir():
            raise UserError(f"{path} is a folder; a gallery is a file, for example {path}.db")
        new = create and not path.exists()
        if new:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
            except OSError as error:
                raise UserError(f"the gallery {path} cannot be opened: {error.strerror}") from error
        address = f"file:{quote(str(path.resolve()))}?mode="
        # SQLite reads beside a writer only through that one's -shm file. Without one nobody
        # writes, and the file is taken as it is.
        mode = "ro" if path.with_name(f"{path.name}-wal").exists() else "ro&immutable=1"
        if path.exists() and path.stat().st_size:
            _check_whose(path, address + mode)
        if os.access(path, os.W_OK) and os.access(path.resolve().parent, os.W_OK):
            mode = "rw"

        def connect() -> sqlite3.Connection:
            connection = sqlite3.connect(
                address + mode,
                uri=True,
                isolation_level=None,
                check_same_thread=False,
                timeout=BUSY_SECONDS,
            )
            for pragma in (
                f"page_size = {_PAGE_BYTES}",
                "synchronous = FULL",
                "fullfsync = ON",  # macOS: what it calls fsync leaves data in the disk's cache
                "checkpoint_fullfsync = ON",
                "foreign_keys = ON",
                "secure_delete = ON",
            ):
                connection.execute(f"PRAGMA {pragma}")
            connection.create_function("casefold", 1, str.casefold, deterministic=True)
            return connection

        # 0: as many as are asked for, so that no search waits for a connection.
        engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.QueuePool, pool_size=0)

        @sa.event.listens_for(engine, "begin")
        def begin(connection: Connection) -> None:
            writes = connection.get_execution_options().get("writes", False)
            connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

        return cls(engine, str(path), path, mode != "rw", new)

    @property
    def is_file(self) -> bool:
        """Whether this is SQLite."""
        return self.path is not None

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database throughout."""
        options: dict[str, Any] = {}
        if not self.is_file:
            options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with (
            self._told("read"),
            self.engine.connect() as connection,
            connection.execution_options(**options).begin(),
        ):
            yield connection

    @contextmanager
    def snapshot(self) -> Iterator[sqlite3.Connection]:
        """As `read`, on SQLite and past SQLAlchemy: a search costs little more than its product."""
        with self._told("read"), self._raw() as connection:
            connection.execute("BEGIN")
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that changes all of it or nothing, one at a time in this process.

        When it ends, the change is on the disk.
        """
        if self.read_only:
            raise UserError(f"the gallery {self.name} is read-only; nothing was changed")
        with (
            self._writing,
            self._told("changed"),
            self.engine.connect() as connection,
            connection.execution_options(writes=True).begin(),
        ):
            yield connection

    def discard(self) -> None:
        """Close, and delete the file if it was created here and holds no table."""
        empty = False
        if self._new:
            with suppress(UserError), self.snapshot() as connection:
                (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
                empty = tables == 0
        self.close()
        if empty and self.path is not None:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close every connection."""
        self.engine.dispose()

    def log_ahead(self) -> None:
        """Have SQLite write changes to a log beside the file: readers and a writer do not wait."""
        if self.is_file and not self.read_only:
            with self._told("changed"), self._raw() as connection:
                connection.execute("PRAGMA journal_mode = WAL")

    def erase(self, *, patience: float | None = None) -> bool:
        """Overwrite what changes left behind in SQLite's log; whether none of it is left.

        Rows are overwritten when they are deleted, but the log of recent changes, the -wal file,
        holds pages as they were. It is emptied once no process reads an older state.
        """
        if not self.is_file or self.read_only:
            return True
        until = time.monotonic() + (ERASE_SECONDS if patience is None else patience)
        with self._told("changed"), self._raw() as connection:
            connection.execute("PRAGMA busy_timeout = 200")
            try:
                while connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
                    if time.monotonic() >= until:
                        return False
                    time.sleep(0.01)
            finally:
                connection.execute(f"PRAGMA busy_timeout = {1000 * BUSY_SECONDS}")
        return True

    def vacuum(self) -> None:
        """Give the space of deleted rows back: SQLite rewrites its file; PostgreSQL reuses it."""
        if self.is_file:
            with self._told("changed"), self._raw() as connection:
                connection.execute("VACUUM")
        else:
            with self._told("changed"), self.engine.connect() as server:
                server = server.execution_options(isolation_level="AUTOCOMMIT")
                server.exec_driver_sql("VACUUM people, images")

    @contextmanager
    def _raw(self) -> Iterator[Any]:
        with closing(self.engine.raw_connection()) as connection:  # ends its transaction as well
            yield connection.driver_connection

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except DBAPIError as error:
            raise self._sentence(what, error.orig or error) from error
        except self.engine.dialect.dbapi.Error as error:  # type: ignore[union-attr]
            raise self._sentence(what, error) from error  # of statements past SQLAlchemy
        except sa.exc.TimeoutError as error:
            raise GalleryUnavailableError(
                f"the gallery {self.name} is overloaded; try again later"
            ) from error

    def _sentence(self, what: str, error: BaseException) -> UserError:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        kept = "" if what == "read" else "; nothing was changed"
        code = getattr(error, "sqlstate", None)  # of the server, if it has answered
        if code in _HELD:
            return GalleryUnavailableError(
                f"another client of the database {self.name} holds rows that are to be {what}: "
                f"{reason}{kept}; try again when it has ended (pg_blocking_pids() names it)"
            )
        lost = any(kind.__name__ == "OperationalError" for kind in type(error).__mro__)
        if lost and not self.is_file and (code is None or code.startswith(("08", "57P"))):
            doubt = "" if what == "read" else "; look whether the last change is there"
            return GalleryUnavailableError(
                f"the database {self.name} does not answer: {reason}{doubt}; try again when it does"
            )
        if self.is_file and "locked" in reason:
            return GalleryUnavailableError(
                f"the gallery {self.name} is being changed by another process; try again later"
            )
        if self.is_file and ("not a database" in reason or "malformed" in reason):
            return UserError(
                f"the gallery {self.name} is damaged or no gallery ({reason}): restore a backup, "
                "or give another file"
            )
        return GalleryUnavailableError(f"the gallery {self.name} cannot be {what}: {reason}{kept}")


def _check_whose(path: Path, address: str) -> None:
    """UserError if a SQLite file is another program's, which stays as it is to the byte.

    To open it for writing would already move what its log holds into it.
    """
    query = "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
    try:
        with closing(sqlite3.connect(address, uri=True)) as connection:
            tables = [name for (name,) in connection.execute(query)]
    except sqlite3.Error:
        return  # told when it is opened
    if tables and not {"stamp", "people", "images"} <= set(tables):
        raise UserError(
            f"{path} is the database of another program, with a table {tables[0]!r}: give the "
            "gallery a file of its own"
        )


def _tune(connection: Any, _: Any) -> None:
    """Have pgvector take packed embeddings, and its index go on until it has found enough rows."""
    from psycopg.types.string import BytesBinaryDumper

    class PackedDumper(BytesBinaryDumper):
        oid = 0  # of no type: the server takes that of the column or the cast

    connection.adapters.register_dumper(Packed, PackedDumper)
    with connection.cursor() as cursor:
        cursor.execute(
            "SET hnsw.iterative_scan = strict_order; SET hnsw.ef_search = 400; "
            "SET hnsw.max_scan_tuples = 100000"
        )
    connection.commit()
