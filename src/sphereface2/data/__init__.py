"""Data sets on disk, and the way from their bytes to a batch.

What this package offers is imported when it is first used: without batches nothing imports torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sphereface2.data.dataset import Batch, FaceDataset
    from sphereface2.data.opening import load_pairs, open_source
    from sphereface2.data.pairs import PairSet
    from sphereface2.data.sampler import BatchKey, BatchSampler
    from sphereface2.data.source import Source
    from sphereface2.data.split import split_people
    from sphereface2.data.transforms import Augmentation

__all__ = [
    "Augmentation",
    "Batch",
    "BatchKey",
    "BatchSampler",
    "FaceDataset",
    "PairSet",
    "Source",
    "load_pairs",
    "open_source",
    "split_people",
]

_PLACES = {
    "dataset": ("Batch", "FaceDataset"),
    "opening": ("load_pairs", "open_source"),
    "pairs": ("PairSet",),
    "sampler": ("BatchKey", "BatchSampler"),
    "source": ("Source",),
    "split": ("split_people",),
    "transforms": ("Augmentation",),
}


def __getattr__(name: str) -> Any:
    for place, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"sphereface2.data.{place}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
