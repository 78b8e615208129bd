"""dlib's face network, ``dlib_face_recognition_resnet_model_v1``, for crops of our template.

The architecture is that of King, "High quality face recognition with deep metric learning",
2017 (blog.dlib.net), with each affine layer folded into the convolution before it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sphereface2.backbones.base import Backbone, scaled
from sphereface2.errors import check_number

CHIP = 150
"""Side of the chip that dlib's network reads."""
_CROP = 112
_SCALE, _EYES, _CHIP_EYES = 1.491, (51.6, 55.91), (47.13, 74.0)
"""Chip pixels a crop pixel; the middle between the eyes (row, column), in a crop of 112 and
in the chip."""
_WIDTHS = (32, 32, 32, 32, -64, 64, 64, 64, -128, 128, 128, -256, 256, 256, -256)
"""Of the units, in turn; below 0 where one halves the sides."""


def convolution(inputs: int, outputs: int, side: int, stride: int) -> nn.Conv2d:
    """With a bias; unpadded where it strides."""
    return nn.Conv2d(inputs, outputs, side, stride, 0 if stride > 1 else side // 2)


class Unit(nn.Module):
    """f(x + conv(f(conv(x)))); maps of unequal size or depth are added as if filled up with 0."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        self.first = convolution(inputs, outputs, 3, stride)
        self.second = convolution(outputs, outputs, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.second(F.relu(self.first(x)))
        x = F.avg_pool2d(x, self.stride) if self.stride > 1 else x
        side = max(x.shape[3], branch.shape[3])
        deeper = branch.shape[1] - x.shape[1]
        x = F.pad(x, (0, side - x.shape[3], 0, side - x.shape[2], 0, deeper))
        branch = F.pad(branch, (0, side - branch.shape[3], 0, side - branch.shape[2]))
        return F.relu(x + branch)


class DlibNetwork(Backbone):
    """29 convolutions, 5.6 million parameters, embeddings of 128 whose length is dlib's.

    It cuts dlib's chip of 150×150 pixels from a crop of 112×112 by a fixed scale and shift, by
    which dlib's mean eyes fall on our template's, and repeats the crop's border below it.
    ``benchmarks/box/dlib_network.py`` makes a model of dlib's published weights.

    Args:
        embedding_dim: 128 as published.
        input_size: side, or (height, width), in pixels; divisible by 16; 112 for dlib's weights.
        width: multiplies every channel count, rounded to multiples of 8; 1 for dlib's weights.

    Example:
        >>> network = DlibNetwork()
        >>> sum(parameter.numel() for parameter in network.parameters())
        5607488
    """

    def __init__(
        self,
        *,
        embedding_dim: int = 128,
        input_size: int | tuple[int, int] = _CROP,
        width: float = 1.0,
    ):
        super().__init__(embedding_dim, input_size)
        check_number("width", width, above=0)
        widths = [(scaled(abs(count), width), 2 if count < 0 else 1) for count in _WIDTHS]
        self.stem = convolution(3, widths[0][0], 7, 2)
        self.units = nn.Sequential(
            *(Unit(inputs, outputs, by) for (inputs, _), (outputs, by) in pairwise(widths))
        )
        self.linear = nn.Linear(widths[-1][0], embedding_dim, bias=False)
        for axis, name in enumerate(("down", "across")):
            weights = _interpolation(self.input_size[axis], _EYES[axis], _CHIP_EYES[axis])
            self.register_buffer(name, weights, persistent=False)

    def chip(self, crops: Tensor) -> Tensor:
        """The chips (B, 3, 150, 150) of crops (B, 3, h, w), by bilinear interpolation."""
        return self.down @ crops @ self.across.T  # type: ignore[operator]

    def of_chips(self, chips: Tensor) -> Tensor:
        """The embeddings of chips."""
        x = F.max_pool2d(F.relu(self.stem(chips)), 3, 2)
        return self.linear(self.units(x).mean((2, 3)))

    def embed(self, images: Tensor) -> Tensor:
        return self.of_chips(self.chip(images))


def _interpolation(side: int, eyes: float, chip_eyes: float) -> Tensor:
    """(150, side): weights by which a row of chip pixels is made of crop pixels."""
    places = (np.arange(CHIP) - chip_eyes) / _SCALE + eyes  # in a crop of 112
    places = ((places + 0.5) * side / _CROP - 0.5).clip(0, side - 1)
    low = np.minimum(places.astype(int), side - 2)
    rows = np.zeros((CHIP, side), np.float32)
    rows[np.arange(CHIP), low] = 1 - (places - low)
    rows[np.arange(CHIP), low + 1] += places - low
    return torch.from_numpy(rows)
