"""SphereFace2's terms of a block of classes in one read and one write of the cosines, in Triton.

The eager code of `margins.BinaryMargin` reads and writes the block about ten times. It remains the
reference, and what runs wherever this kernel does not.
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
    margin: BinaryMargin, cos: Tensor, bias: Tensor, own: Own, weight: float = 1.0
) -> Terms:
    """`terms.block_terms_` for a shared bias, () on the same CUDA device.

    Sums are float32 and made in the same order every time.

    Args:
        cos: (B, c), contiguous, float32 or bfloat16; overwritten by the derivatives.
    """
    samples, columns = cos.shape
    grid = (samples, triton.cdiv(columns, SPLIT.value))
    # A place for each program: no two add to one.
    sums = torch.empty((2, *grid), dtype=torch.float32, device=cos.device)
    _block_terms[grid](
        cos,
        own.columns,
        own.columns if own.present is None else own.present,
        bias,
        sums,
        columns,
        margin.lam,
        (1 - margin.lam) * weight,
        margin.r,
        margin.m,
        margin.negative_offset,
        margin.t,
        KIND=margin.margin_type,
        SLOPE=margin.detach == "margin" and margin.t != 1,
        POWER=int(margin.t) if margin.t in (1, 2, 3, 4) else 0,
        ALWAYS=own.present is None,
    )
    loss, dbias = sums.sum(2)
    return Terms(loss, cos, dbias)


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
def _sigmoid_softplus(z: tl.tensor) -> tl.tensor:
    """σ(z) and log(1 + exp z), accurate over the whole range."""
    u = tl.exp(-tl.abs(z))
    w = 1 + u
    # log(w)·u/(w-1) is log1p(u) in spite of the rounding of w.
    rest = w - 1
    log1p = tl.where(rest == 0, u, tl.log(w) * (u / tl.where(rest == 0, 1.0, rest)))
    return tl.where(z >= 0, 1.0, u) / w, tl.maximum(z, 0.0) + log1p


@triton.jit
def _block_terms(
    cos_ptr: tl.tensor,
    own_ptr: tl.tensor,
    present_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    columns: tl.tensor,
    lam: tl.tensor,
    share: tl.tensor,
    r: tl.tensor,
    m: tl.tensor,
    offset: tl.tensor,
    t: tl.tensor,
    KIND: tl.constexpr,
    SLOPE: tl.constexpr,
    POWER: tl.constexpr,
    ALWAYS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    split = tl.program_id(1)
    start = split * SPLIT
    line = cos_ptr + row.to(tl.int64) * columns
    bias = tl.load(bias_ptr).to(tl.float32)

    # The positive belongs to the program whose columns hold it, before anything is overwritten.
    own = tl.load(own_ptr + row)
    mine = (own >= start) & (own < start + SPLIT)
    if not ALWAYS:
        mine = mine & (tl.load(present_ptr + row) != 0)
    cos_y = tl.load(line + own, mask=mine, other=0.0).to(tl.float32)
    margined = cos_y
    if KIND != "C":
        theta = _acos(tl.minimum(tl.maximum(cos_y, -_COSINE), _COSINE))
        theta = theta + m if KIND == "A" else theta * m
        margined = tl.cos(tl.minimum(tl.maximum(theta, _SMALLEST), _LARGEST))
    g = 2 * _power((margined + 1) * 0.5, t, POWER) - 1
    p = r * (g - m if KIND == "C" else g) + bias
    sigmoid_y, softplus_y = _sigmoid_softplus(-p)
    pull = -lam * sigmoid_y
    loss = tl.where(mine, softplus_y * lam / r, 0.0)
    dbias = tl.where(mine, pull / r, 0.0)
    if SLOPE:
        pull = pull * _slope((cos_y + 1) * 0.5, t, POWER)

    losses = tl.zeros((TILE,), tl.float32)
    pushes = tl.zeros((TILE,), tl.float32)
    for first in range(0, SPLIT, TILE):
        column = start + first + tl.arange(0, TILE)
        inside = column < columns
        u = (tl.load(line + column, mask=inside, other=0.0).to(tl.float32) + 1) * 0.5
        n = 2 * r * _power(u, t, POWER) + (r * (offset - 1) + bias)
        sigmoid, softplus = _sigmoid_softplus(n)
        is_own = mine & (column == own)
        counts = inside & (column != own) if ALWAYS else inside & ~is_own
        losses += tl.where(counts, softplus, 0.0)
        push = share * sigmoid
        pushes += tl.where(counts, push, 0.0)
        if SLOPE:
            push = push * _slope(u, t, POWER)
        derivative = tl.where(is_own, pull, push)
        tl.store(line + column, derivative.to(cos_ptr.dtype.element_ty), mask=inside)
    loss += tl.sum(losses) * share / r
    dbias += tl.sum(pushes) / r
    splits = tl.num_programs(1)
    place = sums_ptr + row * splits + split
    tl.store(place, loss)
    tl.store(place + tl.num_programs(0) * splits, dbias)
