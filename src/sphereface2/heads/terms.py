"""SphereFace2's terms of a block of classes, positives and negatives together."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch import Tensor

from sphereface2.margins import BinaryMargin, ClassTerms, Own, Terms


def block_terms_(
    margin: ClassTerms, cos: Tensor, bias: Tensor, own: Own, weight: float = 1.0
) -> Terms:
    """Loss terms and derivatives of a block of c classes, in place.

    On CUDA one kernel does `BinaryMargin`'s (`kernels`), where Triton is installed; elsewhere, for
    a bias of each class and in float64 the margin's own methods do, one operation after another.

    Args:
        margin: the equations.
        cos: (B, c) cosines, contiguous; overwritten by the derivatives.
        bias: () or (c,).
        own: the entries that are some sample's own class.
        weight: factor of the negatives' loss and derivatives.

    Returns:
        `Terms` with loss (B,), dcos the given ``cos`` itself, dbias (B,) or (B, c).
    """
    plain = bias.ndim == 0 and cos.dtype != torch.float64
    if isinstance(margin, BinaryMargin) and cos.is_cuda and plain and has_kernel():
        from sphereface2.heads import kernels

        return kernels.block_terms_(margin, cos, bias, own, weight)
    own_bias = bias if bias.ndim == 0 else bias[own.columns]
    positive = margin.positive(own.take(cos), own_bias)
    loss, dcos, dbias = margin.negatives_(cos, bias, own, weight)
    own.put_(dcos, positive.dcos)
    if bias.ndim == 0:
        dbias += own.mask(positive.dbias)
    else:
        own.put_(dbias, positive.dbias)
    return Terms(loss + own.mask(positive.loss), dcos, dbias)


@functools.cache
def has_kernel() -> bool:
    """Whether Triton is installed, as it is with PyTorch for CUDA on Linux."""
    return importlib.util.find_spec("triton") is not None
