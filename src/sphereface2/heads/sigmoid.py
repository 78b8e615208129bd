"""Losses of SphereFace2's kind that were published under other names.

Each sums one term a class without a normaliser. UCE and the sigmoid loss are points of the space of
SphereFace2 and are built as such; SFace has terms of its own in the same passes over W.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sphereface2.errors import check_number
from sphereface2.heads.base import Scaling, unit_rows
from sphereface2.heads.one_vs_all import OneVersusAllHead
from sphereface2.heads.registry import register
from sphereface2.heads.sharding import Shard
from sphereface2.heads.sphereface2 import Bias, BiasStart, SphereFace2
from sphereface2.margins import Own, Terms, clamped_angle


@register("uce")
class UCE(SphereFace2):
    """Unified cross-entropy: one threshold for all positives and negatives.

    L = softplus(-(s·(cos θ_y - m) - b')) + l·Σ_{i≠y} softplus(s·cos θ_i - b'), where b' is learned
    from log(10·C·l). It is SphereFace2 with t = 1, r = s, the margin m/2 on both sides, the bias
    b = -b' - s·m/2, λ = 1/(1+l) and the loss weight (1+l)·s, and is built so.
    Zhou et al., "UniFace: Unified Cross-Entropy Loss for Deep Face Recognition", ICCV 2023.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: scale > 0.
        m: margin of the positive ≥ 0.
        l: weight of the negatives > 0. None: 1, and with sampled negatives their share, because the
            authors do not make up for the negatives that a sample leaves out.
        bias, scaling: as in `SphereFace2`.

    Example:
        >>> head = UCE(embedding_dim=8, num_classes=10)
        >>> head.margin.m, head.margin.r, head.loss_weight
        (0.2, 64.0, 128.0)
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float = 64.0,
        m: float = 0.4,
        l: float | None = None,  # noqa: E741
        bias: Bias = "learned",
        **scaling: Unpack[Scaling],
    ) -> None:
        check_number("s", s, above=0)
        check_number("m", m, least=0)
        if l is None:
            sampled = scaling.get("negatives", "all") != "all"
            l = scaling.get("negative_share", 0.1) if sampled else 1.0  # noqa: E741
        check_number("l", l, above=0)
        super().__init__(
            embedding_dim,
            num_classes,
            lam=1 / (1 + l),
            r=s,
            m=m / 2,
            t=1.0,
            loss_weight=(1 + l) * s,
            bias=bias,
            bias_start="log_classes",
            **scaling,
        )


@register("siglip")
class SigmoidLoss(SphereFace2):
    """The sigmoid loss with a learned scale.

    L = softplus(-(s·cos θ_y + b)) + Σ_{i≠y} softplus(s·cos θ_i + b) with s = exp(t') and b learned.
    It is SphereFace2 with λ = ½, m = 0, t = 1 and the loss weight 2 at r = 1, of an embedding of
    length s, and is built so.
    Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: scale at the start, > 0; "norm": each embedding's own norm takes its place, as in
            `SphereFace`.
        scale_rate: factor on the gradient of t', and so on its rate of SGD, > 0. With the rate of
            prototypes the scale falls to 0 before they are of any use.
        bias, bias_start, scaling: as in `SphereFace2`; the published start is -10.

    Attributes:
        log_scale: () parameter, t'; None with "norm".

    Example:
        >>> head = SigmoidLoss(embedding_dim=8, num_classes=10)
        >>> round(head.log_scale.item(), 4), head.bias.item()
        (2.3026, -10.0)
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float | Literal["norm"] = 10.0,
        scale_rate: float = 1.0,
        bias: Bias = "learned",
        bias_start: BiasStart | float = -10.0,
        **scaling: Unpack[Scaling],
    ) -> None:
        if s != "norm":
            check_number("s", s, above=0)
        check_number("scale_rate", scale_rate, above=0)
        plain: dict[str, Any] = {"lam": 0.5, "r": 1.0, "m": 0.0, "t": 1.0, "loss_weight": 2.0}
        super().__init__(
            embedding_dim, num_classes, bias=bias, bias_start=bias_start, **plain, **scaling
        )
        self.scale_rate = scale_rate
        self.log_scale = None if s == "norm" else nn.Parameter(torch.tensor(math.log(s)))

    def directions(self, embeddings: Tensor) -> Tensor:
        if self.log_scale is None:
            return embeddings
        # The gradient is that of the whole, times the rate.
        scale = self.log_scale * self.scale_rate
        scale = scale + (self.log_scale - scale).detach()
        if self.shard.group is not None:
            scale = _MeanGradient.apply(scale, self.shard)
        return unit_rows(embeddings) * scale.exp().to(embeddings.dtype)

    def summary(self) -> dict[str, Any]:
        if self.log_scale is None:  # differs from image to image
            return super().summary() | {"r": None}
        return super().summary() | {"scale": self.log_scale.exp().item()}


class _MeanGradient(torch.autograd.Function):
    """A parameter that every rank of a sharded head has, whose gradient is averaged over ranks."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        return parameter.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad / ctx.shard.size
        dist.all_reduce(grad, group=ctx.shard.group)
        return grad, None


