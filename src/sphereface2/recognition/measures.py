"""What an audit keeps of each image beside its embedding: what it shows, small, and how well."""

from __future__ import annotations

import hashlib
from typing import Any

import cv2
import numpy as np
import pyarrow as pa

from sphereface2.align import Face
from sphereface2.recognition.quality import measure as quality

SIDE = 32
"""Side of a thumbnail, grey."""

COLUMNS = (
    pa.field("index", pa.int64()),
    pa.field("pixels", pa.binary(16)),
    pa.field("thumbnail", pa.binary(SIDE * SIDE)),
    pa.field("sharpness", pa.float32()),
    pa.field("brightness", pa.float32()),
    pa.field("contrast", pa.float32()),
)
"""Of the table: place in the set; digest of the pixels; grey values; see `measures`."""


def measures(index: int, crop: np.ndarray, face: Face | None) -> dict[str, Any]:
    """The row of an image in `COLUMNS`.

    ``pixels`` is equal for images of equal size and pixels, however they are encoded;
    ``sharpness`` is that of `quality`; ``brightness`` and ``contrast`` are the mean and the
    standard deviation of the grey values, 0 to 255.

    Args:
        index: of the image in its set.
        crop: uint8 (H, W, 3) RGB.
        face: where it was found; None if the image was a crop.
    """
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    pixels = hashlib.blake2b(repr(crop.shape).encode(), digest_size=16)
    pixels.update(crop.tobytes())
    return {
        "index": index,
        "pixels": pixels.digest(),
        "thumbnail": cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).tobytes(),
        "sharpness": quality(crop, face).sharpness,
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
    }
