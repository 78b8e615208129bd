"""The people of the gallery and, where they are kept, the crops they were enrolled with."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from sphereface2.errors import UserError
from sphereface2.files import atomic_write
from sphereface2.recognition.gallery import Gallery, Match, Person
from sphereface2.recognition.service.errors import Refusal
from sphereface2.recognition.service.recogniser import encode

Result = TypeVar("Result")
_READERS = 4


class Crops:
    """A folder with one folder a person and in it one file a picture, named by the pictures' ids.

    Ids, because a name may be given again: a crop is shown only while the gallery holds the very
    picture that it was cut from.

    Args:
        folder: made if it is missing. It belongs to one gallery.

    Raises:
        UserError: it cannot be made.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UserError(f"crops cannot be kept in {folder}: {error}") from error

    def add(self, ids: Sequence[str], crops: Sequence[np.ndarray]) -> None:
        """Keep the crops of new pictures."""
        for picture, crop in zip(ids, crops, strict=True):
            file = self._file(picture)
            file.parent.mkdir(exist_ok=True, mode=0o700)
            atomic_write(file, encode(crop, ".jpg"))

    def first(self, ids: Sequence[str]) -> Path | None:
        """The first crop kept of a person's pictures."""
        files = [self._file(picture) for picture in ids]
        try:
            kept = set(os.listdir(files[0].parent)) if files else set()
        except FileNotFoundError:
            return None
        return next((file for file in files if file.name in kept), None)

    def read(self, ids: Sequence[str]) -> bytes | None:
        """The first crop's JPEG; None if there is none, or no more at this very moment."""
        file = self.first(ids)
        try:
            return None if file is None else file.read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, ids: Sequence[str]) -> None:
        """Delete a person's crops, also any of earlier pictures."""
        for place in {self._file(picture).parent for picture in ids}:
            shutil.rmtree(place, ignore_errors=True)

    def keep_only(self, ids: Iterable[str]) -> None:
        """Delete all other crops: of what was removed while nobody looked after the folder."""
        known = {self._file(picture) for picture in ids}
        for place in self.folder.iterdir():
            if not re.fullmatch("[0-9a-f]{24,}", place.name) or not place.is_dir():
                continue  # not made here
            for file in set(place.iterdir()) - known:
                file.unlink(missing_ok=True)
            if not any(place.iterdir()):
                place.rmdir()

    def _file(self, picture: str) -> Path:
        person, _, token = picture.partition(".")
        return self.folder / person / f"{token}.jpg"


class _Directory:
    """Everybody by name, so that a page of people needs no reading of the whole gallery.

    Only the thread that changes the gallery calls the methods.
    """

    def __init__(self) -> None:
        self.people: list[Person] | None = None  # None: to be read

    def put(self, person: Person) -> None:
        """Somebody is new or changed."""
        if self.people is not None:
            self.people[self._place(self.people, person.name)] = [person]

    def drop(self, name: str) -> None:
        """Somebody is gone."""
        if self.people is not None:
            del self.people[self._place(self.people, name)]

    @staticmethod
    def _place(people: list[Person], name: str) -> slice:
        at = bisect_left(people, name, key=lambda person: person.name)
        there = at < len(people) and people[at].name == name
        return slice(at, at + there)


