"""Heads that sum one term a class: C binary classifiers without a normaliser over classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from typing import Any, Unpack

import torch
from torch import Tensor

from sphereface2.errors import UserError, check_number
from sphereface2.heads.base import Head, Scaling, unit_rows
from sphereface2.heads.blocks import Block, RowUpdate, all_rows
from sphereface2.heads.sampling import HardNegatives
from sphereface2.heads.sampling import uniform as sampled_uniformly
from sphereface2.heads.sharding import local
from sphereface2.heads.streaming import Work, streamed_one_vs_all
from sphereface2.heads.terms import block_terms_
from sphereface2.margins import ClassTerms, Own


class OneVersusAllHead(Head):
    """Base of these heads: `loss_weight` times the mean over the batch of its sums.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        margin: the terms of a class and their derivatives by cosine and bias; a dataclass.
        loss_weight: factor of the whole loss, > 0.
        scaling: all of `Scaling`.

    Attributes:
        weight: (C, d) parameter.
        bias: (), or (C,) where each class has its own; a member sets it.
    """

    bias: Tensor
    scaling = frozenset(Scaling.__annotations__)

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        margin: ClassTerms,
        loss_weight: float,
        **scaling: Unpack[Scaling],
    ) -> None:
        super().__init__(embedding_dim, num_classes, **scaling)
        check_number("loss_weight", loss_weight, above=0)
        self.margin = margin
        self.loss_weight = loss_weight
        hard = self.negatives == "hard"
        self.hard_negatives = HardNegatives(self.negative_share) if hard else None

    def directions(self, embeddings: Tensor) -> Tensor:
        """What is multiplied with the unit prototypes, (B, d), with gradient."""
        return unit_rows(embeddings)

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        x = self.directions(embeddings)
        if self.streaming:
            return self._streamed(x, labels)
        w = self.unit_weight(x.dtype)
        losses = OneVersusAll.apply(x, w, self.bias.to(x.dtype), labels, self.margin)
        return losses.mean() * self.loss_weight

    @torch.no_grad()
    def cosine_gradients(self, embeddings: Tensor, labels: Tensor) -> Tensor | None:
        if self.shard.group is not None:
            return None
        x = self.directions(embeddings)
        cos = x @ self.unit_weight(x.dtype).T
        terms = block_terms_(self.margin, cos, self.bias.to(x.dtype), Own(labels))
        scale = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        return terms.dcos * scale * self.loss_weight

    def _streamed(self, x: Tensor, labels: Tensor) -> Tensor:
        update = self.fused if self.training and torch.is_grad_enabled() else None
        weight = local(self.weight if self.fused is None else self.weight.detach())
        if update is not None:
            update.begin_step()
        chunk = self.chunk(x)
        work = Work(
            self.margin,
            self.shard,
            partial(self._plan, chunk),
            visits_all=self.negatives == "all" or not self.training,
            scale=self.loss_weight,
            chunk=chunk,
            half=self.compute == "bf16",
            even=self.trust_batches,
            update=update,
        )
        return streamed_one_vs_all(x, weight, local(self.bias).to(x.dtype), labels, work)

    def _plan(self, chunk: int, x: Tensor, labels: Tensor) -> Iterable[Block]:
        """The blocks to visit; all of them for a loss that nobody learns from."""
        rows = self.shard.rows
        if self.training and self.hard_negatives is not None:
            return self.hard_negatives.blocks(x, labels, local(self.weight), chunk)
        if self.training and self.negatives == "uniform":
            return sampled_uniformly(labels, rows, self.negative_share, chunk)
        return all_rows(labels, rows, chunk)

    def fuse(self, optimizer: RowUpdate) -> None:
        if not self.streaming:
            raise UserError("a fused update needs a head with streaming=True")
        self.fused = optimizer

    def summary(self) -> dict[str, Any]:
        return super().summary() | asdict(self.margin)  # type: ignore[call-overload]


class OneVersusAll(torch.autograd.Function):
    """L of each sample, (B,), from unit embeddings (B, d) and unit prototypes (C, d).

    The derivatives by the cosines are known as soon as the cosines are, so the forward pass
    writes them over the cosines: one (B, C) tensor is all that is held.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor,
        labels: Tensor,
        margin: ClassTerms,
    ) -> Tensor:
        cos = x @ w.T
        loss, dcos, dbias = block_terms_(margin, cos, bias, Own(labels))
        ctx.save_for_backward(x, w, dcos, dbias)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("the loss can be differentiated once only (create_graph)")
        x, w, dcos, dbias = ctx.saved_tensors
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = (dcos @ w) * grad[:, None] if need_x else None
            grad_w = dcos.T @ (x * grad[:, None]) if need_w else None
            grad_bias = grad @ dbias if need_bias else None
        return grad_x, grad_w, grad_bias, None, None
