"""A network behind the input that insightface, and what is built on it, gives to ONNX files."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sphereface2.align.template import SIZE
from sphereface2.backbones import Backbone, Preprocessing


class AsInsightface(Backbone):
    """The same embeddings of square RGB images, normalised as (x - 127.5) / 127.5.

    insightface makes crops as large as the ONNX file's input, for sides that are multiples of 112.
    Another size, scale or order of colours that the network was trained with is therefore part of
    this one: a 1×1 convolution, and for the size two matrices, which every runtime multiplies with
    equally. They resize as `Preprocessing` does.

    Args:
        network: with its `preprocessing`. Crops get the least side that is no smaller.
    """

    colours: Tensor
    shift: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, network: Backbone) -> None:
        height, width = network.input_size
        side = SIZE * -(-max(height, width) // SIZE)
        super().__init__(network.embedding_dim, side)
        self.network = network
        self.config, self.metadata = network.config, network.metadata
        self.preprocessing = Preprocessing((side, side), std=(127.5, 127.5, 127.5))
        inner, given = network.preprocessing, self.preprocessing
        std, colours = torch.tensor(inner.std), torch.eye(3) * given.std[0]
        colours = colours.flip(1) if inner.colour_order == "BGR" else colours
        bias = (given.mean[0] - torch.tensor(inner.mean)) / std
        self.register_buffer("colours", (colours / std[:, None])[:, :, None, None])
        self.register_buffer("shift", bias)
        self.register_buffer("rows", _resizing(side, height))
        self.register_buffer("columns", _resizing(side, width).T.contiguous())

    def embed(self, images: Tensor) -> Tensor:
        images = F.conv2d(images, self.colours, self.shift)
        if self.input_size != self.network.input_size:
            images = self.rows @ images @ self.columns
        return self.network(images)


def _resizing(before: int, after: int) -> Tensor:
    """(after, before): the matrix that resizes a column of pixels, bilinear and antialiased."""
    units = torch.eye(before)[None, None]
    size = (after, before)
    return F.interpolate(units, size, mode="bilinear", antialias=True, align_corners=False)[0, 0]
