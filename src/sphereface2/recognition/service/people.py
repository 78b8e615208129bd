"""The people of the gallery, as the API sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

import numpy as np

from sphereface2.errors import UserError
from sphereface2.recognition.gallery import (
    Gallery,
    GalleryUnavailableError,
    Match,
    Person,
    PersonExistsError,
    UnknownPersonError,
)
from sphereface2.recognition.service.errors import Refusal
from sphereface2.recognition.service.recogniser import encode

Result = TypeVar("Result")
_THREADS = 4


class People:
    """The gallery for coroutines.

    Args:
        gallery: closed by `close`.
        keep_crops: whether the crops of enrolled people are kept in it.
    """

    def __init__(self, gallery: Gallery, keep_crops: bool) -> None:
        self._gallery = gallery
        self.keeps_crops = keep_crops
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="gallery")

    async def _do(self, work: Callable[[], Result]) -> Result:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except UnknownPersonError:
            raise _nobody() from None
        except PersonExistsError:
            raise Refusal(
                409,
                "exists",
                "somebody of that name is enrolled already: add pictures to that person or choose "
                "another name",
            ) from None
        except GalleryUnavailableError as error:
            raise Refusal(503, "gallery_unavailable", str(error), retry_after=1) from None
        except UserError as error:  # a name or metadata that the gallery does not take
            raise Refusal(422, "invalid", str(error)) from None

    async def count(self) -> int:
        """How many there are; also tells whether the gallery answers."""
        return await self._do(self._gallery.count)

    async def page(self, offset: int, limit: int) -> tuple[list[Person], int]:
        """People by name, and how many there are in all."""
        return await self._do(lambda: (self._gallery.people(offset, limit), self._gallery.count()))

    async def get(self, name: str) -> Person:
        """One person; a 404 if there is none."""
        return _found(await self._do(lambda: self._gallery.get(name)))

    async def add(
        self,
        name: str,
        rows: np.ndarray,
        crops: list[np.ndarray],
        *,
        metadata: Mapping[str, Any] | None = None,
        known: bool,
        replace: bool = False,
    ) -> tuple[Person, list[str]]:
        """Add pictures; a 409 or a 404 unless the person is ``known`` or not, as is said.

        Args:
            name: who.
            rows: embeddings (k, d).
            crops: the aligned faces.
            metadata: see `Gallery.add`.
            known: whether the person must be there or must not.
            replace: see `Gallery.add`.
        """

        def work() -> tuple[Person, list[str]]:
            added = self._gallery.add(
                name,
                rows,
                metadata=None if metadata is None else dict(metadata),
                crops=[encode(crop, ".jpg") for crop in crops] if self.keeps_crops else None,
                replace=replace,
                known=known,
            )
            return _found(self._gallery.get(name)), list(map(str, added))

        return await self._do(work)

    async def set_metadata(self, name: str, metadata: Mapping[str, Any]) -> Person:
        """Put other metadata in the place of somebody's; a 404 if there is no such person."""
        return _found(await self._do(lambda: self._gallery.set_metadata(name, dict(metadata))))

    async def remove(self, name: str) -> None:
        """Delete somebody, crops included; a 404 if there is no such person."""
        if not await self._do(lambda: self._gallery.remove(name)):
            raise _nobody()

    async def thumbnail(self, name: str) -> bytes | None:
        """The first crop kept of somebody, a JPEG; a 404 if there is no such person."""
        crop = await self._do(lambda: self._gallery.crop(name))
        if crop is None:
            await self.get(name)
        return crop

    async def search(self, row: np.ndarray, k: int, fusion: Literal["max", "mean"]) -> list[Match]:
        """The k most similar people."""
        return await self._do(lambda: self._gallery.search(row[None], k=k, fusion=fusion)[0])

    def start(self) -> None:
        """Make the gallery ready to be searched."""
        self._gallery.warm_up()

    def close(self) -> None:
        """Finish what was asked for and close the gallery."""
        self._threads.shutdown()
        self._gallery.close()


def _found(person: Person | None) -> Person:
    if person is None:
        raise _nobody()
    return person


def _nobody() -> Refusal:
    return Refusal(404, "no_such_person", "nobody of that name is enrolled")
