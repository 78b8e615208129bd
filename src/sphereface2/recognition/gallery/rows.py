"""The tables of a gallery, and every statement about people and images.

Each key begins with the person's, a hash of the name, and no sequence hands out ids: so the tables
can be partitioned by person, or distributed over servers, as they are.
"""

from __future__ import annotations

import json
import time
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import Connection, Dialect

from sphereface2.errors import UserError
from sphereface2.recognition.gallery.types import (
    Enrolment,
    Image,
    Person,
    PersonExistsError,
    UnknownPersonError,
    check_count,
    image_ids,
    packed,
    person_key,
    template,
)

STORAGES = ("float32", "float16")
_CHANGES_KEPT = 100_000

#: Somebody with their images.
Stored = tuple[Person, list[Image]]
#: Is told whom a gallery refuses, and why.
Refused = Callable[[Enrolment, UserError], None]
#: Is told of whom a gallery has images already, and how many of those it was to take.
Passed = Callable[[Enrolment, int], None]


class Embedding(sa.types.TypeDecorator[np.ndarray]):
    """Vectors (d,), float32 or float16: pgvector's types; on SQLite bytes, little-endian."""

    impl = sa.LargeBinary
    cache_ok = True

    def __init__(self, storage: str) -> None:
        super().__init__()
        self.storage = storage

    def load_dialect_impl(self, dialect: Dialect) -> sa.types.TypeEngine[Any]:
        """The column's type."""
        if dialect.name == "sqlite":
            return sa.LargeBinary()
        from pgvector.sqlalchemy import HALFVEC, VECTOR

        class Type(HALFVEC if self.storage == "float16" else VECTOR):  # type: ignore[misc]
            def bind_processor(self, dialect: Dialect) -> None:
                """None: values are packed already."""

        return Type()

    def process_bind_param(self, value: Any, dialect: Dialect) -> bytes:
        """To the database, where every row has one."""
        if dialect.name == "sqlite":
            return value.astype(bytes_type(self.storage)).tobytes()
        return packed(value, self.storage)

    def process_result_value(self, value: Any, dialect: Dialect) -> np.ndarray:
        """From the database, float32."""
        if dialect.name == "sqlite":
            return np.frombuffer(value, bytes_type(self.storage)).astype(np.float32)
        return np.asarray(value.to_list() if hasattr(value, "to_list") else value, np.float32)


def bytes_type(storage: str) -> np.dtype[Any]:
    """How SQLite holds an embedding's numbers."""
    return np.dtype("<f2" if storage == "float16" else "<f4")


_ALIKE = 0.999  # cosine of one image, embedded twice or stored in float16
_TEXT = sa.Text().with_variant(postgresql.TEXT(collation="C"), "postgresql")
#: The number of the last change that a transaction of SQLite sees.
SEQ = "SELECT seq FROM sqlite_sequence WHERE name = 'changes'"
# SQLite's record of who changed, by which a process brings its matrix in memory up to date. Every
# change of a person touches the person's row.
_CHANGES = (
    "CREATE TABLE changes (seq INTEGER PRIMARY KEY AUTOINCREMENT, person INTEGER NOT NULL)",
    *(
        f"CREATE TRIGGER people_{event} AFTER {event} ON people BEGIN "
        f"INSERT INTO changes (person) VALUES ({row}.id); END"
        for event, row in (("insert", "NEW"), ("update", "NEW"), ("delete", "OLD"))
    ),
    "CREATE TRIGGER changes_kept AFTER INSERT ON changes BEGIN "
    f"DELETE FROM changes WHERE seq <= NEW.seq - {_CHANGES_KEPT}; END",
)


