"""Passes over rows of W as Triton kernels, one read and one write each: unit length, SGD's step.

The eager code reads and writes a block about ten times for a step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sphereface2.heads.base import SMALLEST_NORM

ELEMENTS = 2048
"""Numbers of W a program."""
_SMALLEST_NORM = tl.constexpr(SMALLEST_NORM)
_CLOSE = tl.constexpr(8 * torch.finfo(torch.float32).eps)
"""As in `base.renormalise_`."""
_ROUNDS = tl.constexpr(7)
"""Of Philox4x32: the fewest with which its authors found no fault (Salmon et al., SC 2011)."""


def unit_rows(weight: Tensor, rows: slice | Tensor, into: Tensor | None, *, store: bool) -> None:
    """Rows of W, (C, d) float32 or bfloat16, at unit length.

    Args:
        rows: a range or int64 indices.
        into: (c, d) of either type, contiguous: the result; None: none but in W.
        store: write them back into W.
    """
    count, dim, start, indices = _range(weight, rows)
    width, each = _tile(dim)
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
    width, each = _tile(dim)
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
        ROUNDS=any(one is not None and one.dtype == torch.bfloat16 for one in (weight, velocity)),
        ROWS=each,
        WIDTH=width,
    )


def _range(weight: Tensor, rows: slice | Tensor) -> tuple[int, int, int, Tensor | None]:
    """Rows, d, the first row and the indices if there are any."""
    if isinstance(rows, slice):
        return rows.stop - rows.start, weight.shape[1], rows.start, None
    return len(rows), weight.shape[1], 0, rows


def _tile(dim: int) -> tuple[int, int]:
    """Width of a row, of at least four numbers, as noise comes in fours, and rows of a program."""
    width = max(4, triton.next_power_of_2(dim))
    return width, max(1, ELEMENTS // width)


@triton.jit
def _inverse_norms(w: tl.tensor) -> tl.tensor:
    """What the rows of (rows, d) are multiplied by, as `base.renormalise_` has it."""
    norm = tl.sqrt(tl.sum(w * w, axis=1))
    return 1 / tl.where(tl.abs(norm - 1) < _CLOSE, 1.0, tl.maximum(norm, _SMALLEST_NORM))


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
    weight = tl.load(place, mask=mask, other=0.0).to(tl.float32)
    unit = weight * _inverse_norms(weight)[:, None]
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
    weight = tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32)
    weight = weight * _inverse_norms(weight)[:, None]
    step = tl.load(given, mask=mask, other=0.0).to(tl.float32) + decay * weight
    if ROUNDS:
        # One call gives four numbers of 32 bits: the lower half of each is for W, the upper one
        # for the momentum.
        quarter = source[:, None] * (WIDTH // 4) + tl.arange(0, WIDTH // 4)[None, :]
        a, b, c, d = tl.randint4x(tl.load(seed_ptr), quarter, n_rounds=_ROUNDS)
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
