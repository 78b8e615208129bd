"""The answer whether two images show one person."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sphereface2.align import Face
from sphereface2.errors import UserError
from sphereface2.evaluation.calibration import Calibration


@dataclass(frozen=True)
class Verification:
    """How alike two faces are and, with a calibration, what that means.

    Attributes:
        similarity: cosine of the two embeddings, in [-1, 1].
        threshold: at and above it the decision is "same"; None without a calibration.
        far: the FAR that the threshold was chosen for; None for a threshold of the caller's.
        llr: natural logarithm of the likelihood ratio; None without a calibration.
        probability: that the pair is genuine, at ``prior``; None without a calibration.
        prior: the share of genuine pairs that was assumed.
        faces: the face found in each image, None where the image is an aligned crop.
    """

    similarity: float
    threshold: float | None
    far: float | None
    llr: float | None
    probability: float | None
    prior: float
    faces: tuple[Face | None, Face | None]

    @property
    def same(self) -> bool | None:
        """The decision; None without a threshold."""
        return None if self.threshold is None else self.similarity >= self.threshold

    @property
    def verdict(self) -> str:
        """The decision in words."""
        return {True: "same person", False: "different people", None: "no decision"}[self.same]

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        faces = [face and face.to_dict() for face in self.faces]
        decision = {True: "same", False: "different", None: None}[self.same]
        return {**self.__dict__, "decision": decision, "faces": faces}


def choose_threshold(
    calibration: Calibration | None, far: float | None, threshold: float | None
) -> tuple[float | None, float | None]:
    """The similarity to decide at and the FAR it was chosen for; None where nothing tells them.

    Raises:
        UserError: both are given, ``threshold`` is no cosine, or the calibration is missing or has
            no threshold for ``far``.
    """
    if threshold is not None:
        if far is not None:
            raise UserError("give a threshold or a FAR, not both")
        if not -1 <= threshold <= 1:
            raise UserError(f"a threshold is a cosine in [-1, 1], not {threshold:g}")
        return threshold, None
    if calibration is not None:
        return calibration.threshold(far), calibration.far_default if far is None else far
    if far is not None:
        raise UserError("a FAR needs a calibration: run sphereface2 calibrate on the model first")
    return None, None
