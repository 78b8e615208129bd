"""The softmax family: one C-way classifier, each member overriding its logits only."""

from __future__ import annotations

import math
from typing import Literal, Unpack, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereface2.errors import check_choice, check_count, check_number
from sphereface2.heads.base import Head, Scaling, unit_rows
from sphereface2.heads.registry import register
from sphereface2.heads.streaming import streamed_softmax


class SoftmaxHead(Head):
    """Base of the family: cross-entropy over logits made from cosines.

    L = -log(exp(z_y) / (exp(z_y) + Σ_{i≠y} exp(z_i))), meaned over the batch. A member overrides
    `positive`, `negatives` or both; statistics over batches belong into `prepare`. Prototypes are
    kept at unit length as in `SphereFace2`, so that all heads are trained alike.

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

    def positive(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        """z_y, (B,), from each sample's cosine with its own class, (B,), and norm, (B,)."""
        return self.scale * cos_y

    def negatives(self, cos: Tensor, cos_y: Tensor, lengths: Tensor) -> Tensor:
        """z_i, a new (B, c), for any block of classes; a sample's own class in it is ignored."""
        return self.scale * cos

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        x = unit_rows(embeddings)
        lengths = torch.linalg.vector_norm(embeddings, dim=1)
        if self.streaming:
            return streamed_softmax(self, x, lengths, labels, self.chunk(x.device))
        cos = x @ self.unit_weight(x.dtype).T
        own = labels[:, None]
        cos_y = cos.gather(1, own)[:, 0]
        with torch.no_grad():
            self.prepare(cos_y, lengths)
        z_y = self.positive(cos_y, lengths)
        logits = self.negatives(cos, cos_y, lengths).scatter_(1, own, z_y[:, None])
        return F.cross_entropy(logits, labels)


def sine(cos: Tensor) -> Tensor:
    """sin θ from cos θ, at least 1e-5 so that its gradient stays finite at cos θ = ±1."""
    return (1 - cos.square()).clamp_min(1e-10).sqrt()


def angle(cos: Tensor) -> Tensor:
    """θ in radians from cos θ, with a finite gradient everywhere."""
    return torch.atan2(sine(cos), cos)


def falling_cosine(angles: Tensor) -> Tensor:
    """(-1)^k·cos(angle) - 2k with k = floor(angle/π): cosine continued to fall beyond π."""
    k = (angles.detach() / math.pi).floor()
    return (1 - 2 * (k % 2)) * angles.cos() - 2 * k


@register("softmax")
class Softmax(Head):
    """The plain softmax classifier: z_i = <x, W_i> + b_i, nothing normalised.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.

    Attributes:
        weight: (C, d) parameter, not renormalised.
        bias: (C,) parameter, 0 at the start.
    """

    def __init__(self, embedding_dim: int, num_classes: int) -> None:
        super().__init__(embedding_dim, num_classes)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        dtype = embeddings.dtype
        logits = F.linear(embeddings, self.weight.to(dtype), self.bias.to(dtype))
        return F.cross_entropy(logits, labels)


@register("normface")
class NormFace(SoftmaxHead):
    """Softmax of scaled cosines: z_i = s·cos θ_i.

    Wang et al., "NormFace: L2 Hypersphere Embedding for Face Verification", ACM MM 2017.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: scale > 0; the start value if it is learned.
        learn_scale: whether s is a parameter.
        scaling: `streaming` and `chunk_size` of `Head`.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float = 30.0,
        learn_scale: bool = False,
        **scaling: Unpack[Scaling],
    ) -> None:
        super().__init__(embedding_dim, num_classes, s=s, **scaling)
        if learn_scale:
            del self.scale
            self.scale = nn.Parameter(torch.tensor(float(s)))


@register("cocoloss")
class CocoLoss(SoftmaxHead):
    """Congenerous cosine loss: z_i = s·cos θ_i with the scale derived from the number of classes.

    With every negative cosine at -1 the loss is at best log(1 + (C-1)·exp(-2s)); the default s is
    the one that brings this to ε = 1e-4: s = ½·log((C-1)/(exp(ε)-1)).
    Liu, Li, Wang, "Rethinking Feature Discrimination and Polymerization for Large-scale
    Recognition", 2017 (and "Learning Deep Features via Congenerous Cosine Loss", 2017).

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: scale > 0, or None (default) for the one above.
        scaling: `streaming` and `chunk_size` of `Head`.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float | None = None,
        **scaling: Unpack[Scaling],
    ) -> None:
        check_count("num_classes", num_classes, 2)
        if s is None:
            s = 0.5 * math.log((num_classes - 1) / math.expm1(1e-4))
        super().__init__(embedding_dim, num_classes, s=s, **scaling)


