"""The endpoints: read the request, ask the recogniser and the gallery, shape the answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.convertors import Convertor, register_url_convertor

from sphereface2.align import Face
from sphereface2.errors import UserError
from sphereface2.evaluation.calibration import Calibration
from sphereface2.recognition.gallery import Gallery, Match, Person, UnknownPersonError
from sphereface2.recognition.gallery.quality import Gate, measure
from sphereface2.recognition.service import bodies, schemas
from sphereface2.recognition.service.errors import Refusal
from sphereface2.recognition.service.metrics import CONTENT_TYPE, Metrics
from sphereface2.recognition.service.recogniser import Recogniser, Seen, Which, encode

_CURVE_POINTS = 201


class _Text(Convertor[str]):
    """A name in an address: a gallery takes any text, slashes and line breaks too."""

    regex = "(?s:.+)"

    def convert(self, value: str) -> str:
        """As it is."""
        return value

    def to_string(self, value: str) -> str:
        """As it is."""
        return value


register_url_convertor("text", _Text())


@dataclass
class Service:
    """What the endpoints work with."""

    recogniser: Recogniser
    gallery: Gallery
    metrics: Metrics
    max_images: int
    far: float | None
    keep_crops: bool
    gate: Gate
    draining: bool = False

    @property
    def calibration(self) -> Calibration | None:
        """The model's, if it has one."""
        return self.recogniser.embedder.calibration

    def decide(self, far: float | None) -> tuple[float | None, float | None]:
        """FAR and threshold to decide by, or nothing without a calibration."""
        if self.calibration is None:
            if far is not None:
                raise Refusal(
                    422,
                    "not_calibrated",
                    "the model is not calibrated, so no far can be kept: run sphereface2 "
                    "calibrate first",
                )
            return None, None
        far = far or self.far or self.calibration.far_default
        try:
            return far, self.calibration.threshold(far)
        except UserError as error:
            raise Refusal(422, "unknown_far", str(error)) from None

    def probability(self, similarity: float) -> float | None:
        """With even odds beforehand, or nothing without a calibration."""
        if self.calibration is None:
            return None
        return float(self.calibration.probability(np.array([similarity]))[0])

    async def embed(
        self, request: Request, images: Sequence[bytes], aligned: bool, which: Which
    ) -> list[list[Seen]]:
        """The faces of each of a request's images."""
        if len(images) > self.max_images:
            raise Refusal(422, "too_many_images", f"at most {self.max_images} images a request")
        request.state.images = len(images)
        return await self.recogniser.embed(images, aligned=aligned, which=which)

    def check(self, seen: Sequence[Seen]) -> list[str]:
        """Warnings about faces that are poor ones to enrol or to decide by.

        Raises:
            Refusal: 422 for one that the quality gate refuses.
        """
        warnings = []
        for number, one in enumerate(seen, 1):
            name = "the image" if len(seen) == 1 else f"image {number}"
            try:
                warnings += self.gate.check(measure(one.crop, one.face), name)
            except UserError as error:
                raise Refusal(422, "poor_image", str(error)) from None
        return warnings

    def person(self, name: str) -> Person:
        """An enrolled person; a 404 if there is none."""
        person = self.gallery.get(name)
        if person is None:
            raise UnknownPersonError("no person of that name is enrolled")
        return person

    async def enrol(
        self, request: Request, name: str, asked: schemas.ImagesRequest, **options: Any
    ) -> schemas.Enrolled:
        """Add a request's images to the gallery; ``options`` are of `Gallery.add`."""
        seen = [
            faces[0]
            for faces in await self.embed(request, asked.images, asked.aligned, asked.faces)
        ]
        warnings = self.check(seen)
        rows = np.stack([one.embedding for one in seen])
        if self.keep_crops:
            options["crops"] = [encode(one.crop, ".jpg") for one in seen]

        def work() -> tuple[list[int], Person]:
            return self.gallery.add(name, rows, **options), self.person(name)

        added, person = await run_in_threadpool(work)
        return schemas.Enrolled(**_person(person).model_dump(), added=added, warnings=warnings)


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


Current = Annotated[Service, Depends(_service)]


