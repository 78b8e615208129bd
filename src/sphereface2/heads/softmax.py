"""The softmax family: one C-way classifier, each member overriding its logits only."""

from __future__ import annotations

import math
from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from sphereface2.errors import check_number
from sphereface2.heads.base import Head, Scaling, renormalise_, unit_rows
from sphereface2.heads.blocks import all_rows
from sphereface2.heads.streaming import ONCE, unit_block
from sphereface2.margins import softplus


class SoftmaxHead(Head):
    """Base of the family: cross-entropy over logits made from cosines.

    L = -log(exp(z_y) / (exp(z_y) + Σ_{i≠y} exp(z_i))), meaned over the batch. A member overrides
    `positive_logit`, `negative_logits` or both; statistics over batches belong into `prepare`.
    Prototypes are kept at unit length as in `SphereFace2`, so that all heads are trained alike.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: the scale of the cosines, > 0.
        scaling: `streaming` and `chunk_size` of `Head`.
    """

    scale: float | Tensor
    scaling = frozenset({"streaming", "chunk_size"})

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float = 64.0,
        **scaling: Unpack[Scaling],
    ) -> None:
        super().__init__(embedding_dim, num_classes, **scaling)
        check_number("s", s, above=0)
        self.scale = s

    def prepare(self, cos_y: Tensor, lengths: Tensor) -> None:
        """Called before the logits are formed, without gradient.

        Args:
            cos_y: (B,) cosine of each sample with its own class.
            lengths: (B,) norm of each embedding.
        """

    def positive_logit(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        """z_y, (B,), from each sample's cosine with its own class, (B,), and norm, (B,)."""
        return self.scale * cos_y

    def negative_logits(self, cos: Tensor, cos_y: Tensor, lengths: Tensor) -> Tensor:
        """z_i, a new (B, c), for any block of classes; a sample's own class in it is ignored."""
        return self.scale * cos

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Logits without margin, s·cos θ_i, (B, C), as pytorch-metric-learning names them."""
        x = unit_rows(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)))
        return self.scale * (x @ self.unit_weight(x.dtype).T)

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        x = unit_rows(embeddings)
        lengths = torch.linalg.vector_norm(embeddings, dim=1)
        if self.streaming:
            return self.streamed(x, lengths, labels)
        cos = x @ self.unit_weight(x.dtype).T
        with torch.no_grad():
            self.prepare(cos.gather(1, labels[:, None])[:, 0], lengths)
        return self.divergence(self._logits(cos, lengths, labels), labels, "mean")

    def divergence(self, logits: Tensor, labels: Tensor, reduction: str) -> Tensor:
        """The loss from logits (B, C), which may be altered: ``reduction`` "mean" or "sum"."""
        return F.cross_entropy(logits, labels, reduction=reduction)

    def streamed(self, x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of unit embeddings (B, d) that had norms (B,), block after block."""
        return streamed_softmax(self, x, lengths, labels, self.chunk(x))

    def _logits(self, cos: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        own = labels[:, None]
        cos_y = cos.gather(1, own)[:, 0]
        z_y = self.positive_logit(cos_y, lengths)
        return self.negative_logits(cos, cos_y, lengths).scatter_(1, own, z_y[:, None])

    def cosine_gradients(self, embeddings: Tensor, labels: Tensor) -> Tensor | None:
        lengths = torch.linalg.vector_norm(embeddings, dim=1).detach()
        unit = unit_rows(embeddings).detach()
        cos = (unit @ self.unit_weight(unit.dtype).T).detach().requires_grad_()
        with torch.enable_grad():
            loss = self.divergence(self._logits(cos, lengths, labels), labels, "sum")
        return torch.autograd.grad(loss, cos)[0]


def sine(cos: Tensor) -> Tensor:
    """sin θ from cos θ, at least 1e-5 so that its gradient stays finite at cos θ = ±1."""
    return (1 - cos.square()).clamp_min(1e-10).sqrt()


def smooth_angle(cos: Tensor) -> Tensor:
    """θ in radians from cos θ, with a finite gradient everywhere.

    Example:
        >>> smooth_angle(torch.tensor([0.0, -1.0]))
        tensor([1.5708, 3.1416])
    """
    return torch.atan2(sine(cos), cos)


def falling_cosine(angles: Tensor) -> Tensor:
    """(-1)^k·cos(angle) - 2k with k = floor(angle/π): cosine continued to fall beyond π.

    Example:
        >>> falling_cosine(torch.tensor([0.0, math.pi, 2 * math.pi]))
        tensor([ 1., -1., -3.])
    """
    k = (angles.detach() / math.pi).floor()
    return (1 - 2 * (k % 2)) * angles.cos() - 2 * k


def additive_angle(cos: Tensor, m: float) -> Tensor:
    """cos(θ + m), or cos θ - m·sin m once θ + m exceeds π, so that it keeps falling.

    Example:
        >>> additive_angle(torch.tensor([0.5]), math.pi / 3).round(decimals=2)
        tensor([-0.5000])
    """
    moved = cos * math.cos(m) - sine(cos) * math.sin(m)
    return torch.where(cos > -math.cos(m), moved, cos - m * math.sin(m))


def streamed_softmax(
    head: SoftmaxHead, x: Tensor, lengths: Tensor, labels: Tensor, chunk: int
) -> Tensor:
    """Mean cross-entropy of a softmax head with memory O(B·chunk) besides W's gradient.

    Args:
        head: gives `weight`, `prepare`, `positive_logit` and `negative_logits`.
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
    return softplus(negatives - head.positive_logit(cos_y, lengths)).mean()


def _with_copied_buffers(head: SoftmaxHead) -> SoftmaxHead:
    """The head as it is now: another batch may move its statistics before the backward pass."""
    found: SoftmaxHead = object.__new__(type(head))  # copy.copy would build a sharded one anew
    buffers = {name: b if b is None else b.clone() for name, b in head._buffers.items()}
    vars(found).update(vars(head), _buffers=buffers)
    return found


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
        head = _with_copied_buffers(head)
        total = x.new_full((len(x),), -torch.inf)
        for block in all_rows(labels, len(weight), chunk):
            logits = head.negative_logits(x @ unit_block(weight, block, x.dtype).T, cos_y, lengths)
            block.own.put_(logits, -torch.inf)
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
            for block in all_rows(labels, len(weight), ctx.chunk):
                unit = unit_block(weight, block, x.dtype)
                inputs = [x @ unit.T, cos_y.detach(), lengths.detach()]
                inputs = [tensor.requires_grad_() for tensor in inputs]
                with torch.enable_grad():
                    logits = head.negative_logits(*inputs)
                probabilities = (logits.detach() - total[:, None]).exp_().mul_(grad_total[:, None])
                block.own.put_(probabilities, 0)
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
