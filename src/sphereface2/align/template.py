"""The five-point template and the warp to it: pure geometry."""

from __future__ import annotations

import cv2
import numpy as np

from sphereface2.errors import UserError, check_count

#: The template's side in pixels.
SIZE = 112

_SMALLEST, _LARGEST = 16, 4096

#: (5, 2) float64: left eye, right eye, nose, left and right mouth corner as seen in the image,
#: x right and y down, in pixels of a 112×112 crop.
TEMPLATE = np.array(
    [
        (38.2946, 51.6963),
        (73.5318, 51.5014),
        (56.0252, 71.7366),
        (41.5493, 92.3655),
        (70.7299, 92.2041),
    ]
)
TEMPLATE.setflags(write=False)


def check_size(size: int) -> None:
    """UserError if crops cannot have this side."""
    if not _SMALLEST <= size <= _LARGEST:
        raise UserError(f"crops must have a side of {_SMALLEST} to {_LARGEST:,} pixels, not {size}")


def similarity(points: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """The rotation, scaling and shift that takes ``points`` nearest to ``targets``.

    Least squares over (N, 2) points, N ≥ 2, without reflection. Returns the matrix (2, 3) float64
    that `cv2.warpAffine` takes: ``targets ≈ points @ matrix[:, :2].T + matrix[:, 2]``.

    Raises:
        UserError: a coordinate is not finite, or all points coincide.
    """
    points, targets = np.asarray(points, np.float64), np.asarray(targets, np.float64)
    if not np.isfinite(points).all():
        raise UserError("a landmark's coordinate is not a finite number")
    # As complex numbers the map is z -> a·z + b, and linear least squares gives a and b.
    z, w = points @ (1, 1j), targets @ (1, 1j)
    centred = z - z.mean()
    spread = np.vdot(centred, centred).real
    if spread <= 1e-12 * max(1.0, np.abs(z).max() ** 2):
        raise UserError("the landmarks coincide, so that they give no direction and no size")
    a = np.vdot(centred, w - w.mean()) / spread
    b = w.mean() - a * z.mean()
    return np.array([[a.real, -a.imag, b.real], [a.imag, a.real, b.imag]])


def warp(image: np.ndarray, landmarks: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Crop a face by its landmarks: uint8 (size, size, 3); what lies outside the image is black.

    Args:
        image: uint8 (H, W, 3).
        landmarks: (5, 2), pixels of ``image`` (a pixel's centre has whole coordinates), in the
            order of `TEMPLATE`.
        size: side of the crop; the template is scaled with it.

    Raises:
        UserError: it is no such array, or the landmarks are not five finite, distinct points.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        found = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(
            f"what is cropped must be an array of uint8, got {found}: read_image makes it of a file"
        )
    check_count("size", size, 1)
    landmarks = np.asarray(landmarks, np.float64)
    if landmarks.shape != (5, 2):
        raise UserError(f"a face has five landmarks (5, 2), not {landmarks.shape}")
    matrix = similarity(landmarks, (TEMPLATE + 0.5) * (size / SIZE) - 0.5)
    scale = float(np.hypot(matrix[0, 0], matrix[1, 0]))
    if scale < 0.5:
        # Bilinear sampling would skip pixels: average them first, around the face alone.
        image, matrix = _reduce(image, matrix, scale, size)
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)


def _reduce(
    image: np.ndarray, matrix: np.ndarray, scale: float, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """The part of ``image`` under the crop at about the crop's scale, and the matrix for it."""
    height, width = image.shape[:2]
    inverse = cv2.invertAffineTransform(matrix)
    corners = np.array([(0, 0), (size, 0), (0, size), (size, size)], float) - 0.5
    corners = corners @ inverse[:, :2].T + inverse[:, 2]
    margin = 2 / scale
    x0, y0 = np.clip(np.floor(corners.min(axis=0) - margin), 0, (width, height)).astype(int)
    x1, y1 = np.clip(np.ceil(corners.max(axis=0) + margin), 0, (width, height)).astype(int)
    part = image[y0:y1, x0:x1]
    if not part.size:  # the crop lies outside the image
        return image[:1, :1] * 0, matrix
    target = np.maximum(np.round(np.array([x1 - x0, y1 - y0]) * scale), 1).astype(int)
    small = cv2.resize(part, tuple(target.tolist()), interpolation=cv2.INTER_AREA)
    # A pixel centre x of the image is (x - x0 + 1/2)·f - 1/2 of the small one.
    f = target / (x1 - x0, y1 - y0)
    linear = matrix[:, :2] / f
    shift = matrix[:, 2] + matrix[:, :2] @ (np.array([x0, y0]) - 0.5 + 0.5 / f)
    return small, np.column_stack([linear, shift])
