"""From a photograph to aligned crops: reading, finding faces, warping to the template."""

from sphereface2.align.aligner import Aligner, NoFaceError
from sphereface2.align.detector import Face
from sphereface2.align.template import TEMPLATE, similarity, warp

__all__ = [
    "TEMPLATE",
    "Aligner",
    "Face",
    "NoFaceError",
    "similarity",
    "warp",
]
