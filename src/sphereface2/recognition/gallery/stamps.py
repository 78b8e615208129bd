"""The stamp of a gallery: its format, its model, how it holds and searches embeddings."""

from __future__ import annotations

import time
from itertools import cycle
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sphereface2.errors import UserError
from sphereface2.recognition.gallery.rows import Rows
from sphereface2.recognition.gallery.sql import BUSY_SECONDS, Database
from sphereface2.recognition.gallery.types import GalleryUnavailableError
from sphereface2.version import __version__

FORMAT_VERSION = 1
#: From so many images on, a long-lived process keeps an approximate index beside SQLite.
INDEX_FROM = 200_000

stamp = sa.Table(
    "stamp",
    sa.MetaData(),
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("format_version", sa.Integer, nullable=False),
    sa.Column("package_version", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("dim", sa.Integer, nullable=False),
    sa.Column("storage", sa.Text, nullable=False),
    sa.Column("model", sa.Text),
    sa.Column("hnsw_from", sa.Integer, key="index_from"),  # as galleries have it since the first
)


def read(connection: Connection) -> Any:
    """The stamp, or None where there is no gallery."""
    if not sa.inspect(connection).has_table("stamp"):
        return None
    return connection.execute(sa.select(stamp)).one_or_none()


def create(database: Database, **facts: Any) -> Any:
    """Make the tables and stamp them with these facts, unless another process just did."""
    rows = Rows(database.is_file, facts["storage"])
    values = {
        "id": 1,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "index_from": INDEX_FROM if database.is_file else 0,
        **facts,
    }
    with database.write() as connection:
        rows.create(connection)
        stamp.metadata.create_all(connection)
        connection.execute(rows.insert(stamp).on_conflict_do_nothing(), values)
        row = read(connection)
        if not database.is_file:
            index_server(connection, row)
    return row


def index_server(connection: Connection, row: Any) -> None:
    """Have PostgreSQL keep the indexes that the stamp asks for, and no other; without one, none."""
    wanted = row is not None and row.index_from is not None
    there = "SELECT coalesce(to_regclass('images_hnsw'), to_regclass('people_hnsw')) IS NOT NULL"
    if not wanted and connection.exec_driver_sql(there).scalar():
        _lock_out_searches(connection)
    for table, column in (("images", "embedding"), ("people", "template")):
        connection.exec_driver_sql(
            f"CREATE INDEX IF NOT EXISTS {table}_hnsw ON {table} "
            # As dense as by default (m 16, ef_construction 64): with m 12, or 32, one search in 50
            # among 100,000 images misses the nearest, and enrolment is hardly quicker.
            f"USING hnsw (({column}::halfvec({row.dim})) halfvec_ip_ops) "
            # Rows of another model, which other transactions still see, stay out.
            f"WHERE vector_dims({column}) = {row.dim}"
            if wanted
            else f"DROP INDEX IF EXISTS {table}_hnsw"
        )


def _lock_out_searches(connection: Connection) -> None:
    """Take the tables for this transaction alone.

    A search may hold one of them and wait for the other: then it is let through. For the first it
    is waited longer than the server's deadlock_timeout, 1 s, after which the server stops an
    autovacuum that is in the way; either table comes first in turn.
    """
    until = time.monotonic() + BUSY_SECONDS
    for one, other in cycle([("images", "people"), ("people", "images")]):
        try:
            with connection.begin_nested():
                for table, patience in ((one, "2s"), (other, "500ms")):
                    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{patience}'")
                    connection.exec_driver_sql(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
                connection.exec_driver_sql("SET LOCAL lock_timeout = 0")
            return
        except sa.exc.OperationalError as error:
            if getattr(error.orig, "sqlstate", None) != "55P03":  # no time-out of the lock
                raise
            if time.monotonic() > until:
                raise GalleryUnavailableError(
                    "the gallery's tables are in use without a pause; nothing was changed; try "
                    "again later"
                ) from error


def check(row: Any, uri: str, **wanted: Any) -> None:
    """UserError unless the stamp has these facts; None is any."""
    if row.format_version != FORMAT_VERSION:
        raise UserError(
            f"the gallery {uri} has format version {row.format_version} and this package reads "
            f"{FORMAT_VERSION}: use the package version that wrote it ({row.package_version})"
        )
    remedies = {
        "fingerprint": (
            "holds embeddings of the model {} and the model given is {}: use the former, or move "
            "the gallery to the latter with `sphereface2 gallery reembed`"
        ),
        "dim": "holds embeddings of {} numbers and the model gives {}: use the model it was made "
        "with",
        "storage": "was made with the storage {}, not {}: leave the option out, or make another "
        "gallery",
    }
    for fact, sentence in remedies.items():
        there, given = getattr(row, fact), wanted.get(fact)
        if given is not None and given != there:
            short = [str(value)[:12] for value in (there, given)]
            raise UserError(f"the gallery {uri} {sentence.format(*short)}")


def check_moved(database: Database, row: Any, fingerprint: str | None) -> None:
    """UserError if the gallery has another fingerprint than ``row``, by which it was opened."""
    if fingerprint != row.fingerprint:
        raise UserError(
            f"the gallery {database.name} was moved to another model meanwhile; open it again, "
            "with that one"
        )
