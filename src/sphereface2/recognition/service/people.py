"""The endpoints of people: enrol, list, read, change, delete."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import Response
from starlette.convertors import PathConvertor, register_url_convertor

from sphereface2.recognition.gallery import Person
from sphereface2.recognition.service import bodies, schemas
from sphereface2.recognition.service.errors import Refusal
from sphereface2.recognition.service.state import ERRORS, Current, doing, enrolled, person_out


class _Text(PathConvertor):
    """A name in an address: a gallery takes any text, slashes and line breaks too."""

    regex = "(?s:.+)"


register_url_convertor("text", _Text())
router = APIRouter(prefix="/v1/people", tags=["people"], responses=ERRORS)
_JPEG: dict[str, Any] = {
    "response_class": Response,
    "responses": {200: {"content": {"image/jpeg": {}}}},
}


@router.get("", **doing("list"))
def list_people(
    service: Current,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    query: Annotated[str, Query(max_length=schemas.MAX_NAME, description="Part of the name.")] = "",
) -> schemas.PeoplePage:
    """Who is enrolled, by name, a page at a time."""
    people = service.gallery.people(offset, limit, query=query)
    total = service.gallery.count(query=query)
    following = offset + len(people)
    return schemas.PeoplePage(
        people=[person_out(person) for person in people],
        total=total,
        next=following if following < total and people else None,
    )


@router.post("", status_code=201, **doing("enrol", schemas.EnrolRequest))
async def enrol(request: Request, service: Current) -> schemas.Enrolled:
    """Add a person with one image or several."""
    asked = await bodies.read(request, schemas.EnrolRequest)
    request.state.person = asked.name
    return await service.enrol(request, asked.name, asked, metadata=asked.metadata, known=False)


# Before the route of a name, which takes slashes too.
@router.get("/{name:text}/thumbnail", **_JPEG, **doing("thumbnail"))
def thumbnail(name: str, service: Current) -> Response:
    """The first crop kept of a person."""
    service.person(name)
    return _jpeg(service.gallery.crop(name))


@router.get("/{name:text}/images", **doing("read"))
def list_images(name: str, service: Current) -> schemas.PersonImages:
    """A person's images."""
    person, images = enrolled(name, service.gallery.stored([name]))[0]
    return schemas.PersonImages(
        **person_out(person).model_dump(),
        enrolled=[schemas.ImageOut(id=str(image.id), source=image.source) for image in images],
    )


@router.get("/{name:text}/images/{image}/crop", **_JPEG, **doing("thumbnail"))
def image_crop(name: str, image: str, service: Current) -> Response:
    """The crop kept of one image of a person."""
    return _jpeg(service.gallery.crop(name, _id(image)))


@router.post("/{name:text}/images", status_code=201, **doing("add", schemas.ImagesRequest))
async def add_images(name: str, request: Request, service: Current) -> schemas.Enrolled:
    """Add images to a person."""
    asked = await bodies.read(request, schemas.ImagesRequest)
    await run_in_threadpool(service.person, name)
    return await service.enrol(request, name, asked, known=True)


@router.delete("/{name:text}/images/{image}", status_code=204, **doing("remove image"))
def remove_image(name: str, image: str, service: Current) -> Response:
    """Delete one image of a person; the last one cannot be, the person can."""
    if not service.gallery.remove_image(name, _id(image)):
        raise Refusal(404, "no_such_image", "that person has no image of that id")
    return Response(status_code=204)


@router.get("/{name:text}", **doing("read"))
def get_person(name: str, service: Current) -> schemas.PersonOut:
    """One person."""
    return service.person(name)


@router.put("/{name:text}", **doing("replace", schemas.ReplaceRequest))
async def replace_person(name: str, request: Request, service: Current) -> schemas.Enrolled:
    """Put new images and metadata in the place of all there were."""
    asked = await bodies.read(request, schemas.ReplaceRequest)
    await run_in_threadpool(service.person, name)
    return await service.enrol(
        request, name, asked, metadata=asked.metadata, known=True, replace=True
    )


@router.patch("/{name:text}", **doing("change", schemas.ChangeRequest))
async def change_person(name: str, request: Request, service: Current) -> schemas.PersonOut:
    """Rename a person, replace the metadata, or both at once; the images stay."""
    asked = await bodies.read(request, schemas.ChangeRequest)

    def work() -> Person | None:
        gallery, metadata = service.gallery, asked.metadata
        if asked.name is not None:
            return gallery.rename(name, asked.name, metadata=metadata)
        return gallery.get(name) if metadata is None else gallery.set_metadata(name, metadata)

    return person_out(enrolled(name, await run_in_threadpool(work)))


@router.delete("/{name:text}", status_code=204, **doing("remove"))
def remove_person(name: str, service: Current) -> Response:
    """Delete a person: embeddings, metadata and kept crops."""
    enrolled(name, service.gallery.remove(name))
    return Response(status_code=204)


def _id(text: str) -> int:
    """An image's id; -1, which is none's, for what is no number of 63 bits, as databases take.

    A route of numbers alone would leave the rest to the route of a name, which takes slashes.
    """
    known = text.isascii() and text.isdigit() and len(text) < 20 and int(text) < 2**63
    return int(text) if known else -1


def _jpeg(crop: bytes | None) -> Response:
    if crop is None:
        raise Refusal(404, "no_thumbnail", "no crop of that person is kept")
    return Response(crop, media_type="image/jpeg")
