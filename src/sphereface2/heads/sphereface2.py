"""SphereFace2: one binary classifier a person (arXiv 2108.01513)."""

from __future__ import annotations

import math
from typing import Any, Literal, Unpack, get_args

import torch
from torch import nn

from sphereface2.errors import check_choice, check_number
from sphereface2.heads.base import Scaling
from sphereface2.heads.one_vs_all import OneVersusAllHead
from sphereface2.heads.registry import register
from sphereface2.margins import BinaryMargin, Detach, MarginType

Bias = Literal["learned", "fixed", "zero", "per_class"]
BiasStart = Literal["balanced", "log_classes"]


@register("sphereface2")
class SphereFace2(OneVersusAllHead):
    """C independent binary classifiers with one shared bias, the universal threshold.

    For an embedding x with label y and unit prototypes W_i, cos θ_i = ⟨x/|x|, W_i⟩,

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
        bias_start: "balanced" (default) as just said; "log_classes", where every negative logit is
            -log(10·C·(1-λ)/λ) at cos θ = 0; or a number.
        scaling: `streaming`, `chunk_size`, `process_group`, `negatives`, `negative_share`,
            `weight_dtype` and `compute` of `Head`.

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

    margin: BinaryMargin

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
        bias_start: BiasStart | float = "balanced",
        **scaling: Unpack[Scaling],
    ) -> None:
        margin = BinaryMargin(margin_type, lam, r, m, t, detach)
        super().__init__(embedding_dim, num_classes, margin, loss_weight, **scaling)
        check_choice("bias", bias, get_args(Bias))
        self.bias_mode = bias
        start = torch.tensor(0.0 if bias == "zero" else self._bias_start(bias_start))
        if bias == "per_class":
            start = self.shard.distribute(start.repeat(self.shard.rows), num_classes)
        if bias in ("learned", "per_class"):
            self.bias = nn.Parameter(start)
        else:
            self.register_buffer("bias", start)

    def _bias_start(self, start: BiasStart | float) -> float:
        if isinstance(start, str):
            check_choice("bias_start", start, get_args(BiasStart))
            if start == "balanced":
                return self.margin.initial_bias(self.num_classes)
            at_right_angle = self.margin.negative_logit(torch.zeros((), device="cpu")).item()
            weighed = self.num_classes * (1 - self.margin.lam) / self.margin.lam
            return -math.log(10 * weighed) - at_right_angle
        check_number("bias_start", start)
        return float(start)

    def summary(self) -> dict[str, Any]:
        facts = super().summary()
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
