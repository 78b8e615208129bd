"""Whole photographs where crops are expected: noticed by a detector, or by their sizes."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
from skimage.data import astronaut

from sphereface2.align import Aligner, warp
from sphereface2.align.unaligned import image_reader, looks_unaligned, warn_if_unaligned
from sphereface2.data import open_source, synthetic


@pytest.fixture(scope="module")
def photograph() -> np.ndarray:
    return astronaut()[:300, 50:400]


@pytest.mark.parametrize("side", [48, 112, 224])
def test_crops_of_any_size_look_aligned_and_their_surroundings_do_not(
    photograph: np.ndarray, side: int
) -> None:
    crop, face = Aligner().align(photograph)
    crops = [cv2.resize(crop, (side, side))] * 3
    assert looks_unaligned(crops.__getitem__, range(3)) is None
    # The same face in a square image of twice its size, as LFW's photographs are.
    wide = warp(photograph, face.landmarks, 224)
    shrunk = np.zeros((224, 224, 3), np.uint8)
    shrunk[56:168, 56:168] = cv2.resize(wide, (112, 112))
    reason = looks_unaligned(lambda index: shrunk, [7, 9])
    assert reason is not None and re.search(r"have 0\.(4[5-9]|5\d) times", reason)


def test_no_pair_of_drawn_crops_looks_unaligned(tmp_path: Path) -> None:
    # Such as `verify --aligned` is given in the quickstart.
    options = {"people": 12, "images_per_person": 2, "pairs_per_fold": 1}
    source = open_source(synthetic.write(tmp_path / "faces", **options))
    for first in range(0, 24, 2):
        assert looks_unaligned(source.read, [first, first + 1]) is None, first


def test_without_a_face_only_sizes_speak() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    same = [noise] * 4
    assert looks_unaligned(same.__getitem__, range(4)) is None
    mixed = [noise, noise[:40], b"no image"]
    reason = looks_unaligned(mixed.__getitem__, range(3))
    assert reason == "their sizes differ, 64×40 and 64×64 for example"
    thin = np.zeros((1, 3000, 3), np.uint8)
    assert looks_unaligned(lambda index: thin, range(2)) is None


def test_the_warning_names_the_set_and_the_remedy(photograph: np.ndarray) -> None:
    with pytest.warns(UserWarning, match=r"^holiday seems to hold whole ph.*: give --align$"):
        assert warn_if_unaligned("holiday", lambda index: photograph, range(5))
    crop = image_reader(True)(photograph)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # not what the detector is told
        assert not warn_if_unaligned("crops", lambda index: crop, range(5))
    np.testing.assert_array_equal(image_reader(False)(photograph), photograph)
