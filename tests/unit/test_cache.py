"""Decoded images kept in memory or on the device: the same batches, and what does not fit."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from sphereface2.data.cache import DecodedPart, ImageCache
from sphereface2.data.dataset import FaceDataset
from sphereface2.data.sampler import BatchKey
from sphereface2.data.transforms import Augmentation
from sphereface2.errors import UserError
from sphereface2.images import decode
from sphereface2.training.distributed import World
from sphereface2.training.loading import cache_images

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class Images:
    """Smooth images of given sides; number 5 cannot be read."""

    class_names = None

    def __init__(self, sides: list[int]) -> None:
        rng = np.random.default_rng(0)
        self.files = []
        for side in sides:
            small = rng.integers(0, 256, (8, 8, 3), np.uint8)
            image = cv2.resize(small, (side, side), interpolation=cv2.INTER_CUBIC)
            self.files.append(cv2.imencode(".jpg", image)[1].tobytes())
        self.labels = np.arange(len(sides)) // 2
        self.num_classes = len(sides) // 2

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:
        return b"" if index == 5 else self.files[index]

    def name(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> str:
        return ""


def dataset(sides: list[int]) -> FaceDataset:
    augmentation = Augmentation(
        32, affine=0.5, crop=0.5, low_resolution=0.3, photometric=0.3, erase=0.3
    )
    return FaceDataset(
        Images(sides), np.arange(len(sides))[::-1], augmentation=augmentation, max_unreadable=0.5
    )


KEY = BatchKey(1, 2, np.array([3, 6, 0, 9, 7, 2]), 4)


def test_images_in_memory_make_the_same_batches() -> None:
    plain, cached = dataset([40, 48] * 5), dataset([40, 48] * 5)
    assert "MB of pixels (ram)" in cache_images(cached, "ram", ALONE)
    cached.source.files = []  # type: ignore[attr-defined]
    for one in (cached, pickle.loads(pickle.dumps(cached))):  # as it reaches a loader process
        expected, found = plain[KEY], one[KEY]
        assert torch.equal(found.images, expected.images)
        assert torch.equal(found.labels, expected.labels)


def test_without_files_in_memory_a_temporary_one_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.memfd_create", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plain, cached = dataset([40] * 10), dataset([40] * 10)
    cache_images(cached, "ram", ALONE)
    expected = plain[KEY].images
    for one in (cached, pickle.loads(pickle.dumps(cached))):
        assert torch.equal(one[KEY].images, expected)
    assert len([*tmp_path.iterdir()]) == 1
    del cached, one
    gc.collect()
    assert not [*tmp_path.iterdir()]
    with pytest.raises(UserError, match="MB of memory"):
        DecodedPart(Images([320] * 4), np.arange(4), of=8, free=1_000_000)
    assert not [*tmp_path.iterdir()]


def test_an_unreadable_image_is_replaced_as_without_a_cache() -> None:
    key = BatchKey(0, 0, np.array([4, 1, 8]))  # position 4 is image 5
    expected = dataset([40] * 10)[key]
    assert expected.unreadable == [5]
    for kind in ("ram", "device"):
        cached = dataset([40] * 10)
        cache_images(cached, kind, ALONE)
        found = cached[key]
        assert found.unreadable == [5]
        assert torch.equal(found.labels, expected.labels)
        assert torch.equal(found.images[0], found.images[1])


def test_images_on_the_device_make_the_same_batches_to_a_grey_level() -> None:
    plain, cached = dataset([40] * 10), dataset([40] * 10)
    cache_images(cached, "device", ALONE)
    expected, found = plain[KEY], cached[KEY]
    assert found.images.is_contiguous(memory_format=torch.channels_last)
    error = (found.images.float() - expected.images.float()).abs()
    assert error.mean() < 0.5 and error.max() <= 4


def test_parts_of_two_ranks_are_one_set() -> None:
    source = Images([16, 24, 32, 40, 48])
    parts = [DecodedPart(source, np.arange(first, 5, 2), of=5) for first in range(2)]
    cache = ImageCache([part.table for part in parts], keep=parts)
    assert len(cache) == 5
    for number, file in enumerate(source.files):
        np.testing.assert_array_equal(cache[number], decode(file))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match=r"the 8 decoded images take 2 MB of memory, and 1 MB are"):
        DecodedPart(Images([320] * 4), np.arange(4), of=8, free=1_000_000)
    with pytest.raises(UserError, match=r"there are 2 \(40×40, 48×48, …\): set it to ram"):
        cache_images(dataset([40, 48] * 3), "device", ALONE)
