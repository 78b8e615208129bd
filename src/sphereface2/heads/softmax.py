"""The softmax family: one C-way classifier, each member overriding its logits only."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from sphereface2.heads.base import Head, register, unit_rows
from sphereface2.margins import check_number


class SoftmaxHead(Head):
    """Base of the family: cross-entropy over logits made from cosines.

    L = -log(exp(z_y) / (exp(z_y) + Σ_{i≠y} exp(z_i))), meaned over the batch. A member overrides
    `positive`, `negatives` or both; what depends on the whole batch (running statistics) belongs
    into `prepare`. As in `SphereFace2`, unit prototypes are kept by renormalising them in place.
    """

    scale: float | Tensor

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
        """z_i, (B, c), for any block of classes; entries of a sample's own class are ignored."""
        return self.scale * cos

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        x = unit_rows(embeddings)
        lengths = torch.linalg.vector_norm(embeddings, dim=1)
        cos = x @ self.unit_weight(x.dtype).T
        column = labels[:, None]
        cos_y = cos.gather(1, column)[:, 0]
        with torch.no_grad():
            self.prepare(cos_y, lengths)
        own = self.positive(cos_y, lengths)
        logits = self.negatives(cos, cos_y, lengths).scatter(1, column, own[:, None])
        return F.cross_entropy(logits, labels)


@register("cosface")
class CosFace(SoftmaxHead):
    """Additive cosine margin: z_y = s·(cos θ_y - m), z_i = s·cos θ_i.

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018.

    Args:
        embedding_dim: d, ≥ 1.
        num_classes: C, ≥ 2.
        s: scale > 0.
        m: margin in cosine, ≥ 0.
    """

    def __init__(
        self, embedding_dim: int, num_classes: int, *, s: float = 64.0, m: float = 0.35
    ) -> None:
        super().__init__(embedding_dim, num_classes)
        check_number("s", s, above=0)
        check_number("m", m, least=0)
        self.scale, self.m = s, m

    def positive(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        return self.scale * (cos_y - self.m)


def angular_margin(cos: Tensor, m: float) -> Tensor:
    """cos(θ + m), continued by cos θ - m·sin m once θ + m exceeds π so that it keeps falling."""
    # The sum formula has a finite gradient everywhere but at |cos| = 1, where sin θ is floored.
    sin = (1 - cos.square()).clamp_min(1e-10).sqrt()
    moved = cos * math.cos(m) - sin * math.sin(m)
    return torch.where(cos > math.cos(math.pi - m), moved, cos - m * math.sin(m))


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
    """

    def __init__(
        self, embedding_dim: int, num_classes: int, *, s: float = 64.0, m: float = 0.5
    ) -> None:
        super().__init__(embedding_dim, num_classes)
        check_number("s", s, above=0)
        check_number("m", m, least=0, most=math.pi / 2)
        self.scale, self.m = s, m

    def positive(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        return self.scale * angular_margin(cos_y, self.m)
