"""The endpoints of recognition and operation: embed, verify, search; health and metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import generate_latest

from sphereface2.evaluation.calibration import named_by_mistake
from sphereface2.recognition.gallery import Match
from sphereface2.recognition.service import bodies, schemas
from sphereface2.recognition.service.metrics import CONTENT_TYPE
from sphereface2.recognition.service.state import ERRORS, Current, decision, doing, face_out

_CURVE_POINTS = 201

api = APIRouter(prefix="/v1", tags=["recognition"], responses=ERRORS)
operation = APIRouter(tags=["operation"])
probes = APIRouter(tags=["operation"])


@api.get("/model", **doing("model"))
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
        keeps_crops=service.settings.keep_crops,
        quality=service.settings.quality,
    )


@api.post("/embed", **doing("embed", schemas.EmbedRequest))
async def embed(request: Request, service: Current) -> schemas.Embedded:
    """Embeddings of the faces of images."""
    asked = await bodies.read(request, schemas.EmbedRequest)
    seen = await service.embed(request, asked.images, asked.aligned, asked.faces)
    return schemas.Embedded(
        model=service.recogniser.embedder.fingerprint,
        embeddings=[
            schemas.Embedding(image=at, face=face_out(one.face), embedding=one.embedding.tolist())
            for at, faces in enumerate(seen)
            for one in faces
        ],
    )


@api.post("/verify", **doing("verify", schemas.VerifyRequest))
async def verify(request: Request, service: Current) -> schemas.Verdict:
    """Whether two images show one person."""
    asked = await bodies.read(request, schemas.VerifyRequest)
    far, threshold = service.decide(asked.far)
    first, second = await service.embed(request, [asked.a, asked.b], asked.aligned, asked.faces)
    pairs = [
        schemas.PairOut(a=a, b=b, similarity=score, same=decision(score, threshold))
        for a, one in enumerate(first)
        for b, other in enumerate(second)
        for score in [float(np.clip(one.embedding @ other.embedding, -1, 1))]
    ]
    pairs.sort(key=lambda pair: -pair.similarity)
    best = pairs[0]
    chosen = [first[best.a], second[best.b]]
    return schemas.Verdict(
        **service.verdict(request, best.similarity, threshold, far, chosen),
        faces=[[face_out(one.face) for one in faces] for faces in (first, second)],
        pairs=pairs,
        crops=[one.png() for one in chosen] if asked.crops else None,
    )


@api.post("/search", **doing("search", schemas.SearchRequest))
async def search(request: Request, service: Current) -> schemas.Found:
    """Who in the gallery the faces of an image look most like, and whether it is anybody."""
    asked = await bodies.read(request, schemas.SearchRequest)
    far, threshold = service.decide(asked.far)
    (seen,) = await service.embed(request, [asked.image], asked.aligned, asked.faces)
    rows = np.stack([one.embedding for one in seen])

    def work() -> tuple[list[list[Match]], dict[str, Any]]:
        found = service.gallery.search(rows, k=asked.k, fusion=asked.fusion)
        return found, service.gallery.stats()

    found, sizes = await run_in_threadpool(work)
    comparisons = sizes["people" if asked.fusion == "mean" else "images"]
    faces = []
    for one, matches in zip(seen, found, strict=True):
        listed = [
            schemas.MatchOut(
                name=match.person,
                similarity=match.score,
                same=decision(match.score, threshold),
                metadata=match.metadata,
                thumbnail=match.has_crop,
            )
            for match in matches
        ]
        faces.append(
            schemas.FaceSearch(
                face=face_out(one.face),
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
        people=sizes["people"],
        fpir=None if far is None else named_by_mistake(far, comparisons),
        faces=faces,
    )


@api.post("/people/{name:text}/verify", **doing("verify person", schemas.VerifyPersonRequest))
async def verify_person(name: str, request: Request, service: Current) -> schemas.PersonVerdict:
    """Whether an image shows an enrolled person."""
    asked = await bodies.read(request, schemas.VerifyPersonRequest)
    far, threshold = service.decide(asked.far)
    person = await run_in_threadpool(service.person, name)
    (seen,) = await service.embed(request, [asked.image], asked.aligned, asked.faces)
    rows = np.stack([one.embedding for one in seen])
    scores = await run_in_threadpool(service.gallery.verify, name, rows, fusion=asked.fusion)
    best = int(np.argmax(scores))
    return schemas.PersonVerdict(
        **service.verdict(request, scores[best], threshold, far, [seen[best]]),
        person=person,
        face=face_out(seen[best].face),
        crop=seen[best].png() if asked.crops else None,
    )


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
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE)
