"""The equations of SphereFace2 (arXiv 2108.01513) as pure functions of cosines.

One sample with label y, unit embedding x and unit prototypes W_i has cos θ_i = ⟨x, W_i⟩ and loss

    L = (λ/r) · softplus(-p) + ((1-λ)/r) · Σ_{i≠y} softplus(n_i)

with the positive logit p and the negative logits n_i of the margin type. Every term belongs to one
class: the functions below take the cosines of any block of classes, and the terms and derivatives
of the blocks add up. Nothing here knows about parameters, devices or the whole of W.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from sphereface2.errors import UserError, check_choice, check_number

MarginType = Literal["C", "A", "M"]
Detach = Literal["all", "margin"]

COSINE_LIMIT = 1.0 - 1e-5
"""acos is taken of cosines within ± this."""
ANGLE_LIMITS = (1e-5, 3.14159)
"""Range of an angle after its margin, in radians."""
SOFTPLUS_THRESHOLD = 40.0
"""Above it softplus(z) = z: exact to float64, and exp(40) is far from overflow in float32."""


def similarity(z: Tensor, t: float) -> Tensor:
    """g(z) = 2·((z+1)/2)^t - 1, which maps [-1, 1] onto itself; any shape.

    Example:
        >>> similarity(torch.tensor([-1.0, 0.0, 1.0]), t=3)
        tensor([-1.0000, -0.7500,  1.0000])
    """
    if t == 1:
        return z
    # Rounding may put a cosine just below -1, where a fractional power is not defined.
    return ((z + 1) / 2).clamp_min(0).pow(t) * 2 - 1


def similarity_slope(z: Tensor, t: float) -> Tensor:
    """g'(z) = t·((z+1)/2)^(t-1); same shape as `z`.

    Example:
        >>> similarity_slope(torch.tensor([-1.0, 0.0, 1.0]), t=3)
        tensor([0.0000, 0.7500, 3.0000])
    """
    if t == 1:
        return torch.ones_like(z)
    return ((z + 1) / 2).clamp_min(0).pow(t - 1) * t


def clamped_angle(cos: Tensor) -> Tensor:
    """θ in radians of a cosine clamped to ±`COSINE_LIMIT`; any shape."""
    return cos.clamp(-COSINE_LIMIT, COSINE_LIMIT).acos()


@dataclass(frozen=True, eq=False)
class Own:
    """Where each sample's own class lies in a block of c classes.

    Attributes:
        places: (B,) int64, the place of its class in a sequence of classes.
        start: the block's first place in that sequence.
        width: c; None: every sample's class is in the block.

    Example:
        >>> own = Own(torch.tensor([2, 0]))
        >>> own.take(torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]))
        tensor([0.3000, 0.4000])
        >>> Own(torch.tensor([2, 0]), start=2, width=3).present
        tensor([ True, False])
    """

    places: Tensor
    start: int = 0
    width: int | None = None

    @functools.cached_property
    def columns(self) -> Tensor:
        """(B,) int64, the column of its class; any valid column where the block lacks it."""
        if self.width is None:
            return self.places - self.start
        return (self.places - self.start).clamp(0, self.width - 1)

    @functools.cached_property
    def present(self) -> Tensor | None:
        """(B,) bool, whether the block has it; None: always."""
        if self.width is None:
            return None
        return (self.places >= self.start) & (self.places < self.start + self.width)

    def take(self, values: Tensor) -> Tensor:
        """(B,), each sample's entry of ``values`` (B, c) at its column."""
        return values.gather(1, self.columns[:, None])[:, 0]

    def put_(self, values: Tensor, own: Tensor | float) -> None:
        """Write ``own``, (B,) or a number, into ``values`` (B, c) where the class is present."""
        if not isinstance(own, Tensor):
            own = values.new_full(self.columns.shape, own)
        if self.present is not None:
            own = torch.where(self.present, own, self.take(values))
        values.scatter_(1, self.columns[:, None], own[:, None])

    def mask(self, terms: Tensor) -> Tensor:
        """``terms`` (B,), 0 where the class is absent."""
        return terms if self.present is None else terms.where(self.present, 0)


class Terms(NamedTuple):
    """Loss terms of a block of classes with their derivatives.

    ``loss`` (B,) is each sample's sum over the block; ``dcos`` its derivative by each cosine, as
    the gradient mode defines it; ``dbias`` (B,) its derivative by the shared bias, or (B, c) by
    the bias of each class.
    """

    loss: Tensor
    dcos: Tensor
    dbias: Tensor


