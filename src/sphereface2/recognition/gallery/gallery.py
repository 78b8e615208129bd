"""People and the embeddings of their images, searched one to many, with strangers among probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sphereface2.errors import UserError, check_count
from sphereface2.recognition.gallery import stamps
from sphereface2.recognition.gallery.reader import GalleryReader
from sphereface2.recognition.gallery.rows import Passed, Refused, Stored
from sphereface2.recognition.gallery.types import (
    Enrolment,
    Person,
    metadata_json,
    person_key,
    person_name,
    unit,
)
from sphereface2.version import __version__

Result = TypeVar("Result")
#: Images that one transaction of `Gallery.add_many` holds.
BATCH_IMAGES = 1_500


class Gallery(GalleryReader):
    """People to search among. Make one with `Gallery.open`; safe to use from several threads.

    Every change is one transaction: it happens whole or not at all, is on the disk when the call
    returns, and is seen at once by every process that has the gallery open.
    """

    @contextmanager
    def _change(self, *, alone: bool = False) -> Iterator[Connection]:
        """A change; ``alone``: no other change of anybody's at the same time."""
        self._check_open()
        with self._db.write() as connection:
            # Whoever moves the gallery to another model waits for this change, or this for that.
            lock = sa.select(stamps.stamp.c.fingerprint).with_for_update(read=not alone)
            stamps.check_moved(self._db, self._stamp, connection.scalar(lock))
            yield connection

    def _changed(self, change: Callable[[Connection], Result], removes: bool = True) -> Result:
        """What ``change`` says that it changed; where it ``removes``, no file holds that then."""
        with self._change() as connection:
            result = change(connection)
            gone = removes and bool(result)
            if gone:
                self._search.forget()
        if gone:
            self._erase()
        return result

    def _erase(self) -> None:
        self.unerased = not self._db.erase()

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
        item = Enrolment(person, embeddings, metadata, sources, crops).check(self.dim)
        options: dict[str, Any] = {"replace": replace, "known": known}
        return self._changed(lambda c: self._rows.add(c, [item], **options), replace)[item.key]

    def add_many(
        self,
        people: Iterable[Enrolment],
        *,
        replace: bool = False,
        refused: Refused | None = None,
        passed: Passed | None = None,
    ) -> Iterator[list[Person]]:
        """Add many people, many in one transaction: yields those stored since last time.

        Args:
            people: whom to add; one person may come several times.
            replace: see `add`.
            refused: is told whom `add` refuses, and why; the others are added.
            passed: has images that their person has already, of one source and alike, passed over,
                whoever enrolled them and however recently, and is told of whom and how many.

        Raises:
            UserError: as `add`, without ``refused``; what was yielded before stays.
            ValueError: ``replace`` and ``passed``, by which what is passed over would be lost.
        """
        if replace and passed is not None:
            raise ValueError("replace takes no passed, as it removes the images that are there")
        options: dict[str, Any] = {"replace": replace, "refused": refused, "passed": passed}
        waiting: dict[int, Enrolment] = {}
        size = 0
        for item in people:
            try:
                one = item.check(self.dim)
            except UserError as error:
                if refused is None:
                    raise
                refused(item, error)
                continue
            size += len(one.embeddings)
            if waiting and (size > BATCH_IMAGES or one.key in waiting):
                yield self._add_batch(waiting, **options)
                waiting, size = {}, len(one.embeddings)
            waiting[one.key] = one
        if waiting:
            yield self._add_batch(waiting, **options)

    def _add_batch(self, batch: dict[int, Enrolment], **options: Any) -> list[Person]:
        def change(connection: Connection) -> list[Person]:
            stored = self._rows.add(connection, batch.values(), **options)
            return list(self._rows.describe(connection, stored).values())

        return self._changed(change, options["replace"])

    def set_metadata(self, person: str, metadata: dict[str, Any]) -> Person | None:
        """Put other metadata, as in `add`, in the place of a person's.

        Returns:
            The person as they are now, or None if nobody of that name is there.
        """
        name = person_name(person)
        key, text = person_key(name), metadata_json(name, metadata)
        with self._change() as connection:
            there = self._rows.set(connection, key, metadata=text)
            return self._rows.describe(connection, [key])[key] if there else None

    def rename(
        self, person: str, new_name: str, *, metadata: dict[str, Any] | None = None
    ) -> Person | None:
        """Give a person another name, and other metadata if there are any.

        Returns:
            The person as they are now, or None if nobody of the old name is there.

        Raises:
            PersonExistsError: somebody of the new name is there.
        """
        key, name = person_key(person_name(person)), person_name(new_name)
        text = None if metadata is None else metadata_json(name, metadata)
        # Alone: nobody is enrolled under either name while rows go from one to the other.
        with self._change(alone=True) as connection:
            if text is not None:
                self._rows.set(connection, key, metadata=text)
            return self._rows.rename(connection, key, name)

    def remove(self, person: str) -> int:
        """Remove a person; on SQLite the embeddings' bytes are then in no file, see `unerased`.

        Returns:
            How many images went; 0 if nobody of that name was there.
        """
        key = person_key(person_name(person))
        return self._changed(lambda connection: self._rows.remove(connection, key))

    def remove_image(self, person: str, image: int) -> bool:
        """Remove one image of a person, by its id; whether it was there.

        Raises:
            UserError: it is the person's last.
        """
        key = person_key(person_name(person))
        return self._changed(lambda connection: self._rows.remove_image(connection, key, image))

    def compact(self) -> None:
        """Give back the space of what was removed, and overwrite its bytes if that is left to do.

        On PostgreSQL this is VACUUM: rows that were removed are in the server's files until then,
        and their space is written over when it is used again.
        """
        self._check_open()
        self._db.vacuum()
        self._erase()

    def set_index(self, index_from: int | None) -> None:
        """Have the gallery search approximately from some number of images on, or never.

        On SQLite, processes that called `warm_up` keep the index in memory, and this writes its
        file so that they need not build it. On PostgreSQL the index is made or dropped here, and
        any number means always.

        Args:
            index_from: images; None: look at every image in every search.
        """
        if index_from is not None:
            check_count("index_from", index_from, 0)
        with self._change(alone=True) as connection:
            row = self._restamp(connection, index_from=index_from)
        self._take(row)
        self._search.finish()

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
                people who have got images meanwhile.
            fingerprint: of the new model.
            dim: numbers in its embeddings.
            model: where the new model is.

        Raises:
            UserError: what ``embed`` raises; the gallery is then as it was.
        """
        done: set[int] = set()  # the images that were handed out
        vectors: dict[int, np.ndarray] = {}
        while True:
            with self._change(alone=True) as connection:
                there = self._rows.stored(connection, None)
                todo = [one for one in there.values() if not done.issuperset(i.id for i in one[1])]
                if not todo:
                    if not self.is_file:  # an index is built faster than it grows
                        stamps.index_server(connection, None)
                    self._rows.reembed(connection, there, vectors)
                    row = self._restamp(connection, fingerprint=fingerprint, dim=dim, model=model)
                    self._search.forget()
                    break
            todo.sort(key=lambda one: one[0].name)
            vectors |= {image: unit(vector, dim)[0] for image, vector in embed(todo)}
            done |= {image.id for _, theirs in todo for image in theirs}
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
