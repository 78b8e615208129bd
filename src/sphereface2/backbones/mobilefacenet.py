"""MobileFaceNet: inverted residuals and a global depthwise convolution.

The architecture is the double-width one of InsightFace's ``arcface_torch`` ("mbf") and the
parameters carry its names. Chen et al., "MobileFaceNets", 2018.
"""

from __future__ import annotations

from torch import Tensor, nn

from sphereface2.backbones.base import Backbone, activation_layer, scaled
from sphereface2.errors import check_number


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation and, unless `activation` is None, f."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int | tuple[int, int] = 1,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        activation: str | None = None,
    ):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
        )
        if activation is not None:
            self.layers.append(activation_layer(activation, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class InvertedResidual(nn.Module):
    """1×1 to `hidden` channels, depthwise 3×3, linear 1×1 to `outputs`; a shortcut if asked."""

    def __init__(
        self, inputs: int, outputs: int, hidden: int, stride: int, shortcut: bool, activation: str
    ):
        super().__init__()
        self.shortcut = shortcut
        self.layers = nn.Sequential(
            ConvNorm(inputs, hidden, activation=activation),
            ConvNorm(hidden, hidden, 3, stride, 1, groups=hidden, activation=activation),
            ConvNorm(hidden, outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).add_(x) if self.shortcut else self.layers(x)


class Repeat(nn.Module):
    """`count` inverted residuals of one shape, each with its shortcut."""

    def __init__(self, count: int, channels: int, hidden: int, activation: str):
        super().__init__()
        self.layers = nn.Sequential(
            *(
                InvertedResidual(channels, channels, hidden, 1, True, activation)
                for _ in range(count)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Embedding(nn.Module):
    """Depthwise convolution over the whole map (h, w), a linear layer, batch normalisation."""

    def __init__(self, channels: int, size: tuple[int, int], embedding_dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            ConvNorm(channels, channels, size, groups=channels),
            nn.Flatten(),
            nn.Linear(channels, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class MobileFaceNet(Backbone):
    """The light network of the ArcFace family: 2.05 million parameters at 112×112, 512-d.

    Args:
        embedding_dim: length of the embedding.
        input_size: side, or (height, width), in pixels; divisible by 16.
        activation: "prelu" (as published) or "relu" (faster).
        width: multiplies every channel count, rounded to multiples of 8.

    Example:
        >>> network = MobileFaceNet(embedding_dim=32, input_size=64)
        >>> sum(parameter.numel() for parameter in network.parameters())
        1795904
    """

    def __init__(
        self,
        *,
        embedding_dim: int = 512,
        input_size: int | tuple[int, int] = 112,
        activation: str = "prelu",
        width: float = 1.0,
    ):
        super().__init__(embedding_dim, input_size)
        check_number("width", width, above=0)
        c128, c256, c512 = (scaled(count, width) for count in (128, 256, 512))
        self.layers = nn.Sequential(
            ConvNorm(3, c128, 3, 2, 1, activation=activation),
            # Two channels a group, as in arcface_torch; the paper's is depthwise on 64.
            ConvNorm(c128, c128, 3, 1, 1, groups=c128 // 2, activation=activation),
            InvertedResidual(c128, c128, c128, 2, False, activation),
            Repeat(4, c128, c128, activation),
            InvertedResidual(c128, c256, c256, 2, False, activation),
            Repeat(6, c256, c256, activation),
            InvertedResidual(c256, c256, c512, 2, False, activation),
            Repeat(2, c256, c256, activation),
        )
        self.conv_sep = ConvNorm(c256, c512, activation=activation)
        height, breadth = (side // 16 for side in self.input_size)
        self.features = Embedding(c512, (height, breadth), embedding_dim)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def embed(self, images: Tensor) -> Tensor:
        return self.features(self.conv_sep(self.layers(images)))
