"""SphereFace2's terms of a block of classes as a Triton kernel: one read and one write.

The eager code reads and writes a block about ten times. It remains the reference, and what runs
wherever the kernels do not.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sphereface2.margins import ANGLE_LIMITS, COSINE_LIMIT, BinaryMargin, Own, Terms

SPLIT = tl.constexpr(4096)
"""Columns a program: a row of a block is shared by several, so that small batches fill a GPU."""
TILE = tl.constexpr(1024)
_COSINE = tl.constexpr(COSINE_LIMIT)
_SMALLEST = tl.constexpr(ANGLE_LIMITS[0])
_LARGEST = tl.constexpr(ANGLE_LIMITS[1])
_PI = tl.constexpr(math.pi)


def block_terms_(
    margin: BinaryMargin,
    cos: Tensor,
    bias: Tensor,
    own: Own,
    weight: float = 1.0,
    *,
    skip: Tensor | None = None,
    own_cos: Tensor | None = None,
) -> Terms:
    """`terms.block_terms_` for a shared bias, () on the same CUDA device.

    Args:
        cos: (B, c), contiguous, float32 or bfloat16; overwritten by the derivatives.
    """
    sums = partial_sums(len(cos), cos.shape[1], cos.device)
    add_block_terms_(margin, cos, bias, own, weight, skip=skip, own_cos=own_cos, sums=sums)
    loss, dbias = sums.sum(2)
    return Terms(loss, cos, dbias)


def partial_sums(samples: int, columns: int, device: torch.device) -> Tensor:
    """Zeros for `add_block_terms_`: (2, B, parts), of loss and derivative by the bias."""
    return torch.zeros(2, samples, triton.cdiv(columns, SPLIT.value), device=device)


def add_block_terms_(
    margin: BinaryMargin,
    cos: Tensor,
    bias: Tensor,
    own: Own,
    weight: float,
    *,
    skip: Tensor | None,
    own_cos: Tensor | None,
    sums: Tensor,
) -> None:
    """`block_terms_` whose sums are added to ``sums``, made for this width or a larger one.

    Each program has a place of its own in them, so that sums are float32 and made in the same
    order every time.
    """
    samples, columns = cos.shape
    _block_terms[(samples, triton.cdiv(columns, SPLIT.value))](
        cos,
        own.places,
        cos if skip is None else skip,
        cos if own_cos is None else own_cos,
        bias,
        sums,
        samples,
        columns,
        own.start,
        sums.shape[2],
        margin.lam,
        (1 - margin.lam) * weight,
        margin.r,
        margin.m,
        margin.negative_offset,
        margin.t,
        KIND=margin.margin_type,
        SLOPE=margin.detach == "margin" and margin.t != 1,
        POWER=int(margin.t) if margin.t in (1, 2, 3, 4) else 0,  # then powers are products
        SKIPS=skip is not None,
        GIVEN=own_cos is not None,
    )


@triton.jit
def _power(u: tl.tensor, t: tl.tensor, POWER: tl.constexpr) -> tl.tensor:
    """u^t for u in [0, 1]; POWER is t where that is a small integer, else 0."""
    if POWER == 1:
        result = u
    elif POWER == 2:
        result = u * u
    elif POWER == 3:
        result = u * u * u
    elif POWER == 4:
        result = (u * u) * (u * u)
    else:
        result = tl.exp2(t * tl.log2(tl.maximum(u, 0.0)))
    return result


@triton.jit
def _slope(u: tl.tensor, t: tl.tensor, POWER: tl.constexpr) -> tl.tensor:
    """g'(cos) = t·u^(t-1) with u = (cos + 1)/2."""
    if POWER == 2:
        result = t * u
    elif POWER == 3:
        result = t * u * u
    elif POWER == 4:
        result = t * u * u * u
    else:
        result = t * tl.exp2((t - 1) * tl.log2(tl.maximum(u, 0.0)))
    return result


@triton.jit
def _acos(x: tl.tensor) -> tl.tensor:
    """acos of x in [-1, 1] to 2e-8, by the polynomial 4.4.46 of Abramowitz and Stegun."""
    y = tl.abs(x)
    p = -0.0012624911 * y + 0.0066700901
    p = p * y - 0.0170881256
    p = p * y + 0.0308918810
    p = p * y - 0.0501743046
    p = p * y + 0.0889789874
    p = p * y - 0.2145988016
    p = p * y + 1.5707963050
    p = p * tl.sqrt(1 - y)
    return tl.where(x < 0, _PI - p, p)


