"""The endpoints: read the request, ask the recogniser and the people, shape the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import PlainTextResponse, Response
from fastapi.security import HTTPBearer
from starlette.convertors import Convertor, register_url_convertor

from sphereface2.align import Face
from sphereface2.errors import UserError
from sphereface2.recognition.calibration import Calibration
from sphereface2.recognition.gallery import Person
from sphereface2.recognition.service import bodies, schemas
from sphereface2.recognition.service.errors import Refusal
from sphereface2.recognition.service.metrics import CONTENT_TYPE, Metrics
from sphereface2.recognition.service.people import People
from sphereface2.recognition.service.recogniser import Recogniser, Seen

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
    people: People
    metrics: Metrics
    max_pictures: int
    far: float | None = None
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
                    "the model is not calibrated, so that no far can be kept: run sphereface2 "
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
        self, request: Request, pictures: list[bytes], aligned: bool
    ) -> tuple[list[Seen], np.ndarray]:
        """Faces and rows of a request's pictures."""
        if len(pictures) > self.max_pictures:
            raise Refusal(
                422, "too_many_pictures", f"at most {self.max_pictures} pictures a request"
            )
        request.state.pictures = len(pictures)
        return await self.recogniser.embed(pictures, aligned=aligned)


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
probes = APIRouter(tags=["operation"])


@api.get("/model", tags=["recognition"], dependencies=_doing("model"))
async def model(service: Current) -> schemas.ModelOut:
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
        people=await service.people.count(),
        keeps_crops=service.people.keeps_crops,
    )


@api.post(
    "/embed",
    tags=["recognition"],
    dependencies=_doing("embed"),
    openapi_extra=bodies.documentation(schemas.EmbedRequest),
)
async def embed(request: Request, service: Current) -> schemas.Embedded:
    """Embeddings of the most prominent face of each picture."""
    asked = await bodies.read(request, schemas.EmbedRequest)
    seen, rows = await service.embed(request, asked.images, asked.aligned)
    return schemas.Embedded(
        model=service.recogniser.embedder.fingerprint,
        embeddings=rows.tolist(),
        faces=[_face(one.face) for one in seen],
    )


@api.post(
    "/verify",
    tags=["recognition"],
    dependencies=_doing("verify"),
    openapi_extra=bodies.documentation(schemas.VerifyRequest),
)
async def verify(request: Request, service: Current) -> schemas.Verdict:
    """Whether two pictures show one person."""
    asked = await bodies.read(request, schemas.VerifyRequest)
    far, threshold = service.decide(asked.far)
    seen, rows = await service.embed(request, [asked.a, asked.b], asked.aligned)
    similarity = _cosine(rows[0] @ rows[1])
    same = None if threshold is None else similarity >= threshold
    request.state.outcome = {None: "not calibrated", True: "same", False: "different"}[same]
    return schemas.Verdict(
        similarity=similarity,
        same=same,
        threshold=threshold,
        far=far,
        probability=service.probability(similarity),
        faces=[_face(one.face) for one in seen],
        crops=[one.png() for one in seen] if asked.crops else None,
    )


@api.post(
    "/search",
    tags=["recognition"],
    dependencies=_doing("search"),
    openapi_extra=bodies.documentation(schemas.SearchRequest),
)
async def search(request: Request, service: Current) -> schemas.Found:
    """Who in the gallery looks most like the face in a picture, and whether it is anybody."""
    asked = await bodies.read(request, schemas.SearchRequest)
    far, threshold = service.decide(asked.far)
    seen, rows = await service.embed(request, [asked.image], asked.aligned)
    matches = []
    for found in await service.people.search(rows[0], asked.k, asked.fusion):
        similarity = _cosine(found.score)
        matches.append(
            schemas.MatchOut(
                name=found.person,
                similarity=similarity,
                probability=service.probability(similarity),
                same=None if threshold is None else similarity >= threshold,
                metadata=found.metadata,
                thumbnail=found.has_crop,
            )
        )
    known = None if threshold is None else any(match.same for match in matches)
    request.state.outcome = {None: "not calibrated", True: "known", False: "unknown"}[known]
    if known:
        request.state.person = matches[0].name
    return schemas.Found(
        known=known,
        threshold=threshold,
        far=far,
        matches=matches,
        face=_face(seen[0].face),
        crop=seen[0].png() if asked.crops else None,
    )


