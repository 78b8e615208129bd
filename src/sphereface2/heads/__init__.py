"""Losses over classes: embeddings and labels in, one number out."""

from sphereface2.heads.adaptive_margins import AdaFace, CurricularFace, SphereFace
from sphereface2.heads.base import Head, Scaling
from sphereface2.heads.divergence import QMargin
from sphereface2.heads.fixed_margins import (
    ArcFace,
    CircleLoss,
    CocoLoss,
    CombinedMargin,
    CosFace,
    NormFace,
    Softmax,
    SphereFaceR,
)
from sphereface2.heads.fused import FusedSGD
from sphereface2.heads.one_vs_all import OneVersusAllHead
from sphereface2.heads.registry import (
    available,
    build,
    check_settings,
    defaults,
    parameters,
    register,
)
from sphereface2.heads.sample_to_sample import SampleToSample, SampleToSampleConfig
from sphereface2.heads.sigmoid import UCE, SFace, SigmoidLoss
from sphereface2.heads.softmax import SoftmaxHead
from sphereface2.heads.sphereface2 import OneVersusAllBCE, SphereFace2

__all__ = [
    "UCE",
    "AdaFace",
    "ArcFace",
    "CircleLoss",
    "CocoLoss",
    "CombinedMargin",
    "CosFace",
    "CurricularFace",
    "FusedSGD",
    "Head",
    "NormFace",
    "OneVersusAllBCE",
    "OneVersusAllHead",
    "QMargin",
    "SFace",
    "SampleToSample",
    "SampleToSampleConfig",
    "Scaling",
    "SigmoidLoss",
    "Softmax",
    "SoftmaxHead",
    "SphereFace",
    "SphereFace2",
    "SphereFaceR",
    "available",
    "build",
    "check_settings",
    "defaults",
    "parameters",
    "register",
]
