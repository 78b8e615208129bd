"""SphereFace2: one binary classifier a person (arXiv 2108.01513)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Literal, Unpack, get_args

import torch
from torch import Tensor, nn

from sphereface2.errors import UserError, check_choice, check_number
from sphereface2.heads.base import Head, Scaling, unit_rows
from sphereface2.heads.blocks import Block, RowUpdate, all_rows
from sphereface2.heads.registry import register
from sphereface2.heads.sampling import HardNegatives
from sphereface2.heads.sampling import uniform as sampled_uniformly
from sphereface2.heads.sharding import local
from sphereface2.heads.streaming import Work, streamed_one_vs_all
from sphereface2.heads.terms import block_terms_
from sphereface2.margins import BinaryMargin, Detach, MarginType, Own

Bias = Literal["learned", "fixed", "zero", "per_class"]


@register("sphereface2")
class SphereFace2(Head):
    """C independent binary classifiers with one shared bias, the universal threshold.

    For an embedding x with label y and unit prototypes W_i, cos θ_i = <x/|x|, W_i>,

        L = (λ/r) · softplus(-p) + ((1-λ)/r) · Σ_{i≠y} softplus(n_i),

    and the batch's loss is `loss_weight` times the mean of L. With g(z) = 2·((z+1)/2)^t - 1:

    | type | positive logit p                      | negative logits n_i      |
    |------|---------------------------------------|--------------------------|
    | C    | r·(g(cos θ_y) - m) + b                | r·(g(cos θ_i) + m) + b   |
    | A    | r·g(cos(min(π, θ_y + m))) + b         | r·g(cos θ_i) + b         |
    | M    | r·g(cos(min(m, π/θ_y)·θ_y)) + b       | r·g(cos θ_i) + b         |

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        margin_type: "C" (default), "A" or "M".
        lam: λ in (0, 1), balances the positive against the negatives; 0.5 treats them alike.
        r: scale > 0; larger weighs hard samples more.
        m: margin ≥ 0, in similarity for C, in radians for A; for M a factor, where 1 is no margin
            and less than 1 a negative one.
        t: similarity adjustment ≥ 1; 1 is none.
        loss_weight: factor of the whole loss, > 0.
        detach: "all" (default, the authors' code): g and margin are added as constants, the
            gradient flows straight through cos θ. "margin" (the paper): it flows through g(cos θ),
            only the angular margin's offset is constant. Values are equal.
        bias: "learned" (default): a scalar parameter that starts where positive and negative
            gradients balance at cos θ = 0. Ablations: "fixed" stays there, "zero" is fixed at 0,
            "per_class" learns one for each class.
        scaling: `streaming`, `chunk_size`, `process_group`, `negatives`, `negative_share` and
            `weight_dtype` of `Head`.

    Attributes:
        weight: (C, d) parameter.
        bias: () parameter; (C,) for "per_class"; a () buffer for "fixed" and "zero".
        margin: the `BinaryMargin` with the equations.

    Example:
        >>> head = SphereFace2(embedding_dim=8, num_classes=10)
        >>> loss = head(torch.randn(4, 8, requires_grad=True), torch.tensor([0, 3, 3, 9]))
        >>> loss.backward()
        >>> head.weight.grad.shape
        torch.Size([10, 8])
    """

    bias: Tensor
    scaling = frozenset(Scaling.__annotations__)

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        margin_type: MarginType = "C",
        lam: float = 0.7,
        r: float = 40.0,
        m: float = 0.4,
        t: float = 3.0,
        loss_weight: float = 50.0,
        detach: Detach = "all",
        bias: Bias = "learned",
        **scaling: Unpack[Scaling],
    ) -> None:
        super().__init__(embedding_dim, num_classes, **scaling)
        self.margin = BinaryMargin(margin_type, lam, r, m, t, detach)
        check_number("loss_weight", loss_weight, above=0)
        check_choice("bias", bias, get_args(Bias))
        self.loss_weight = loss_weight
        self.bias_mode = bias
        value = 0.0 if bias == "zero" else self.margin.initial_bias(num_classes)
        start = torch.tensor(value)
        if bias == "per_class":
            start = self.shard.distribute(start.repeat(self.shard.rows), num_classes)
        if bias in ("learned", "per_class"):
            self.bias = nn.Parameter(start)
        else:
            self.register_buffer("bias", start)
        hard = self.negatives == "hard"
        self.hard_negatives = HardNegatives(self.negative_share) if hard else None

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        x = unit_rows(embeddings)
        if self.streaming:
            return self._streamed(x, labels)
        w = self.unit_weight(x.dtype)
        losses = OneVersusAll.apply(x, w, self.bias.to(x.dtype), labels, self.margin)
        return losses.mean() * self.loss_weight

    def _streamed(self, x: Tensor, labels: Tensor) -> Tensor:
        update = self.fused if self.training and torch.is_grad_enabled() else None
        weight = local(self.weight if self.fused is None else self.weight.detach())
        if update is not None:
            update.begin_step()
        work = Work(
            self.margin,
            self.shard,
            self._plan,
            visits_all=self.negatives == "all" or not self.training,
            scale=self.loss_weight,
            even=self.trust_batches,
            update=update,
        )
        return streamed_one_vs_all(x, weight, local(self.bias).to(x.dtype), labels, work)

    def _plan(self, x: Tensor, labels: Tensor) -> Iterable[Block]:
        """The blocks to visit; all of them for a loss that nobody learns from."""
        rows, chunk = self.shard.rows, self.chunk(x.device)
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
        facts = super().summary() | asdict(self.margin)
        return facts if self.bias.ndim else facts | {"bias": self.bias.item()}

    def extra_repr(self) -> str:
        margin = self.margin
        return (
            f"{super().extra_repr()}, margin_type={margin.margin_type!r}, lam={margin.lam}, "
            f"r={margin.r}, m={margin.m}, t={margin.t}, loss_weight={self.loss_weight}, "
            f"detach={margin.detach!r}, bias={self.bias_mode!r}"
        )


@register("bce")
class OneVersusAllBCE(SphereFace2):
    """Vanilla one-vs-all classification, SphereFace2 with all its principles switched off.

    C sigmoids with plain binary cross-entropy summed over the classes: λ = ½, m = 0, t = 1, a loss
    weight of 2r and r = 1, the bias fixed at 0:

        L = softplus(-r·cos θ_y - b) + Σ_{i≠y} softplus(r·cos θ_i + b)

    At the start L is about C·log 2: the negatives drown the positive, which is what the paper's
    principles repair.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        r: scale > 0.
        bias, scaling: as in `SphereFace2`.

    Example:
        >>> head = OneVersusAllBCE(embedding_dim=8, num_classes=10)
        >>> round(head(torch.zeros(4, 8), torch.arange(4)).item(), 3)  # 10 · log 2
        6.931
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        r: float = 1.0,
        bias: Bias = "zero",
        **scaling: Unpack[Scaling],
    ) -> None:
        check_number("r", r, above=0)
        plain: dict[str, Any] = {"lam": 0.5, "r": r, "m": 0.0, "t": 1.0, "loss_weight": 2 * r}
        super().__init__(embedding_dim, num_classes, bias=bias, **plain, **scaling)


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
        margin: BinaryMargin,
    ) -> Tensor:
        cos = x @ w.T
        loss, dcos, dbias = block_terms_(margin, cos, bias, Own(labels))
        ctx.save_for_backward(x, w, dcos, dbias)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("SphereFace2's loss can be differentiated once only (create_graph)")
        x, w, dcos, dbias = ctx.saved_tensors
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        with torch.autocast(grad.device.type, enabled=False):
            grad_x = (dcos @ w) * grad[:, None] if need_x else None
            grad_w = dcos.T @ (x * grad[:, None]) if need_w else None
            grad_bias = grad @ dbias if need_bias else None
        return grad_x, grad_w, grad_bias, None, None