@api.get("/people", tags=["people"], dependencies=_doing("list"))
async def list_people(
    service: Current,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
) -> schemas.PeoplePage:
    """Who is enrolled, by name, a page at a time."""
    people, total = await service.people.page(offset, limit)
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
async def enrol(request: Request, response: Response, service: Current) -> schemas.Enrolled:
    """Add a person with one picture or several."""
    asked = await bodies.read(request, schemas.EnrolRequest)
    request.state.person = asked.name
    seen, rows = await service.embed(request, asked.images, asked.aligned)
    crops = [one.crop for one in seen]
    people, metadata = service.people, asked.metadata
    return _enrolled(*await people.add(asked.name, rows, crops, metadata=metadata, known=False))


# Before the route of a name, which takes slashes too.
@api.get(
    "/people/{name:text}/thumbnail",
    tags=["people"],
    dependencies=_doing("thumbnail"),
    response_class=Response,
    responses={200: {"content": {"image/jpeg": {}}}},
)
async def thumbnail(name: str, service: Current) -> Response:
    """The first crop kept of a person."""
    crop = await service.people.thumbnail(name)
    if crop is None:
        raise Refusal(404, "no_thumbnail", "no crop of that person is kept")
    return Response(crop, media_type="image/jpeg")


@api.get("/people/{name:text}", tags=["people"], dependencies=_doing("read"))
async def get_person(name: str, service: Current) -> schemas.PersonOut:
    """One person."""
    return _person(await service.people.get(name))


@api.put(
    "/people/{name:text}",
    tags=["people"],
    dependencies=_doing("replace"),
    openapi_extra=bodies.documentation(schemas.ReplaceRequest),
)
async def replace_person(name: str, request: Request, service: Current) -> schemas.Enrolled:
    """Put new pictures and metadata in the place of all there were."""
    asked = await bodies.read(request, schemas.ReplaceRequest)
    await service.people.get(name)
    seen, rows = await service.embed(request, asked.images, asked.aligned)
    crops = [one.crop for one in seen]
    people, metadata = service.people, asked.metadata
    return _enrolled(
        *await people.add(name, rows, crops, metadata=metadata, known=True, replace=True)
    )


@api.patch(
    "/people/{name:text}",
    tags=["people"],
    dependencies=_doing("change"),
    openapi_extra=bodies.documentation(schemas.ChangeRequest),
)
async def change_person(name: str, request: Request, service: Current) -> schemas.PersonOut:
    """Put new metadata in the place of all there was."""
    asked = await bodies.read(request, schemas.ChangeRequest)
    return _person(await service.people.set_metadata(name, asked.metadata))


@api.post(
    "/people/{name:text}/pictures",
    tags=["people"],
    status_code=201,
    dependencies=_doing("add pictures"),
    openapi_extra=bodies.documentation(schemas.PicturesRequest),
)
async def add_pictures(name: str, request: Request, service: Current) -> schemas.Enrolled:
    """Add pictures to a person."""
    asked = await bodies.read(request, schemas.PicturesRequest)
    await service.people.get(name)
    seen, rows = await service.embed(request, asked.images, asked.aligned)
    crops = [one.crop for one in seen]
    return _enrolled(*await service.people.add(name, rows, crops, known=True))


@api.delete("/people/{name:text}", tags=["people"], status_code=204, dependencies=_doing("remove"))
async def remove_person(name: str, service: Current) -> Response:
    """Delete a person: embeddings, metadata and kept crops."""
    await service.people.remove(name)
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
        await service.people.count()
    except Exception as error:  # whatever a database far away may raise
        return PlainTextResponse(f"the gallery does not answer: {type(error).__name__}", 503)
    return PlainTextResponse("ready")


@probes.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Current) -> Response:
    """Prometheus metrics."""
    return Response(service.metrics.text(), media_type=CONTENT_TYPE)


def include(app: FastAPI) -> None:
    """Add all endpoints."""
    app.include_router(api)
    app.include_router(probes)


def _cosine(value: float) -> float:
    return float(np.clip(value, -1, 1))


def _face(face: Face | None) -> schemas.Face | None:
    if face is None:
        return None
    return schemas.Face(
        box=np.asarray(face.box).tolist(),
        score=float(face.score),
        landmarks=np.asarray(face.landmarks).tolist(),
    )


def _person(person: Person) -> schemas.PersonOut:
    return schemas.PersonOut(
        name=person.name,
        pictures=person.images,
        metadata=person.metadata,
        thumbnail=person.has_crop,
    )


def _enrolled(person: Person, added: list[str]) -> schemas.Enrolled:
    return schemas.Enrolled(**_person(person).model_dump(), added=added)
