"""SFNet-4/10/20/36/64: the residual networks of the SphereFace papers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from sphereface2.backbones.base import Backbone, activation_layer, scaled
from sphereface2.errors import UserError, check_number

UNITS = {
    "sfnet4": (0, 0, 0, 0),
    "sfnet10": (0, 1, 2, 0),
    "sfnet20": (1, 2, 4, 1),
    "sfnet36": (2, 4, 8, 2),
    "sfnet64": (3, 8, 16, 3),
}
"""Residual units in each of the four stages."""

CHANNELS = (64, 128, 256, 512)


def _convolution(inputs: int, outputs: int, stride: int, batch_norm: bool) -> nn.Conv2d:
    # A bias before batch normalisation would be subtracted again with the mean.
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=not batch_norm)


def _norm(channels: int, batch_norm: bool) -> nn.Module:
    return nn.BatchNorm2d(channels) if batch_norm else nn.Identity()


class Downsample(nn.Module):
    """A stride-2 3×3 convolution with its activation: how each stage begins."""

    def __init__(self, inputs: int, outputs: int, activation: str, batch_norm: bool):
        super().__init__()
        self.conv = _convolution(inputs, outputs, 2, batch_norm)
        self.norm = _norm(outputs, batch_norm)
        self.act = activation_layer(activation, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class ResidualUnit(nn.Module):
    """Two 3×3 convolutions and a shortcut.

    The second activation f is inside the branch, x + f(conv2(f(conv1(x)))), or after the sum,
    f(x + conv2(f(conv1(x)))).
    """

    def __init__(self, channels: int, activation: str, batch_norm: bool, after_sum: bool):
        super().__init__()
        self.conv1 = _convolution(channels, channels, 1, batch_norm)
        self.norm1 = _norm(channels, batch_norm)
        self.act1 = activation_layer(activation, channels)
        self.conv2 = _convolution(channels, channels, 1, batch_norm)
        self.norm2 = _norm(channels, batch_norm)
        self.act2 = activation_layer(activation, channels)
        self.after_sum = after_sum

    def forward(self, x: Tensor) -> Tensor:
        branch = self.norm2(self.conv2(self.act1(self.norm1(self.conv1(x)))))
        if self.after_sum:
            return self.act2(branch.add_(x))
        return self.act2(branch) + x


class SFNet(Backbone):
    """Four stages, each a stride-2 convolution and residual units; then one linear layer.

    Args:
        units: residual units a stage.
        embedding_dim: length of the embedding.
        input_size: side, or (height, width), in pixels; divisible by 16.
        batch_norm: batch normalisation after each convolution and, as BatchNorm1d whose weight
            starts at 0.1, after the linear layer. False is the network of the papers.
        activation: "prelu" (SphereFace paper) or "relu" (authors' code).
        after_sum: the residual unit's second activation follows the addition rather than the
            second convolution. None takes the habit of the activation's source: PReLU inside
            the branch, ReLU after the sum.
        width: multiplies the 64/128/256/512 channels, rounded to multiples of 8.
        dropout: probability before the linear layer.
        residual_scale: factor on the initial output of every residual branch. 0 starts each unit
            as the identity.

    Example:
        >>> network = SFNet(UNITS["sfnet10"], embedding_dim=32, input_size=64, width=0.25)
        >>> network(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        units: tuple[int, int, int, int],
        *,
        embedding_dim: int = 512,
        input_size: int | tuple[int, int] = 112,
        batch_norm: bool = False,
        activation: str = "prelu",
        after_sum: bool | None = None,
        width: float = 1.0,
        dropout: float = 0.0,
        residual_scale: float = 1.0,
    ):
        super().__init__(embedding_dim, input_size)
        check_number("width", width, above=0)
        check_number("dropout", dropout, least=0, below=1)
        check_number("residual_scale", residual_scale, least=0)
        if after_sum is None:
            after_sum = activation == "relu"
        if residual_scale == 0 and activation == "relu" and not after_sum:
            raise UserError(
                "residual_scale 0 with ReLU inside the branch never learns: "
                "set after_sum or a small positive residual_scale"
            )
        channels = [3, *(scaled(count, width) for count in CHANNELS)]
        self.stages = nn.Sequential()
        for (inputs, outputs), count in zip(pairwise(channels), units, strict=True):
            self.stages.append(
                nn.Sequential(
                    Downsample(inputs, outputs, activation, batch_norm),
                    *(
                        ResidualUnit(outputs, activation, batch_norm, after_sum)
                        for _ in range(count)
                    ),
                )
            )
        height, breadth = (side // 16 for side in self.input_size)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels[-1] * height * breadth, embedding_dim)
        self.norm = nn.BatchNorm1d(embedding_dim) if batch_norm else nn.Identity()
        self._initialise(batch_norm, residual_scale)

    def _initialise(self, batch_norm: bool, residual_scale: float) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                if batch_norm:
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.xavier_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for unit in self.modules():
            if isinstance(unit, ResidualUnit):
                if isinstance(unit.norm2, nn.BatchNorm2d):
                    nn.init.constant_(unit.norm2.weight, residual_scale)
                else:
                    # Small branches start each unit near the identity; without normalisation
                    # the activations of 64 layers would otherwise grow exponentially.
                    nn.init.normal_(unit.conv1.weight, std=0.01)
                    nn.init.normal_(unit.conv2.weight, std=0.01 * residual_scale)
        nn.init.xavier_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        if isinstance(self.norm, nn.BatchNorm1d):
            nn.init.constant_(self.norm.weight, 0.1)

    def embed(self, images: Tensor) -> Tensor:
        features = self.dropout(torch.flatten(self.stages(images), 1))
        return self.norm(self.fc(features))
