"""Pixels to a network's input, against NumPy."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sphereface2.backbones import Preprocessing
from sphereface2.errors import UserError


@pytest.mark.parametrize("order", ["RGB", "BGR"])
@pytest.mark.parametrize("mean", [(127.5, 127.5, 127.5), (10.0, 20.0, 30.0)])
def test_preprocessing_against_numpy(order: str, mean: tuple[float, float, float]) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 6, 5), dtype=np.uint8)
    original = images.copy()
    std = (128.0, 64.0, 32.0)
    preprocessing = Preprocessing((6, 5), mean, std, order)
    result = preprocessing(torch.from_numpy(images))
    ordered = images if order == "RGB" else images[:, ::-1]
    expected = (ordered - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(images, original)
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


def test_preprocessing_resizes_with_antialiasing() -> None:
    # A one-pixel checkerboard: every antialiased pixel of the half-size image is grey.
    rows, columns = np.mgrid[:32, :32]
    board = (255 * ((rows + columns) % 2)).astype(np.uint8)
    images = torch.from_numpy(np.broadcast_to(board, (1, 3, 32, 32)).copy())
    result = Preprocessing(size=(16, 16))(images)
    assert result.shape == (1, 3, 16, 16)
    assert result[..., 2:-2, 2:-2].abs().max() < 0.05


def test_preprocessing_keeps_channels_last() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8).to(memory_format=torch.channels_last)
    result = Preprocessing(size=(8, 8))(images)
    assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 8, 8, 3, dtype=torch.uint8),
    ],
)
def test_preprocessing_refuses_other_tensors(images: torch.Tensor) -> None:
    with pytest.raises(UserError, match="takes uint8 images of shape"):
        Preprocessing()(images)


def test_preprocessing_from_dict_refuses_other_keys() -> None:
    with pytest.raises(UserError, match="exactly the keys"):
        Preprocessing.from_dict({"size": [112, 112]})