class ClassTerms(Protocol):
    """A loss that is a sum of one term a class, as `BinaryMargin` describes its methods."""

    def positive(self, cos: Tensor, bias: Tensor) -> Terms:
        """The samples' terms of their own class."""

    def negatives_(
        self,
        cos: Tensor,
        bias: Tensor,
        own: Own | None = None,
        weight: float = 1.0,
        skip: Tensor | None = None,
    ) -> Terms:
        """The samples' terms of a block of other classes, in place."""


@dataclass(frozen=True)
class BinaryMargin:
    """The hyper-parameters of SphereFace2 and its per-logit mathematics.

    Args:
        margin_type: "C" additive in similarity, "A" additive in angle, "M" multiplicative in angle.
        lam: λ in (0, 1), the weight of the positive against the negatives.
        r: scale, > 0.
        m: margin, ≥ 0: in similarity for C, in radians for A, a factor for M (where 1 is none).
        t: similarity adjustment, ≥ 1; 1 is none.
        detach: "all": dg/dcos is taken as 1 (the authors' code); "margin": the gradient of
            g(cos θ), with the angular margin's offset as a constant (the paper).

    Raises:
        UserError: a value out of its range.

    Example:
        >>> margin = BinaryMargin(r=40, m=0.25, t=1)
        >>> margin.positive_logit(torch.tensor([0.75])), margin.negative_logit(torch.tensor([0.25]))
        (tensor([20.]), tensor([20.]))
    """

    margin_type: MarginType = "C"
    lam: float = 0.7
    r: float = 40.0
    m: float = 0.4
    t: float = 3.0
    detach: Detach = "all"

    def __post_init__(self) -> None:
        check_choice("margin_type", self.margin_type, get_args(MarginType))
        check_choice("detach", self.detach, get_args(Detach))
        check_number("lam", self.lam, above=0, below=1)
        check_number("r", self.r, above=0)
        check_number("m", self.m, least=0)
        check_number("t", self.t, least=1)

    def positive_logit(self, cos: Tensor) -> Tensor:
        """p - b, for the cosines of the samples with their own class; any shape."""
        if self.margin_type == "C":
            return (similarity(cos, self.t) - self.m) * self.r
        theta = clamped_angle(cos)
        theta = theta + self.m if self.margin_type == "A" else theta * self.m
        return similarity(theta.clamp(*ANGLE_LIMITS).cos(), self.t) * self.r

    def negative_logit(self, cos: Tensor) -> Tensor:
        """n - b, for the cosines of the samples with other classes; any shape."""
        return (similarity(cos, self.t) + self.negative_offset) * self.r

    @property
    def negative_offset(self) -> float:
        """What the margin adds to g(cos θ_i) of a negative."""
        return self.m if self.margin_type == "C" else 0.0

    def slope(self, cos: Tensor) -> Tensor | None:
        """(dp/dcos)/r and (dn/dcos)/r as the gradient mode defines them; None stands for 1."""
        if self.detach == "all" or self.t == 1:
            return None
        return similarity_slope(cos, self.t)

    @torch.no_grad()
    def positive(self, cos: Tensor, bias: Tensor) -> Terms:
        """(λ/r)·softplus(-p) for each sample.

        Args:
            cos: (B,) cosine of each sample with its own class.
            bias: () or (B,), that class's bias.

        Returns:
            `Terms` whose tensors are all (B,).
        """
        p = self.positive_logit(cos) + bias
        loss = softplus(-p) * (self.lam / self.r)
        pull = torch.sigmoid(-p) * -self.lam
        slope = self.slope(cos)
        return Terms(loss, pull if slope is None else pull * slope, pull / self.r)

    @torch.no_grad()
    def negatives_(
        self,
        cos: Tensor,
        bias: Tensor,
        own: Own | None = None,
        weight: float = 1.0,
        skip: Tensor | None = None,
    ) -> Terms:
        """((1-λ)/r)·Σ_i softplus(n_i) over a block of c classes, for each sample, in place.

        Args:
            cos: (B, c) cosines; overwritten by their derivatives.
            bias: () or (c,).
            own: the entries that are some sample's own class, to be left out: they get neither
                loss nor derivative.
            weight: factor of loss and derivatives; a sample of the negatives weighs more than 1.
            skip: (c,) bool, classes that get neither loss nor derivative.

        Returns:
            `Terms` with loss (B,), dcos the given `cos` itself, dbias (B,) or (B, c).
        """
        slope = self.slope(cos)
        # r·(g(cos) + offset) + b = 2r·((cos+1)/2)^t + r·(offset-1) + b, in place.
        n = cos.mul_(0.5).add_(0.5)
        if self.t != 1:
            if self.t % 1:
                n.clamp_min_(0)  # as in `similarity`
            n.pow_(self.t)
        constant = bias + self.r * (self.negative_offset - 1)
        torch.add(constant, n, alpha=2 * self.r, out=n)
        if own is not None:
            own.put_(n, -math.inf)
        if skip is not None:
            n.masked_fill_(skip, -math.inf)
        share = (1 - self.lam) * weight
        loss = softplus_sum(n) * (share / self.r)
        push = n.sigmoid_().mul_(share)
        dbias = push.sum(1) / self.r if bias.ndim == 0 else push / self.r
        return Terms(loss, push if slope is None else push.mul_(slope), dbias)

    def initial_bias(self, num_classes: int) -> float:
        """The bias at which positive and negative gradients balance when every cosine is 0.

        It solves λ·σ(-(a_y+b)) = (1-λ)(C-1)·σ(a_i+b), where a_y and a_i are the logits without
        bias at cos = 0. With ℓ = ½·log(λ/((1-λ)(C-1))) the solution is

            b = ℓ - (a_y+a_i)/2 + asinh(sinh(ℓ)·exp((a_i-a_y)/2)),

        which neither overflows nor cancels for any r, m and C ≥ 2.

        Raises:
            UserError: fewer than 2 classes.

        Example:
            >>> plain = BinaryMargin(lam=0.5, m=0, t=1)
            >>> round(plain.initial_bias(num_classes=1001), 3)  # log(1 / 1000)
            -6.908
        """
        if num_classes < 2:
            raise UserError(
                f"num_classes must be at least 2, got {num_classes}: "
                "with one class there is no negative to balance against"
            )
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        a_y = self.positive_logit(zero).item()
        a_i = self.negative_logit(zero).item()
        half = 0.5 * (math.log(self.lam) - math.log1p(-self.lam) - math.log(num_classes - 1))
        return half - (a_y + a_i) / 2 + _asinh_of_sinh_times_exp(half, (a_i - a_y) / 2)


