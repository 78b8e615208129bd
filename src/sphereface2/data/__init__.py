"""Data sets on disk, and the way from their bytes to a batch."""

from sphereface2.data.dataset import Batch, FaceDataset
from sphereface2.data.sampler import BatchKey, BatchSampler
from sphereface2.data.sources import Source, open_source, split_people
from sphereface2.data.transforms import Augmentation

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
