"""Products of a pass over W with what follows them in their epilogues, as Triton kernels.

The cosines of a block become their derivatives before they leave the multiprocessor that made them,
and the gradient of the prototypes is consumed where it is summed: neither is ever in memory.
benchmarks/gpu/NOTES.md counts what this saves.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sphereface2.heads.blocks import Block, GradientProduct
from sphereface2.heads.kernels import log1p, power, slope, t_as_constant
from sphereface2.heads.row_kernels import padded, rounds, take_step
from sphereface2.margins import BinaryMargin

_LOG2E = tl.constexpr(math.log2(math.e))


class Tiles(NamedTuple):
    """How a product is cut up.

    Chosen here and not while it runs: another choice sums in another order, and a run that is
    resumed would differ from one that was never stopped.

    Attributes:
        rows, columns: of the result, a program.
        depth: of the product, at a time.
        warps: a program.
        stages: depths that are on their way from memory at once.
        registers: most a thread; 128 let two programs of 8 warps share a multiprocessor, so that
            one multiplies while the other is in its epilogue.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    registers: int | None = None

    def programs(self, rows: int, columns: int) -> int:
        """How many make a result of this size."""
        return triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)

    def options(self) -> dict[str, Any]:
        """What a kernel is compiled with."""
        sizes = {"ROWS": self.rows, "COLUMNS": self.columns, "DEPTH": self.depth}
        return sizes | {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "maxnreg": self.registers,
        }


TERMS_TILES = (
    Tiles(128, 128, 64, 8, 3, 128),
    Tiles(128, 256, 64, 16, 3, 128),
    Tiles(64, 128, 64, 4, 4),
)
"""For `terms_of_product`: what is used, and what might be faster (benchmarks/gpu/heads.py)."""
STEP_TILES = (
    Tiles(128, 128, 64, 8, 3, 128),
    Tiles(128, 256, 64, 8, 3),
    Tiles(128, 256, 64, 16, 3, 128),
)
"""For `step_with_product_`."""


def partial_sums(samples: int, columns: int, device: torch.device) -> Tensor:
    """Zeros for `terms_of_product`: (2, B, parts), of loss and derivative by the bias."""
    return torch.zeros(2, samples, triton.cdiv(columns, TERMS_TILES[0].columns), device=device)


