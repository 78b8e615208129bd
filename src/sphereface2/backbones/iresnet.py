"""IResNet-18/34/50/100/200: ArcFace's residual networks.

The architecture is that of InsightFace's ``arcface_torch`` and the parameters carry its names, so
that its published weights load with ``load_state_dict``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sphereface2.backbones.base import Backbone, activation_layer, scaled
from sphereface2.errors import check_number

UNITS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
    "iresnet200": (6, 26, 60, 6),
}
"""Residual units in each of the four stages."""

CHANNELS = (64, 128, 256, 512)


class ResidualUnit(nn.Module):
    """norm, 3×3 convolution, norm, activation, 3×3 convolution with the stride, norm; shortcut.

    Nothing follows the sum. The first unit of a stage halves the map and projects its shortcut by
    a 1×1 convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, activation: str):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.prelu = activation_layer(activation, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        branch = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(branch)).add_(self.downsample(x))


class IResNet(Backbone):
    """A stride-1 stem, four stages that each halve the map, one linear layer.

    Args:
        units: residual units a stage.
        embedding_dim: length of the embedding.
        input_size: side, or (height, width), in pixels; divisible by 16.
        activation: "prelu" (the published networks) or "relu" (faster).
        width: multiplies the 64/128/256/512 channels, rounded to multiples of 8.
        dropout: probability before the linear layer.

    Example:
        >>> network = IResNet(UNITS["iresnet18"], embedding_dim=32, input_size=64, width=0.25)
        >>> network(torch.zeros(2, 3, 64, 64)).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        units: tuple[int, int, int, int],
        *,
        embedding_dim: int = 512,
        input_size: int | tuple[int, int] = 112,
        activation: str = "prelu",
        width: float = 1.0,
        dropout: float = 0.0,
    ):
        super().__init__(embedding_dim, input_size)
        check_number("width", width, above=0)
        check_number("dropout", dropout, least=0, below=1)
        channels = [scaled(count, width) for count in CHANNELS]
        inputs = channels[0]
        self.conv1 = nn.Conv2d(3, inputs, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.prelu = activation_layer(activation, inputs)
        stages = []
        for outputs, count in zip(channels, units, strict=True):
            stages.append(
                nn.Sequential(
                    ResidualUnit(inputs, outputs, 2, activation),
                    *(ResidualUnit(outputs, outputs, 1, activation) for _ in range(count - 1)),
                )
            )
            inputs = outputs
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        height, breadth = (side // 16 for side in self.input_size)
        self.bn2 = nn.BatchNorm2d(inputs)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(inputs * height * breadth, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        # The loss sees directions only: a learned scale of each coordinate would be a second,
        # redundant linear layer. It stays at 1.
        self.features.weight.requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def embed(self, images: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(images)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.features(self.fc(self.dropout(torch.flatten(self.bn2(x), 1))))
