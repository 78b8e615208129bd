"""The people of the gallery and, where they are kept, the crops they were enrolled with."""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
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
    """A folder with one folder a person, named by a hash: names are not file names.

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

    def add(self, name: str, crops: Sequence[np.ndarray]) -> None:
        """Keep a person's crops."""
        place = self._place(name)
        place.mkdir(exist_ok=True, mode=0o700)
        start = max((int(file.stem) for file in place.glob("[0-9]*.jpg")), default=0) + 1
        for number, crop in enumerate(crops, start):
            atomic_write(place / f"{number:06d}.jpg", encode(crop, ".jpg"))

    def first(self, name: str) -> Path | None:
        """A person's first crop."""
        return min(self._place(name).glob("[0-9]*.jpg"), default=None)

    def remove(self, name: str) -> None:
        """Delete a person's crops."""
        shutil.rmtree(self._place(name), ignore_errors=True)

    def keep_only(self, names: Sequence[str]) -> None:
        """Delete the crops of everybody else: who was removed while the server was down."""
        known = {self._place(name) for name in names}
        for place in self.folder.iterdir():
            if re.fullmatch("[0-9a-f]{32}", place.name) and place not in known:
                shutil.rmtree(place, ignore_errors=True)

    def _place(self, name: str) -> Path:
        return self.folder / hashlib.sha256(name.encode()).hexdigest()[:32]


class People:
    """The gallery for coroutines: one thread changes it, in the order asked for, others read."""

    def __init__(self, gallery: Gallery, crops: Crops | None) -> None:
        self._gallery = gallery
        self.crops = crops
        self._changes = ThreadPoolExecutor(1, thread_name_prefix="gallery-change")
        self._reads = ThreadPoolExecutor(_READERS, thread_name_prefix="gallery-read")

    async def _read(self, work: Callable[[], Result]) -> Result:
        return await self._do(self._reads, work)

    async def _change(self, work: Callable[[], Result]) -> Result:
        return await self._do(self._changes, work)

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
        people = await self._read(self._gallery.people)
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
            return person

        return await self._change(work)

    async def remove(self, name: str) -> None:
        """Delete somebody, crops included; a 404 if there is no such person."""

        def work() -> None:
            person = self._found(name)
            self._gallery.remove(person.name)
            if self.crops is not None:
                self.crops.remove(person.name)

        await self._change(work)

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
            self.crops.keep_only([person.name for person in self._gallery.people()])

    def close(self) -> None:
        """Finish what was asked for and close the gallery."""
        self._reads.shutdown()
        self._changes.submit(self._gallery.close).result()
        self._changes.shutdown()

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
        if self.crops is not None:
            if replace:
                self.crops.remove(person.name)
            self.crops.add(person.name, crops)
        return person, added