def softplus(z: Tensor) -> Tensor:
    """log(1 + exp(z)), accurate over the whole range; any shape.

    Example:
        >>> softplus(torch.tensor([0.0, 100.0]))
        tensor([  0.6931, 100.0000])
    """
    return F.softplus(z, threshold=SOFTPLUS_THRESHOLD)


def softplus_sum(z: Tensor) -> Tensor:
    """Σ_i log(1 + exp(z_i)) over the columns of (B, c), accurate over the whole range; (B,).

    Example:
        >>> softplus_sum(torch.zeros(1, 3))
        tensor([2.0794])
    """
    # A logarithm costs as much as ten of the other operations, so most of them are spared:
    # log1p(u) + log1p(v) = log1p(u + v + uv), where nothing cancels as exp(-|z|) ≥ 0.
    total = z.clamp_min(0).sum(1)
    u = z.abs().neg_().exp_()
    for _ in range(4):  # (1 + u) grows to 2^16 at most
        half = u.shape[1] // 2
        if half == 0:
            break
        first, second, odd = u[:, :half], u[:, half : 2 * half], u[:, 2 * half :]
        first.addcmul_(first, second).add_(second)
        if odd.shape[1]:
            first[:, :1].addcmul_(first[:, :1], odd).add_(odd)
        u = first
    return total + u.log1p().sum(1)


def _asinh_of_sinh_times_exp(x: float, k: float) -> float:
    """asinh(sinh(x)·exp(k)) without overflow."""
    if x == 0:
        return 0.0
    # log|sinh x| = |x| - log 2 + log(1 - exp(-2|x|))
    log_size = abs(x) - math.log(2) + math.log(-math.expm1(-2 * abs(x))) + k
    # asinh(q) = log(2q) to the last digit from exp(40) on.
    size = log_size + math.log(2) if log_size > 40 else math.asinh(math.exp(log_size))
    return math.copysign(size, x)
