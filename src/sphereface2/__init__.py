"""SphereFace2: deep face recognition trained by binary classification.

>>> from sphereface2 import heads
>>> "sphereface2" in heads.available()
True

The names below are imported when they are first used, so that ``import sphereface2`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sphereface2.version import __version__

if TYPE_CHECKING:
    from sphereface2 import backbones, heads
    from sphereface2.recognition.face_embedder import FaceEmbedder
    from sphereface2.recognition.gallery import Gallery

__all__ = ["FaceEmbedder", "Gallery", "__version__", "backbones", "heads"]

_MODULES = {
    "FaceEmbedder": "sphereface2.recognition.face_embedder",
    "Gallery": "sphereface2.recognition.gallery",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    if name in __all__:
        return importlib.import_module(f"sphereface2.{name}")
    raise AttributeError(f"module 'sphereface2' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
