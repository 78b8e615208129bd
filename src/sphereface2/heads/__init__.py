"""Losses over classes: embeddings and labels in, one number out."""

from sphereface2.heads.base import Head, available, build, parameters, register
from sphereface2.heads.softmax import ArcFace, CosFace, SoftmaxHead
from sphereface2.heads.sphereface2 import SphereFace2

__all__ = [
    "ArcFace",
    "CosFace",
    "Head",
    "SoftmaxHead",
    "SphereFace2",
    "available",
    "build",
    "parameters",
    "register",
]
