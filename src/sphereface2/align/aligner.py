"""Photograph in, aligned crops out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from sphereface2.align.detector import Face, Mtcnn
from sphereface2.align.template import SIZE, check_size, warp
from sphereface2.errors import UserError, check_number
from sphereface2.images import ImageLike, read_image

#: The sides in pixels that an image's longer side is brought to for detection, one after the
#: other until a face is found, and the smallest face looked for in it.
_COARSE, _FINE, _SMALLEST = 512, 1536, 20.0
#: A face smaller than this in the image searched is looked at again, enlarged to it.
_LOOK = 160
#: An image whose brightest hundredth is darker than this is looked at again, brightened, unless it
#: is black.
_DARK, _BLACK = 100, 4


class NoFaceError(UserError):
    """No face was found in an image."""


class Aligner:
    """Finds faces and crops them by the five-point template.

    Detection works on the image brought to 512 pixels (its longer side), so that faces of a
    25th of that side and more are found whatever the image's size. If there is none, or when
    `align_all` wants every face, it is done at up to 1,536 pixels. Landmarks of small faces are
    located again in the original pixels. A dark image without a face is searched again, brightened;
    its crops stay dark.

    Args:
        size: side of the crops in pixels.
        min_score: the detector's confidence in [0, 1] from which a face counts.
        rotations: where no face is found, look for it with the image turned by 90°, 180° and
            270°, and take the turn with the surest face. Four times the time for such images.

    Raises:
        UserError: a number is out of range.
    """

    def __init__(
        self, *, size: int = SIZE, min_score: float = 0.9, rotations: bool = False
    ) -> None:
        check_size(size)
        check_number("min_score", min_score, least=0, most=1)
        self._detector = Mtcnn()
        self.size = size
        self.min_score = min_score
        self.rotations = rotations

    @property
    def name(self) -> str:
        """The detector, its version and whether rotations are tried, for fingerprints."""
        return self._detector.name + (" with rotations" if self.rotations else "")

    def detect(self, image: ImageLike, *, thorough: bool = False) -> list[Face]:
        """The faces of an image, the largest and most central first; ``[]`` if there is none.

        Args:
            image: anything `read_image` takes.
            thorough: look for small faces though a larger one was found.

        Raises:
            UserError: the image cannot be read.
        """
        return self._detect(read_image(image), thorough)

    def align(self, image: ImageLike) -> tuple[np.ndarray, Face]:
        """The crop, uint8 (size, size, 3) RGB, of the largest and most central face, and the face.

        Raises:
            NoFaceError: there is no face.
            UserError: the image cannot be read.
        """
        pixels = read_image(image)
        faces = self._detect(pixels, False)
        if not faces:
            raise NoFaceError(f"no face found in {_name(image)}; give an image that shows one")
        main = replace(faces[0], others=len(faces) - 1)
        return warp(pixels, main.landmarks, self.size), main

    def align_all(self, image: ImageLike) -> list[tuple[np.ndarray, Face]]:
        """Crop and face of every face, the largest and most central first; ``[]`` if none."""
        pixels = read_image(image)
        return [
            (warp(pixels, face.landmarks, self.size), face) for face in self._detect(pixels, True)
        ]

    def _detect(self, pixels: np.ndarray, thorough: bool) -> list[Face]:
        faces = self._upright(pixels, thorough)
        if not faces and (brighter := _brighter(pixels)) is not None:
            pixels = brighter
            faces = self._upright(pixels, thorough)
        if faces or not self.rotations:
            return faces
        turned = []
        for turns in (1, 2, 3):
            found = self._upright(np.ascontiguousarray(np.rot90(pixels, turns)), thorough)
            turned.append([_turned_back(face, turns, pixels) for face in found])
        return max(turned, key=lambda faces: max((face.score for face in faces), default=0.0))

    def _upright(self, pixels: np.ndarray, thorough: bool) -> list[Face]:
        longer = max(pixels.shape[:2])
        faces: list[Face] = []
        for side in (_COARSE, _FINE):
            last = longer <= side or side == _FINE
            if not thorough or last:
                faces = self._search(pixels, side)
            if faces or last:
                break
        height, width = pixels.shape[:2]
        return sorted(faces, key=lambda face: -_prominence(face, width, height))

    def _search(self, pixels: np.ndarray, side: int) -> list[Face]:
        scale = side / max(pixels.shape[:2])
        faces = []
        for face in self.at_scale(pixels, scale, _SMALLEST):
            if face.score >= self.min_score:
                near = _side(face) * scale >= _LOOK
                faces.append(face if near else self._look_again(pixels, face))
        return faces

    def at_scale(self, pixels: np.ndarray, scale: float, min_face: float) -> list[Face]:
        """Detect in ``pixels`` resized by ``scale``; faces in coordinates of ``pixels``."""
        height, width = pixels.shape[:2]
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
        if size != (width, height):
            resized = cv2.resize(pixels, size, interpolation=method)
        else:
            resized = pixels
        factor = np.array([width / size[0], height / size[1]], np.float32)
        return [
            Face(
                box=(face.box * np.tile(factor, 2)).astype(np.float32),
                score=face.score,
                landmarks=((face.landmarks + 0.5) * factor - 0.5).astype(np.float32),
            )
            for face in self._detector.detect(resized, min_face)
        ]

    def _look_again(self, pixels: np.ndarray, face: Face) -> Face:
        """The same face with landmarks from the enlarged part of the image around it."""
        side = _side(face)
        centre = (face.box[:2] + face.box[2:]) / 2
        height, width = pixels.shape[:2]
        x0, y0 = np.clip(np.floor(centre - side), 0, (width - 1, height - 1)).astype(int)
        x1, y1 = np.clip(np.ceil(centre + side), (x0 + 1, y0 + 1), (width, height)).astype(int)
        part = np.ascontiguousarray(pixels[y0:y1, x0:x1])
        corner = np.array([x0, y0], np.float32)
        nearer = [
            Face(f.box + np.tile(corner, 2), f.score, f.landmarks + corner)
            for f in self.at_scale(part, _LOOK / side, _LOOK / 3)
        ]
        nearer = [f for f in nearer if _overlap(f.box, face.box) > 0.5]
        if not nearer:
            return face
        best = max(nearer, key=lambda f: _overlap(f.box, face.box))
        return Face(best.box, face.score, best.landmarks)


def _brighter(pixels: np.ndarray) -> np.ndarray | None:
    """A dark image stretched to the full range, which the detector was trained on; else None."""
    brightest = float(np.percentile(pixels[::4, ::4], 99))
    if not _BLACK < brightest < _DARK:
        return None
    return cv2.convertScaleAbs(pixels, alpha=255 / brightest)


def _turned_back(face: Face, turns: int, pixels: np.ndarray) -> Face:
    """A face found in ``np.rot90(pixels, turns)``, in coordinates of ``pixels``."""
    points = np.concatenate([face.landmarks, face.box.reshape(2, 2)]).astype(np.float64)
    for turn in reversed(range(turns)):
        # What lay at (x, y) before a quarter turn to the left lies at (y, width - 1 - x) after it.
        width = pixels.shape[1 - turn % 2]
        points = np.column_stack([width - 1 - points[:, 1], points[:, 0]])
    corners = points[5:]
    box = np.concatenate([corners.min(axis=0), corners.max(axis=0)])
    return Face(box.astype(np.float32), face.score, points[:5].astype(np.float32))


def _side(face: Face) -> float:
    return float(max(face.box[2] - face.box[0], face.box[3] - face.box[1], 1e-3))


def _prominence(face: Face, width: int, height: int) -> float:
    """A face's area less twice its squared distance from the image's middle."""
    area = float((face.box[2] - face.box[0]) * (face.box[3] - face.box[1]))
    offset = (face.box[:2] + face.box[2:]) / 2 - np.array([width, height]) / 2
    return area - 2 * float(offset @ offset)


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two boxes."""
    inner = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0).prod()
    areas = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod()
    return float(inner / max(areas - inner, 1e-9))


def _name(image: ImageLike) -> str:
    return str(image) if isinstance(image, str | Path) else "the image"
