"""Augmentation by tensors on a device, operation by operation, against that of single images."""

import cv2
import numpy as np
import pytest
import torch

from sphereface2.data.batched import table, transformed
from sphereface2.data.transforms import Augmentation

STEPS = {
    "nothing": {},
    "flip": {"flip": 1.0},
    "affine": {"affine": 1.0, "rotation": 8.0},
    "crop": {"crop": 1.0},
    "affine, crop, flip": {"affine": 0.7, "crop": 0.7, "flip": 0.5},
    "yaw": {"yaw": 1.0, "yaw_degrees": 60.0},
    "low_resolution": {"low_resolution": 1.0},
    "light": {"light": 1.0},
    "photometric": {"photometric": 1.0},
    "jpeg": {"jpeg": 1.0},
    "erase": {"erase": 1.0},
}


def textured(count, side):
    """Images with edges, and noise as a camera has it."""
    rng = np.random.default_rng(0)
    smooth = rng.integers(0, 256, (count, 6, 6, 3)).astype(np.float32)
    images = [cv2.resize(one, (side, side), interpolation=cv2.INTER_CUBIC) for one in smooth]
    for image in images:
        top, left = rng.integers(0, side // 2, 2)
        image[top : top + side // 3, left : left + side // 3] += 40
        image += rng.normal(0, 2, image.shape)
    return [np.clip(image, 0, 255).astype(np.uint8) for image in images]


@pytest.mark.parametrize("size", [64, 51, 80], ids=["same", "smaller, odd", "larger"])
@pytest.mark.parametrize("step", STEPS)
def test_equals_the_augmentation_of_single_images(device, step, size):
    if step == "jpeg" and size != 64:
        pytest.skip("a grey level before it decides what it rounds")
    augmentation = Augmentation(size, **({"flip": 0.0} | STEPS[step]))
    images = textured(40, 64)
    draws = augmentation.draw(len(images), np.random.default_rng(1))
    expected = augmentation.apply(images, draws).float()
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).to(device)
    numbers = torch.from_numpy(table(augmentation, draws, *batch.shape[2:])).to(device)
    found = transformed(augmentation, batch, numbers)
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last)
    errors = (found.cpu().float() - expected).abs().numpy()
    assert errors.mean() <= 1
    assert np.percentile(errors, 99.9) <= 4
