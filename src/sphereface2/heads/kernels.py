"""SphereFace2's passes over a block of classes as Triton kernels, one read and one write each.

The eager code reads and writes a block about ten times for the terms, and as often for a step. It
remains the reference, and what runs wherever these kernels do not.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sphereface2.heads.base import SMALLEST_NORM
from sphereface2.margins import ANGLE_LIMITS, COSINE_LIMIT, BinaryMargin, Own, Terms

SPLIT = tl.constexpr(4096)
"""Columns a program: a row of a block is shared by several, so that small batches fill a GPU."""
TILE = tl.constexpr(1024)
ELEMENTS = 2048
"""Numbers of W a program."""
_COSINE = tl.constexpr(COSINE_LIMIT)
_SMALLEST = tl.constexpr(ANGLE_LIMITS[0])
_LARGEST = tl.constexpr(ANGLE_LIMITS[1])
_PI = tl.constexpr(math.pi)
_SMALLEST_NORM = tl.constexpr(SMALLEST_NORM)
_CLOSE = tl.constexpr(8 * torch.finfo(torch.float32).eps)
"""As in `base.renormalise_`."""
_ROUNDS = tl.constexpr(7)
"""Of Philox4x32: the fewest with which its authors found no fault (Salmon et al., SC 2011)."""


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
        POWER=int(margin.t) if margin.t in (1, 2, 3, 4) else 0,
        SKIPS=skip is not None,
        GIVEN=own_cos is not None,
    )


def unit_rows(weight: Tensor, rows: slice | Tensor, into: Tensor | None, *, store: bool) -> None:
    """Rows of W, (C, d) float32 or bfloat16, at unit length.

    Args:
        rows: a range or int64 indices.
        into: (c, d) of either type, contiguous: the result; None: none but in W.
        store: write them back into W.
    """
    count, dim, start, indices = _range(weight, rows)
    width = triton.next_power_of_2(dim)
    each = max(1, ELEMENTS // width)
    _unit_rows[(triton.cdiv(count, each),)](
        weight,
        weight if into is None else into,
        weight if indices is None else indices,
        start,
        count,
        dim,
        INDEXED=indices is not None,
        COPY=into is not None,
        STORE=store,
        ROWS=each,
        WIDTH=width,
    )


def step_rows_(
    weight: Tensor,
    velocity: Tensor | None,
    gradient: Tensor,
    rows: slice | Tensor,
    skip: Tensor | None,
    seed: Tensor | None,
    rate: Tensor,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """SGD's step with rows of W that are normalised on the way: `FusedSGD.update_` in one pass.

    Args:
        weight: (C, d), float32 or bfloat16, which is rounded to stochastically.
        velocity: (C, d) momentum, of either type; None: none.
        gradient: (c, d) by the normalised rows, contiguous.
        rows: a range or int64 indices.
        skip: (c,) bool, rows to leave alone.
        seed: (1,) int64 of the noise of rounding; needed for bfloat16.
        rate: () float32, the learning rate.
    """
    count, dim, start, indices = _range(weight, rows)
    width = max(4, triton.next_power_of_2(dim))
    each = max(1, ELEMENTS // width)
    _step_rows[(triton.cdiv(count, each),)](
        weight,
        weight if velocity is None else velocity,
        gradient,
        weight if indices is None else indices,
        weight if skip is None else skip,
        weight if seed is None else seed,
        rate,
        start,
        count,
        dim,
        momentum,
        weight_decay,
        INDEXED=indices is not None,
        SKIPS=skip is not None,
        MOMENTUM=velocity is not None,
        NESTEROV=nesterov,
        ROUNDS=_rounds(weight) or (velocity is not None and _rounds(velocity)),
        ROWS=each,
        WIDTH=width,
    )


def _range(weight: Tensor, rows: slice | Tensor) -> tuple[int, int, int, Tensor | None]:
    """Rows, d, the first row and the indices if there are any."""
    if isinstance(rows, slice):
        return rows.stop - rows.start, weight.shape[1], rows.start, None
    return len(rows), weight.shape[1], 0, rows


def _rounds(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


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


@triton.jit
def _unit(w: tl.tensor) -> tl.tensor:
    """The rows of (rows, d) at unit length, as `base.renormalise_` has it."""
    norm = tl.sqrt(tl.sum(w * w, axis=1))
    norm = tl.where(tl.abs(norm - 1) < _CLOSE, 1.0, tl.maximum(norm, _SMALLEST_NORM))
    return w / norm[:, None]


@triton.jit(do_not_specialize=["start", "count"])
def _unit_rows(
    weight_ptr: tl.tensor,
    into_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    dim: tl.tensor,
    INDEXED: tl.constexpr,
    COPY: tl.constexpr,
    STORE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    source = (row + start).to(tl.int64)
    if INDEXED:
        source = tl.load(rows_ptr + row, mask=row < count, other=0)
    mask = (row < count)[:, None] & (column < dim)[None, :]
    place = weight_ptr + source[:, None] * dim + column[None, :]
    unit = _unit(tl.load(place, mask=mask, other=0.0).to(tl.float32))
    if COPY:
        target = into_ptr + row.to(tl.int64)[:, None] * dim + column[None, :]
        tl.store(target, unit.to(into_ptr.dtype.element_ty), mask=mask)
    if STORE:
        tl.store(place, unit.to(weight_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rounded(x: tl.tensor, noise: tl.tensor) -> tl.tensor:
    """float32 to bfloat16, as `fused.stochastic_round` with noise on 0 … 65535."""
    bits = (x.to(tl.int32, bitcast=True) + noise) & -65536
    return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit(do_not_specialize=["start", "count"])
def _step_rows(
    weight_ptr: tl.tensor,
    velocity_ptr: tl.tensor,
    gradient_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    skip_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    rate_ptr: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    dim: tl.tensor,
    momentum: tl.tensor,
    decay: tl.tensor,
    INDEXED: tl.constexpr,
    SKIPS: tl.constexpr,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    ROUNDS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    alive = row < count
    if SKIPS:
        alive = alive & (tl.load(skip_ptr + row, mask=alive, other=1) == 0)
    source = (row + start).to(tl.int64)
    if INDEXED:
        source = tl.load(rows_ptr + row, mask=alive, other=0)
    mask = alive[:, None] & (column < dim)[None, :]
    place = source[:, None] * dim + column[None, :]
    given = gradient_ptr + row.to(tl.int64)[:, None] * dim + column[None, :]
    weight = _unit(tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32))
    step = tl.load(given, mask=mask, other=0.0).to(tl.float32) + decay * weight
    if ROUNDS:
        # One call gives four numbers of 32 bits: the lower half of each is for W, the upper one
        # for the momentum.
        quarter = tl.arange(0, WIDTH // 4)
        offset = source[:, None] * (WIDTH // 4) + quarter[None, :]
        a, b, c, d = tl.randint4x(tl.load(seed_ptr), offset, n_rounds=_ROUNDS)
        noise = tl.interleave(tl.interleave(a, b), tl.interleave(c, d))
    if MOMENTUM:
        velocity = tl.load(velocity_ptr + place, mask=mask, other=0.0).to(tl.float32)
        velocity = velocity * momentum + step
        step = step + velocity * momentum if NESTEROV else velocity
        if velocity_ptr.dtype.element_ty == tl.bfloat16:
            velocity = _rounded(velocity, (noise >> 16).to(tl.int32))
        tl.store(velocity_ptr + place, velocity, mask=mask)
    weight = weight - tl.load(rate_ptr) * step
    if weight_ptr.dtype.element_ty == tl.bfloat16:
        weight = _rounded(weight, (noise & 65535).to(tl.int32))
    tl.store(weight_ptr + place, weight, mask=mask)
