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
from sphereface2.heads.terms import Totals, fits_kernels
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
        chunk: most rows a block.
        half: whether the products of float32 embeddings are made of bfloat16 numbers.
        even: all ranks are known to have equally many samples and the same loss.
        update: consumes the gradient of W in the forward pass, which then yields none.
    """

    margin: ClassTerms
    shard: Shard
    plan: Callable[[Tensor, Tensor], Iterable[Block]]
    visits_all: bool
    scale: float
    chunk: int
    half: bool = False
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
        UserError: the ranks' losses differ, unless `Work.even` vouches that they do not.
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
        shard, update = work.shard, work.update
        terms = _terms(work, bias, need_bias)
        batch = shard.gather(x, labels, even=work.even, terms=terms)
        x, own_class = batch.x, batch.labels - shard.start
        mean = work.scale / len(x)
        half = work.half and x.dtype == torch.float32
        dtype = torch.bfloat16 if half else x.dtype
        narrow_x, scaled_x = x.to(dtype), (x * mean).to(dtype)
        own_cos = _own_cosines(x, weight, own_class) if half else None
        grad_x = torch.zeros_like(x)
        empty = torch.empty_like if work.visits_all else torch.zeros_like
        grad_weight = empty(weight) if need_weight else None
        totals = Totals(work.margin, bias, len(x), work.chunk)
        buffers = _Buffers(x, dtype)
        for block in work.plan(x, own_class):
            exact, unit = _prototypes(weight, block, x.dtype, buffers, update is None)
            cos = torch.mm(narrow_x, unit.T, out=buffers.take("cos", len(x), len(block)))
            dcos = totals.add_(cos, block, own_cos)
            if need_x:
                _add_product_(grad_x, dcos, unit)
            if update is not None:
                gradient = buffers.take("gradient", *unit.shape)
                update.update_(block, exact, torch.mm(dcos.T, scaled_x, out=gradient))
            elif grad_weight is not None:
                _put_product_(grad_weight, block.rows, dcos.T, scaled_x)
        losses, dbias = totals.sums()
        if need_bias and not bias.ndim:
            shard.sum(dbias)
        if shard.group is not None:  # one message carries the gradients by x and the losses
            mine = shard.scatter_sum(torch.cat([grad_x, losses[:, None]], 1), batch)
            grad_x, losses = mine[:, :-1], mine[:, -1]
        share = mean * shard.size
        ctx.grads = (
            grad_x * share if need_x else None,
            grad_weight,
            dbias * mean if need_bias else None,
        )
        return losses.sum() * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = take_once(ctx)
        # Usually 1, which saves a pass over W's gradient; on a GPU the question costs more.
        if grad.device.type != "cpu" or grad != 1:
            for part in grads:
                if part is not None:
                    part.mul_(grad)
        return *grads, None, None, None


def _terms(work: Work, bias: Tensor, learned: bool) -> dict[str, Any]:
    """What must be the same on all ranks, for the loss to be one and messages to fit."""
    return {
        "the loss": str(work.margin),
        "the weight of the loss": work.scale,
        "the number of biases": "C" if bias.ndim else 1,
        "whether the bias gets a gradient": learned,
        "whether all negatives are visited": work.visits_all,
    }


class _Buffers:
    """Scratch memory that the blocks of one pass share."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype = like, dtype
        self.flat: dict[str, Tensor] = {}

    def take(self, name: str, rows: int, columns: int) -> Tensor:
        """An uninitialised contiguous (rows, columns)."""
        size = rows * columns
        if name not in self.flat or self.flat[name].numel() < size:
            self.flat[name] = self.like.new_empty(size, dtype=self.dtype)
        return self.flat[name][:size].view(rows, columns)


def _prototypes(
    weight: Tensor, block: Block, exact: torch.dtype, buffers: _Buffers, store: bool
) -> tuple[Tensor | None, Tensor]:
    """The block's rows at unit length, (c, d), in full precision and in that of the products.

    The first is None where the kernels are used: nothing but the products needs it.
    """
    if not fits_kernels(weight) or exact != torch.float32:
        unit = unit_block(weight, block, exact)
        return unit, unit.to(buffers.dtype)
    if isinstance(block.rows, slice) and weight.dtype == buffers.dtype == exact:
        return None, unit_block(weight, block, exact)
    from sphereface2.heads import row_kernels

    unit = buffers.take("unit", len(block), weight.shape[1])
    store = store and weight.dtype == exact
    row_kernels.unit_rows(weight.data, block.rows, unit, store=store)
    return None, unit


def unit_block(weight: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The block's rows of W at unit length, (c, d); stored back where W keeps that precision."""
    if isinstance(block.rows, slice):
        rows = weight.data[block.rows]
        if fits_kernels(weight) and weight.dtype == dtype == torch.float32:
            from sphereface2.heads import row_kernels

            row_kernels.unit_rows(weight.data, block.rows, None, store=True)
            return rows
        return renormalise_(rows if rows.dtype == dtype else rows.to(dtype))
    rows = renormalise_(weight.data[block.rows].to(dtype))
    if weight.dtype == dtype:
        weight.data[block.rows] = rows
    return rows


def _own_cosines(x: Tensor, weight: Tensor, own_class: Tensor) -> Tensor:
    """(B,) cosines with the own classes; of any value where these rows of W lack the class."""
    if not len(weight):
        return x.new_zeros(len(x))
    rows = weight.data[own_class.clamp(0, len(weight) - 1)]
    return (x * renormalise_(rows.to(x.dtype))).sum(1)


def _add_product_(into: Tensor, a: Tensor, b: Tensor) -> None:
    """``into`` += a·b, with sums over blocks in the precision of ``into``."""
    if a.dtype == into.dtype:
        into.addmm_(a, b)
    elif a.is_cuda and "dtype" in torch.ops.aten.mm.overloads():  # since torch 2.8
        into += torch.mm(a, b, out_dtype=into.dtype)
    else:  # the block's product is rounded before it is added
        into += torch.mm(a, b)


def _put_product_(into: Tensor, rows: slice | Tensor, a: Tensor, b: Tensor) -> None:
    """Write a·b to rows of ``into``; a row that is named twice gets the sum."""
    if not isinstance(rows, slice):
        into.index_add_(0, rows, (a @ b).to(into.dtype))
    elif into.dtype == a.dtype:
        torch.mm(a, b, out=into[rows])
    else:
        into[rows] = a @ b


def take_once(ctx: Any) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass left; autograd then owns the only reference."""
    if torch.is_grad_enabled() or ctx.grads is None:
        raise RuntimeError(ONCE)
    grads: tuple[Tensor | None, ...] = ctx.grads
    ctx.grads = None
    return grads
