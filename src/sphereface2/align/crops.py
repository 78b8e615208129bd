"""One image of a batch job: read, find, crop, write. What worker processes run."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sphereface2.align.aligner import Aligner
from sphereface2.align.template import check_size, warp
from sphereface2.errors import UserError
from sphereface2.files import atomic_write
from sphereface2.images import encode_image, read_image
from sphereface2.signals import in_worker

_QUALITY = 95


@dataclass(frozen=True)
class Settings:
    """What decides how crops look; a folder of crops has one."""

    size: int
    min_score: float
    all_faces: bool
    landmarks: bool
    suffix: str
    max_pixels: int
    rotations: bool = False


@dataclass(frozen=True)
class Job:
    """An image, where its crops go (a path without its end) and its landmarks, if known."""

    name: str
    source: Path
    target: Path
    landmarks: np.ndarray | None = None

    def input(self) -> dict[str, Any]:
        """What the crops are made from, JSON-able: another one means other crops."""
        state: dict[str, Any] = {"size": None, "mtime_ns": None}
        try:
            about = self.source.stat()
            state = {"size": about.st_size, "mtime_ns": about.st_mtime_ns}
        except (OSError, ValueError):  # ValueError: a null byte in the name
            pass
        if self.landmarks is not None:
            state["landmarks"] = self.landmarks.tolist()
        return state


class Cropper:
    """Turns jobs into crops on disk and one JSON-able record each."""

    def __init__(self, settings: Settings) -> None:
        check_size(settings.size)
        self.settings = settings
        self.aligner = (
            None
            if settings.landmarks
            else Aligner(
                size=settings.size,
                min_score=settings.min_score,
                rotations=settings.rotations,
            )
        )

    def run(self, job: Job) -> dict[str, Any]:
        """``image``, ``input`` (of `Job.input`), ``status`` (aligned, no face, unreadable, bad
        landmarks, not written), and ``faces`` or ``reason``.

        OSError if no crop at all can be written there.
        """
        # Before the image is read, so that one that changes meanwhile counts as changed.
        return {"image": job.name, "input": job.input(), **self._done(job)}

    def _done(self, job: Job) -> dict[str, Any]:
        try:
            pixels = read_image(job.source, max_pixels=self.settings.max_pixels)
        except UserError as error:
            return {"status": "unreadable", "reason": str(error)}
        try:
            found = self._crops(pixels, job)
        except UserError as error:
            return {"status": "bad landmarks", "reason": f"{job.name}: {error}"}
        if not found:
            return {"status": "no face"}
        try:
            return {"status": "aligned", "faces": self._written(found, job)}
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return {
                "status": "not written",
                "reason": f"{job.name}: its crop's name is too long; give it a shorter one",
            }

    def _written(
        self, found: list[tuple[np.ndarray, dict[str, Any]]], job: Job
    ) -> list[dict[str, Any]]:
        faces = []
        # The longest name first: if it fits, all do, and otherwise none is left behind.
        for number, (crop, face) in reversed(list(enumerate(found, 1))):
            end = f"_face{number}" if self.settings.all_faces else ""
            target = job.target.with_name(f"{job.target.name}{end}{self.settings.suffix}")
            encoded = encode_image(crop, self.settings.suffix, _QUALITY)
            target.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(target, encoded)
            faces.append({"crop": target.name, **face})
        return faces[::-1]

    def _crops(self, pixels: np.ndarray, job: Job) -> list[tuple[np.ndarray, dict[str, Any]]]:
        if job.landmarks is not None:
            face: dict[str, Any] = {"landmarks": job.landmarks.tolist()}
            return [(warp(pixels, job.landmarks, self.settings.size), face)]
        assert self.aligner is not None
        faces = self.aligner.detect(pixels, thorough=self.settings.all_faces)
        return [
            (
                warp(pixels, face.landmarks, self.settings.size),
                {
                    "score": round(face.score, 4),
                    "box": np.round(face.box.astype(float), 1).tolist(),
                    "landmarks": np.round(face.landmarks.astype(float), 2).tolist(),
                },
            )
            for face in (faces if self.settings.all_faces else faces[:1])
        ]


_cropper: Cropper | None = None


def start_worker(settings: Settings) -> None:
    """Prepare a worker process."""
    global _cropper
    cv2.setNumThreads(1)  # one process a core is faster than threads within
    _cropper = Cropper(settings)
    in_worker()


def run_in_worker(jobs: list[Job]) -> list[dict[str, Any]]:
    """The records of some jobs."""
    assert _cropper is not None
    return [_cropper.run(job) for job in jobs]