@triton.jit
def _log1p(u: tl.tensor) -> tl.tensor:
    """log(1 + u) for u ≥ 0: log(w)·u/(w-1) with w = 1 + u, in spite of the rounding of w."""
    w = 1 + u
    rest = w - 1
    return tl.where(rest == 0, u, tl.log(w) * (u / tl.where(rest == 0, 1.0, rest)))


@triton.jit(do_not_specialize=["samples", "start", "splits"])
def _block_terms(
    cos_ptr: tl.tensor,
    places_ptr: tl.tensor,
    skip_ptr: tl.tensor,
    own_cos_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    samples: tl.tensor,
    columns: tl.tensor,
    start: tl.tensor,
    splits: tl.tensor,
    lam: tl.tensor,
    share: tl.tensor,
    r: tl.tensor,
    m: tl.tensor,
    offset: tl.tensor,
    t: tl.tensor,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,
    POWER: tl.constexpr,
    SKIPS: tl.constexpr,
    GIVEN: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    split = tl.program_id(1)
    begin = split * SPLIT
    line = cos_ptr + row.to(tl.int64) * columns
    bias = tl.load(bias_ptr).to(tl.float32)

    # The positive belongs to the program whose columns hold it.
    own = tl.load(places_ptr + row) - start
    mine = (own >= begin) & (own < begin + SPLIT) & (own < columns)
    if GIVEN:
        cos_y = tl.load(own_cos_ptr + row).to(tl.float32)
    else:
        cos_y = tl.load(line + own, mask=mine, other=0.0).to(tl.float32)
        tl.debug_barrier()  # every thread has read it before one overwrites it
    margined = cos_y
    if KIND != "C":
        theta = _acos(tl.minimum(tl.maximum(cos_y, -_COSINE), _COSINE))
        theta = theta + m if KIND == "A" else theta * m
        margined = tl.cos(tl.minimum(tl.maximum(theta, _SMALLEST), _LARGEST))
    g = 2 * _power((margined + 1) * 0.5, t, POWER) - 1
    p = r * (g - m if KIND == "C" else g) + bias
    small_y = tl.exp(-tl.abs(p))
    pull = -lam * tl.where(p <= 0, 1.0, small_y) / (1 + small_y)
    loss = tl.where(mine, (tl.maximum(-p, 0.0) + _log1p(small_y)) * lam / r, 0.0)
    dbias = tl.where(mine, pull / r, 0.0)
    if SLOPE:
        pull = pull * _slope((cos_y + 1) * 0.5, t, POWER)

    # softplus(n) = max(n, 0) + log(1 + exp(-|n|)). Logarithms are dear, so that the factors are
    # multiplied first: 1 + product = Π (1 + exp(-|n|)), at most 2 each, where nothing cancels.
    largest = tl.zeros((TILE,), tl.float32)
    product = tl.zeros((TILE,), tl.float32)
    pushes = tl.zeros((TILE,), tl.float32)
    for first in range(0, SPLIT, TILE):
        column = begin + first + tl.arange(0, TILE)
        inside = column < columns
        base = (tl.load(line + column, mask=inside, other=0.0).to(tl.float32) + 1) * 0.5
        n = 2 * r * _power(base, t, POWER) + (r * (offset - 1) + bias)
        counts = inside & (column != own)
        if SKIPS:
            counts = counts & (tl.load(skip_ptr + column, mask=inside, other=1) == 0)
        u = tl.where(counts, tl.exp(-tl.abs(n)), 0.0)
        largest += tl.where(counts, tl.maximum(n, 0.0), 0.0)
        product += u + product * u
        push = tl.where(counts, share * tl.where(n >= 0, 1.0, u) / (1 + u), 0.0)
        pushes += push
        if SLOPE:
            push = push * _slope(base, t, POWER)
        derivative = tl.where(mine & (column == own), pull, push)
        tl.store(line + column, derivative.to(cos_ptr.dtype.element_ty), mask=inside)
    loss += tl.sum(largest + _log1p(product)) * share / r
    dbias += tl.sum(pushes) / r
    place = sums_ptr + row * splits + split
    tl.store(place, tl.load(place) + loss)
    place += samples * splits
    tl.store(place, tl.load(place) + dbias)