def _doing(action: str) -> Any:
    """Names the request for the audit log before anything can go wrong."""

    def name(request: Request) -> None:
        request.state.action = action
        if person := request.path_params.get("name"):
            request.state.person = person[: schemas.MAX_NAME]

    return [Depends(name)]


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schemas.ErrorOut, "description": "What was wrong with the request."},
    503: {"model": schemas.ErrorOut, "description": "Too busy: see Retry-After."},
}
api = APIRouter(
    prefix="/v1",
    responses=_ERRORS,
    dependencies=[Depends(HTTPBearer(auto_error=False, description="An API key."))],
)
operation = APIRouter(tags=["operation"])
probes = APIRouter(tags=["operation"])


@api.get("/model", tags=["recognition"], dependencies=_doing("model"))
def model(service: Current) -> schemas.ModelOut:
    """What the server computes with: the model, its thresholds, its calibrated curve."""
    calibration, curve = service.calibration, None
    operating: list[schemas.Operating] = []
    if calibration is not None:
        similarity = np.linspace(-1, 1, _CURVE_POINTS)
        probability = calibration.probability(similarity)
        curve = schemas.Curve(similarity=similarity.tolist(), probability=probability.tolist())
        operating = [
            schemas.Operating(far=far, threshold=calibration.threshold(far))
            for far in calibration.thresholds
        ]
    embedder = service.recogniser.embedder
    return schemas.ModelOut(
        model=embedder.fingerprint,
        dim=embedder.embedding_dim,
        calibrated=calibration is not None,
        far=service.decide(None)[0],
        operating=operating,
        curve=curve,
        people=service.gallery.count(),
        keeps_crops=service.keep_crops,
    )


@api.post(
    "/embed",
    tags=["recognition"],
    dependencies=_doing("embed"),
    openapi_extra=bodies.documentation(schemas.EmbedRequest),
)
async def embed(request: Request, service: Current) -> schemas.Embedded:
    """Embeddings of the faces of images."""
    asked = await bodies.read(request, schemas.EmbedRequest)
    seen = await service.embed(request, asked.images, asked.aligned, asked.faces)
    return schemas.Embedded(
        model=service.recogniser.embedder.fingerprint,
        embeddings=[
            schemas.Embedding(image=at, face=_face(one.face), embedding=one.embedding.tolist())
            for at, faces in enumerate(seen)
            for one in faces
        ],
    )


@api.post(
    "/verify",
    tags=["recognition"],
    dependencies=_doing("verify"),
    openapi_extra=bodies.documentation(schemas.VerifyRequest),
)
async def verify(request: Request, service: Current) -> schemas.Verdict:
    """Whether two images show one person."""
    asked = await bodies.read(request, schemas.VerifyRequest)
    far, threshold = service.decide(asked.far)
    first, second = await service.embed(request, [asked.a, asked.b], asked.aligned, asked.faces)
    pairs = [
        schemas.PairOut(a=a, b=b, similarity=score, same=_same(score, threshold))
        for a, one in enumerate(first)
        for b, other in enumerate(second)
        for score in [_cosine(one.embedding @ other.embedding)]
    ]
    pairs.sort(key=lambda pair: -pair.similarity)
    best = pairs[0]
    chosen = [first[best.a], second[best.b]]
    request.state.outcome = {None: "not calibrated", True: "same", False: "different"}[best.same]
    return schemas.Verdict(
        similarity=best.similarity,
        same=best.same,
        threshold=threshold,
        far=far,
        probability=service.probability(best.similarity),
        faces=[[_face(one.face) for one in faces] for faces in (first, second)],
        pairs=pairs,
        crops=[one.png() for one in chosen] if asked.crops else None,
        warnings=service.check(chosen),
    )


@api.post(
    "/search",
    tags=["recognition"],
    dependencies=_doing("search"),
    openapi_extra=bodies.documentation(schemas.SearchRequest),
)
async def search(request: Request, service: Current) -> schemas.Found:
    """Who in the gallery the faces of an image look most like, and whether it is anybody."""
    asked = await bodies.read(request, schemas.SearchRequest)
    far, threshold = service.decide(asked.far)
    (seen,) = await service.embed(request, [asked.image], asked.aligned, asked.faces)
    rows = np.stack([one.embedding for one in seen])

    def work() -> tuple[list[list[Match]], int]:
        found = service.gallery.search(rows, k=asked.k, fusion=asked.fusion)
        return found, service.gallery.count()

    found, people = await run_in_threadpool(work)
    faces = []
    for one, matches in zip(seen, found, strict=True):
        listed = [_match(match, threshold) for match in matches]
        faces.append(
            schemas.FaceSearch(
                face=_face(one.face),
                known=None if threshold is None else any(match.same for match in listed),
                matches=listed,
                crop=one.png() if asked.crops else None,
            )
        )
    known = [face.matches[0].name for face in faces if face.known]
    outcome = "not calibrated" if threshold is None else "known" if known else "unknown"
    request.state.outcome = outcome
    if known:
        request.state.person = ", ".join(known)[: schemas.MAX_NAME]
    return schemas.Found(
        threshold=threshold,
        far=far,
        people=people,
        fpir=None if far is None else float(-np.expm1(people * np.log1p(-far))),
        faces=faces,
    )


