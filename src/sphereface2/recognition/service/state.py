"""What the endpoints work with, and the shapes they answer in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel

from sphereface2.align import Face
from sphereface2.errors import UserError
from sphereface2.evaluation.calibration import Calibration
from sphereface2.images import encode_image
from sphereface2.recognition.gallery import Gallery, Person, UnknownPersonError, person_name
from sphereface2.recognition.quality import check, measure
from sphereface2.recognition.service import bodies, schemas
from sphereface2.recognition.service.errors import Refusal
from sphereface2.recognition.service.metrics import Metrics
from sphereface2.recognition.service.recogniser import Recogniser, Seen, Which
from sphereface2.recognition.service.settings import Settings

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": schemas.ErrorOut, "description": "What was wrong with the request."},
    503: {"model": schemas.ErrorOut, "description": "Too busy: see Retry-After."},
}
Found = TypeVar("Found")


@dataclass
class Service:
    """What the endpoints work with."""

    recogniser: Recogniser
    gallery: Gallery
    metrics: Metrics
    settings: Settings
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
        far = far or self.settings.far or self.calibration.far_default
        try:
            return far, self.calibration.threshold(far)
        except UserError as error:
            raise Refusal(422, "unknown_far", str(error)) from None

    async def embed(
        self, request: Request, images: Sequence[bytes], aligned: bool, which: Which
    ) -> list[list[Seen]]:
        """The faces of each of a request's images."""
        most = self.settings.max_images
        if len(images) > most:
            raise Refusal(422, "too_many_images", f"at most {most} images a request")
        request.state.images = len(images)
        return await self.recogniser.embed(images, aligned=aligned, which=which)

    def check(self, seen: Sequence[Seen]) -> list[str]:
        """Warnings about poor faces; a Refusal, 422, of one that the quality gate refuses."""
        warnings = []
        for number, one in enumerate(seen, 1):
            name = "the image" if len(seen) == 1 else f"image {number}"
            try:
                warnings += check(measure(one.crop, one.face), self.settings.quality, name)
            except UserError as error:
                raise Refusal(422, "poor_image", str(error)) from None
        return warnings

    def verdict(
        self,
        request: Request,
        similarity: float,
        threshold: float | None,
        far: float | None,
        seen: Sequence[Seen],
    ) -> dict[str, Any]:
        """What the answer to a comparison says, whatever ``seen`` was compared with."""
        same, probability = decision(similarity, threshold), None
        if self.calibration is not None:
            probability = float(self.calibration.probability(similarity))
        request.state.outcome = {None: "not calibrated", True: "same", False: "different"}[same]
        return {
            "similarity": similarity,
            "same": same,
            "threshold": threshold,
            "far": far,
            "probability": probability,
            "warnings": self.check(seen),
        }

    def person(self, name: str) -> schemas.PersonOut:
        """An enrolled person; a 404 if there is none."""
        return person_out(enrolled(name, self.gallery.get(name)))

    async def enrol(
        self, request: Request, name: str, asked: schemas.ImagesRequest, **options: Any
    ) -> schemas.Enrolled:
        """Add a request's images to the gallery; ``options`` are of `Gallery.add`."""
        if asked.lookalikes == "refuse" and self.calibration is None:
            raise Refusal(
                422,
                "not_calibrated",
                "the model is not calibrated, so nobody can be said to look alike: run sphereface2 "
                "calibrate first, or leave out lookalikes",
            )
        seen = [
            faces[0]
            for faces in await self.embed(request, asked.images, asked.aligned, asked.faces)
        ]
        warnings = self.check(seen)
        rows = np.stack([one.embedding for one in seen])
        if self.settings.keep_crops:
            options["crops"] = [encode_image(one.crop, ".jpg") for one in seen]

        def work() -> tuple[list[int], schemas.PersonOut]:
            if asked.lookalikes == "refuse":
                self._refuse_lookalikes(name, rows)
            return self.gallery.add(name, rows, **options), self.person(name)

        added, person = await run_in_threadpool(work)
        return schemas.Enrolled(
            **person.model_dump(), added=[str(one) for one in added], warnings=warnings
        )

    def _refuse_lookalikes(self, name: str, rows: np.ndarray) -> None:
        assert self.calibration is not None
        threshold = self.calibration.threshold()
        for number, matches in enumerate(self.gallery.search(rows, k=2), 1):
            for match in matches:
                if match.person != person_name(name) and match.score >= threshold:
                    raise Refusal(
                        409,
                        "looks_like",
                        f"image {number} looks like {match.person}, who is enrolled (similarity "
                        f"{match.score:.2f}, threshold {threshold:.2f})",
                    )


# Dependencies are coroutines: FastAPI would run each plain function in a thread of its pool.
async def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


Current = Annotated[Service, Depends(_service)]


def doing(action: str, body: type[BaseModel] | None = None) -> dict[str, Any]:
    """Options of a route: its name in the audit log, before anything can go wrong; its body."""

    async def name(request: Request) -> None:
        request.state.action = action
        if person := request.path_params.get("name"):
            request.state.person = person[: schemas.MAX_NAME]

    documented = bodies.documentation(body) if body else None
    return {"dependencies": [Depends(name)], "openapi_extra": documented}


def enrolled(name: str, found: Found | None) -> Found:
    """What was found of a person; a 404 if nothing was.

    It tells the name, which may be more of the address than the client took for one.
    """
    if not found:
        raise UnknownPersonError(f"no person named {name!r} is enrolled")
    return found


def decision(similarity: float, threshold: float | None) -> bool | None:
    """Whether a similarity reaches the threshold; None without one."""
    return None if threshold is None else similarity >= threshold


def face_out(face: Face | None) -> schemas.Face | None:
    """A face as the API gives it."""
    return None if face is None else schemas.Face(**face.to_dict())


def person_out(person: Person) -> schemas.PersonOut:
    """A person as the API gives them."""
    return schemas.PersonOut(
        name=person.name,
        images=person.images,
        metadata=person.metadata,
        thumbnail=person.has_crop,
    )