class People:
    """The gallery for coroutines: one thread changes it, in the order asked for, others read."""

    def __init__(self, gallery: Gallery, crops: Crops | None) -> None:
        self._gallery = gallery
        self._directory = _Directory()
        self.crops = crops
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="gallery-change")
        self._reads = ThreadPoolExecutor(_READERS, thread_name_prefix="gallery-read")

    async def _read(self, work: Callable[[], Result]) -> Result:
        return await self._do(self._reads, work)

    async def _change(self, work: Callable[[], Result]) -> Result:
        def change() -> Result:
            try:
                return work()
            except (UserError, Refusal):  # refused before anything was written
                raise
            except BaseException:
                self._directory.people = None
                raise

        return await self._do(self._changes, change)

    async def _do(self, threads: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(threads, work)
        except UserError as error:  # a name or metadata that the gallery does not take
            raise Refusal(422, "invalid", str(error)) from None

    async def count(self) -> int:
        """How many there are; also tells whether the gallery answers."""
        return await self._read(lambda: int(self._gallery.stats()["people"]))

    async def page(self, offset: int, limit: int) -> tuple[list[Person], int]:
        """People by name, and how many there are in all."""
        if not self._gallery.local:  # other processes may be changing it
            people = await self._read(self._gallery.people)
        elif (known := self._directory.people) is not None:
            people = known
        else:
            people = await self._change(self._list)
        return people[offset : offset + limit], len(people)

    async def get(self, name: str) -> Person:
        """One person; a 404 if there is none."""
        return await self._read(lambda: self._found(name))

    async def create(
        self, name: str, rows: np.ndarray, metadata: Mapping[str, Any], crops: list[np.ndarray]
    ) -> tuple[Person, list[str]]:
        """Add somebody new; a 409 if the name is taken."""

        def work() -> tuple[Person, list[str]]:
            if self._gallery.get(name) is not None:
                raise Refusal(
                    409,
                    "exists",
                    "somebody of that name is enrolled already: add pictures to that person or "
                    "choose another name",
                )
            return self._add(name, rows, metadata, crops)

        return await self._change(work)

    async def add(
        self, name: str, rows: np.ndarray, crops: list[np.ndarray]
    ) -> tuple[Person, list[str]]:
        """Add pictures of somebody who is there."""

        def work() -> tuple[Person, list[str]]:
            self._found(name)
            return self._add(name, rows, None, crops)

        return await self._change(work)

    async def replace(
        self, name: str, rows: np.ndarray, metadata: Mapping[str, Any], crops: list[np.ndarray]
    ) -> tuple[Person, list[str]]:
        """Put new pictures and metadata in the place of the old."""

        def work() -> tuple[Person, list[str]]:
            self._found(name)
            return self._add(name, rows, metadata, crops, replace=True)

        return await self._change(work)

    async def set_metadata(self, name: str, metadata: Mapping[str, Any]) -> Person:
        """Put other metadata in the place of somebody's; a 404 if there is no such person."""

        def work() -> Person:
            self._found(name)
            person = self._gallery.set_metadata(name, dict(metadata))
            assert person is not None  # this thread alone removes people
            self._directory.put(person)
            return person

        return await self._change(work)

    async def remove(self, name: str) -> None:
        """Delete somebody, crops included; a 404 if there is no such person."""

        def work() -> None:
            person = self._found(name)
            self._gallery.remove(person.name)
            self._directory.drop(person.name)
            if self.crops is not None:
                self.crops.remove(person.ids)

        await self._change(work)

    async def thumbnail(self, name: str) -> bytes | None:
        """The first crop kept of somebody, a JPEG; a 404 if there is no such person."""

        def work() -> bytes | None:
            person = self._found(name)
            return None if self.crops is None else self.crops.read(person.ids)

        return await self._read(work)

    async def search(
        self, row: np.ndarray, k: int, fusion: Literal["max", "mean"]
    ) -> Sequence[Match]:
        """The k most similar people."""
        return await self._read(lambda: self._gallery.search(row[None], k=k, fusion=fusion)[0])

    def start(self) -> None:
        """Erase what was removed before: embeddings from the gallery's files, kept crops."""
        if self._gallery.local and self._gallery.stats()["removed"]:
            self._gallery.compact()
        if self.crops is not None:
            everybody = self._gallery.people()
            self.crops.keep_only(picture for person in everybody for picture in person.ids)

    def close(self) -> None:
        """Finish what was asked for and close the gallery."""
        self._reads.shutdown()
        self._changes.submit(self._gallery.close).result()
        self._changes.shutdown()

    def _list(self) -> list[Person]:
        if self._directory.people is None:
            self._directory.people = self._gallery.people()
        return self._directory.people

    def _found(self, name: str) -> Person:
        person = self._gallery.get(name)
        if person is None:
            raise Refusal(404, "no_such_person", "nobody of that name is enrolled")
        return person

    def _add(
        self,
        name: str,
        rows: np.ndarray,
        metadata: Mapping[str, Any] | None,
        crops: list[np.ndarray],
        *,
        replace: bool = False,
    ) -> tuple[Person, list[str]]:
        added = self._gallery.add(
            name, rows, metadata=None if metadata is None else dict(metadata), replace=replace
        )
        person = self._found(name)
        self._directory.put(person)
        if self.crops is not None:
            if replace:
                self.crops.remove(person.ids)
            self.crops.add(added, crops)
        return person, added