@dataclass(frozen=True)
class SFaceTerms:
    """SFace's terms of a block of classes, with the interface of `BinaryMargin`.

    Args:
        s, k, a, b: as in `SFace`.
    """

    s: float
    k: float
    a: float
    b: float

    @torch.no_grad()
    def positive(self, cos: Tensor, bias: Tensor) -> Terms:
        """-r_intra(θ_y)·cos θ_y for cosines (B,); all `Terms` are (B,)."""
        pull = torch.sigmoid(self.k * (clamped_angle(cos) - self.a)).mul_(-self.s)
        return Terms(pull * cos, pull, torch.zeros_like(pull))

    @torch.no_grad()
    def negatives_(
        self,
        cos: Tensor,
        bias: Tensor,
        own: Own | None = None,
        weight: float = 1.0,
        skip: Tensor | None = None,
    ) -> Terms:
        """Σ_i r_inter(θ_i)·cos θ_i over a block (B, c), whose derivatives overwrite ``cos``."""
        push = torch.sigmoid(self.k * (self.b - clamped_angle(cos))).mul_(self.s * weight)
        if own is not None:
            own.put_(push, 0.0)
        if skip is not None:
            push.masked_fill_(skip, 0.0)
        loss = (push * cos).sum(1)
        return Terms(loss, cos.copy_(push), torch.zeros_like(loss))


@register("sface")
class SFace(OneVersusAllHead):
    """Sigmoid-constrained hypersphere loss: gradients that fade where an angle is good enough.

    L = -[r_intra(θ_y)]·cos θ_y + Σ_{i≠y} [r_inter(θ_i)]·cos θ_i, where brackets carry no gradient,
    r_intra(θ) = s·σ(k·(θ - a)) and r_inter(θ) = s·σ(k·(b - θ)). Angles that are smaller than a for
    the own class and larger than b for others are left alone. There is no bias.
    Zhong et al., "SFace: Sigmoid-Constrained Hypersphere Loss for Robust Face Recognition", IEEE
    Transactions on Image Processing, 2021.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: scale of the gradients, > 0.
        k: slope of the sigmoids, > 0.
        a: angle to the own class below which it is not pulled, in radians, in [0, π].
        b: angle to another class above which it is not pushed, in radians, in [0, π].
        scaling: as in `SphereFace2`.

    Example:
        >>> head = SFace(embedding_dim=8, num_classes=10)
        >>> head.margin.positive(torch.tensor([1.0, 0.0]), torch.zeros(())).dcos.round()
        tensor([ -0., -64.])
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float = 64.0,
        k: float = 80.0,
        a: float = 0.8,
        b: float = 1.23,
        **scaling: Unpack[Scaling],
    ) -> None:
        check_number("s", s, above=0)
        check_number("k", k, above=0)
        check_number("a", a, least=0, most=math.pi)
        check_number("b", b, least=0, most=math.pi)
        super().__init__(embedding_dim, num_classes, SFaceTerms(s, k, a, b), 1.0, **scaling)
        self.register_buffer("bias", torch.zeros(()))
