"""What one training step of a head costs each rank, as formulas.

Memory, operations, memory traffic and messages as functions of the people C, the dimension d, the
batch of all ranks B and the number of ranks, for SphereFace2 and for its softmax rivals. Pure
arithmetic: ``benchmarks/cost_model.py`` holds it against measurements.

The step is forward, backward and SGD with momentum and weight decay, computed in float32. The
backbone is not part of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from sphereface2.errors import check_choice
from sphereface2.heads.blocks import default_chunk

Kind = Literal["all_gather", "reduce_scatter", "all_reduce"]
Form = Literal["dense", "streaming", "fused"]
SoftmaxForm = Literal["dense", "streaming", "kept"]

FLOAT = 4
PRODUCT = 2
"""Operations a multiply-add; the logits and their two gradients are three products of B·C·d."""

LOGIT_PASSES = {"sphereface2": 31.75, "dense": 21.0, "streaming": 17.0, "kept": 14.0}
"""Reads and writes of each of the B·C logits by torch's operators, one after the other (the tests
count them). SphereFace2 (margin C, detach "all"): 1 to write the cosines, 8 to bend and shift them,
15.75 for the sum of softplus, 5 for the derivatives, 2 to read those in two products. A kernel that
keeps a block to itself would need 3 of these."""
ROW_PASSES = {"sphereface2": 6, "dense": 6, "streaming": 10, "kept": 6}
"""Likewise of each element of W: 3 to renormalise, 2 to read it in two products, 1 to write the
gradient; 4 more for logits that are computed twice."""
SGD_PASSES = 11
"""Passes over W, its gradient and its momentum in a step of SGD with weight decay."""
ROUNDING_PASSES = 11
"""Passes over W, or over its momentum, where it is kept in bfloat16: to float32 and back."""


@dataclass(frozen=True)
class Message:
    """One collective: its kind, and the bytes of the whole tensor that it gathers or reduces."""

    kind: Kind
    size: float


@dataclass(frozen=True)
class Cost:
    """What a step costs one rank.

    Attributes:
        weights: bytes of this rank's rows of W.
        momentum: bytes of their momentum.
        gradient: bytes of their gradient that are held at once.
        working: further bytes at the peak: logits, buffers, copies.
        flops: floating-point operations of the matrix products.
        traffic: bytes read and written in the device's memory, if no cache spared any.
        messages: the collectives, in order.
        ranks: how many take part.
    """

    weights: float
    momentum: float
    gradient: float
    working: float
    flops: float
    traffic: float
    messages: tuple[Message, ...] = ()
    ranks: int = 1

    @property
    def memory(self) -> float:
        """Peak bytes."""
        return self.weights + self.momentum + self.gradient + self.working

    @property
    def sent(self) -> float:
        """Bytes that this rank sends when collectives go around a ring."""
        share = (self.ranks - 1) / self.ranks
        return sum((1 + (m.kind == "all_reduce")) * share * m.size for m in self.messages)


def sphereface2(
    people: int,
    dim: int,
    batch: int,
    *,
    ranks: int = 1,
    form: Form = "streaming",
    share: float = 1.0,
    chunk: int | None = None,
    weight_bytes: int = FLOAT,
    momentum_bytes: int = FLOAT,
) -> Cost:
    """Cost of SphereFace2, sharded over ``ranks``.

    Args:
        people: C.
        dim: d.
        batch: B, samples of all ranks.
        ranks: of the process group; W is split over them. "dense" has one.
        form: "dense", "streaming", or "fused" for streaming with a fused SGD.
        share: of the people that a step visits; below 1 for sampled negatives.
        chunk: classes a block; None: the default on a GPU.
        weight_bytes: of an element of W: 4, or 2 for bfloat16.
        momentum_bytes: likewise.
    """
    check_choice("form", form, get_args(Form))
    rows = math.ceil(people / ranks)
    elements = rows * dim
    # A sample comes on top of the batch's own people.
    visited = rows if share == 1 else min(rows, share * rows + batch / ranks)
    gradient = 0.0 if form == "fused" else FLOAT * elements
    chunk = chunk or default_chunk("cuda", batch, dim)
    block = min(chunk, math.ceil(visited))
    if form == "dense":
        logits = FLOAT * batch * rows
        # Forward: logits and a copy; backward: logits and gradient; SGD: two gradients.
        working = max(2 * logits, logits + gradient, 2 * gradient) - gradient
    else:
        narrow = min(weight_bytes, momentum_bytes) < FLOAT
        copies = (form == "fused") * (1 + (momentum_bytes < FLOAT or share < 1) + 2.5 * narrow)
        copies += weight_bytes < FLOAT or share < 1
        samples = (2 if ranks == 1 else 5) * batch * dim
        buffers = FLOAT * (2 * batch * block + copies * block * dim + samples)
        working = buffers if form == "fused" else max(buffers, gradient)
    updated = visited if form == "fused" else rows
    row_passes = ROW_PASSES["sphereface2"] + ROUNDING_PASSES * (
        (weight_bytes < FLOAT) + (momentum_bytes < FLOAT)
    )
    return Cost(
        weights=weight_bytes * elements,
        momentum=momentum_bytes * elements,
        gradient=gradient,
        working=working,
        flops=3 * PRODUCT * batch * visited * dim,
        traffic=FLOAT
        * (
            LOGIT_PASSES["sphereface2"] * batch * visited
            + row_passes * visited * dim
            + SGD_PASSES * updated * dim
        ),
        messages=_gathered(batch, dim, ranks)
        + _messages(ranks, ("reduce_scatter", batch * (dim + 1)), ("all_reduce", 1)),
        ranks=ranks,
    )


def softmax(
    people: int,
    dim: int,
    batch: int,
    *,
    ranks: int = 1,
    form: SoftmaxForm = "kept",
    share: float = 1.0,
    chunk: int | None = None,
) -> Cost:
    """Cost of a softmax loss over cosines (CosFace), sharded over ``ranks``.

    The normaliser must be known before any gradient: all logits of a rank are either kept until
    two further all-reduces (their maxima, then the sums of exponentials with the own logits) are
    through, or computed a second time.

    Args:
        people, dim, batch, ranks, chunk: as for `sphereface2`.
        form: "dense", this package's dense heads, differentiated by autograd, one rank; "streaming"
            computes the logits twice; "kept" keeps them, all operations in place: the least that a
            sharded softmax in separate operations needs.
        share: of the people in a step; below 1 it is Partial-FC, whose gradient and optimiser
            touch the sampled rows only.
    """
    check_choice("form", form, get_args(SoftmaxForm))
    rows = math.ceil(people / ranks)
    visited, elements = share * rows, rows * dim
    gradient = FLOAT * visited * dim
    logits = FLOAT * batch * visited
    chunk = chunk or default_chunk("cuda", batch, dim)
    samples = FLOAT * (2 if ranks == 1 else 5) * batch * dim
    working = {
        # On the way back: four of gradients and log_softmax; then W's gradient; then SGD's second.
        "dense": max(4 * logits, logits + gradient, 2 * gradient) - gradient,
        "streaming": max(FLOAT * 4 * batch * min(chunk, rows) + samples, gradient),
        "kept": max(logits + samples, gradient) + (gradient if share < 1 else 0),
    }[form]
    products = 4 if form == "streaming" else 3
    return Cost(
        weights=FLOAT * elements,
        momentum=FLOAT * elements,
        gradient=gradient,
        working=working,
        flops=products * PRODUCT * batch * visited * dim,
        traffic=FLOAT
        * (LOGIT_PASSES[form] * batch * visited + (ROW_PASSES[form] + SGD_PASSES) * visited * dim),
        messages=_gathered(batch, dim, ranks)
        + _messages(
            ranks,
            ("all_reduce", batch),
            ("all_reduce", 2 * batch),
            ("reduce_scatter", batch * dim),
        ),
        ranks=ranks,
    )


def replicated(alone: Cost, ranks: int) -> Cost:
    """A head copied to every rank, as DistributedDataParallel does.

    Args:
        alone: the cost of one rank with its own samples and all people.
        ranks: copies, whose gradients are averaged.
    """
    return replace(alone, ranks=ranks, messages=(Message("all_reduce", alone.gradient),))


def _gathered(batch: int, dim: int, ranks: int) -> tuple[Message, ...]:
    """Every rank's number of samples (int64), then embeddings with a label (int64) each."""
    return _messages(ranks, ("all_gather", 2 * ranks), ("all_gather", batch * (dim + 2)))


def _messages(ranks: int, *found: tuple[Kind, float]) -> tuple[Message, ...]:
    if ranks == 1:
        return ()
    return tuple(Message(kind, FLOAT * elements) for kind, elements in found)
