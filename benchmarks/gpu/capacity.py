"""The most people for whom one device takes an exact step: forward, backward and update.

Prototypes and their momentum are kept in bfloat16 with stochastic rounding, the products are made
in bfloat16, and the update is part of the pass over the blocks, so that nothing else of the size of
W is held.
"""

from __future__ import annotations

import statistics

from gpu import measure
from gpu.heads import DIM, HALF, Inputs
from gpu.measure import Part

BATCH = 512
PEOPLE = (10_000_000, 30_000_000, 1_000_000)


def run(part: Part) -> None:
    batch, dim = (16, 16) if part.tiny else (BATCH, DIM)
    for people in (1_000, 3_000) if part.tiny else PEOPLE:
        if part.left < 5 and not part.tiny:
            part.record(people=people, error="no time was left")
            continue
        with part.measuring(people=people, batch=batch, dim=dim) as row:
            row |= one(part, people, batch, dim)


def one(part: Part, people: int, batch: int, dim: int) -> measure.Row:
    """A training step of the head alone."""
    with measure.matmul_precision("high"):
        step = Inputs(batch, dim, people, part.device).fused(**HALF)
        step()
        peak = measure.peak_gib(step, part.device)
        seconds = 0 if part.tiny else 2
        (times,) = measure.in_turns({"": step}, part.device, seconds=seconds, warm_up=0).values()
    return {
        "seconds a step": statistics.median(times) / 1e3,
        "ns a person": 1e6 * statistics.median(times) / people,
        "peak GiB": peak,
        "W and momentum GiB": 2 * 2 * people * dim / 2**30,
    }
