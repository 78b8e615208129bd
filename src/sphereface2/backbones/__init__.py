"""Networks from images to embeddings, each with the preprocessing it was trained with."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphereface2.backbones.base import Backbone
    from sphereface2.backbones.preprocessing import Preprocessing
    from sphereface2.backbones.registry import available, build, parameters, register

# Imported when asked for: an exported network and its preprocessing do without torch.
_HOMES = {
    "Backbone": "base",
    "Preprocessing": "preprocessing",
    "available": "registry",
    "build": "registry",
    "parameters": "registry",
    "register": "registry",
}
__all__ = ["Backbone", "Preprocessing", "available", "build", "parameters", "register"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
