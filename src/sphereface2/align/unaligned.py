"""Whether images are whole photographs where crops by the template are expected."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np

from sphereface2.align.aligner import Aligner
from sphereface2.align.template import SIZE, TEMPLATE, similarity
from sphereface2.errors import UserError
from sphereface2.images import ImageLike, read_image

_SAMPLE = 6
_SIDE = 256  # enough for a face that fills a crop
_SCALE = 1.25
"""98 % of single crops (LFW, CelebA, drawn) lie within 1.24, LFW's photographs above 1.58."""


def image_reader(align: bool) -> Callable[[ImageLike], np.ndarray]:
    """What makes a decoded image of an encoded one: the decoder or, with ``align``, an Aligner."""
    if not align:
        return read_image
    aligner = Aligner()
    return lambda image: aligner.align(image)[0]


def check_readable(
    name: str, read: Callable[[int], ImageLike], indices: Sequence[int] | np.ndarray
) -> None:
    """Refuse a set before the work: UserError if none of six images of it, spread evenly, reads."""
    first: Exception | None = None
    for place in _sample(indices):
        try:
            read_image(read(place))
            return
        except (OSError, UserError) as error:
            first = first or error
    raise UserError(f"no image of {name} that was tried can be read: {first}") from first


def warn_if_unaligned(
    name: str,
    read: Callable[[int], ImageLike],
    indices: Sequence[int] | np.ndarray,
    *,
    remedy: str = "give --align",
) -> bool:
    """Warn of a set whose images `looks_unaligned`, and say whether it does."""
    reason = looks_unaligned(read, indices)
    if reason is not None:
        warnings.warn(
            f"{name} seems to hold whole photographs and not aligned crops ({reason}), on which a "
            f"network says little: {remedy}",
            stacklevel=2,
        )
    return reason is not None


def looks_unaligned(
    read: Callable[[int], ImageLike], indices: Sequence[int] | np.ndarray
) -> str | None:
    """Say why images look like photographs and not like crops by the template.

    A detector looks at six of them, evenly spread: in a crop, the face has the template's size.
    Where it finds no face, images of different sizes are taken for photographs.

    Args:
        read: gives image ``i``, encoded or decoded.
        indices: of the images.

    Returns:
        The reason, or None where they look like crops or nothing can be said.
    """
    shapes, scales = set(), []
    aligner = Aligner()
    for index in _sample(indices):
        try:
            pixels = read_image(read(index))
        except (OSError, UserError):
            continue
        shapes.add(pixels.shape[:2])
        found = aligner.at_scale(pixels, _SIDE / max(pixels.shape[:2]), 20.0)
        faces = [face for face in found if face.score >= aligner.min_score]
        if faces:
            largest = max(faces, key=lambda face: float(np.ptp(face.box[[1, 3]])))
            matrix = similarity(largest.landmarks * (SIZE / len(pixels)), TEMPLATE)
            scales.append(float(np.hypot(matrix[0, 0], matrix[1, 0])))
    if scales:
        scale = float(np.median(scales))
        if 1 / _SCALE < scale < _SCALE:
            return None
        return f"their faces have {1 / scale:.2f} times the size of those in a crop"
    if len(shapes) > 1:
        first, second = (f"{width}×{height}" for height, width in sorted(shapes)[:2])
        return f"their sizes differ, {first} and {second} for example"
    return None


def _sample(indices: Sequence[int] | np.ndarray) -> list[int]:
    places = np.unique(np.linspace(0, len(indices) - 1, _SAMPLE).astype(int))
    return [int(indices[place]) for place in places]
