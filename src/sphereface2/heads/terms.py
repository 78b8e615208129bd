"""SphereFace2's terms of a block of classes, positives and negatives together."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import warnings

import torch
from torch import Tensor

from sphereface2.heads.blocks import Block
from sphereface2.margins import BinaryMargin, ClassTerms, Own, Terms


def block_terms_(
    margin: ClassTerms,
    cos: Tensor,
    bias: Tensor,
    own: Own,
    weight: float = 1.0,
    *,
    skip: Tensor | None = None,
    own_cos: Tensor | None = None,
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
        skip: (c,) bool, classes that get neither loss nor derivative.
        own_cos: (B,) cosines with the own classes, where ``cos`` has too few digits.

    Returns:
        `Terms` with loss (B,), dcos the given ``cos`` itself, dbias (B,) or (B, c).
    """
    if _has_terms_kernel(margin, cos, bias):
        from sphereface2.heads import kernels

        assert isinstance(margin, BinaryMargin)
        return kernels.block_terms_(margin, cos, bias, own, weight, skip=skip, own_cos=own_cos)
    if cos.dtype == torch.bfloat16:
        terms = block_terms_(margin, cos.float(), bias, own, weight, skip=skip, own_cos=own_cos)
        return terms._replace(dcos=cos.copy_(terms.dcos))
    own_bias = bias if bias.ndim == 0 else bias[own.columns]
    positive = margin.positive(own.take(cos) if own_cos is None else own_cos, own_bias)
    loss, dcos, dbias = margin.negatives_(cos, bias, own, weight, skip)
    own.put_(dcos, positive.dcos)
    if bias.ndim == 0:
        dbias += own.mask(positive.dbias)
    else:
        own.put_(dbias, positive.dbias)
    return Terms(loss + own.mask(positive.loss), dcos, dbias)


class Totals:
    """Losses and derivatives by the bias, summed over the blocks of a pass.

    Args:
        margin: the equations.
        bias: () or (C,).
        samples: B.
        widest: most classes a block.
    """

    def __init__(self, margin: ClassTerms, bias: Tensor, samples: int, widest: int) -> None:
        self.margin, self.bias, self.widest = margin, bias, widest
        self.losses = bias.new_zeros(samples)
        self.dbias = bias.new_zeros(bias.shape if bias.ndim else (samples,))
        self.partial: Tensor | None = None

    def add_(self, cos: Tensor, block: Block, own_cos: Tensor | None) -> Tensor:
        """Take the terms of a block: its cosines (B, c) are overwritten by their derivatives."""
        if _has_terms_kernel(self.margin, cos, self.bias):
            from sphereface2.heads import kernels

            if self.partial is None:
                self.partial = kernels.partial_sums(len(cos), self.widest, cos.device)
            assert isinstance(self.margin, BinaryMargin)
            kernels.add_block_terms_(
                self.margin,
                cos,
                self.bias,
                block.own,
                block.weight,
                skip=block.skip,
                own_cos=own_cos,
                sums=self.partial,
            )
            return cos
        bias = self.bias[block.rows] if self.bias.ndim else self.bias
        loss, dcos, dbias = block_terms_(
            self.margin, cos, bias, block.own, block.weight, skip=block.skip, own_cos=own_cos
        )
        self.losses += loss
        if not bias.ndim:
            self.dbias += dbias
        elif isinstance(block.rows, slice):
            self.dbias[block.rows] = dbias.sum(0)
        else:
            self.dbias.index_add_(0, block.rows, dbias.sum(0))
        return dcos

    def sums(self) -> tuple[Tensor, Tensor]:
        """Each sample's loss, (B,), and the derivative by the bias summed over samples."""
        if self.partial is not None:
            loss, dbias = self.partial.sum(2)
            self.losses, self.dbias, self.partial = self.losses + loss, self.dbias + dbias, None
        return self.losses, self.dbias if self.bias.ndim else self.dbias.sum()


def _has_terms_kernel(margin: ClassTerms, cos: Tensor, bias: Tensor) -> bool:
    """Whether the kernels know the equations and take these tensors."""
    return isinstance(margin, BinaryMargin) and bias.ndim == 0 and fits_kernels(cos)


def fits_kernels(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: on CUDA, of float32 or bfloat16, with Triton."""
    fits = all(t.is_cuda and t.dtype in (torch.float32, torch.bfloat16) for t in tensors)
    return fits and has_kernel()


@functools.cache
def has_kernel() -> bool:
    """Whether Triton is installed, as with PyTorch for CUDA on Linux, and a C compiler it needs."""
    if importlib.util.find_spec("triton") is None:
        return False
    if any([os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")]):
        return True
    warnings.warn(
        "the heads' kernels need a C compiler and take slower ways without: install gcc or clang, "
        "or name one in CC",
        stacklevel=2,
    )
    return False
