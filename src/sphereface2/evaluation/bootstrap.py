"""The bootstrap over people, from which every interval over people comes.

Pairs that share a person are not independent: somebody who is hard to tell apart spoils many pairs
at once. So people are resampled where they are known: a replicate draws as many people as the set
has, with replacement, and where person a was drawn c_a times

- what person a counts alone counts c_a times,
- a genuine pair of a counts c_a times,
- an impostor pair (a, b) counts c_a c_b times; two copies of one person make no impostor pair.

For impostor pairs that hardly share people the product of counts makes intervals wider than need be
(Owen 2007, "The pigeonhole bootstrap"), not narrower. The bounds are percentiles of the replicates.

A TAR at a FAR is that at a threshold, which other people would move. Where the pairs are kept, each
resample finds its own threshold. Where they are not, `at_own_threshold` knows to first order what
a resample's own threshold would change, from sums by person.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
"""Coverage of all intervals of the package."""
Interval = tuple[float, float]


class Bootstrap(NamedTuple):
    """Which resamples intervals of 95 % are made from.

    Attributes:
        replicates: how many; 0 leaves the intervals out.
        seed: that draws them.
    """

    replicates: int = 1000
    seed: int = 0


USUAL, NONE = Bootstrap(), Bootstrap(0)

_NUMBERS = 4_000_000  # that a chunk of replicates holds


def draws(
    units: int, replicates: int, seed: int = 0, *, numbers: int | None = None
) -> Iterator[np.ndarray]:
    """How often each unit is drawn in each resample, a chunk of resamples at a time.

    The same seed draws the same resamples, however they are cut into chunks.

    Args:
        units: people, or pairs, to draw from; each resample draws as many.
        replicates: R, the number of resamples.
        seed: of the random numbers.
        numbers: what the caller computes for each resample, by default ``units`` numbers: chunks
            are as large as a few million of them allow.

    Yields:
        float64 (r, units), whole numbers whose rows sum to ``units``.

    Examples:
        >>> [chunk.shape for chunk in draws(5, 3)]
        [(3, 5)]
    """
    rng = np.random.default_rng(seed)
    chunk = max(1, _NUMBERS // max(units, numbers or 0))
    for start in range(0, replicates, chunk):
        size = min(chunk, replicates - start)
        drawn = rng.integers(units, size=(size, units)) + np.arange(size)[:, None] * units
        counts = np.bincount(drawn.ravel(), minlength=size * units)
        yield counts.reshape(size, units).astype(np.float64)


def pair_weights(counts: np.ndarray, same: np.ndarray, people: np.ndarray | None) -> np.ndarray:
    """How often each pair counts in each resample.

    Args:
        counts: (R, units) of `draws`.
        same: bool (P,), True for genuine pairs.
        people: int (P, 2) in [0, units), the two people of each pair; None where the pairs
            themselves were drawn (units = P).

    Returns:
        (R, P): c_a for genuine pairs of a, c_a c_b for impostor pairs (a, b).

    Examples:
        >>> counts, people = np.array([[2.0, 0, 3]]), np.array([[0, 0], [0, 2]])
        >>> pair_weights(counts, np.array([True, False]), people)
        array([[2., 6.]])
    """
    if people is None:
        return counts
    weights: np.ndarray = counts[:, people[:, 0]]
    weights[:, ~same] *= counts[:, people[~same, 1]]
    return weights


def ratios(counts: np.ndarray, hits: np.ndarray, trials: np.ndarray) -> np.ndarray:
    """Sum of ``hits`` over sum of ``trials`` in each resample.

    Args:
        counts: (R, people) of `draws`.
        hits: (people,) or (people, K), what each person counts.
        trials: (people,), out of how many.

    Returns:
        (R,) or (R, K); nan in a resample without a trial.
    """
    total = counts @ np.asarray(trials, np.float64)
    total[total == 0] = np.nan
    return ((counts @ np.asarray(hits, np.float64)).T / total).T


def interval(replicates: np.ndarray) -> Interval | None:
    """The percentile interval at `LEVEL` of the finite ones of ``replicates`` (R,).

    Returns:
        (low, high), or None where no replicate is finite.

    Examples:
        >>> interval(np.array([7.0, np.nan, 7.0]))
        (7.0, 7.0)
    """
    finite = replicates[np.isfinite(replicates)]
    if not len(finite):
        return None
    low, high = np.quantile(finite, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def at_own_threshold(
    counts: np.ndarray,
    hits: np.ndarray,
    trials: np.ndarray,
    accepted: np.ndarray,
    impostors: np.ndarray,
    *,
    sides: int = 2,
    most: np.ndarray | None = None,
) -> np.ndarray:
    """TAR at each of K FARs in each resample, to first order at the resample's own threshold.

    At the set's threshold a resample has another FAR: to first order in c,

        FAR_c / FAR = ((Σ c A / Σ A) / (Σ c I / Σ I))²

    with A_p of the I_p impostor pairs of person p accepted. Squared, since a pair has two people:
    the linear part of a U-statistic is twice that of a person's mean (Hoeffding 1948). The asked
    FAR is got back along the set's ROC: TAR_c - dTAR/dlogFAR · log(FAR_c / FAR), within [0, 1].
    The slope is taken between the neighbouring FARs of the K, at the ends from one side: there it
    is too steep where TAR falls ever slower, and the interval wider for it.

    Where a resample draws no accepted pair its threshold may lie anywhere below, so TAR goes to its
    limit, 1 or what ``most`` says, where the ROC rises: an upper bound there says that the false
    accepts hang on too few people. Where there is no slope, as of a single FAR, the threshold is
    kept.

    Args:
        counts: (R, people) of `draws`.
        hits: (people, K), accepted genuine pairs at the set's thresholds.
        trials: (people,), genuine pairs.
        accepted: (people, K), A; a pair counts for each of its people.
        impostors: (people,), I.
        sides: people to an impostor trial, the exponent: 2 to a pair, 1 to a probe.
        most: (people,), what ``hits`` would be without a threshold; default: ``trials``.

    Returns:
        (R, K); nan in a resample without a genuine or without an impostor trial.
    """
    slopes = _slopes(accepted.sum(axis=0), hits.sum(axis=0) / trials.sum())
    again, whole = ratios(counts, accepted, impostors), accepted.sum(axis=0) / impostors.sum()
    change, known = np.zeros_like(again), slopes != 0
    with np.errstate(divide="ignore"):  # the limit
        change[:, known] = sides * np.log(again[:, known] / whole[known]) * slopes[known]
    limit = 1 if most is None else ratios(counts, most, trials)[:, None]
    return np.clip(ratios(counts, hits, trials) - change, 0, limit)


def _slopes(accepted: np.ndarray, tar: np.ndarray) -> np.ndarray:
    """dTAR/dlogFAR at each of K points of an ROC; 0 where none is accepted."""
    slopes = np.zeros(len(tar))
    known = np.flatnonzero(accepted)
    counts, first, at = np.unique(accepted[known], return_index=True, return_inverse=True)
    if len(counts) > 1:
        # As np.gradient, of differences: what rounding leaves of a flat ROC has no limit.
        steps = np.diff(np.log(counts))
        rises = np.diff(tar[known[first]]) / steps
        within = (rises[:-1] * steps[1:] + rises[1:] * steps[:-1]) / (steps[:-1] + steps[1:])
        slopes[known] = np.concatenate([rises[:1], within, rises[-1:]])[at]
    return slopes


def own_threshold_intervals(
    hits: np.ndarray,
    trials: np.ndarray,
    accepted: np.ndarray,
    impostors: np.ndarray,
    bootstrap: Bootstrap,
    *,
    sides: int = 2,
    most: np.ndarray | None = None,
) -> list[Interval | None]:
    """The interval of each of K TARs, each resample's to first order at its own threshold.

    Args:
        hits, accepted: (K, people), else as in `at_own_threshold`.
        trials, impostors, sides, most: as there.
        bootstrap: over people, with resamples.
    """
    parts = [
        at_own_threshold(counts, hits.T, trials, accepted.T, impostors, sides=sides, most=most)
        for counts in draws(len(trials), *bootstrap)
    ]
    return [interval(values) for values in np.concatenate(parts).T]


def ratio_intervals(
    hits: np.ndarray, trials: np.ndarray, bootstrap: Bootstrap
) -> list[Interval | None]:
    """The interval of each of K ratios of sums over people.

    Args:
        hits: (K, people), what each of the ratios counts for each person.
        trials: (people,), out of how many; people without a trial are not drawn.
        bootstrap: over people; without resamples each interval is None.
    """
    if not bootstrap.replicates:
        return [None] * len(hits)
    tried = np.flatnonzero(trials)
    parts = [
        ratios(counts, hits[:, tried].T, trials[tried]) for counts in draws(len(tried), *bootstrap)
    ]
    return [interval(values) for values in np.concatenate(parts).T]
