"""Members of the softmax family whose margin follows the batches seen before."""

from __future__ import annotations

import math
from typing import Unpack

import torch
import torch.distributed as dist
from torch import Tensor

from sphereface2.errors import check_count, check_number
from sphereface2.heads.base import Scaling
from sphereface2.heads.registry import register
from sphereface2.heads.softmax import (
    SoftmaxHead,
    additive_angle,
    falling_cosine,
    sine,
    smooth_angle,
)


@register("sphereface")
class SphereFace(SoftmaxHead):
    """A-softmax, the original multiplicative angular margin, with its annealing.

    z_i = |x|·cos θ_i and z_y = |x|·(λ·cos θ_y + ψ(θ_y))/(1+λ), where ψ(θ) = (-1)^k·cos(mθ) - 2k on
    θ in [kπ/m, (k+1)π/m] falls throughout, and λ = max(λ_min, λ_base·(1+γ·n)^(-power)) falls with
    the number n of batches seen in training mode. The scale is the embedding's own norm.
    Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition", CVPR 2017; the
    annealing's defaults are its authors' code's.

    Args:
        embedding_dim, num_classes, scaling: as in `SoftmaxHead`.
        m: integer margin factor ≥ 1; 1 is none.
        lambda_base, lambda_min: start and end of λ, ≥ 0; both 0 is the margin at full strength.
        gamma, power: speed of the annealing, ≥ 0.

    Attributes:
        batches: () int64 buffer, n.

    Example:
        >>> head = SphereFace(8, 10, m=2, lambda_base=0, lambda_min=0)
        >>> z_y = head.positive_logit(torch.tensor([0.5]), torch.tensor([10.0]))
        >>> z_y.round(decimals=2)  # 10 · cos(2 · 60°)
        tensor([-5.])
    """

    batches: Tensor

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        m: int = 4,
        lambda_base: float = 1000.0,
        lambda_min: float = 5.0,
        gamma: float = 0.12,
        power: float = 1.0,
        **scaling: Unpack[Scaling],
    ) -> None:
        super().__init__(embedding_dim, num_classes, **scaling)
        check_count("m", m, 1)
        check_number("lambda_base", lambda_base, least=0)
        check_number("lambda_min", lambda_min, least=0)
        check_number("gamma", gamma, least=0)
        check_number("power", power, least=0)
        self.m = m
        self.lambda_base, self.lambda_min = lambda_base, lambda_min
        self.gamma, self.power = gamma, power
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Logits without margin, |x|·cos θ_i, (B, C)."""
        lengths = torch.linalg.vector_norm(embeddings, dim=1, keepdim=True)
        return lengths * super().get_logits(embeddings) / self.scale

    def prepare(self, cos_y: Tensor, lengths: Tensor) -> None:
        if self.training:
            self.batches.add_(1)  # += would assign, which misleads torch.compile about the result

    def positive_logit(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        batches = self.batches.to(cos_y.dtype)
        annealed = self.lambda_base * (1 + self.gamma * batches) ** -self.power
        lam = annealed.clamp_min(self.lambda_min)
        psi = falling_cosine(self.m * smooth_angle(cos_y))
        return lengths * (lam * cos_y + psi) / (1 + lam)

    def negative_logits(self, cos: Tensor, cos_y: Tensor, lengths: Tensor) -> Tensor:
        return lengths[:, None] * cos


@register("adaface")
class AdaFace(SoftmaxHead):
    """A margin that follows image quality, for which the embedding's norm stands.

    z_y = s·(cos(θ_y - m·q) - m·(1+q)), z_i = s·cos θ_i, where q = clip(h·(|x| - μ)/(σ + ε), -1, 1)
    carries no gradient; |x| is limited to [1e-3, 100], θ_y - m·q to [ε, π-ε], ε = 1e-3. μ and σ are
    running mean and deviation of the norms over the batches seen in training mode.
    Kim, Jain, Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022.

    Args:
        embedding_dim, num_classes, scaling: as in `SoftmaxHead`.
        s: scale > 0.
        m: margin in [0, π/2].
        h: concentration of q, ≥ 0; 0 is CosFace.
        momentum: share of a new batch in the running statistics, in (0, 1].

    Attributes:
        mean, std: () buffers, μ and σ; 20 and 100 at the start.

    Example:
        >>> head = AdaFace(8, 10)
        >>> z_y = head.positive_logit(torch.tensor([0.5]), torch.tensor([20.0]))
        >>> z_y.round(decimals=2)  # q = 0: 64 · (0.5 - 0.4)
        tensor([6.4000])
    """

    EPSILON = 1e-3
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float = 64.0,
        m: float = 0.4,
        h: float = 0.333,
        momentum: float = 0.01,
        **scaling: Unpack[Scaling],
    ) -> None:
        super().__init__(embedding_dim, num_classes, s=s, **scaling)
        check_number("m", m, least=0, most=math.pi / 2)
        check_number("h", h, least=0)
        check_number("momentum", momentum, above=0, most=1)
        self.m, self.h, self.momentum = m, h, momentum
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def prepare(self, cos_y: Tensor, lengths: Tensor) -> None:
        if not self.training:
            return
        lengths = lengths.clamp(1e-3, 100)
        if self.sync_statistics and dist.is_initialized():
            mean, std = _moments_of_ranks(lengths)
        elif len(lengths) > 1:
            mean, std = lengths.mean(), lengths.std()
        else:
            return  # one sample has no deviation
        _follow(self.mean, mean, self.momentum)
        _follow(self.std, std, self.momentum)

    def positive_logit(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        norms = lengths.detach().clamp(1e-3, 100)
        quality = self.h * (norms - self.mean) / (self.std + self.EPSILON)
        shift = self.m * quality.clamp(-1, 1)
        theta = (smooth_angle(cos_y) - shift).clamp(self.EPSILON, math.pi - self.EPSILON)
        return self.scale * (theta.cos() - (self.m + shift))


@register("curricularface")
class CurricularFace(SoftmaxHead):
    """ArcFace whose hard negatives grow in weight as training proceeds.

    z_y is ArcFace's. A negative with cos θ_i > cos(θ_y + m) is hard: z_i = s·cos θ_i·(t + cos θ_i);
    the others have z_i = s·cos θ_i. t, 0 at the start, is the running mean of cos θ_y over the
    batches seen in training mode.
    Huang et al., "CurricularFace: Adaptive Curriculum Learning Loss for Deep Face Recognition",
    CVPR 2020.

    Args:
        embedding_dim, num_classes, scaling: as in `SoftmaxHead`.
        s: scale > 0.
        m: margin in radians, in [0, π/2].
        momentum: share of a new batch in t, in (0, 1].

    Attributes:
        t: () buffer.

    Example:
        >>> head = CurricularFace(8, 10)
        >>> cos, cos_y, lengths = torch.tensor([[0.75]]), torch.tensor([0.1]), torch.ones(1)
        >>> head.negative_logits(cos, cos_y, lengths)  # hard, and t = 0: 64 · 0.75 · 0.75
        tensor([[36.]])
    """

    t: Tensor

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float = 64.0,
        m: float = 0.5,
        momentum: float = 0.01,
        **scaling: Unpack[Scaling],
    ) -> None:
        super().__init__(embedding_dim, num_classes, s=s, **scaling)
        check_number("m", m, least=0, most=math.pi / 2)
        check_number("momentum", momentum, above=0, most=1)
        self.m, self.momentum = m, momentum
        self.register_buffer("t", torch.tensor(0.0))

    def prepare(self, cos_y: Tensor, lengths: Tensor) -> None:
        if self.training:
            synced = self.sync_statistics and dist.is_initialized()
            mean = _moments_of_ranks(cos_y)[0] if synced else cos_y.mean()
            _follow(self.t, mean, self.momentum)

    def positive_logit(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        return self.scale * additive_angle(cos_y, self.m)

    def negative_logits(self, cos: Tensor, cos_y: Tensor, lengths: Tensor) -> Tensor:
        cos_y = cos_y.detach()
        bar = cos_y * math.cos(self.m) - sine(cos_y) * math.sin(self.m)
        return self.scale * torch.where(cos > bar[:, None], cos * (self.t + cos), cos)


def _moments_of_ranks(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the values (B,) of all ranks, whose B may differ."""
    values = values.double()  # else the squares' rounding hides a small deviation
    sums = torch.stack([torch.ones_like(values), values, values.square()]).sum(1)
    dist.all_reduce(sums)
    count, total, squares = sums
    mean = total / count
    return mean, ((squares - total * mean) / (count - 1)).clamp_min(0).sqrt()


def _follow(running: Tensor, value: Tensor, momentum: float) -> None:
    """Move a running mean towards a batch's value; one that is not finite, whose step is skipped
    by who trains, would stay in it for ever."""
    moved = running.lerp(value.to(running.dtype), momentum)
    running.copy_(moved.where(moved.isfinite(), running))
