"""People and the embeddings of their images, searched one to many, with strangers among probes."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sphereface2 import __version__
from sphereface2.errors import UserError, did_you_mean
from sphereface2.recognition.gallery import search as searching
from sphereface2.recognition.gallery.sql import STORAGES, Database, Tables, stamp
from sphereface2.recognition.gallery.types import (
    FUSIONS,
    MOST_K,
    Checked,
    Enrolment,
    Image,
    Match,
    NoGalleryError,
    Person,
    PersonExistsError,
    UnknownPersonError,
    check_count,
    checked,
    image_ids,
    metadata_json,
    person_key,
    person_name,
    template,
    unit,
)

FORMAT_VERSION = 1
#: Images that one transaction of `Gallery.add_many` holds.
BATCH_IMAGES = 1_500
#: From so many images on, a long-lived process keeps an approximate index beside SQLite.
HNSW_FROM = 200_000
_KEYS = 500  # in one IN (…)
_STATE = (
    "SELECT (SELECT fingerprint FROM stamp), "
    "(SELECT seq FROM sqlite_sequence WHERE name = 'changes')"
)

#: Somebody with their images: what `Gallery.reembed` hands out.
Stored = tuple[Person, list[Image]]


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
        self._db, self._stamp = database, row
        self._closed = self._warm = self.unerased = False
        tables = Tables.of(row.storage)
        self._people, self._images = tables.people, tables.images
        described = (
            self._people.c.id,
            self._people.c.name,
            self._people.c.metadata,
            sa.select(sa.func.count())
            .where(self._images.c.person == self._people.c.id)
            .scalar_subquery()
            .label("count"),
            sa.exists()
            .where(self._images.c.person == self._people.c.id, self._images.c.crop.is_not(None))
            .label("has_crop"),
        )
        self._described = sa.select(*described)
        self._describing = str(self._described.compile(database.engine))
        keys: Any = sa.bindparam("keys", expanding=True)
        self._by_key = self._described.where(self._people.c.id.in_(keys))
        residents = (("images", "person", "id", "embedding"), ("people", "id", "id", "template"))
        self._residents = [searching.Resident(*r, row.dim, row.storage) for r in residents]

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
        if storage is not None and storage not in STORAGES:
            raise UserError(
                f"there is no storage {storage!r}{did_you_mean(storage, STORAGES)}; choose from "
                f"{', '.join(STORAGES)}"
            )
        create = create and fingerprint is not None and dim is not None
        database = Database.connect(uri, create=create)
        missing = NoGalleryError(
            f"there is no gallery at {database.name}; `sphereface2 gallery add` creates one"
        )
        if database.path is not None and not database.path.exists():
            raise missing
        try:
            row = database.stamped()
            if row is None:
                if not create:
                    raise missing
                assert fingerprint is not None and dim is not None
                row = _create(database, fingerprint, dim, model, storage or "float32")
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
            if (hnsw := self._residents[0].hnsw) is not None:
                hnsw.stop()
                hnsw.save()
            self._db.close()

    def __enter__(self) -> Gallery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(
        self, fingerprint: str | None, dim: int | None = None, storage: str | None = None
    ) -> None:
        """UserError unless the gallery is of this model and storage; None is any."""
        row, uri = self._stamp, self.uri
        if row.format_version != FORMAT_VERSION:
            raise UserError(
                f"the gallery {uri} has format version {row.format_version} and this package reads "
                f"{FORMAT_VERSION}: use the package version that wrote it ({row.package_version})"
            )
        if fingerprint is not None and row.fingerprint != fingerprint:
            raise UserError(
                f"the gallery {uri} holds embeddings of the model {row.fingerprint[:12]} and the "
                f"model given is {fingerprint[:12]}: use the former, or move the gallery to the "
                "latter with `sphereface2 gallery reembed`"
            )
        if dim is not None and row.dim != dim:
            raise UserError(
                f"the gallery {uri} holds embeddings of {row.dim} numbers and the model gives "
                f"{dim}: use the model it was made with"
            )
        if storage is not None and row.storage != storage:
            raise UserError(
                f"the gallery {uri} was made with the storage {row.storage}, not {storage}: leave "
                "the option out, or make another gallery"
            )

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
            self._check_model(connection.scalar(sa.select(stamp.c.fingerprint)))
            yield connection

    @contextmanager
    def _change(self) -> Iterator[Connection]:
        self._check_open()
        with self._db.write() as connection:
            # Whoever moves the gallery to another model waits for this change, or this for that.
            lock = sa.select(stamp.c.fingerprint).with_for_update(read=True)
            self._check_model(connection.execute(lock).scalar())
            yield connection

    def _check_model(self, fingerprint: str | None) -> None:
        if fingerprint != self.fingerprint:
            raise UserError(
                f"the gallery {self.uri} was moved to another model meanwhile; open it again, "
                "with that one"
            )

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
            stored = self._store(connection, [item], replace, known=known)
        if replace:
            self._erase()
        return stored[item.key]

    def add_many(
        self,
        people: Iterable[Enrolment],
        *,
        replace: bool = False,
        refused: Callable[[Enrolment, UserError], None] | None = None,
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
        self,
        batch: dict[int, Checked],
        replace: bool,
        refused: Callable[[Enrolment, UserError], None] | None,
    ) -> list[Person]:
        with self._change() as connection:
            stored = self._store(connection, list(batch.values()), replace, refused)
            described = self._describe(connection, stored)
        if replace:
            self._erase()
        return [described[key] for key in stored]

    def _store(
        self,
        connection: Connection,
        items: list[Checked],
        replace: bool,
        refused: Callable[[Enrolment, UserError], None] | None = None,
        known: bool | None = None,
    ) -> dict[int, list[int]]:
        """Write people and their images: the images' ids by the person's key."""
        people, images = self._people, self._images
        # In one order, so that two processes never wait for each other; and touched, so that the
        # rows of people who are there are locked.
        items = sorted(items, key=lambda item: item.key)
        rows = [
            {"id": i.key, "name": i.name, "metadata": "{}", "template": template(i.vectors)}
            for i in items
        ]
        touch = self._db.insert(people).on_conflict_do_update(
            index_elements=["id"], set_={"name": people.c.name}
        )
        connection.execute(touch, rows)
        there = self._describe(connection, [item.key for item in items])
        ids: dict[int, list[int]] = {}
        new_ids = iter(image_ids(sum(len(item.vectors) for item in items)))
        added, changed = [], []
        for item in items:
            before = there[item.key]
            if known is False and before.images:
                raise PersonExistsError(f"{item.name!r} is in the gallery {self.uri} already")
            if known and not before.images:
                raise self._nobody(item.name)
            try:
                if before.name != item.name:
                    raise UserError(
                        f"{item.name!r} cannot be told from {before.name!r}; give another name"
                    )
                check_count(item.name, len(item.vectors) + (0 if replace else before.images))
            except UserError as error:
                if refused is None:
                    raise
                refused(item.enrolment, error)
                continue
            ids[item.key] = [next(new_ids) for _ in item.vectors]
            for row in zip(ids[item.key], item.vectors, item.sources, item.crops, strict=True):
                added.append(dict(zip(images.c.keys(), (item.key, *row), strict=True)))
            vectors, metadata = item.vectors, item.metadata
            if before.images and replace:
                connection.execute(sa.delete(images).where(images.c.person == item.key))
            elif before.images:
                # Of the images themselves, so that it does not drift however often it changes.
                kept = sa.select(images.c.embedding).where(images.c.person == item.key)
                vectors = np.stack([*connection.scalars(kept), *vectors])
            if before.images or metadata is not None:
                metadata = metadata or json.dumps(before.metadata)
                changed.append(
                    {"key": item.key, "metadata": metadata, "template": template(vectors)}
                )
        if added:
            connection.execute(sa.insert(images), added)
        if changed:
            one = people.c.id == sa.bindparam("key")
            connection.execute(sa.update(people).where(one), changed)
        return ids

    def _nobody(self, name: str) -> UnknownPersonError:
        return UnknownPersonError(f"there is no {name!r} in the gallery {self.uri}")

    def set_metadata(self, person: str, metadata: dict[str, Any]) -> Person | None:
        """Put other metadata in the place of a person's; the images stay as they are.

        Args:
            person: as in `add`.
            metadata: as in `add`; ``{}`` takes away what was there.

        Returns:
            The person as they are now, or None if nobody of that name is there.

        Raises:
            UserError: as `add`.
        """
        name = person_name(person)
        key, text = person_key(name), metadata_json(name, metadata)
        one = self._people.c.id == key
        with self._change() as connection:
            connection.execute(sa.update(self._people).where(one).values(metadata=text))
            return self._describe(connection, [key]).get(key)

    def rename(self, person: str, new_name: str) -> Person | None:
        """Give a person another name.

        Returns:
            The person as they are now, or None if nobody of the old name is there.

        Raises:
            UserError: a bad name, or somebody of the new name is there.
        """
        people, images = self._people, self._images
        old, name = person_key(person_name(person)), person_name(new_name)
        key = person_key(name)
        with self._change() as connection:
            there = self._describe(connection, [old, key])
            if old not in there or old == key:
                return there.get(old)
            if key in there:
                raise PersonExistsError(
                    f"somebody named {name!r} is there already; remove that person first, or "
                    "choose another name"
                )
            # The key is the name's, so the rows are written again with another.
            row = sa.select(sa.literal(key), sa.literal(name), *list(people.c)[2:])
            connection.execute(
                sa.insert(people).from_select(people.c.keys(), row.where(people.c.id == old))
            )
            row = sa.select(sa.literal(key), *list(images.c)[1:])
            connection.execute(
                sa.insert(images).from_select(images.c.keys(), row.where(images.c.person == old))
            )
            connection.execute(sa.delete(people).where(people.c.id == old))
            return self._describe(connection, [key])[key]

    def remove(self, person: str) -> int:
        """Remove a person; on SQLite the embeddings' bytes are then in no file, see `unerased`.

        Returns:
            How many images went; 0 if nobody of that name was there.
        """
        key = person_key(person_name(person))
        with self._change() as connection:
            one = self._people.c.id == key
            connection.execute(sa.select(self._people.c.id).where(one).with_for_update())
            images = sa.delete(self._images).where(self._images.c.person == key)
            count = connection.execute(images).rowcount
            connection.execute(sa.delete(self._people).where(one))
        if count:
            self._erase()
        return count

    def remove_image(self, person: str, image: int) -> bool:
        """Remove one image of a person, by its id; whether it was there.

        Raises:
            UserError: it is the person's last.
        """
        name, images = person_name(person), self._images
        key = person_key(name)
        with self._change() as connection:
            touch = sa.update(self._people).where(self._people.c.id == key)
            connection.execute(touch.values(name=self._people.c.name))  # locks the row
            mine = sa.select(images.c.id, images.c.embedding).where(images.c.person == key)
            rows = {row.id: row.embedding for row in connection.execute(mine)}
            if rows.pop(image, None) is None:
                return False
            if not rows:
                raise UserError(f"{name!r} has no other image: remove the person instead")
            one = (images.c.person == key) & (images.c.id == image)
            connection.execute(sa.delete(images).where(one))
            connection.execute(touch.values(template=template(np.stack(list(rows.values())))))
        self._erase()
        return True

    def _erase(self) -> None:
        for file in self._index_files():
            file.unlink(missing_ok=True)
        self.unerased = not self._db.erase()

    def compact(self) -> None:
        """Give back the space of what was removed, and overwrite its bytes if that is left to do.

        On PostgreSQL this is VACUUM: rows that were removed are in the server's files until then,
        and their space is written over when it is used again.
        """
        self._check_open()
        self._db.vacuum(self._people, self._images)
        self._erase()

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
        if not 1 <= k <= MOST_K:
            raise UserError(f"k must be from 1 to {MOST_K}, not {k}")
        _check_fusion(fusion)
        probes = unit(embeddings, self.dim)
        if not self._db.is_file:
            every, mean = exact or self._stamp.hnsw_from is None, fusion == "mean"
            with self._read() as connection:
                ranked = [
                    searching.pgvector(connection, probe, k, mean=mean, every=every)
                    for probe in probes
                ]
                people = self._describe(connection, {key for one in ranked for key, _ in one})
            return [[_match(people[key], score) for key, score in one] for one in ranked]
        with self._view(fusion == "mean") as (view, snapshot):
            hnsw = None if exact or fusion == "mean" else self._index(view)
            if hnsw is None:
                ranked = searching.exact(view, probes, k)
            else:
                ranked = [
                    hnsw.search(view, probe, k) or searching.exact(view, probe[None], k)[0]
                    for probe in probes
                ]
            keys = {key for one in ranked for key, _ in one}
            found = {
                row[0]: Person(row[1], row[3], json.loads(row[2]), bool(row[4]))
                for some in _parts(list(keys))
                for row in snapshot.execute(
                    f"{self._describing} WHERE people.id IN ({','.join('?' * len(some))})", some
                )
            }
        return [[_match(found[key], score) for key, score in one] for one in ranked]

    @contextmanager
    def _view(self, mean: bool) -> Iterator[tuple[searching.View, sqlite3.Connection]]:
        """The matrix of one state of SQLite's database, and the transaction that sees it."""
        self._check_open()
        while True:
            with self._db.snapshot() as snapshot:
                fingerprint, seq = snapshot.execute(_STATE).fetchone()
                self._check_model(fingerprint)
                view = self._residents[mean].view(snapshot, seq or 0)
                if view is not None:  # else another thread's transaction is newer
                    yield view, snapshot
                    return

    def verify(self, person: str, embeddings: np.ndarray, *, fusion: str = "max") -> list[float]:
        """How like one person probes are: the cosine of each (q, d), as `search` scores them.

        Raises:
            UnknownPersonError: nobody of that name is there.
            UserError: as `search`.
        """
        _check_fusion(fusion)
        name, probes = person_name(person), unit(embeddings, self.dim)
        table, owner, vector = self._images, self._images.c.person, self._images.c.embedding
        if fusion == "mean":
            table, owner, vector = self._people, self._people.c.id, self._people.c.template
        with self._read() as connection:
            rows = list(
                connection.scalars(
                    sa.select(vector).select_from(table).where(owner == person_key(name))
                )
            )
        if not rows:
            raise self._nobody(name)
        return [_cosine(score) for score in (probes @ np.stack(rows).T).max(1)]

    def warm_up(self) -> None:
        """Read what searches need, so that the first is as quick as the others.

        On SQLite, this also begins to build or load the approximate index of a large gallery, for
        this process to use from when it is there.
        """
        self._warm = True
        if self._db.is_file:
            with self._view(False) as (view, _):
                self._index(view)

    def _index(self, view: searching.View) -> searching.Hnsw | None:
        """The approximate index to ask, begun if it is time."""
        least, images = self._stamp.hnsw_from, self._residents[0]
        if not self._warm or least is None or view.images < least:
            return None
        if images.hnsw is None:
            assert self._db.path is not None
            name = f"{self._db.path.name}-hnsw-{self.fingerprint[:8]}"
            images.hnsw = searching.Hnsw(self._db.path.with_name(name), self._keep_index)
            images.hnsw.start(view)
        return images.hnsw

    def _keep_index(self, temporary: Path, seq: int) -> None:
        """Move an index's file into place, unless the gallery has changed since it was written."""
        if not self._db.read_only:
            with self._db.write() as connection:
                if connection.exec_driver_sql(_STATE).one()[1] == seq:
                    os.replace(temporary, temporary.with_name(temporary.name.rsplit(".", 2)[0]))

    def _index_files(self) -> list[Path]:
        path = self._db.path
        if path is None:
            return []
        return [p for p in path.parent.iterdir() if p.name.startswith(f"{path.name}-hnsw-")]

    def set_index(self, hnsw_from: int | None) -> None:
        """Have the gallery search approximately from some number of images on, or never.

        On SQLite, processes that called `warm_up` keep the index in memory, and this writes its
        file so that they need not build it. On PostgreSQL the index is made or dropped here, and
        any number means always.

        Args:
            hnsw_from: images; None: look at every image in every search.
        """
        with self._change() as connection:
            connection.execute(sa.update(stamp).values(hnsw_from=hnsw_from))
            if not self._db.is_file:
                _index_server(connection, None if hnsw_from is None else self.dim)
        self._stamp = self._db.stamped()
        if self._db.is_file and hnsw_from is not None:
            self.warm_up()
            if (hnsw := self._residents[0].hnsw) is not None:
                hnsw.wait()
        elif self._db.is_file:
            self._erase()

    # -- reading ---------------------------------------------------------------------------------

    def get(self, person: str) -> Person | None:
        """The person of this name, or None."""
        key = person_key(person_name(person))
        with self._read() as connection:
            return self._describe(connection, [key]).get(key)

    def crop(self, person: str, image: int | None = None) -> bytes | None:
        """The crop kept of a person's image, or the first of them, as it was given; else None."""
        images = self._images
        mine = images.c.person == person_key(person_name(person))
        query = sa.select(images.c.crop).where(mine, images.c.crop.is_not(None))
        if image is not None:
            query = query.where(images.c.id == image)
        with self._read() as connection:
            return connection.scalar(query.order_by(images.c.id).limit(1))

    def people(self, offset: int = 0, limit: int | None = None) -> list[Person]:
        """Everybody by name, or a page: ``limit`` people after the first ``offset``."""
        query = self._described.order_by(self._people.c.name).limit(limit).offset(offset)
        with self._read() as connection:
            return [_person(row) for row in connection.execute(query)]

    def count(self) -> int:
        """How many people there are."""
        with self._read() as connection:
            return int(connection.scalar(sa.select(sa.func.count()).select_from(self._people)) or 0)

    def stored(self, names: Iterable[str] | None = None) -> list[Stored]:
        """Everybody by name, or those of these names, with their images, oldest first."""
        keys = None
        if names is not None:
            keys = []
            for name in names:
                with suppress(UserError):  # a name that nobody can have
                    keys.append(person_key(person_name(name)))
        with self._read() as connection:
            found = self._stored(connection, keys)
        return sorted(found.values(), key=lambda one: one[0].name)

    def _stored(self, connection: Connection, keys: list[int] | None) -> dict[int, Stored]:
        images = self._images
        query = sa.select(images.c.person, images.c.id, images.c.source).order_by(images.c.id)
        if keys is None:
            people = {row.id: _person(row) for row in connection.execute(self._described)}
            parts = [query]
        else:
            people = self._describe(connection, keys)
            parts = [query.where(images.c.person.in_(some)) for some in _parts(keys)]
        found: dict[int, Stored] = {key: (person, []) for key, person in people.items()}
        for part in parts:
            for person, image, source in connection.execute(part):
                found[person][1].append(Image(image, source))
        return found

    def stats(self) -> dict[str, Any]:
        """Facts: ``people``, ``images``, ``dim``, ``fingerprint``, ``model``, ``storage``,
        ``hnsw_from``, ``uri``, ``package_version``, ``unerased``."""
        with self._read() as connection:
            people, images = (
                connection.scalar(sa.select(sa.func.count()).select_from(table))
                for table in (self._people, self._images)
            )
        facts = ("dim", "fingerprint", "model", "storage", "hnsw_from")
        return {
            "people": people,
            "images": images,
            **{fact: getattr(self._stamp, fact) for fact in facts},
            "uri": self.uri,
            "package_version": self._stamp.package_version,
            "unerased": self.unerased,
        }

    def _describe(self, connection: Connection, keys: Iterable[int]) -> dict[int, Person]:
        return {
            row.id: _person(row)
            for some in _parts(list(keys))
            for row in connection.execute(self._by_key, {"keys": some})
        }

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
            with self._change() as connection:
                if not self._db.is_file:
                    connection.execute(sa.select(stamp.c.id).with_for_update())
                there = self._stored(connection, None)
                todo = {
                    key: one
                    for key, one in there.items()
                    if done.get(key) != {image.id for image in one[1]}
                }
                if not todo:
                    self._replace(connection, there, vectors, fingerprint, dim, model)
                    break
            some = sorted(todo.values(), key=lambda one: one[0].name)
            vectors |= {image: unit(vector, dim)[0] for image, vector in embed(some)}
            done |= {key: {image.id for image in one[1]} for key, one in todo.items()}
        self._erase()
        self.__init__(self._db, self._db.stamped())  # type: ignore[misc]

    def _replace(
        self,
        connection: Connection,
        there: dict[int, Stored],
        vectors: dict[int, np.ndarray],
        fingerprint: str,
        dim: int,
        model: str | None,
    ) -> None:
        people, images = self._people, self._images
        if not self._db.is_file:
            _index_server(connection, None)
        new_images, new_people, lost_images, lost_people = [], [], [], []
        for key, (_, theirs) in there.items():
            kept = [image.id for image in theirs if image.id in vectors]
            lost_images += [
                {"person_": key, "id_": image.id} for image in theirs if image.id not in vectors
            ]
            if not kept:
                lost_people.append({"id_": key})
                continue
            new_images += [{"person_": key, "id_": i, "embedding": vectors[i]} for i in kept]
            mean = template(np.stack([vectors[i] for i in kept]))
            new_people.append({"id_": key, "template": mean})
        one = (images.c.person == sa.bindparam("person_")) & (images.c.id == sa.bindparam("id_"))
        somebody = people.c.id == sa.bindparam("id_")
        for statement, rows in (
            (sa.delete(images).where(one), lost_images),
            (sa.delete(people).where(somebody), lost_people),
            (sa.update(images).where(one), new_images),
            (sa.update(people).where(somebody), new_people),
        ):
            if rows:
                connection.execute(statement, rows)
        facts = {"fingerprint": fingerprint, "dim": dim, "model": model}
        connection.execute(sa.update(stamp).values(package_version=__version__, **facts))
        if not self._db.is_file and self._stamp.hnsw_from is not None:
            _index_server(connection, dim)


