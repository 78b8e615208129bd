"""SphereFace2's loss over any number of classes in bounded memory: no logits are kept.

A sum over classes with no normaliser, it needs each block of W once: the derivatives of a block are
known as soon as its cosines are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sphereface2.heads.base import renormalise_
from sphereface2.heads.blocks import Block, RowUpdate
from sphereface2.heads.sharding import Shard
from sphereface2.heads.terms import block_terms_
from sphereface2.margins import ClassTerms

ONCE = "the loss can be differentiated once only (no create_graph, no second backward)"


@dataclass(frozen=True)
class Work:
    """What `streamed_one_vs_all` does besides its tensors.

    Attributes:
        margin: the equations.
        shard: this rank's rows of W.
        plan: the blocks of W to visit, from the samples and their labels among these rows.
        visits_all: whether these are all rows.
        scale: factor of the mean loss.
        even: all ranks are known to have equally many samples.
        update: consumes the gradient of W in the forward pass, which then yields none.
    """

    margin: ClassTerms
    shard: Shard
    plan: Callable[[Tensor, Tensor], Iterable[Block]]
    visits_all: bool
    scale: float
    even: bool = False
    update: RowUpdate | None = None


def streamed_one_vs_all(
    x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, work: Work
) -> Tensor:
    """SphereFace2's loss in one pass over the rows of W.

    Memory is O(B·chunk) besides W's gradient, and not even that is held with `Work.update`. The
    rows are renormalised in place on the way.

    Args:
        x: (B, d) unit embeddings of this rank.
        weight: (c, d), this rank's rows of W; of any floating type.
        bias: () or (c,).
        labels: (B,) int64 among all classes.

    Returns:
        A scalar whose mean over the ranks is `Work.scale` times the mean loss of the samples of
        all ranks. The gradient by `x` is that of this scalar, those by weight and bias are of the
        mean over ranks, which is what DistributedDataParallel makes of replicated parameters. The
        gradient that arrives from above must be the same on all ranks.

    Raises:
        RuntimeError: on a second backward pass, or one with create_graph.
    """
    enabled = torch.is_grad_enabled()
    needs = tuple(enabled and tensor.requires_grad for tensor in (x, weight, bias))
    loss: Tensor = _StreamedOneVersusAll.apply(x, weight, bias, labels, work, needs)
    return loss


class _StreamedOneVersusAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        labels: Tensor,
        work: Work,
        needs: tuple[bool, bool, bool],
    ) -> Tensor:
        need_x, need_weight, need_bias = needs
        margin, shard, update = work.margin, work.shard, work.update
        batch = shard.gather(x, labels, even=work.even)
        x, own_class = batch.x, batch.labels - shard.start
        mean = work.scale / len(x)
        scaled_x = x * mean
        # One tensor, so that one message carries the gradients by x and the losses.
        sums = x.new_zeros(len(x), x.shape[1] + 1)
        grad_x, losses = sums[:, :-1], sums[:, -1]
        empty = torch.empty_like if work.visits_all else torch.zeros_like
        grad_weight = empty(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias)
        buffers = _Buffers(x)
        for block in work.plan(x, own_class):
            unit = unit_block(weight, block, x.dtype)
            cos = torch.mm(x, unit.T, out=buffers.take("cos", len(x), len(block)))
            block_bias = bias[block.rows] if bias.ndim else bias
            loss, dcos, dbias = block_terms_(margin, cos, block_bias, block.own, block.weight)
            losses += loss
            if need_bias:
                if bias.ndim:
                    grad_bias[block.rows] = dbias.sum(0) * mean
                else:
                    grad_bias += dbias.sum() * mean
            if need_x:
                grad_x.addmm_(dcos, unit)
            if update is not None:
                gradient = buffers.take("gradient", *unit.shape)
                update.update_(block.rows, unit, torch.mm(dcos.T, scaled_x, out=gradient))
            elif grad_weight is not None:
                if isinstance(block.rows, slice) and weight.dtype == x.dtype:
                    torch.mm(dcos.T, scaled_x, out=grad_weight[block.rows])
                else:
                    grad_weight[block.rows] = (dcos.T @ scaled_x).to(weight.dtype)
        if need_bias and not bias.ndim:
            shard.sum(grad_bias)
        mine = shard.scatter_sum(sums, batch)
        share = mean * shard.size
        ctx.grads = (
            mine[:, :-1] * share if need_x else None,
            grad_weight,
            grad_bias if need_bias else None,
        )
        return mine[:, -1].sum() * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = take_once(ctx)
        # Usually 1, which saves a pass over W's gradient; on a GPU the question costs more.
        if grad.device.type != "cpu" or grad != 1:
            for part in grads:
                if part is not None:
                    part.mul_(grad)
        return *grads, None, None, None


class _Buffers:
    """Scratch memory that the blocks of one pass share."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.flat: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """An uninitialised contiguous (rows, columns)."""
        size = rows * columns
        if name not in self.flat or self.flat[name].numel() < size:
            self.flat[name] = self.like.new_empty(size)
        return self.flat[name][:size].view(rows, columns)


def unit_block(weight: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The block's rows of W at unit length, (c, d); stored back where W keeps that precision."""
    if isinstance(block.rows, slice):
        rows = weight.data[block.rows]
        return renormalise_(rows if rows.dtype == dtype else rows.to(dtype))
    rows = renormalise_(weight.data[block.rows].to(dtype))
    if weight.dtype == dtype:
        weight.data[block.rows] = rows
    return rows


def take_once(ctx: Any) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass left; autograd then owns the only reference."""
    if torch.is_grad_enabled() or ctx.grads is None:
        raise RuntimeError(ONCE)
    grads: tuple[Tensor | None, ...] = ctx.grads
    ctx.grads = None
    return grads
