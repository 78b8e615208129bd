"""People and the embeddings of their images, searched one to many, with strangers among probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sphereface2.errors import UserError, check_choice
from sphereface2.recognition.gallery import stamps
from sphereface2.recognition.gallery.engines import FileSearch, ServerSearch
from sphereface2.recognition.gallery.rows import STORAGES, Refused, Rows, Stored
from sphereface2.recognition.gallery.sql import Database
from sphereface2.recognition.gallery.types import (
    FUSIONS,
    MOST_K,
    Checked,
    Enrolment,
    Match,
    NoGalleryError,
    Person,
    UnknownPersonError,
    checked,
    metadata_json,
    person_key,
    person_name,
    unit,
)
from sphereface2.version import __version__

#: Images that one transaction of `Gallery.add_many` holds.
BATCH_IMAGES = 1_500


class Embedder(Protocol):
    """What `Gallery.open` needs to know of a model."""

    @property
    def fingerprint(self) -> str:
        """Which model it is."""
        ...

    @property
    def embedding_dim(self) -> int:
        """Numbers in an embedding."""
        ...


class Gallery:
    """People to search among. Make one with `Gallery.open`; safe to use from several threads.

    Every change is one transaction: it happens whole or not at all, is on the disk when the call
    returns, and is seen at once by every process that has the gallery open.

    Attributes:
        unerased: whether a process that reads an older state kept the last removal's bytes from
            being overwritten in SQLite's log; `compact` tries again.
    """

    def __init__(self, database: Database, row: Any) -> None:
        self._db, self._closed, self.unerased = database, False, False
        self._take(row)

    def _take(self, row: Any) -> None:
        """Work by this stamp."""
        if hasattr(self, "_search"):
            self._search.close()
        self._stamp = row
        self._rows = Rows(self._db.is_file, row.storage)
        engine = FileSearch if self._db.is_file else ServerSearch
        self._search: FileSearch | ServerSearch = engine(self._db, self._rows, row)

    # -- opening and closing ---------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        uri: str | Path,
        *,
        embedder: Embedder | None = None,
        fingerprint: str | None = None,
        dim: int | None = None,
        create: bool = True,
        model: str | None = None,
        storage: str | None = None,
    ) -> Gallery:
        """Open a gallery, or create an empty one.

        Args:
            uri: a file (SQLite), or ``postgresql+psycopg://user:password@host/database``, a server
                with pgvector.
            embedder: the model whose embeddings the gallery holds; or give
            fingerprint, dim: of that model, with the numbers in an embedding. None takes what is
                there.
            create: whether a gallery that does not exist is created.
            model: of a new gallery: where its model is, for the commands to remember.
            storage: of a new gallery: ``float32``, or ``float16`` for half the space, at an error
                of about 0.0003 in a cosine.

        Raises:
            NoGalleryError: it does not exist and ``create`` is False.
            UserError: the gallery is of another model, damaged, or made by a later version.
        """
        if embedder is not None:
            fingerprint, dim = embedder.fingerprint, embedder.embedding_dim
        if storage is not None:
            check_choice("storage", storage, STORAGES)
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

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(
        self, fingerprint: str | None, dim: int | None = None, storage: str | None = None
    ) -> None:
        """UserError unless the gallery is of this model and storage; None is any."""
        stamps.check(self._stamp, self.uri, fingerprint=fingerprint, dim=dim, storage=storage)

    @property
    def is_file(self) -> bool:
        """Whether the gallery is SQLite's, not a server's."""
        return self._db.is_file

    @property
    def uri(self) -> str:
        """The address, without a password."""
        return self._db.name

    @property
    def fingerprint(self) -> str:
        """Of the model whose embeddings the gallery holds."""
        return str(self._stamp.fingerprint)

    @property
    def dim(self) -> int:
        """Numbers in an embedding."""
        return int(self._stamp.dim)

    @property
    def model(self) -> str | None:
        """Where the model is, if the one who created the gallery said so."""
        return None if self._stamp.model is None else str(self._stamp.model)

    # -- transactions ----------------------------------------------------------------------------

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        """One state of the database."""
        self._check_open()
        with self._db.read() as connection:
            fingerprint = connection.scalar(sa.select(stamps.stamp.c.fingerprint))
            stamps.check_moved(self._db, self._stamp, fingerprint)
            yield connection

    @contextmanager
    def _change(self, *, alone: bool = False) -> Iterator[Connection]:
        """A change; ``alone``: no other change of anybody's at the same time."""
        self._check_open()
        with self._db.write() as connection:
            # Whoever moves the gallery to another model waits for this change, or this for that.
            lock = sa.select(stamps.stamp.c.fingerprint).with_for_update(read=not alone)
            stamps.check_moved(self._db, self._stamp, connection.scalar(lock))
            yield connection

    def _check_open(self) -> None:
        if self._closed:
            raise UserError(f"the gallery {self.uri} was closed; open it again")

    # -- changing --------------------------------------------------------------------------------

    def add(
        self,
        person: str,
        embeddings: np.ndarray,
        *,
        metadata: dict[str, Any] | None = None,
        sources: Sequence[str | None] | None = None,
        crops: Sequence[bytes | None] | None = None,
        replace: bool = False,
        known: bool | None = None,
    ) -> list[int]:
        """Add images of a person, who may be new.

        Args:
            person: any text of 1 to 200 characters. Spaces at the ends do not count, and names
                that Unicode calls equivalent (é as one character or two) are one person.
            embeddings, metadata, sources, crops: of `Enrolment`.
            replace: the person's older images go.
            known: whether the person must be there already (True) or must not (False).

        Returns:
            The images' ids.

        Raises:
            PersonExistsError, UnknownPersonError: see ``known``.
            UserError: a bad name, metadata that is not JSON or too long, embeddings that are not
                finite or of another dimension, more than 1,000 images of one person.
        """
        item = checked(Enrolment(person, embeddings, metadata, sources, crops), self.dim)
        with self._change() as connection:
            stored = self._rows.add(connection, [item], replace=replace, known=known)
        if replace:
            self._erase()
        return stored[item.key]

    def add_many(
        self,
        people: Iterable[Enrolment],
        *,
        replace: bool = False,
        refused: Refused | None = None,
    ) -> Iterator[list[Person]]:
        """Add many people, many in one transaction: yields those stored since last time.

        Args:
            people: whom to add; one person may come several times.
            replace: see `add`.
            refused: is told whom `add` refuses, and why; the others are added.

        Raises:
            UserError: as `add`, without ``refused``; what was yielded before stays.
        """
        waiting: dict[int, Checked] = {}
        for item in people:
            try:
                one = checked(item, self.dim)
            except UserError as error:
                if refused is None:
                    raise
                refused(item, error)
                continue
            size = sum(len(other.vectors) for other in waiting.values()) + len(one.vectors)
            if waiting and (size > BATCH_IMAGES or one.key in waiting):
                yield self._add_batch(waiting, replace, refused)
                waiting = {}
            waiting[one.key] = one
        if waiting:
            yield self._add_batch(waiting, replace, refused)

    def _add_batch(
        self, batch: dict[int, Checked], replace: bool, refused: Refused | None
    ) -> list[Person]:
        with self._change() as connection:
            items = batch.values()
            stored = self._rows.add(connection, items, replace=replace, refused=refused)
            described = self._rows.describe(connection, stored)
        if replace:
            self._erase()
        return list(described.values())

    def set_metadata(self, person: str, metadata: dict[str, Any]) -> Person | None:
        """Put other metadata, as in `add`, in the place of a person's.

        Returns:
            The person as they are now, or None if nobody of that name is there.
        """
        name = person_name(person)
        key, text = person_key(name), metadata_json(name, metadata)
        with self._change() as connection:
            self._rows.set(connection, key, metadata=text)
            return self._rows.describe(connection, [key]).get(key)

    def rename(self, person: str, new_name: str) -> Person | None:
        """Give a person another name.

        Returns:
            The person as they are now, or None if nobody of the old name is there.

        Raises:
            PersonExistsError: somebody of the new name is there.
        """
        key, name = person_key(person_name(person)), person_name(new_name)
        with self._change() as connection:
            return self._rows.rename(connection, key, name)

    def remove(self, person: str) -> int:
        """Remove a person; on SQLite the embeddings' bytes are then in no file, see `unerased`.

        Returns:
            How many images went; 0 if nobody of that name was there.
        """
        key = person_key(person_name(person))
        with self._change() as connection:
            count = self._rows.remove(connection, key)
        if count:
            self._erase()
        return count

    def remove_image(self, person: str, image: int) -> bool:
        """Remove one image of a person, by its id; whether it was there.

        Raises:
            UserError: it is the person's last.
        """
        key = person_key(person_name(person))
        with self._change() as connection:
            removed = self._rows.remove_image(connection, key, image)
        if removed:
            self._erase()
        return removed

    def _erase(self) -> None:
        self._search.forget()
        self.unerased = not self._db.erase()

    def compact(self) -> None:
        """Give back the space of what was removed, and overwrite its bytes if that is left to do.

        On PostgreSQL this is VACUUM: rows that were removed are in the server's files until then,
        and their space is written over when it is used again.
        """
        self._check_open()
        self._db.vacuum(self._rows.people, self._rows.images)
        self._erase()

    # -- searching -------------------------------------------------------------------------------

    def search(
        self, embeddings: np.ndarray, *, k: int = 5, fusion: str = "max", exact: bool = False
    ) -> list[list[Match]]:
        """The k people most like each probe, best first.

        The answer does not say whether the best is the right one: compare its score with a
        calibrated threshold (see `decide`). On SQLite, all probes of a call see one state.

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
        if not 1 <= k <= MOST_K:
            raise UserError(f"k must be from 1 to {MOST_K}, not {k}")
        check_choice("fusion", fusion, FUSIONS)
        self._check_open()
        probes = unit(embeddings, self.dim)
        found = self._search.search(probes, k, mean=fusion == "mean", every=exact)
        return [[_match(person, score) for person, score in one] for one in found]

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
            raise UnknownPersonError(f"there is no {name!r} in the gallery {self.uri}")
        return [_cosine(score) for score in (probes @ np.stack(rows).T).max(1)]

    def warm_up(self) -> None:
        """Read what searches need, so that the first is as quick as the others.

        On SQLite, this also begins to build or load the approximate index of a large gallery, for
        this process to use from when it is there.
        """
        self._check_open()
        self._search.warm_up()

    def set_index(self, hnsw_from: int | None) -> None:
        """Have the gallery search approximately from some number of images on, or never.

        On SQLite, processes that called `warm_up` keep the index in memory, and this writes its
        file so that they need not build it. On PostgreSQL the index is made or dropped here, and
        any number means always.

        Args:
            hnsw_from: images; None: look at every image in every search.
        """
        with self._change(alone=True) as connection:
            row = self._restamp(connection, hnsw_from=hnsw_from)
        self._take(row)
        self._search.finish()

    # -- reading ---------------------------------------------------------------------------------

    def get(self, person: str) -> Person | None:
        """The person of this name, or None."""
        key = person_key(person_name(person))
        with self._read() as connection:
            return self._rows.describe(connection, [key]).get(key)

    def crop(self, person: str, image: int | None = None) -> bytes | None:
        """The crop kept of a person's image, or the first of them, as it was given; else None."""
        with self._read() as connection:
            return self._rows.crop(connection, person_key(person_name(person)), image)

    def people(self, offset: int = 0, limit: int | None = None) -> list[Person]:
        """Everybody by name, or a page: ``limit`` people after the first ``offset``."""
        with self._read() as connection:
            return self._rows.page(connection, offset, limit)

    def count(self) -> int:
        """How many people there are."""
        with self._read() as connection:
            return _count(connection, self._rows.people)

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
        ``hnsw_from``, ``uri``, ``package_version``, ``unerased``."""
        with self._read() as connection:
            facts: dict[str, Any] = {
                table.name: _count(connection, table)
                for table in (self._rows.people, self._rows.images)
            }
        for fact in ("dim", "fingerprint", "model", "storage", "hnsw_from", "package_version"):
            facts[fact] = getattr(self._stamp, fact)
        return {**facts, "uri": self.uri, "unerased": self.unerased}

    # -- another model ---------------------------------------------------------------------------

    def reembed(
        self,
        embed: Callable[[list[Stored]], Iterable[tuple[int, np.ndarray]]],
        *,
        fingerprint: str,
        dim: int,
        model: str | None = None,
    ) -> None:
        """Replace all embeddings by those of another model, in one transaction at the end.

        Meanwhile the gallery can be searched and changed; who came meanwhile is embedded too.

        Args:
            embed: gives (an image's id, its new embedding) for images of the people it is handed.
                Images that it leaves out go, and people without images. It is called again for
                people who changed meanwhile.
            fingerprint: of the new model.
            dim: numbers in its embeddings.
            model: where the new model is.

        Raises:
            UserError: what ``embed`` raises; the gallery is then as it was.
        """
        done: dict[int, set[int]] = {}  # the images that were handed out
        vectors: dict[int, np.ndarray] = {}
        while True:
            with self._change(alone=True) as connection:
                there = self._rows.stored(connection, None)
                images = {key: {image.id for image in one[1]} for key, one in there.items()}
                todo = [key for key in there if done.get(key) != images[key]]
                if not todo:
                    if not self.is_file:  # an index is built faster than it grows
                        stamps.index_server(connection, None)
                    self._rows.reembed(connection, there, vectors)
                    row = self._restamp(connection, fingerprint=fingerprint, dim=dim, model=model)
                    break
            some = sorted((there[key] for key in todo), key=lambda one: one[0].name)
            vectors |= {image: unit(vector, dim)[0] for image, vector in embed(some)}
            done |= {key: images[key] for key in todo}
        self._take(row)
        self._erase()

    def _restamp(self, connection: Connection, **facts: Any) -> Any:
        """Change the stamp, and the server's index with it."""
        changed = sa.update(stamps.stamp).values(package_version=__version__, **facts)
        connection.execute(changed)
        row = stamps.read(connection)
        if not self.is_file:
            stamps.index_server(connection, row)
        return row


def _count(connection: Connection, table: sa.Table) -> int:
    return int(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0)


def _match(person: Person, score: float) -> Match:
    return Match(person.name, _cosine(score), person.metadata, person.has_crop)


def _cosine(score: float) -> float:
    return min(1.0, max(-1.0, float(score)))
