"""PReLU that does not dominate training on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class PReLU(nn.PReLU):
    """torch.nn.PReLU, trained on a CPU in a quarter of its time; the same function elsewhere.

    torch's backward kernel is not vectorised on CPUs and takes 20 to 30 % of a training step of
    an SFNet. On channels-last images the same derivative is a few vectorised passes. See
    ``benchmarks/backbone_speed.py``.

    Example:
        >>> PReLU(1)(torch.tensor([[-4.0, 2.0]])).detach()
        tensor([[-1.,  2.]])
    """

    def forward(self, x: Tensor) -> Tensor:
        if (
            self.training
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and x.device.type == "cpu"
            and x.ndim == 4
            and x.is_contiguous(memory_format=torch.channels_last)
            and self.weight.numel() == x.shape[1]
        ):
            return _ChannelsLastPReLU.apply(x, self.weight)
        return super().forward(x)


class _ChannelsLastPReLU(torch.autograd.Function):
    """y = max(x, 0) + a·min(x, 0) on (B, C, H, W) in channels-last memory, a (C,).

    The images are read as rows of W·C values with the slopes repeated W times: a long inner
    dimension without strides is what the elementwise kernels vectorise.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:
        rows = _rows(x)
        positive = rows.clamp_min(0)
        ctx.save_for_backward(x, slope)
        return _images(torch.addcmul(positive, rows - positive, _repeated(slope, x)), x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, slope = ctx.saved_tensors
        rows, gradient = _rows(x), _rows(gradient)
        positive = torch.ops.aten.threshold_backward(gradient, rows, 0)  # gradient where x > 0
        negative = gradient - positive
        of_x = torch.addcmul(positive, negative, _repeated(slope, x))
        total = torch.promote_types(slope.dtype, torch.float32)
        of_slope = (negative * rows).sum(0, dtype=total).view(x.shape[3], x.shape[1]).sum(0)
        return _images(of_x, x), of_slope.to(slope.dtype)


def _rows(x: Tensor) -> Tensor:
    batch, channels, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(batch * height, width * channels)


def _repeated(slope: Tensor, x: Tensor) -> Tensor:
    return slope.to(x.dtype).repeat(x.shape[3])


def _images(rows: Tensor, like: Tensor) -> Tensor:
    batch, channels, height, width = like.shape
    return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)
