"""Losses over any number of classes in bounded memory: block after block of W, no logits kept.

`streamed_one_vs_all` is SphereFace2's loss. A sum over classes with no normaliser, it needs each
block once: the derivatives of a block are known as soon as its cosines are. `streamed_softmax` is
what the softmax family needs for the same memory: a first pass for the normaliser and, in the
backward pass, the cosines a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sphereface2.heads.base import renormalise_
from sphereface2.heads.blocks import Block, SortedLabels
from sphereface2.heads.sharding import Shard
from sphereface2.margins import BinaryMargin, softplus

if TYPE_CHECKING:
    from sphereface2.heads.softmax import SoftmaxHead

ONCE = "the loss can be differentiated once only (no create_graph, no second backward)"


class RowUpdate(Protocol):
    """An optimiser that consumes the gradient of W block by block."""

    def update_(self, rows: slice | Tensor, unit: Tensor, gradient: Tensor) -> None:
        """Take a step with the rows ``rows`` of W, which are ``unit`` (c, d) after normalisation.

        Args:
            gradient: (c, d) gradient by these rows, which may be overwritten.
        """


@dataclass(frozen=True)
class Work:
    """What `streamed_one_vs_all` does besides its tensors.

    Attributes:
        margin: the equations.
        shard: this rank's rows of W.
        plan: the blocks of W to visit, from the samples and their labels among these rows.
        visits_all: whether these are all rows.
        scale: factor of the mean loss.
        update: consumes the gradient of W in the forward pass, which then yields none.
    """

    margin: BinaryMargin
    shard: Shard
    plan: Callable[[Tensor, SortedLabels], Iterable[Block]]
    visits_all: bool
    scale: float
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
        batch = shard.gather(x, labels)
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
        for block in work.plan(x, SortedLabels(own_class)):
            unit = _unit_rows(weight, block, x.dtype)
            cos = torch.mm(x, unit.T, out=buffers.take("cos", len(x), len(block)))
            own_bias = block_bias = bias
            if bias.ndim:
                block_bias = bias[block.rows]
            if block.own is not None:
                samples, columns = block.own
                if bias.ndim:
                    own_bias = block_bias[columns]
                positive = margin.positive(cos[block.own], own_bias)
                losses[samples] += positive.loss
            negative = margin.negatives_(cos, block_bias, block.own, block.weight)
            losses += negative.loss
            dcos, dbias = negative.dcos, negative.dbias
            if block.own is not None:
                dcos[block.own] = positive.dcos
                if bias.ndim:
                    dbias[block.own] = positive.dbias
                else:
                    dbias[samples] += positive.dbias
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
        own = shard.scatter_sum(sums, batch)
        share = mean * shard.size
        ctx.grads = (
            own[:, :-1] * share if need_x else None,
            grad_weight,
            grad_bias if need_bias else None,
        )
        return own[:, -1].sum() * share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = _take_once(ctx)
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


def _unit_rows(weight: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The block's rows of W at unit length, (c, d); stored back where W keeps that precision."""
    if isinstance(block.rows, slice):
        rows = weight.data[block.rows]
        return renormalise_(rows if rows.dtype == dtype else rows.to(dtype))
    indices = block.rows.to(weight.device)
    rows = renormalise_(weight.data[indices].to(dtype))
    if weight.dtype == dtype:
        weight.data[indices] = rows
    return rows


def _take_once(ctx: Any) -> tuple[Tensor | None, ...]:
    """The gradients that the forward pass left; autograd then owns the only reference."""
    if torch.is_grad_enabled() or ctx.grads is None:
        raise RuntimeError(ONCE)
    grads: tuple[Tensor | None, ...] = ctx.grads
    ctx.grads = None
    return grads


def streamed_softmax(
    head: SoftmaxHead, x: Tensor, lengths: Tensor, labels: Tensor, chunk: int
) -> Tensor:
    """Mean cross-entropy of a softmax head with memory O(B·chunk) besides W's gradient.

    Args:
        head: gives `weight`, `prepare`, `positive` and `negatives`.
        x: (B, d) unit embeddings.
        lengths: (B,) norms that the embeddings had.
        labels: (B,) int64.
        chunk: classes a block.
    """
    others = [p for name, p in head.named_parameters() if name != "weight"]
    cos_y, negatives = _StreamedLogSumExp.apply(
        head, labels, chunk, x, head.weight, lengths, *others
    )
    # log(exp z_y + exp Σ) - z_y
    return softplus(negatives - head.positive(cos_y, lengths)).mean()


class _StreamedLogSumExp(torch.autograd.Function):
    """cos θ_y, (B,), and the log-sum-exp of the negative logits, (B,)."""

    @staticmethod
    def forward(
        ctx: Any,
        head: SoftmaxHead,
        labels: Tensor,
        chunk: int,
        x: Tensor,
        weight: Tensor,
        lengths: Tensor,
        *others: Tensor,
    ) -> tuple[Tensor, Tensor]:
        own_rows = renormalise_(weight[labels].to(x.dtype))
        cos_y = (x * own_rows).sum(1)
        head.prepare(cos_y, lengths)
        total = x.new_full((len(x),), -torch.inf)
        for block in SortedLabels(labels).blocks(len(weight), chunk):
            logits = head.negatives(x @ _unit_rows(weight, block, x.dtype).T, cos_y, lengths)
            if block.own is not None:
                logits[block.own] = -torch.inf
            total = torch.logaddexp(total, logits.logsumexp(1))
        ctx.head, ctx.chunk = head, chunk
        ctx.save_for_backward(labels, x, weight, lengths, cos_y, total, own_rows, *others)
        return cos_y, total

    @staticmethod
    def backward(ctx: Any, grad_cos_y: Tensor, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(ONCE)
        head = ctx.head
        labels, x, weight, lengths, cos_y, total, own_rows, *others = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[3:5]
        grad_x = torch.zeros_like(x)
        grad_weight = torch.empty_like(weight, dtype=x.dtype) if need_weight else None
        grads = [grad_cos_y.clone(), torch.zeros_like(lengths), *map(torch.zeros_like, others)]
        with torch.autocast(x.device.type, enabled=False):
            for block in SortedLabels(labels).blocks(len(weight), ctx.chunk):
                unit = _unit_rows(weight, block, x.dtype)
                inputs = [x @ unit.T, cos_y.detach(), lengths.detach()]
                inputs = [tensor.requires_grad_() for tensor in inputs]
                with torch.enable_grad():
                    logits = head.negatives(*inputs)
                probabilities = (logits.detach() - total[:, None]).exp_().mul_(grad_total[:, None])
                if block.own is not None:
                    probabilities[block.own] = 0
                dcos, *rest = torch.autograd.grad(
                    logits, [*inputs, *others], probabilities, allow_unused=True
                )
                for sums, part in zip(grads, rest, strict=True):
                    if part is not None:
                        sums += part
                if need_x:
                    grad_x.addmm_(dcos, unit)
                if grad_weight is not None:
                    torch.mm(dcos.T, x, out=grad_weight[block.rows])
        grad_y = grads[0][:, None]
        if grad_weight is not None:
            grad_weight.index_add_(0, labels, grad_y * x)
            grad_weight = grad_weight.to(weight.dtype)
        grad_x += grad_y * own_rows
        return None, None, None, grad_x if need_x else None, grad_weight, *grads[1:]
