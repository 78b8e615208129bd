"""A gallery opened, searched and read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sphereface2.errors import UserError, check_choice, check_count
from sphereface2.recognition.gallery import stamps
from sphereface2.recognition.gallery.engines import FileSearch, ServerSearch
from sphereface2.recognition.gallery.rows import STORAGES, Rows, Stored, person_of
from sphereface2.recognition.gallery.sql import Database
from sphereface2.recognition.gallery.types import (
    FUSIONS,
    MOST_K,
    Match,
    NoGalleryError,
    Person,
    UnknownPersonError,
    person_key,
    person_name,
    unit,
)


class GalleryReader:
    """What can be asked of a gallery without changing it.

    Attributes:
        is_file: whether the gallery is SQLite's, not a server's.
        uri: the address, without a password.
        fingerprint: of the model whose embeddings the gallery holds.
        dim: numbers in an embedding.
        model: where the model is, if the one who created the gallery said so.
        unerased: whether a process that reads an older state kept the last removal's bytes from
            being overwritten in SQLite's log; `Gallery.compact` tries again.
    """

    def __init__(self, database: Database, row: Any) -> None:
        self._db, self._closed, self.unerased = database, False, False
        self.is_file, self.uri = database.is_file, database.name
        self._counted: tuple[Any, int, int] | None = None  # see `_sizes`
        self._take(row)

    def _take(self, row: Any) -> None:
        """Work by this stamp."""
        if hasattr(self, "_search"):
            self._search.close()
        self._stamp = row
        self.fingerprint: str = row.fingerprint
        self.dim: int = row.dim
        self.model: str | None = row.model
        self._rows = Rows(self._db.is_file, row.storage)
        engine = FileSearch if self._db.is_file else ServerSearch
        self._search: FileSearch | ServerSearch = engine(self._db, self._rows, row)

    # -- opening and closing ---------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        uri: str | Path,
        *,
        embedder: Any = None,
        fingerprint: str | None = None,
        dim: int | None = None,
        create: bool = True,
        model: str | None = None,
        storage: str | None = None,
    ) -> Self:
        """Open a gallery, or create an empty one.

        Args:
            uri: a file (SQLite), or ``postgresql+psycopg://user:password@host/database``, a server
                with pgvector.
            embedder: the model whose embeddings the gallery holds, which has a ``fingerprint`` and
                an ``embedding_dim``; or give
            fingerprint, dim: of that model. None takes what is there.
            create: whether a gallery that does not exist is created.
            model: of a new gallery: where its model is, for the commands to remember.
            storage: of a new gallery: ``float32``, or ``float16`` for half the space, at an error
                of about 0.0003 in a cosine.

        Raises:
            NoGalleryError: it does not exist and ``create`` is False.
            UserError: the gallery is of another model, damaged, or made by a later version; ``dim``
                is no whole number above 0.
        """
        if embedder is not None:
            fingerprint, dim = embedder.fingerprint, embedder.embedding_dim
        if storage is not None:
            check_choice("storage", storage, STORAGES)
        if dim is not None:
            check_count("dim", dim, 1)
        create = create and fingerprint is not None and dim is not None
        database = Database.connect(uri, create=create)
        try:
            row = None
            if database.path is None or database.path.exists():
                with database.read() as connection:
                    row = stamps.read(connection)
            if row is None and not create:
                raise NoGalleryError(
                    f"there is no gallery at {database.name}; `sphereface2 gallery add` creates one"
                )
            database.log_ahead()
            if row is None:
                facts = {"fingerprint": fingerprint, "dim": dim, "model": model}
                row = stamps.create(database, storage=storage or STORAGES[0], **facts)
            gallery = cls(database, row)
            gallery.check(fingerprint, dim, storage)
            database.erase(patience=0)  # what a process left behind that was killed
        except BaseException:
            database.discard()
            raise
        return gallery

    def close(self) -> None:
        """Let go of the gallery. May be called twice."""
        if not self._closed:
            self._closed = True
            self._search.close()
            self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(
        self, fingerprint: str | None, dim: int | None = None, storage: str | None = None
    ) -> None:
        """UserError unless the gallery is of this model and storage; None is any."""
        stamps.check(self._stamp, self.uri, fingerprint=fingerprint, dim=dim, storage=storage)

    # -- transactions ----------------------------------------------------------------------------

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        """One state of the database."""
        self._check_open()
        with self._db.read() as connection:
            fingerprint = connection.scalar(sa.select(stamps.stamp.c.fingerprint))
            stamps.check_moved(self._db, self._stamp, fingerprint)
            yield connection

    def _check_open(self) -> None:
        if self._closed:
            raise UserError(f"the gallery {self.uri} was closed; open it again")

    # -- searching -------------------------------------------------------------------------------

    def search(
        self, embeddings: np.ndarray, *, k: int = 5, fusion: str = "max", exact: bool = False
    ) -> list[list[Match]]:
        """The k people most like each probe, best first.

        The answer does not say whether the best is the right one: compare its score with a
        calibrated threshold (see `decide`). All probes of a call see one state of the gallery.

        Args:
            embeddings: (q, d) or (d,), brought to length 1.
            k: people to name, 1 to 1,000; fewer come back if there are fewer.
            fusion: a person's score is that of the image most like the probe (``max``) or that of
                the template, the normalised mean of the images (``mean``).
            exact: look at every image even where there is an approximate index. Scores are exact
                in any case.

        Returns:
            For each probe up to k matches.

        Raises:
            UserError: embeddings that are not finite or of another dimension, a bad k or fusion.
        """
        if not isinstance(k, int | np.integer) or not 1 <= k <= MOST_K:
            raise UserError(f"k must be an integer from 1 to {MOST_K}, got {k!r}")
        check_choice("fusion", fusion, FUSIONS)
        self._check_open()
        probes = unit(embeddings, self.dim)
        found = self._search.search(probes, int(k), mean=fusion == "mean", every=exact)
        return [
            [Match(who.name, _cosine(score), who.metadata, who.has_crop) for who, score in one]
            for one in found
        ]

    def verify(self, person: str, embeddings: np.ndarray, *, fusion: str = "max") -> list[float]:
        """How like one person probes are: the cosine of each (q, d), as `search` scores them.

        Raises:
            UnknownPersonError: nobody of that name is there.
            UserError: as `search`.
        """
        check_choice("fusion", fusion, FUSIONS)
        name, probes = person_name(person), unit(embeddings, self.dim)
        with self._read() as connection:
            rows = self._rows.vectors(connection, person_key(name), fusion == "mean")
        if not rows:
            raise UnknownPersonError(
                f"no person named {name!r} is enrolled in {self.uri}: people() names everybody"
            )
        return [_cosine(score) for score in (probes @ np.stack(rows).T).max(1)]

    def warm_up(self) -> None:
        """Read what searches need, so that the first is as quick as the others.

        On SQLite, this also begins to build or load the approximate index of a large gallery, for
        this process to use from when it is there.
        """
        self._check_open()
        self._search.warm_up()

    # -- reading ---------------------------------------------------------------------------------

    def get(self, person: str) -> Person | None:
        """The person of this name, or None."""
        key = person_key(person_name(person))
        with self._read() as connection:
            return self._rows.describe(connection, [key]).get(key)

    def crop(self, person: str, image: int | None = None) -> bytes | None:
        """The crop kept of a person's image, or the first of them, as it was given; else None."""
        images, key = self._rows.images, person_key(person_name(person))
        query = sa.select(images.c.crop).where(images.c.person == key, images.c.crop.is_not(None))
        if image is not None:
            query = query.where(images.c.id == image)
        with self._read() as connection:
            return connection.scalar(query.order_by(images.c.id).limit(1))

    def people(self, offset: int = 0, limit: int | None = None, *, query: str = "") -> list[Person]:
        """People by name, or a page of them.

        Args:
            offset: people to pass over.
            limit: people to return; None: all that follow.
            query: part of the names, in upper or lower case; empty: everybody.
        """
        rows = self._rows
        page = rows.described.where(rows.named(query)).order_by(rows.people.c.name)
        with self._read() as connection:
            return [person_of(row) for row in connection.execute(page.limit(limit).offset(offset))]

    def count(self, *, query: str = "") -> int:
        """How many people there are, or how many of them `people` finds by ``query``."""
        rows = self._rows
        count = sa.select(sa.func.count()).select_from(rows.people).where(rows.named(query))
        with self._read() as connection:
            return connection.scalar(count) or 0 if query else self._sizes(connection)[0]

    def stored(self, names: Iterable[str] | None = None) -> list[Stored]:
        """Everybody by name, or those of these names, with their images, oldest first."""
        keys: list[int] = []
        for name in names or ():
            with suppress(UserError):  # a name that nobody can have
                keys.append(person_key(person_name(name)))
        with self._read() as connection:
            found = self._rows.stored(connection, None if names is None else keys)
        return sorted(found.values(), key=lambda one: one[0].name)

    def stats(self) -> dict[str, Any]:
        """Facts: ``people``, ``images``, ``dim``, ``fingerprint``, ``model``, ``storage``,
        ``index_from``, ``uri``, ``package_version``, ``unerased``."""
        with self._read() as connection:
            people, images = self._sizes(connection)
        facts = ("dim", "fingerprint", "model", "storage", "index_from", "package_version")
        stamped = {fact: getattr(self._stamp, fact) for fact in facts}
        counts = {"people": people, "images": images}
        return {**counts, **stamped, "uri": self.uri, "unerased": self.unerased}

    def _sizes(self, connection: Connection) -> tuple[int, int]:
        """Numbers of people and images, counted once as long as nothing changes."""
        state, known = self._rows.state(connection), self._counted
        if known is None or known[0] != state:
            people, images = (
                connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0
                for table in (self._rows.people, self._rows.images)
            )
            self._counted = known = (state, people, images)
        return known[1:]


def _cosine(score: float) -> float:
    return min(1.0, max(-1.0, float(score)))
