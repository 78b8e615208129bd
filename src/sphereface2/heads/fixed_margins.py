"""Members of the softmax family whose margin does not depend on other batches."""

from __future__ import annotations

import math
from typing import Literal, Unpack, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sphereface2.errors import check_choice, check_count, check_number
from sphereface2.heads.base import Head, Scaling
from sphereface2.heads.registry import register
from sphereface2.heads.softmax import SoftmaxHead, additive_angle, falling_cosine, smooth_angle


@register("softmax")
class Softmax(Head):
    """The plain softmax classifier: z_i = ⟨x, W_i⟩ + b_i, nothing normalised.

    Args:
        embedding_dim, num_classes, scaling: as in `SoftmaxHead`.

    Attributes:
        weight: (C, d) parameter, not renormalised.
        bias: (C,) parameter, 0 at the start.

    Example:
        >>> head = Softmax(embedding_dim=8, num_classes=10)
        >>> round(head(torch.zeros(4, 8), torch.arange(4)).item(), 4)  # log 10
        2.3026
    """

    unit_rows = False

    def __init__(self, embedding_dim: int, num_classes: int) -> None:
        super().__init__(embedding_dim, num_classes)
        self.bias = nn.Parameter(torch.zeros(num_classes))

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """(B, C), as pytorch-metric-learning names them."""
        dtype = embeddings.dtype
        return F.linear(embeddings, self.weight.to(dtype), self.bias.to(dtype))

    def loss(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.get_logits(embeddings), labels)


@register("normface")
class NormFace(SoftmaxHead):
    """Softmax of scaled cosines: z_i = s·cos θ_i.

    Wang et al., "NormFace: L2 Hypersphere Embedding for Face Verification", ACM MM 2017.

    Args:
        embedding_dim, num_classes, scaling: as in `SoftmaxHead`.
        s: scale > 0; the start value if it is learned.
        learn_scale: whether s is a parameter.

    Example:
        >>> NormFace(8, 10).positive_logit(torch.tensor([0.5]), torch.ones(1))  # 30 · 0.5
        tensor([15.])
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
        embedding_dim, num_classes, scaling: as in `SoftmaxHead`.
        s: scale > 0, or None (default) for the one above.

    Example:
        >>> round(CocoLoss(embedding_dim=8, num_classes=1000).scale, 2)
        8.06
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
        embedding_dim, num_classes, scaling: as in `SoftmaxHead`.
        form: "v1" (default), "v2" or "v0".
        s: scale > 0.
        m: margin factor ≥ 1; 1 is none.

    Example:
        >>> cos_30 = torch.tensor([3**0.5 / 2])
        >>> SphereFaceR(8, 10).positive_logit(cos_30, torch.ones(1))  # 30 · cos(1.5 · 30°)
        tensor([21.2132])
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

    def positive_logit(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        if self.form == "v2":
            return self.scale * cos_y
        angles = self.m * smooth_angle(cos_y.detach())
        moved = falling_cosine(angles) if self.form == "v0" else angles.clamp_max(math.pi).cos()
        return self.scale * (cos_y + (moved - cos_y).detach())

    def negative_logits(self, cos: Tensor, cos_y: Tensor, lengths: Tensor) -> Tensor:
        if self.form != "v2":
            return self.scale * cos
        moved = (smooth_angle(cos.detach()) / self.m).cos()
        return self.scale * (cos + (moved - cos).detach())


@register("cosface")
class CosFace(SoftmaxHead):
    """Additive cosine margin: z_y = s·(cos θ_y - m), z_i = s·cos θ_i.

    Wang et al., "CosFace: Large Margin Cosine Loss for Deep Face Recognition", CVPR 2018.

    Args:
        embedding_dim, num_classes, scaling: as in `SoftmaxHead`.
        s: scale > 0.
        m: margin in cosine, ≥ 0.

    Example:
        >>> CosFace(8, 10).positive_logit(torch.tensor([0.5]), torch.ones(1))  # 64 · (0.5 - 0.35)
        tensor([9.6000])
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

    def positive_logit(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        return self.scale * (cos_y - self.m)


@register("arcface")
class ArcFace(SoftmaxHead):
    """Additive angular margin: z_y = s·cos(θ_y + m), z_i = s·cos θ_i.

    Where θ_y + m > π, z_y = s·(cos θ_y - m·sin m), which keeps falling with θ_y.
    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019.

    Args:
        embedding_dim, num_classes, scaling: as in `SoftmaxHead`.
        s: scale > 0.
        m: margin in radians, in [0, π/2].

    Example:
        >>> head = ArcFace(8, 10, m=math.pi / 3)
        >>> z_y = head.positive_logit(torch.tensor([0.5]), torch.ones(1))
        >>> z_y.round(decimals=2)  # 64 · cos(60° + 60°)
        tensor([-32.])
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

    def positive_logit(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        return self.scale * additive_angle(cos_y, self.m)


@register("combined")
class CombinedMargin(SoftmaxHead):
    """All three margins: z_y = s·(cos(m1·θ_y + m2) - m3), z_i = s·cos θ_i.

    Where m1·θ_y + m2 > π the cosine goes on falling as SphereFace's ψ does.
    Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019,
    section 2.3.

    Args:
        embedding_dim, num_classes, scaling: as in `SoftmaxHead`.
        s: scale > 0.
        m1: factor of the angle, ≥ 1; 1 is none.
        m2: angle in radians, ≥ 0.
        m3: margin in cosine, ≥ 0.

    Example:
        >>> head = CombinedMargin(8, 10, m2=math.pi / 3, m3=0.25)
        >>> z_y = head.positive_logit(torch.tensor([0.5]), torch.ones(1))
        >>> z_y.round(decimals=2)  # 64 · (cos(60° + 60°) - 0.25)
        tensor([-48.])
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

    def positive_logit(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        return self.scale * (falling_cosine(self.m1 * smooth_angle(cos_y) + self.m2) - self.m3)


@register("circle")
class CircleLoss(SoftmaxHead):
    """Circle loss with class prototypes: each cosine weighted by its distance from its optimum.

    z_y = s·[1+m - cos θ_y]₊·(cos θ_y - (1-m)), z_i = s·[cos θ_i + m]₊·(cos θ_i - m); the weights
    [·]₊ carry no gradient.
    Sun et al., "Circle Loss: A Unified Perspective of Pair Similarity Optimization", CVPR 2020.

    Args:
        embedding_dim, num_classes, scaling: as in `SoftmaxHead`.
        s: scale > 0, the paper's γ.
        m: relaxation in [0, 1].

    Example:
        >>> head = CircleLoss(8, 10)
        >>> head.positive_logit(torch.tensor([0.5]), torch.ones(1))  # 256 · 0.75 · (0.5 - 0.75)
        tensor([-48.])
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

    def positive_logit(self, cos_y: Tensor, lengths: Tensor) -> Tensor:
        weight = (1 + self.m - cos_y.detach()).clamp_min(0)
        return self.scale * weight * (cos_y - (1 - self.m))

    def negative_logits(self, cos: Tensor, cos_y: Tensor, lengths: Tensor) -> Tensor:
        weight = (cos.detach() + self.m).clamp_min(0)
        return self.scale * weight * (cos - self.m)
