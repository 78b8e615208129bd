"""Intervals of a study's figures: over seeds by Student's t, over people by the bootstrap.

The resamples themselves are drawn by `sphereface2.evaluation.bootstrap`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from sphereface2.evaluation.bootstrap import LEVEL, Interval, interval

REPLICATES = 2000
SEED = 0


@dataclass(frozen=True)
class Figure:
    """One figure of one cell.

    Attributes:
        value: on the people or pairs as they are.
        replicates: float64 (R,), on R resamples of the people; None where it was not resampled.
        units: names what was resampled: figures with equal ``units`` were resampled alike.
    """

    value: float
    replicates: np.ndarray | None = None
    units: str = ""


Series = Mapping[int, Figure]
"""One figure of one arm under one condition, by seed."""


@dataclass(frozen=True)
class Contrast:
    """A weighted sum of figures, such as a difference, over the seeds that all of them have.

    Attributes:
        value: mean over seeds.
        people: 95 % bootstrap interval over people, or None.
        seeds: 95 % t-interval over seeds, or None with one seed.
        count: number of seeds.
    """

    value: float
    people: Interval | None
    seeds: Interval | None
    count: int

    @property
    def marked(self) -> bool:
        """Whether the interval over people excludes 0."""
        return self.people is not None and not self.people[0] <= 0 <= self.people[1]


def half_width(values: Sequence[float]) -> float | None:
    """Half the width of Student's 95 % interval of the mean; None for fewer than two values."""
    n = len(values)
    if n < 2:
        return None
    return float(stdtrit(n - 1, (1 + LEVEL) / 2) * np.std(values, ddof=1) / np.sqrt(n))


def contrast(*terms: tuple[float, Series]) -> Contrast | None:
    """Σ weight · figure, paired by seed; None where no seed has all of the figures.

    The replicates of each seed are averaged like the figures themselves, so the interval over
    people is that of the mean over these very seeds.
    """
    seeds = [seed for seed in terms[0][1] if all(seed in series for _, series in terms)]
    if not seeds:
        return None
    values = [sum(weight * series[seed].value for weight, series in terms) for seed in seeds]
    mean, half = float(np.mean(values)), half_width(values)
    used = [(weight, series[seed]) for weight, series in terms for seed in seeds]
    people = None
    if len({figure.units for _, figure in used}) == 1:
        parts = [weight * f.replicates for weight, f in used if f.replicates is not None]
        if len(parts) == len(used):
            people = interval(np.sum(parts, axis=0) / len(seeds))
    return Contrast(mean, people, None if half is None else (mean - half, mean + half), len(seeds))


def spread(values: np.ndarray) -> float:
    """Standard deviation (``ddof=1``) of those values that exist; nan for fewer than two."""
    finite = values[np.isfinite(values)]
    return float(np.std(finite, ddof=1)) if len(finite) > 1 else float("nan")


def spreads(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`spread` in each resample: counts (R, people), values (people,) -> (R,)."""
    finite = np.isfinite(values)
    counts, values = counts[:, finite], values[finite]
    centred = values - values.mean() if len(values) else values
    n = counts.sum(axis=1)
    n[n < 2] = np.nan
    mean, square = counts @ centred / n, counts @ centred**2 / n
    return np.sqrt(np.maximum(square - mean**2, 0) * n / (n - 1))


def gini(values: np.ndarray) -> float:
    """Gini coefficient of values >= 0: 0 if all are equal, 1 - 1/n if one has everything."""
    return float(ginis(np.ones((1, len(values))), values)[0])


def ginis(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """`gini` in each resample: counts (R, people), values (people,) -> (R,); nan if all are 0."""
    order = np.argsort(values, kind="stable")
    counts, values = counts[:, order], values[order]
    # The ranks 1 … n that copies of a person take add up to c · (ranks before) + c (c + 1) / 2.
    before = np.cumsum(counts, axis=1)
    n = before[:, -1].copy()
    before -= counts
    ranks = (counts * (before + (counts + 1) / 2)) @ values
    total = counts @ values
    total[total == 0] = np.nan
    return (2 * ranks - (n + 1) * total) / (n * total)