def terms_of_product(
    margin: BinaryMargin,
    x: Tensor,
    rows: Tensor,
    inverse: Tensor,
    bias: Tensor,
    block: Block,
    pull: Tensor,
    sums: Tensor,
    into: Tensor,
) -> None:
    """Derivatives by the cosines of a block, from the factors of the cosines.

    Args:
        margin: the equations.
        x: (B, d) bfloat16, unit embeddings.
        rows: (c, d) bfloat16, prototypes of any length.
        inverse: (c,) float32, 1 / their norms. The derivatives are scaled by them too, so that
            their product with ``rows`` is the gradient by ``x``.
        bias: () shared by the classes.
        block: which classes these are; none is skipped.
        pull: (B,) float32, derivative by the cosine with the own class, of whose loss and
            derivative by the bias nothing is added here.
        sums: of `partial_sums` for this width or a larger one; gets the negatives' sums added.
        into: (B, c) bfloat16 that gets the derivatives; rows of a multiple of 16 numbers, of which
            those beyond c may be overwritten.
    """
    samples, columns = into.shape
    tiles = TERMS_TILES[0]
    _terms_of_product[(tiles.programs(samples, columns),)](
        TensorDescriptor.from_tensor(x, [tiles.rows, tiles.depth]),
        TensorDescriptor.from_tensor(rows, [tiles.columns, tiles.depth]),
        into,
        inverse,
        block.own.places,
        pull,
        bias,
        sums,
        samples,
        columns,
        into.stride(0),
        block.own.start,
        sums.shape[2],
        (1 - margin.lam) * block.weight,
        margin.r,
        margin.negative_offset,
        margin.t,
        DIM=x.shape[1],
        SLOPE=margin.detach == "margin" and margin.t != 1,
        POWER=t_as_constant(margin),
        WIDTH=min(tiles.columns // 2, 64),
        **tiles.options(),
    )


def step_with_product_(
    weight: Tensor,
    velocity: Tensor | None,
    gradient: GradientProduct,
    rows: slice,
    skip: None,
    seed: Tensor | None,
    rate: Tensor,
    *,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """`row_kernels.step_rows_` with a gradient that is not made yet, for a range of rows."""
    assert skip is None
    dcos, x = gradient.dcos, gradient.x
    count, dim = rows.stop - rows.start, weight.shape[1]
    tiles = STEP_TILES[0]
    _step_with_product[(tiles.programs(count, dim),)](
        TensorDescriptor.from_tensor(dcos, [tiles.depth, tiles.rows]),
        TensorDescriptor.from_tensor(x, [tiles.depth, tiles.columns]),
        weight,
        weight if velocity is None else velocity,
        gradient.inverse,
        weight if seed is None else seed,
        rate,
        rows.start,
        count,
        dim,
        len(x),
        gradient.factor,
        momentum,
        weight_decay,
        MOMENTUM=velocity is not None,
        NESTEROV=nesterov,
        ROUNDS=rounds(weight, velocity),
        WIDTH=padded(dim),
        **tiles.options(),
    )


@triton.jit
def _halves(x: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """The left and the right half of (ROWS, COLUMNS)."""
    return tl.split(tl.permute(tl.reshape(x, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _pieces(
    x: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr
) -> tuple[tl.tensor, ...]:
    """(ROWS, COLUMNS) cut into two or four of ``WIDTH`` columns.

    An epilogue goes from piece to piece, as registers do not hold what it needs for a whole tile.
    """
    halves = _halves(x, ROWS, COLUMNS)
    if COLUMNS // WIDTH == 2:
        pieces = halves
    else:
        pieces = _halves(halves[0], ROWS, 2 * WIDTH) + _halves(halves[1], ROWS, 2 * WIDTH)
    return pieces


@triton.jit
def _both(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    """(1 + a)·(1 + b) - 1 without cancellation."""
    return a + (b + a * b)


@triton.jit
def _put_own(
    line: tl.tensor, pull: tl.tensor, inverse_ptr: tl.tensor, own: tl.tensor, mine: tl.tensor
) -> None:
    """The derivatives by the cosines with the own classes, over what was stored for them."""
    tl.debug_barrier()  # every thread has written before one overwrites it
    derivative = tl.load(pull, mask=mine, other=0.0)
    derivative = derivative * tl.load(inverse_ptr + own, mask=mine, other=1.0)
    tl.store(line + own, derivative.to(tl.bfloat16), mask=mine)


@triton.jit
def _add(place: tl.tensor, values: tl.tensor, mask: tl.tensor) -> None:
    tl.store(place, tl.load(place, mask=mask, other=0.0) + values, mask=mask)


@triton.jit
def _negatives(
    product: tl.tensor,
    inverse: tl.tensor,
    own: tl.tensor,
    column: tl.tensor,
    columns: tl.tensor,
    leaves: tl.tensor,
    r: tl.tensor,
    shift: tl.tensor,
    t: tl.tensor,
    SLOPE: tl.constexpr,
    POWER: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Derivatives of (rows, columns) by the cosines, and the rows' sums of softplus(n) and σ(n).

    As in `kernels`, with every instruction counted: a product waits for them. At most 64 columns,
    as factors of up to 2 are multiplied.
    """
    base = product * (0.5 * inverse)[None, :] + 0.5
    n = 2 * r * power(base, t, POWER) + shift
    if leaves:
        leave = (own[:, None] == column[None, :]) | (column >= columns)[None, :]
        n = tl.where(leave, float("-inf"), n)
    large = tl.maximum(n, 0.0)
    u = tl.exp2(tl.abs(n) * -_LOG2E)
    # 1 where n > 0, else u: without a comparison, whose results want registers of their own.
    push = tl.maximum(tl.minimum(large * 1e30, 1.0), u)
    root = tl.rsqrt(1 + u)  # one instruction, where a division is many
    push = push * (root * root)
    pushes = tl.sum(push, axis=1)
    if SLOPE:
        push = push * slope(base, t, POWER)
    return push, tl.sum(large, axis=1) + log1p(tl.reduce(u, 1, _both)), pushes


@triton.jit(do_not_specialize=["samples", "columns", "start", "parts"])
def _terms_of_product(
    x_desc: tl.tensor,
    rows_desc: tl.tensor,
    into_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    places_ptr: tl.tensor,
    pull_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    samples: tl.tensor,
    columns: tl.tensor,
    stride: tl.tensor,
    start: tl.tensor,
    parts: tl.tensor,
    share: tl.tensor,
    r: tl.tensor,
    offset: tl.tensor,
    t: tl.tensor,
    DIM: tl.constexpr,
    SLOPE: tl.constexpr,
    POWER: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    # Neighbouring programs share prototypes, so that these come from memory once.
    tiles = tl.cdiv(samples, ROWS)
    part = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * ROWS
    begin = part * COLUMNS
    cos = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, DIM, DEPTH):
        cos = tl.dot(x_desc.load([first, k]), rows_desc.load([begin, k]).T, cos)

    sample = first + tl.arange(0, ROWS)
    known = sample < samples
    own = (tl.load(places_ptr + sample, mask=known, other=-1) - start).to(tl.int32)
    mine = (own >= begin) & (own < tl.minimum(columns, begin + COLUMNS))
    leaves = (tl.max(mine.to(tl.int32), axis=0) > 0) | (begin + COLUMNS > columns)  # few do
    line = into_ptr + sample.to(tl.int64) * stride
    shift = r * (offset - 1) + tl.load(bias_ptr).to(tl.float32)
    losses, pushes = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    pieces = _pieces(cos, ROWS, COLUMNS, WIDTH)
    for i in tl.static_range(COLUMNS // WIDTH):
        column = begin + i * WIDTH + tl.arange(0, WIDTH)
        inverse = tl.load(inverse_ptr + column, mask=column < columns, other=1.0)
        derivative, loss, push = _negatives(
            pieces[i], inverse, own, column, columns, leaves, r, shift, t, SLOPE, POWER
        )
        losses += loss
        pushes += push
        derivative = derivative * (share * inverse)[None, :]
        within = known[:, None] & (column < stride)[None, :]  # which divides into wide accesses
        tl.store(line[:, None] + column[None, :], derivative.to(tl.bfloat16), mask=within)

    _put_own(line, pull_ptr + sample, inverse_ptr, own, mine)
    place = sums_ptr + sample * parts + part
    _add(place, losses * (share / r), known)
    _add(place + samples * parts, pushes * (share / r), known)


@triton.jit(do_not_specialize=["start", "count", "samples"])
def _step_with_product(
    dcos_desc: tl.tensor,
    x_desc: tl.tensor,
    weight_ptr: tl.tensor,
    velocity_ptr: tl.tensor,
    inverse_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    rate_ptr: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    dim: tl.tensor,
    samples: tl.tensor,
    factor: tl.tensor,
    momentum: tl.tensor,
    decay: tl.tensor,
    MOMENTUM: tl.constexpr,
    NESTEROV: tl.constexpr,
    ROUNDS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
) -> None:
    # Neighbouring programs share rows, whose derivatives come from memory once.
    tiles = tl.cdiv(dim, COLUMNS)
    first = tl.program_id(0) // tiles * ROWS
    begin = (tl.program_id(0) % tiles) * COLUMNS
    gradient = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(0, samples, DEPTH):
        gradient = tl.dot(dcos_desc.load([k, first]).T, x_desc.load([k, begin]), gradient)

    row = first + tl.arange(0, ROWS)
    source = (row + start).to(tl.int64)
    inverse = tl.load(inverse_ptr + row, mask=row < count, other=1.0)
    gradient = gradient * (factor / inverse)[:, None]
    pieces = _pieces(gradient, ROWS, COLUMNS, COLUMNS // 4)
    for i in tl.static_range(4):
        column = begin + i * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        quarter = (begin + i * (COLUMNS // 4)) // 4 + tl.arange(0, COLUMNS // 16)
        mask = (row < count)[:, None] & (column < dim)[None, :]
        place = source[:, None] * dim + column[None, :]
        weight = tl.load(weight_ptr + place, mask=mask, other=0.0).to(tl.float32)
        take_step(
            (weight_ptr, velocity_ptr, seed_ptr, rate_ptr),
            place,
            source[:, None] * (WIDTH // 4) + quarter[None, :],
            mask,
            weight * inverse[:, None],
            pieces[i],
            (momentum, decay),
            MOMENTUM,
            NESTEROV,
            ROUNDS,
        )
