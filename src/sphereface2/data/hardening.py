"""Hardened conditions: harder copies of clean aligned crops, made by image operations alone.

No set of profiles or of people ten years on need be at hand to see that a network which does well
on clean crops does not on others: each condition takes away something that real photographs lack.
The operations are pure functions; what differs between images is drawn by `Hardening`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from sphereface2.errors import UserError, did_you_mean

#: Radius of the cylinder that stands for the head, in half widths of the crop.
HEAD = 0.75
#: Of the shade that a directional light leaves, of full light.
AMBIENT = 0.08
#: Cosine to the lamp of a part that is lit as it was.
FULL = 0.6
GAMMA = 2.2


def turn(image: np.ndarray, degrees: float) -> np.ndarray:
    """Turn the head about the vertical axis, as if it were a cylinder of radius `HEAD`.

    A point at angle φ of the cylinder moves to φ + ``degrees``; the middle of the face stays in
    place, as alignment would hold it. What comes into sight from behind repeats the face's rim,
    and the background is stretched to begin where the head now ends.

    Args:
        image: uint8 (H, W, 3).
        degrees: in (-90, 90); above 0 the face's middle turns to the image's right.

    Returns:
        uint8 (H, W, 3).
    """
    height, width = image.shape[:2]
    angle = math.radians(degrees)
    x = (np.arange(width) + 0.5) * 2 / width - 1
    source = before_turning(x, angle, math.sin(angle), np)
    columns = ((source + 1) * width / 2 - 0.5).astype(np.float32)
    rows = np.arange(height, dtype=np.float32)
    return cv2.remap(
        image,
        np.broadcast_to(columns, (height, width)).copy(),
        np.broadcast_to(rows[:, None], (height, width)).copy(),
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )


def before_turning(x: Any, angle: Any, sine: Any, library: Any) -> Any:
    """Where each place of a turned head was across the image, both from -1 to 1.

    Args:
        x: places, an array of ``library``.
        angle: in radians.
        sine: of the angle.
        library: numpy or torch.
    """
    seen = x + HEAD * sine  # on the turned head, before it is put back in the middle
    behind = library.arcsin(library.clip(seen / HEAD, -1, 1)) - angle
    source = HEAD * library.sin(library.clip(behind, -math.pi / 2, math.pi / 2))
    left, right = -HEAD * (1 + sine), HEAD * (1 - sine)
    source = library.where(seen >= HEAD, 1 - (1 - x) * (1 - HEAD) / (1 - right), source)
    return library.where(seen <= -HEAD, (1 + x) * (1 - HEAD) / (1 + left) - 1, source)


def reduce(image: np.ndarray, side: int = 20) -> np.ndarray:
    """Take the crop down to ``side`` × ``side`` pixels by areas, and bilinearly back: uint8."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)


@functools.lru_cache(8)
def normals(height: int, width: int) -> np.ndarray:
    """float64 (H, W, 3): of half a ball as large as the image, to the right, down and towards the
    camera; outside the ball they lie in the plane."""
    y = ((np.arange(height) + 0.5) * 2 / height - 1)[:, None]
    x = ((np.arange(width) + 0.5) * 2 / width - 1)[None]
    length = np.maximum(1.0, np.hypot(x, y))
    x, y = x / length, y / length
    return np.stack([x, y, np.sqrt(np.maximum(0.0, 1 - x**2 - y**2))], -1)


def relight(image: np.ndarray, facing: np.ndarray, ambient: float) -> np.ndarray:
    """Light an image by one lamp: v · (a + (1 - a) · max(0, n·l) / 0.6) in linear light (gamma
    2.2), clipped, so that parts that face the lamp are overexposed.

    Args:
        image: uint8 (H, W, 3).
        facing: (H, W), n·l in [-1, 1], the cosine between the surface's normal and the lamp.
        ambient: a, in [0, 1].

    Returns:
        uint8 (H, W, 3).
    """
    gain = ambient + (1 - ambient) * np.maximum(0.0, facing) / FULL
    lit = image * (gain ** (1 / GAMMA))[..., None]
    return np.rint(np.minimum(lit, 255.0)).astype(np.uint8)