@register("sphereface")
class SphereFace(SoftmaxHead):
    """A-softmax, the original multiplicative angular margin, with its annealing.

    z_i = |x|·cos θ_i and z_y = |x|·(λ·cos θ_y + ψ(θ_y))/(1+λ), where ψ(θ) = (-1)^k·cos(mθ) - 2k on
    θ in [kπ/m, (k+1)π/m] falls throughout, and λ = max(λ_min, λ_base·(1+γ·n)^(-power)) falls with
    the number n of batches seen in training mode. The scale is the embedding's own norm.
    Liu et al., "SphereFace: Deep Hypersphere Embedding for Face Recognition", CVPR 2017; the
    annealing's defaults are its authors' code's.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        m: integer margin factor ≥ 1; 1 is none.
        lambda_base, lambda_min: start and end of λ, ≥ 0; both 0 is the margin at full strength.
        gamma, power: speed of the annealing, ≥ 0.
        scaling: `streaming` and `chunk_size` of `Head`.

    Attributes:
        batches: () int64 buffer, n.
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

    def prepare(self, cos_y: Tensor, lengths: Tensor) -> None:
        if self.training:
            self.batches += 1

    def positive(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        batches = self.batches.to(cos_y.dtype)
        annealed = self.lambda_base * (1 + self.gamma * batches) ** -self.power
        lam = annealed.clamp_min(self.lambda_min)
        psi = falling_cosine(self.m * angle(cos_y))
        return lengths * (lam * cos_y + psi) / (1 + lam)

    def negatives(self, cos: Tensor, cos_y: Tensor, lengths: Tensor) -> Tensor:
        return lengths[:, None] * cos


SphereFaceForm = Literal["v0", "v1", "v2"]


@register("sphereface_r")
class SphereFaceR(SoftmaxHead):
    """SphereFace revived: the multiplicative margin in stable forms, with a fixed scale s.

    | form | z_y / s                          | z_i / s       |
    |------|----------------------------------|---------------|
    | v0   | (-1)^k·cos(mθ_y) - 2k            | cos θ_i       |
    | v1   | cos(min(m, π/θ_y)·θ_y)           | cos θ_i       |
    | v2   | cos θ_y                          | cos(θ_i / m)  |

    v0 is SphereFace's own. The margin's offset carries no gradient (characteristic gradient
    detachment): d(z/s)/dcos θ is taken as 1.
    Liu et al., "SphereFace Revived: Unifying Hyperspherical Face Recognition", TPAMI 2022.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        form: "v1" (default), "v2" or "v0".
        s: scale > 0.
        m: margin factor ≥ 1; 1 is none.
        scaling: `streaming` and `chunk_size` of `Head`.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        form: SphereFaceForm = "v1",
        s: float = 30.0,
        m: float = 1.5,
        **scaling: Unpack[Scaling],
    ) -> None:
        super().__init__(embedding_dim, num_classes, s=s, **scaling)
        check_choice("form", form, get_args(SphereFaceForm))
        check_number("m", m, least=1)
        self.form, self.m = form, m

    def positive(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        if self.form == "v2":
            return self.scale * cos_y
        angles = self.m * angle(cos_y.detach())
        moved = falling_cosine(angles) if self.form == "v0" else angles.clamp_max(math.pi).cos()
        return self.scale * (cos_y + (moved - cos_y).detach())

    def negatives(self, cos: Tensor, cos_y: Tensor, lengths: Tensor) -> Tensor:
        if self.form != "v2":
            return self.scale * cos
        moved = (angle(cos.detach()) / self.m).cos()
        return self.scale * (cos + (moved - cos).detach())


@register("cosface")
class CosFace(SoftmaxHead):
    """Additive cosine margin: z_y = s·(cos θ_y - m), z_i = s·cos θ_i.

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: scale > 0.
        m: margin in cosine, ≥ 0.
        scaling: `streaming` and `chunk_size` of `Head`.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float = 64.0,
        m: float = 0.35,
        **scaling: Unpack[Scaling],
    ) -> None:
        super().__init__(embedding_dim, num_classes, s=s, **scaling)
        check_number("m", m, least=0)
        self.m = m

    def positive(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        return self.scale * (cos_y - self.m)


def additive_angle(cos: Tensor, m: float) -> Tensor:
    """cos(θ + m), or cos θ - m·sin m once θ + m exceeds π, so that it keeps falling."""
    moved = cos * math.cos(m) - sine(cos) * math.sin(m)
    return torch.where(cos > -math.cos(m), moved, cos - m * math.sin(m))


@register("arcface")
class ArcFace(SoftmaxHead):
    """Additive angular margin: z_y = s·cos(θ_y + m), z_i = s·cos θ_i.

    Where θ_y + m > π, z_y = s·(cos θ_y - m·sin m), which keeps falling with θ_y.
    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: scale > 0.
        m: margin in radians, in [0, π/2].
        scaling: `streaming` and `chunk_size` of `Head`.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float = 64.0,
        m: float = 0.5,
        **scaling: Unpack[Scaling],
    ) -> None:
        super().__init__(embedding_dim, num_classes, s=s, **scaling)
        check_number("m", m, least=0, most=math.pi / 2)
        self.m = m

    def positive(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        return self.scale * additive_angle(cos_y, self.m)


@register("combined")
class CombinedMargin(SoftmaxHead):
    """All three margins: z_y = s·(cos(m1·θ_y + m2) - m3), z_i = s·cos θ_i.

    Where m1·θ_y + m2 > π the cosine goes on falling as SphereFace's ψ does.
    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019,
    section 2.3.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: scale > 0.
        m1: factor of the angle, ≥ 1; 1 is none.
        m2: angle in radians, ≥ 0.
        m3: margin in cosine, ≥ 0.
        scaling: `streaming` and `chunk_size` of `Head`.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float = 64.0,
        m1: float = 1.0,
        m2: float = 0.3,
        m3: float = 0.2,
        **scaling: Unpack[Scaling],
    ) -> None:
        super().__init__(embedding_dim, num_classes, s=s, **scaling)
        check_number("m1", m1, least=1)
        check_number("m2", m2, least=0)
        check_number("m3", m3, least=0)
        self.m1, self.m2, self.m3 = m1, m2, m3

    def positive(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        return self.scale * (falling_cosine(self.m1 * angle(cos_y) + self.m2) - self.m3)


@register("adaface")
class AdaFace(SoftmaxHead):
    """A margin that follows image quality, for which the embedding's norm stands.

    z_y = s·(cos(θ_y - m·q) - m·(1+q)), z_i = s·cos θ_i, where q = clip(h·(|x| - μ)/(σ + ε), -1, 1)
    carries no gradient; |x| is limited to [1e-3, 100], θ_y - m·q to [ε, π-ε], ε = 1e-3. μ and σ are
    running mean and deviation of the norms over the batches seen in training mode.
    Kim, Jain, Liu, "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: scale > 0.
        m: margin in [0, π/2].
        h: concentration of q, ≥ 0; 0 is CosFace.
        momentum: share of a new batch in the running statistics, in (0, 1].
        scaling: `streaming` and `chunk_size` of `Head`.

    Attributes:
        mean, std: () buffers, μ and σ; 20 and 100 at the start.
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
        # One sample has no deviation.
        if self.training and len(lengths) > 1:
            lengths = lengths.clamp(1e-3, 100)
            self.mean.lerp_(lengths.mean().to(self.mean.dtype), self.momentum)
            self.std.lerp_(lengths.std().to(self.std.dtype), self.momentum)

    def positive(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        norms = lengths.detach().clamp(1e-3, 100)
        quality = self.h * (norms - self.mean) / (self.std + self.EPSILON)
        shift = self.m * quality.clamp(-1, 1)
        theta = (angle(cos_y) - shift).clamp(self.EPSILON, math.pi - self.EPSILON)
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
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: scale > 0.
        m: margin in radians, in [0, π/2].
        momentum: share of a new batch in t, in (0, 1].
        scaling: `streaming` and `chunk_size` of `Head`.

    Attributes:
        t: () buffer.
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
            self.t.lerp_(cos_y.mean().to(self.t.dtype), self.momentum)

    def positive(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        return self.scale * additive_angle(cos_y, self.m)

    def negatives(self, cos: Tensor, cos_y: Tensor, lengths: Tensor) -> Tensor:
        cos_y = cos_y.detach()
        bar = cos_y * math.cos(self.m) - sine(cos_y) * math.sin(self.m)
        return self.scale * torch.where(cos > bar[:, None], cos * (self.t + cos), cos)


@register("circle")
class CircleLoss(SoftmaxHead):
    """Circle loss with class prototypes: each cosine weighted by its distance from its optimum.

    z_y = s·[1+m - cos θ_y]₊·(cos θ_y - (1-m)), z_i = s·[cos θ_i + m]₊·(cos θ_i - m); the weights
    [·]₊ carry no gradient.
    Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: scale > 0, the paper's γ.
        m: relaxation in [0, 1].
        scaling: `streaming` and `chunk_size` of `Head`.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        s: float = 256.0,
        m: float = 0.25,
        **scaling: Unpack[Scaling],
    ) -> None:
        super().__init__(embedding_dim, num_classes, s=s, **scaling)
        check_number("m", m, least=0, most=1)
        self.m = m

    def positive(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        weight = (1 + self.m - cos_y.detach()).clamp_min(0)
        return self.scale * weight * (cos_y - (1 - self.m))

    def negatives(self, cos: Tensor, cos_y: Tensor, lengths: Tensor) -> Tensor:
        weight = (cos.detach() + self.m).clamp_min(0)
        return self.scale * weight * (cos - self.m)