def _create(database: Database, fingerprint: str, dim: int, model: str | None, storage: str) -> Any:
    """Make the tables and stamp them, unless another process just did."""
    values = {
        "id": 1,
        "format_version": FORMAT_VERSION,
        "package_version": __version__,
        "fingerprint": fingerprint,
        "dim": dim,
        "storage": storage,
        "model": model,
        "hnsw_from": HNSW_FROM if database.is_file else 0,
    }
    with database.write() as connection:
        database.create(connection, Tables.of(storage))
        connection.execute(database.insert(stamp).on_conflict_do_nothing(), values)
        row = connection.execute(sa.select(stamp)).one()
        if not database.is_file and row.hnsw_from is not None:
            _index_server(connection, row.dim)
    return row


def _index_server(connection: Connection, dim: int | None) -> None:
    """Make PostgreSQL's indexes for embeddings of ``dim`` numbers; None drops them."""
    for table, column in (("images", "embedding"), ("people", "template")):
        name = f"{table}_hnsw"
        if dim is None:
            connection.exec_driver_sql(f"DROP INDEX IF EXISTS {name}")
        else:
            connection.exec_driver_sql(
                f"CREATE INDEX IF NOT EXISTS {name} ON {table} "
                f"USING hnsw (({column}::halfvec({dim})) halfvec_ip_ops) "
                # Rows of another model, which other transactions still see, stay out.
                f"WHERE vector_dims({column}) = {dim}"
            )


def _check_fusion(fusion: str) -> None:
    if fusion not in FUSIONS:
        raise UserError(
            f"there is no fusion {fusion!r}{did_you_mean(fusion, FUSIONS)}; choose "
            f"{' or '.join(FUSIONS)}"
        )


def _person(row: Any) -> Person:
    return Person(row.name, row.count, json.loads(row.metadata), bool(row.has_crop))


def _match(person: Person, score: float) -> Match:
    return Match(person.name, _cosine(score), person.metadata, person.has_crop)


def _cosine(score: float) -> float:
    return min(1.0, max(-1.0, float(score)))


def _parts(keys: list[int]) -> list[list[int]]:
    return [keys[start : start + _KEYS] for start in range(0, len(keys), _KEYS)]