@api.get("/people", tags=["people"], dependencies=_doing("list"))
def list_people(
    service: Current,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> schemas.PeoplePage:
    """Who is enrolled, by name, a page at a time."""
    people, total = service.gallery.people(offset, limit), service.gallery.count()
    following = offset + len(people)
    return schemas.PeoplePage(
        people=[_person(person) for person in people],
        total=total,
        next=following if following < total and people else None,
    )


@api.post(
    "/people",
    tags=["people"],
    status_code=201,
    dependencies=_doing("enrol"),
    openapi_extra=bodies.documentation(schemas.EnrolRequest),
)
async def enrol(request: Request, service: Current) -> schemas.Enrolled:
    """Add a person with one image or several."""
    asked = await bodies.read(request, schemas.EnrolRequest)
    request.state.person = asked.name
    return await service.enrol(request, asked.name, asked, metadata=asked.metadata, known=False)


# Before the route of a name, which takes slashes too.
@api.get(
    "/people/{name:text}/thumbnail",
    tags=["people"],
    dependencies=_doing("thumbnail"),
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}},
)
def thumbnail(name: str, service: Current) -> Response:
    """The first crop kept of a person."""
    service.person(name)
    return _jpeg(service.gallery.crop(name))


@api.get("/people/{name:text}/images", tags=["people"], dependencies=_doing("read"))
def list_images(name: str, service: Current) -> schemas.PersonImages:
    """A person's images."""
    found = service.gallery.stored([name])
    if not found:
        raise UnknownPersonError("no person of that name is enrolled")
    person, images = found[0]
    return schemas.PersonImages(
        **_person(person).model_dump(),
        enrolled=[schemas.ImageOut(id=image.id, source=image.source) for image in images],
    )


@api.get(
    "/people/{name:text}/images/{image:int}/crop",
    tags=["people"],
    dependencies=_doing("thumbnail"),
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}},
)
def image_crop(name: str, image: int, service: Current) -> Response:
    """The crop kept of one image of a person."""
    return _jpeg(service.gallery.crop(name, image))


@api.post(
    "/people/{name:text}/images",
    tags=["people"],
    status_code=201,
    dependencies=_doing("add"),
    openapi_extra=bodies.documentation(schemas.ImagesRequest),
)
async def add_images(name: str, request: Request, service: Current) -> schemas.Enrolled:
    """Add images to a person."""
    asked = await bodies.read(request, schemas.ImagesRequest)
    await run_in_threadpool(service.person, name)
    return await service.enrol(request, name, asked, known=True)


@api.delete(
    "/people/{name:text}/images/{image:int}",
    tags=["people"],
    status_code=204,
    dependencies=_doing("remove image"),
)
def remove_image(name: str, image: int, service: Current) -> Response:
    """Delete one image of a person; the last one cannot be, the person can."""
    if not service.gallery.remove_image(name, image):
        raise Refusal(404, "no_such_image", "that person has no image of that id")
    return Response(status_code=204)


@api.post(
    "/people/{name:text}/verify",
    tags=["recognition"],
    dependencies=_doing("verify person"),
    openapi_extra=bodies.documentation(schemas.VerifyPersonRequest),
)
async def verify_person(name: str, request: Request, service: Current) -> schemas.PersonVerdict:
    """Whether an image shows an enrolled person."""
    asked = await bodies.read(request, schemas.VerifyPersonRequest)
    far, threshold = service.decide(asked.far)
    person = await run_in_threadpool(service.person, name)
    (seen,) = await service.embed(request, [asked.image], asked.aligned, asked.faces)
    rows = np.stack([one.embedding for one in seen])
    scores = await run_in_threadpool(service.gallery.verify, name, rows, fusion=asked.fusion)
    best = int(np.argmax(scores))
    similarity = _cosine(scores[best])
    same = _same(similarity, threshold)
    request.state.outcome = {None: "not calibrated", True: "same", False: "different"}[same]
    return schemas.PersonVerdict(
        person=_person(person),
        similarity=similarity,
        same=same,
        threshold=threshold,
        far=far,
        probability=service.probability(similarity),
        face=_face(seen[best].face),
        crop=seen[best].png() if asked.crops else None,
        warnings=service.check([seen[best]]),
    )