class Rows:
    """People and images in the tables ``people`` and ``images``, by statements on a connection.

    Args:
        is_file: whether the database is SQLite.
        storage: how embeddings are held, ``float32`` or ``float16``.

    Attributes:
        described: selects people as `person_of` takes them.
        description: the same as SQL, without a WHERE.
    """

    def __init__(self, is_file: bool, storage: str) -> None:
        self._dialect: Any = sqlite if is_file else postgresql
        self._storage = storage
        key: dict[str, Any] = {"primary_key": True, "autoincrement": False}
        metadata = sa.MetaData()
        self.people = people = sa.Table(
            "people",
            metadata,
            sa.Column("id", sa.BigInteger, **key),
            sa.Column("name", _TEXT, nullable=False, index=True),
            sa.Column("metadata", sa.Text, nullable=False),
            sa.Column("template", Embedding(storage), nullable=False),
        )
        person = sa.ForeignKey("people.id", ondelete="CASCADE")
        self.images = images = sa.Table(
            "images",
            metadata,
            sa.Column("person", sa.BigInteger, person, **key),
            sa.Column("id", sa.BigInteger, **key),
            sa.Column("embedding", Embedding(storage), nullable=False),
            sa.Column("source", sa.Text),
            sa.Column("crop", sa.LargeBinary),
        )
        self._theirs = theirs = images.c.person == people.c.id
        self.described = sa.select(
            people.c.id,
            people.c.name,
            people.c.metadata,
            sa.select(sa.func.count()).where(theirs).scalar_subquery().label("images"),
            sa.exists().where(theirs, images.c.crop.is_not(None)).label("has_crop"),
        )
        self.description = str(self.described.compile(dialect=self._dialect.dialect()))

    def create(self, connection: Connection) -> None:
        """Create what is missing of the tables; tables that exist are taken as they are."""
        if self._dialect is postgresql:
            # Two processes that create one gallery at once take turns.
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(7311)")
            connection.exec_driver_sql("CREATE EXTENSION IF NOT EXISTS vector")
        self.people.metadata.create_all(connection)
        if self._dialect is sqlite and not sa.inspect(connection).has_table("changes"):
            for statement in _CHANGES:
                connection.exec_driver_sql(statement)

    def insert(self, table: sa.Table) -> Any:
        """An INSERT that knows ON CONFLICT."""
        return self._dialect.insert(table)

    # -- reading ---------------------------------------------------------------------------------

    def describe(self, connection: Connection, keys: Iterable[int]) -> dict[int, Person]:
        """Those of these people who are there."""
        query = self.described.where(self._among(self.people.c.id, keys))
        return {row.id: person_of(row) for row in connection.execute(query)}

    def _among(self, key: sa.ColumnElement[int], keys: Iterable[int]) -> sa.ColumnElement[bool]:
        """Whether a key is one of these, of which one parameter takes any number."""
        if self._dialect is sqlite:
            listed = sa.func.json_each(json.dumps(list(keys))).table_valued("value")
            return key.in_(sa.select(listed.c.value))
        return key == sa.any_(sa.literal(list(keys), sa.ARRAY(sa.BigInteger)))

    def named(self, part: str) -> sa.ColumnElement[bool]:
        """Whether a name contains ``part``, in upper or lower case."""
        if not part:
            return sa.true()
        part = unicodedata.normalize("NFC", part).replace("\0", "")
        name: sa.ColumnElement[str] = self.people.c.name
        if self._dialect is sqlite:  # its own lower() knows ASCII only
            return sa.func.casefold(name).contains(part.casefold(), autoescape=True)
        # The column's collation, "C", has no upper case beyond ASCII either.
        fold = sa.func.lower(sa.collate(name, "default"))
        return fold.contains(part.lower(), autoescape=True)

    def state(self, connection: Connection) -> Any:
        """What another transaction that sees the same tables has in common with this one."""
        if self._dialect is sqlite:
            return connection.exec_driver_sql(SEQ).scalar()
        # The second: a distributed database may change rows elsewhere.
        snapshot = connection.exec_driver_sql("SELECT pg_current_snapshot()::text").scalar()
        return snapshot, int(time.monotonic())

    def stored(self, connection: Connection, keys: list[int] | None) -> dict[int, Stored]:
        """Everybody, or these people, with their images, oldest first."""
        images = self.images
        query = sa.select(images.c.person, images.c.id, images.c.source).order_by(images.c.id)
        if keys is None:
            people = {row.id: person_of(row) for row in connection.execute(self.described)}
        else:
            people = self.describe(connection, keys)
            query = query.where(self._among(images.c.person, keys))
        found: dict[int, Stored] = {key: (person, []) for key, person in people.items()}
        for person, image, source in connection.execute(query):
            found[person][1].append(Image(image, source))
        return found

    def vectors(self, connection: Connection, key: int, mean: bool) -> list[np.ndarray]:
        """A person's embeddings, or their template."""
        vector, owner = self.images.c.embedding, self.images.c.person
        if mean:
            vector, owner = self.people.c.template, self.people.c.id
        return list(connection.scalars(sa.select(vector).where(owner == key)))

    # -- changing --------------------------------------------------------------------------------

    def add(
        self,
        connection: Connection,
        items: Iterable[Enrolment],
        *,
        replace: bool,
        refused: Refused | None = None,
        passed: Passed | None = None,
        known: bool | None = None,
    ) -> dict[int, list[int]]:
        """Write people and their images: the images' ids by the person's key.

        With ``passed`` an image that the person has is passed over, and so is a person who has all
        of theirs. The people's rows are locked by then: nobody else is enrolling them.
        """
        people, images = self.people, self.images
        # In one order, so that two processes never wait for each other. The rows of people who are
        # there are locked and not written, which could link their templates anew.
        items = sorted(items, key=lambda item: item.key)
        rows = [
            {
                "id": item.key,
                "name": item.person,
                "metadata": json.dumps(item.metadata or {}),
                "template": template(item.embeddings),
            }
            for item in items
        ]
        insert = self.insert(people).on_conflict_do_update(
            index_elements=["id"], set_={"name": people.c.name}, where=sa.false()
        )
        connection.execute(insert, rows)
        there = self.describe(connection, [item.key for item in items])
        items = items if passed is None else self._new(connection, items, passed)
        new_ids = iter(image_ids(sum(len(item.embeddings) for item in items)))
        ids: dict[int, list[int]] = {}
        added, changed = [], []
        for item in items:
            before = there[item.key]
            try:
                _check(item, before, replace, known)
            except UserError as error:
                if refused is None:
                    raise
                refused(item, error)
                continue
            vectors, ids[item.key] = item.embeddings, [next(new_ids) for _ in item.embeddings]
            columns: Any = (ids[item.key], vectors, item.sources, item.crops)
            for row in zip(*columns, strict=True):
                added.append(dict(zip(images.c.keys(), (item.key, *row), strict=True)))
            if before.images:
                if replace:
                    connection.execute(sa.delete(images).where(images.c.person == item.key))
                else:  # of the images themselves, so that it does not drift with its changes
                    vectors = np.stack([*self.vectors(connection, item.key, False), *vectors])
                metadata = before.metadata if item.metadata is None else item.metadata
                facts = {"metadata": json.dumps(metadata), "template": template(vectors)}
                changed.append({"key": item.key, **facts})
        if added and self._dialect is postgresql:
            self._copy(connection, added)
        elif added:
            connection.execute(sa.insert(images), added)
        if changed:
            connection.execute(sa.update(people).where(people.c.id == sa.bindparam("key")), changed)
        return ids

    def _new(
        self, connection: Connection, items: Sequence[Enrolment], passed: Passed
    ) -> list[Enrolment]:
        """What is to be added of people, without images that they have or that are given twice.

        One image has one source and one embedding; another set may have files of the same names.
        """
        images, found = self.images, []
        mine = self._among(images.c.person, [item.key for item in items])
        named = mine & images.c.source.is_not(None)
        query = sa.select(images.c.person, images.c.source, images.c.embedding).where(named)
        there = defaultdict[tuple[int, str | None], list[np.ndarray]](list)
        for key, source, vector in connection.execute(query):
            there[key, source].append(vector)
        for item in items:
            new = []
            for i, vector in enumerate(item.embeddings):
                source = item.sources[i] if item.sources else None
                alike = there[item.key, source]
                if source is None or not any(one @ vector > _ALIKE for one in alike):
                    new.append(i)
                    alike.append(vector)
            if len(new) < len(item.embeddings):
                passed(item, len(item.embeddings) - len(new))
            if new:
                found.append(item.part(new))
        return found

    def _copy(self, connection: Connection, rows: list[dict[str, Any]]) -> None:
        """Insert images by COPY, several times as fast as INSERT."""
        driver: Any = connection.connection.driver_connection
        with (
            driver.cursor() as cursor,
            cursor.copy("COPY images FROM STDIN (FORMAT BINARY)") as copy,
        ):
            copy.set_types(["int8", "int8", "bytea", "text", "bytea"])
            for person, image, vector, *rest in (row.values() for row in rows):
                copy.write_row((person, image, packed(vector, self._storage), *rest))

    def set(self, connection: Connection, key: int, **values: Any) -> bool:
        """Put values in the place of a person's, and lock the row; whether the person is there.

        PostgreSQL's next statement would see whom another process enrolled since: who is not there
        now is not there for the whole change.
        """
        changed = sa.update(self.people).where(self.people.c.id == key).values(**values)
        return connection.execute(changed).rowcount > 0

    def rename(self, connection: Connection, old: int, name: str) -> Person | None:
        """Give a person another name: the key is the name's, so that the rows are written anew."""
        people, images, key = self.people, self.images, person_key(name)
        there = self.describe(connection, [old, key])
        if old not in there or old == key:
            return there.get(old)
        if key in there:
            raise PersonExistsError(
                f"a person named {name!r} is enrolled already; remove that person first, or choose "
                "another name"
            )
        person = sa.select(sa.literal(key), sa.literal(name), *list(people.c)[2:])
        theirs = sa.select(sa.literal(key), *list(images.c)[1:]).where(images.c.person == old)
        for table, query in ((people, person.where(people.c.id == old)), (images, theirs)):
            connection.execute(sa.insert(table).from_select(table.c.keys(), query))
        connection.execute(sa.delete(people).where(people.c.id == old))
        return self.describe(connection, [key])[key]

    def remove(self, connection: Connection, key: int) -> int:
        """Remove a person; how many images went."""
        if not self.set(connection, key, name=self.people.c.name):
            return 0
        images = sa.delete(self.images).where(self.images.c.person == key)
        count = connection.execute(images).rowcount
        connection.execute(sa.delete(self.people).where(self.people.c.id == key))
        return count

    def remove_image(self, connection: Connection, key: int, image: int) -> bool:
        """Remove one image of a person; whether it was there. UserError if it is the last."""
        images = self.images
        if not self.set(connection, key, name=self.people.c.name):
            return False
        mine = sa.select(images.c.id, images.c.embedding).where(images.c.person == key)
        rows = {row.id: row.embedding for row in connection.execute(mine)}
        if rows.pop(image, None) is None:
            return False
        if not rows:
            raise UserError("the person has no other image: remove the person instead")
        connection.execute(sa.delete(images).where(images.c.person == key, images.c.id == image))
        self.set(connection, key, template=template(np.stack(list(rows.values()))))
        return True

    def reembed(
        self, connection: Connection, there: dict[int, Stored], vectors: dict[int, np.ndarray]
    ) -> None:
        """Replace everybody's embeddings by these, by image; who and what has none goes."""
        people, images = self.people, self.images
        new_images, new_people, lost = [], [], []
        for key, (_, theirs) in there.items():
            kept = []
            for row in ({"person_": key, "id_": image.id} for image in theirs):
                if (vector := vectors.get(row["id_"])) is None:
                    lost.append(row)
                else:
                    kept.append(vector)
                    new_images.append({**row, "embedding": vector})
            if kept:
                new_people.append({"id_": key, "template": template(np.stack(kept))})
        image = (images.c.person == sa.bindparam("person_")) & (images.c.id == sa.bindparam("id_"))
        somebody = people.c.id == sa.bindparam("id_")
        for statement, rows in (
            (sa.delete(images).where(image), lost),
            (sa.update(images).where(image), new_images),
            (sa.update(people).where(somebody), new_people),
        ):
            if rows:
                connection.execute(statement, rows)
        connection.execute(sa.delete(people).where(~sa.exists().where(self._theirs)))
        if self._dialect is sqlite:
            # Images have other embeddings under the ids that they had: a record of changes that
            # begins after all others has every process read all of them anew.
            connection.exec_driver_sql("INSERT INTO changes (person) VALUES (0)")
            connection.exec_driver_sql(f"DELETE FROM changes WHERE seq < ({SEQ})")


def person_of(row: Iterable[Any]) -> Person:
    """A row of `Rows.description`."""
    _, name, metadata, images, has_crop = row
    return Person(name, images, json.loads(metadata), bool(has_crop))


def _check(item: Enrolment, before: Person, replace: bool, known: bool | None) -> None:
    """UserError unless somebody who is there as ``before`` can become what ``item`` makes them."""
    if known is False and before.images:
        raise PersonExistsError(f"{item.person!r} is enrolled already")
    if known and not before.images:
        raise UnknownPersonError(
            f"no person named {item.person!r} is enrolled: enrol them first, as somebody new"
        )
    if before.name != item.person:
        raise UserError(
            f"{item.person!r} cannot be distinguished from {before.name!r}; give another name"
        )
    check_count(item.person, len(item.embeddings) + (0 if replace else before.images))
