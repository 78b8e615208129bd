"""What every backbone shares: its input check and what travels with its weights."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from sphereface2.backbones.activation import PReLU
from sphereface2.backbones.preprocessing import Preprocessing, as_size
from sphereface2.errors import UserError, check_choice, check_count


class Backbone(nn.Module):
    """Normalised images (B, 3, h, w) to embeddings (B, embedding_dim); not L2-normalised.

    A subclass implements `embed`. `backbones.build` sets `preprocessing` and `config`.

    Attributes:
        embedding_dim: length of an embedding.
        input_size: (h, w) in pixels that `forward` accepts.
        preprocessing: turns uint8 RGB images into this network's input.
        config: ``{"name": ..., "kwargs": {...}}``, JSON-able; rebuilds the network untrained.
        metadata: free-form facts stored with the weights (see `backbones.bundle`).
        frozen: names of modules that stay in evaluation mode in training, with all within them.
    """

    preprocessing: Preprocessing
    config: dict[str, Any]

    def __init__(self, embedding_dim: int, input_size: int | tuple[int, int], stride: int = 16):
        super().__init__()
        check_count("embedding_dim", embedding_dim, 1)
        self.embedding_dim = embedding_dim
        self.input_size = as_size(input_size)
        if any(side % stride for side in self.input_size):
            raise UserError(
                f"input_size must be divisible by {stride} on both sides, got {self.input_size}"
            )
        self.metadata: dict[str, Any] = {}
        self.frozen: frozenset[str] = frozenset()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def embed(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) of the right shape to (B, embedding_dim)."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] != 3 or tuple(images.shape[2:]) != self.input_size:
            raise UserError(
                f"the network takes images of shape (B, 3, {self.input_size[0]}, "
                f"{self.input_size[1]}), got {tuple(images.shape)}"
            )
        if not torch.is_floating_point(images):
            raise UserError(
                f"the network takes normalised float images, got {images.dtype}: "
                "call net.preprocessing(images) first"
            )
        return self.embed(images)


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, to the nearest multiple of 8 (at least 8).

    Example:
        >>> scaled(64, 0.3)
        16
    """
    return max(8, 8 * round(channels * width / 8))


def activation_layer(kind: str, channels: int) -> nn.Module:
    """ "prelu" (one slope a channel, from 0.25) or "relu" as a module.

    Example:
        >>> activation_layer("prelu", 64)
        PReLU(num_parameters=64)
    """
    check_choice("activation", kind, ("prelu", "relu"))
    return PReLU(channels) if kind == "prelu" else nn.ReLU(inplace=True)
