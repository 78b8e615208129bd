"""From a photograph to aligned crops: reading, finding faces, warping to the template."""

from sphereface2.align.aligner import Aligner, NoFaceError
from sphereface2.align.detector import Face
from sphereface2.align.photos import MAX_PIXELS, read_photo
from sphereface2.align.template import TEMPLATE, similarity, warp

__all__ = [
    "MAX_PIXELS",
    "TEMPLATE",
    "Aligner",
    "Face",
    "NoFaceError",
    "read_photo",
    "similarity",
    "warp",
]
