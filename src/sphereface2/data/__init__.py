"""Data sets on disk, and the way from their bytes to a batch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphereface2.data.dataset import Batch, FaceDataset
    from sphereface2.data.sampler import BatchKey, BatchSampler
    from sphereface2.data.sources import Source, open_source, split_people
    from sphereface2.data.transforms import Augmentation

# Imported when asked for: sets are opened and read without torch, batches need it.
_HOMES = {
    "Augmentation": "transforms",
    "Batch": "dataset",
    "BatchKey": "sampler",
    "BatchSampler": "sampler",
    "FaceDataset": "dataset",
    "Source": "sources",
    "open_source": "sources",
    "split_people": "sources",
}
__all__ = [
    "Augmentation",
    "Batch",
    "BatchKey",
    "BatchSampler",
    "FaceDataset",
    "Source",
    "open_source",
    "split_people",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