@api.get("/people/{name:text}", tags=["people"], dependencies=_doing("read"))
def get_person(name: str, service: Current) -> schemas.PersonOut:
    """One person."""
    return _person(service.person(name))


@api.put(
    "/people/{name:text}",
    tags=["people"],
    dependencies=_doing("replace"),
    openapi_extra=bodies.documentation(schemas.ReplaceRequest),
)
async def replace_person(name: str, request: Request, service: Current) -> schemas.Enrolled:
    """Put new images and metadata in the place of all there were."""
    asked = await bodies.read(request, schemas.ReplaceRequest)
    await run_in_threadpool(service.person, name)
    return await service.enrol(
        request, name, asked, metadata=asked.metadata, known=True, replace=True
    )


@api.patch(
    "/people/{name:text}",
    tags=["people"],
    dependencies=_doing("change"),
    openapi_extra=bodies.documentation(schemas.ChangeRequest),
)
async def change_person(name: str, request: Request, service: Current) -> schemas.PersonOut:
    """Rename a person, or replace the metadata; the images stay."""
    asked = await bodies.read(request, schemas.ChangeRequest)

    def work() -> Person:
        current = service.person(name).name
        if asked.metadata is not None:
            service.gallery.set_metadata(current, asked.metadata)
        if asked.name is not None:
            service.gallery.rename(current, asked.name)
        return service.person(asked.name or current)

    return _person(await run_in_threadpool(work))


@api.delete("/people/{name:text}", tags=["people"], status_code=204, dependencies=_doing("remove"))
def remove_person(name: str, service: Current) -> Response:
    """Delete a person: embeddings, metadata and kept crops."""
    if not service.gallery.remove(name):
        raise UnknownPersonError("no person of that name is enrolled")
    return Response(status_code=204)


@probes.get("/healthz", response_class=PlainTextResponse)
async def healthz() -> str:
    """The process answers."""
    return "ok"


@probes.get("/readyz", response_class=PlainTextResponse)
async def readyz(service: Current) -> Response:
    """Requests are welcome: the network's thread runs, the gallery answers, no shutdown began."""
    if service.draining:
        return PlainTextResponse("draining", 503)
    if not service.recogniser.batcher.alive:
        return PlainTextResponse("the network's thread has ended", 503)
    try:
        async with asyncio.timeout(5):
            await run_in_threadpool(service.gallery.count)
    except Exception as error:  # whatever a database far away may raise
        return PlainTextResponse(f"the gallery does not answer: {type(error).__name__}", 503)
    return PlainTextResponse("ready")


@operation.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Current) -> Response:
    """Prometheus metrics."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def _cosine(value: float) -> float:
    return float(np.clip(value, -1, 1))


def _same(similarity: float, threshold: float | None) -> bool | None:
    return None if threshold is None else similarity >= threshold


def _face(face: Face | None) -> schemas.Face | None:
    if face is None:
        return None
    return schemas.Face(
        box=np.asarray(face.box).tolist(),
        score=float(face.score),
        landmarks=np.asarray(face.landmarks).tolist(),
    )


def _match(match: Match, threshold: float | None) -> schemas.MatchOut:
    similarity = _cosine(match.score)
    return schemas.MatchOut(
        name=match.person,
        similarity=similarity,
        same=_same(similarity, threshold),
        metadata=match.metadata,
        thumbnail=match.has_crop,
    )


def _person(person: Person) -> schemas.PersonOut:
    return schemas.PersonOut(
        name=person.name,
        images=person.images,
        metadata=person.metadata,
        thumbnail=person.has_crop,
    )


def _jpeg(crop: bytes | None) -> Response:
    if crop is None:
        raise Refusal(404, "no_thumbnail", "no crop of that person is kept")
    return Response(crop, media_type="image/jpeg")
