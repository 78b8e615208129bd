"""Whether a face is fit to be enrolled: its size, sharpness and pose, by simple measures.

The measures come from what the detector found and from the crop. They tell poor images, not
forged ones: nothing here looks for signs of life.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from sphereface2.align import Face
from sphereface2.errors import UserError

Action = Literal["refuse", "warn", "off"]
"""What happens to a face that is not fit."""
MIN_SIZE, MIN_SHARPNESS = 20.0, 0.01
"""Least values of `Quality`. About one in a hundred press photographs (Labeled Faces in the Wild)
is not fit by these and the `LIMITS`."""
LIMITS = {
    "yaw": (0.5, "is turned to the side"),
    "pitch": (0.3, "looks up or down"),
    "roll": (45.0, "is inclined"),
}
"""Largest absolute values, and what is wrong beyond them."""


@dataclass(frozen=True)
class Quality:
    """The measures of one face; None where the image was a crop already.

    Attributes:
        size: pixels between the eyes, in the image as it was given.
        sharpness: variance of the Laplacian of the grey crop, brought to the template's 112
            pixels and divided by the variance of its grey values: free of contrast.
        yaw: how far the nose lies from the middle between the eyes, in distances of the eyes: 0
            is frontal, 0.5 is about a half profile.
        pitch: how far the nose lies from halfway between eyes and mouth, in distances of these;
            positive looks down.
        roll: degrees by which the line of the eyes is inclined.
    """

    sharpness: float
    size: float | None = None
    yaw: float | None = None
    pitch: float | None = None
    roll: float | None = None


def problems(quality: Quality) -> list[str]:
    """What is wrong with a face, a phrase each; nothing if it is fit."""
    found = []
    if quality.size is not None and quality.size < MIN_SIZE:
        found.append(
            f"the face is small ({quality.size:.0f} pixels between the eyes; {MIN_SIZE:g} are "
            "wanted)"
        )
    if quality.sharpness < MIN_SHARPNESS:
        found.append(
            f"the face is blurred (sharpness {quality.sharpness:.3f}; {MIN_SHARPNESS:g} is wanted)"
        )
    for name, (limit, phrase) in LIMITS.items():
        value = getattr(quality, name)
        if value is not None and abs(value) > limit:
            found.append(f"the face {phrase} ({name} {value:.2f}; at most {limit:g})")
    return found


def check(quality: Quality, action: Action, what: str) -> list[str]:
    """The warnings about a face, sentences that name ``what``.

    Raises:
        UserError: the face is not fit and the action is to refuse it.
    """
    if action == "off" or not (found := problems(quality)):
        return []
    sentence = f"{what}: {', '.join(found)}"
    if action == "refuse":
        raise UserError(f"{sentence}; give a better image, or lower the quality asked for")
    return [sentence]


def measure(crop: np.ndarray, face: Face | None = None) -> Quality:
    """Measure a face.

    Args:
        crop: the aligned face, uint8 (H, W, 3) RGB.
        face: where it was found; None if the image was a crop already.
    """
    grey = cv2.cvtColor(
        cv2.resize(crop, (112, 112), interpolation=cv2.INTER_AREA), cv2.COLOR_RGB2GRAY
    )
    contrast = float(grey.var())
    sharpness = float(cv2.Laplacian(grey, cv2.CV_64F).var()) / contrast if contrast else 0.0
    if face is None:
        return Quality(sharpness)
    left, right, nose, mouth_left, mouth_right = np.asarray(face.landmarks, np.float64)
    across = right - left
    distance = max(float(np.linalg.norm(across)), 1e-6)
    across = across / distance
    eyes, mouth = (left + right) / 2, (mouth_left + mouth_right) / 2
    down = np.array([-across[1], across[0]])
    height = max(abs(float((mouth - eyes) @ down)), 1e-6)
    return Quality(
        sharpness,
        size=distance,
        yaw=float((nose - eyes) @ across) / distance,
        pitch=float((nose - eyes) @ down) / height - 0.5,
        roll=float(np.degrees(np.arctan2(across[1], across[0]))),
    )