def light(image: np.ndarray, degrees: float, elevation: float = 15.0) -> np.ndarray:
    """Light the head, as if it were half a ball, by one lamp at its side (`relight`).

    Args:
        image: uint8 (H, W, 3).
        degrees: where the lamp stands around the image: 0 right, 90 below.
        elevation: of the lamp above the image's plane, in degrees.

    Returns:
        uint8 (H, W, 3).
    """
    around, above = math.radians(degrees), math.radians(elevation)
    lamp = np.array(
        [
            math.cos(above) * math.cos(around),
            math.cos(above) * math.sin(around),
            math.sin(above),
        ]
    )
    return relight(image, normals(*image.shape[:2]) @ lamp, AMBIENT)


def cover(image: np.ndarray, half: int, colour: Iterable[int]) -> np.ndarray:
    """Cover the left (``half`` 0), right (1) or lower half (2) with an RGB ``colour``: uint8."""
    height, width = image.shape[:2]
    covered = image.copy()
    part = (np.s_[:, : width // 2], np.s_[:, width - width // 2 :], np.s_[height - height // 2 :])
    covered[part[half]] = tuple(colour)
    return covered


def smooth(image: np.ndarray, strength: float) -> np.ndarray:
    """Smooth skin and keep edges, as years are taken off a portrait (bilateral filter).

    Args:
        image: uint8 (H, W, 3).
        strength: in [0, 1]: the filter's range is 120 · ``strength`` grey levels, its reach
            1/16 of the width.

    Returns:
        uint8 (H, W, 3).
    """
    if not strength:
        return image.copy()
    return cv2.bilateralFilter(image, 0, 120 * strength, image.shape[1] / 32)


def misalign(image: np.ndarray, degrees: float, scale: float, shift: Iterable[float]) -> np.ndarray:
    """Move the face as landmarks that were found a little elsewhere would: about the middle.

    Args:
        image: uint8 (H, W, 3).
        degrees: turned in the image's plane; above 0 anticlockwise.
        scale: factor of the face's size.
        shift: to the right and down, as shares of the sides.

    Returns:
        uint8 (H, W, 3); the rim is repeated where nothing is left.
    """
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), degrees, scale)
    matrix[:, 2] += np.array([*shift]) * (width, height)
    return cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)


#: Each condition and what it does.
CONDITIONS = {
    "yaw": "turned by up to 45° to either side",
    "low_resolution": "20 × 20 pixels",
    "light": "one lamp from any side, the rest in shade",
    "occlusion": "the left, right or lower half covered",
    "age": "skin smoothed by any strength",
    "misaligned": "turned by up to 6°, scaled by up to 6 % and shifted by up to 4 %",
}


@dataclass(frozen=True)
class Hardening:
    """A named condition: gives each image its own draw, the same whenever it is asked again.

    Attributes:
        name: one of `CONDITIONS`.
        seed: of the draws.

    Examples:
        >>> image = np.arange(12 * 12 * 3, dtype=np.uint8).reshape(12, 12, 3)
        >>> harden = Hardening("yaw")
        >>> bool((harden(image, 3) == harden(image, 3)).all()), harden(image, 3).shape
        (True, (12, 12, 3))
    """

    name: str
    seed: int = 0

    def __call__(self, image: np.ndarray, index: int) -> np.ndarray:
        """Image number ``index`` of a set, uint8 RGB (H, W, 3), as the condition leaves it."""
        rng = np.random.default_rng([self.seed, list(CONDITIONS).index(self.name), index])
        if self.name == "yaw":
            return turn(image, rng.uniform(-45, 45))
        if self.name == "low_resolution":
            return reduce(image)
        if self.name == "light":
            return light(image, rng.uniform(0, 360))
        if self.name == "occlusion":
            return cover(image, int(rng.integers(3)), rng.integers(0, 256, 3).tolist())
        if self.name == "age":
            return smooth(image, rng.uniform())
        degrees, scale = rng.uniform(-6, 6), rng.uniform(0.94, 1.06)
        return misalign(image, degrees, scale, rng.uniform(-0.04, 0.04, 2))


def hardenings(names: Iterable[str], seed: int = 0) -> list[Hardening]:
    """The conditions named, each once; ``all`` stands for all of them.

    Raises:
        UserError: a name that is none of these.

    Examples:
        >>> [one.name for one in hardenings(["light", "yaw", "light"])]
        ['light', 'yaw']
    """
    wanted: dict[str, None] = {}
    for name in names:
        if name not in ("all", *CONDITIONS):
            raise UserError(
                f"there is no condition {name!r}{did_you_mean(name, CONDITIONS)}; available: all, "
                f"{', '.join(CONDITIONS)}"
            )
        wanted |= dict.fromkeys(CONDITIONS if name == "all" else [name])
    return [Hardening(name, seed) for name in wanted]
