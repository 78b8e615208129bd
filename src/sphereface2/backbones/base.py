"""What every backbone shares: its input check and what travels with its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sphereface2.backbones.activation import PReLU
from sphereface2.backbones.preprocessing import Preprocessing, as_size
from sphereface2.errors import UserError


class Backbone(nn.Module):
    """Normalised images (B, 3, h, w) to embeddings (B, embedding_dim); not L2-normalised.

    A subclass implements `embed`. `backbones.create` sets `preprocessing` and `config`.

    Attributes:
        embedding_dim: length of an embedding.
        input_size: (h, w) in pixels that `forward` accepts.
        preprocessing: turns uint8 RGB images into this network's input.
        config: ``{"name": ..., "kwargs": {...}}``, JSON-able; rebuilds the network untrained.
        metadata: free-form facts stored with the weights (see `backbones.bundle`).
    """

    preprocessing: Preprocessing
    config: dict[str, Any]

    def __init__(self, embedding_dim: int, input_size: int | tuple[int, int], stride: int = 16):
        super().__init__()
        if isinstance(embedding_dim, bool) or not isinstance(embedding_dim, int):
            raise UserError(f"embedding_dim must be an integer, not {embedding_dim!r}")
        if embedding_dim < 1:
            raise UserError(f"embedding_dim must be at least 1, not {embedding_dim}")
        self.embedding_dim = embedding_dim
        self.input_size = as_size(input_size)
        if any(side % stride for side in self.input_size):
            raise UserError(
                f"input_size must be divisible by {stride} on both sides, not {self.input_size}"
            )
        self.metadata: dict[str, Any] = {}

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) of the right shape to (B, embedding_dim)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self.input_size:
            raise UserError(
                f"the network takes images of shape (B, 3, {self.input_size[0]}, "
                f"{self.input_size[1]}), not {tuple(images.shape)}"
            )
        if not torch.is_floating_point(images):
            raise UserError(
                f"the network takes normalised float images, not {images.dtype}: "
                "call net.preprocessing(images) first"
            )
        return self.embed(images)


def check_positive(name: str, value: float) -> None:
    """UserError unless `value` is a positive number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"{name} must be a positive number, not {value!r}")


def check_dropout(value: float) -> None:
    """UserError unless `value` is a probability below 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(f"dropout must be in [0, 1), not {value!r}")


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, to the nearest multiple of 8 (at least 8)."""
    return max(8, 8 * round(channels * width / 8))


def activation_layer(kind: str, channels: int) -> nn.Module:
    """ "prelu" (one slope a channel, from 0.25) or "relu" as a module."""
    if kind == "prelu":
        return PReLU(channels)
    if kind == "relu":
        return nn.ReLU(inplace=True)
    raise UserError(f'activation must be "prelu" or "relu", not {kind!r}')
