"""How good a calibration is: what its log-likelihood ratios cost, how true its probabilities are.

Genuine and impostor pairs count as half of the whole each, whatever their numbers, so that the
figures of different sets compare.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sphereface2.evaluation.calibration import Calibration, Method, balance, pool
from sphereface2.evaluation.verification import check_both

BINS = 15


@dataclass(frozen=True)
class CalibrationQuality:
    """A calibration's figures on pairs.

    Attributes:
        method: of the calibration.
        ece: expected calibration error, in [0, 1].
        cllr: cost of its log-likelihood ratios, in bits.
        min_cllr: the least that any rising curve over these scores could cost.
        far, tar: by the FAR wanted, the shares of impostor and of genuine pairs that its threshold
            accepts.
        fitted_here: whether it was fitted on these pairs; its figures are then too optimistic.
    """

    method: Method
    ece: float
    cllr: float
    min_cllr: float
    far: dict[float, float]
    tar: dict[float, float]
    fitted_here: bool


def cllr(llrs: np.ndarray, same: np.ndarray) -> float:
    """Cost of log-likelihood ratios in bits (Brümmer and du Preez, 2006).

    ½ · mean over genuine pairs of log2(1 + exp(-llr)) + ½ · mean over impostor pairs of
    log2(1 + exp(llr)). 0 is perfect, 1 is what knowing nothing costs (every llr 0), more than 1
    is worse than that.

    Args:
        llrs: (P,) natural logarithms; may be infinite.
        same: bool (P,), True for genuine pairs.

    Examples:
        >>> cllr(np.array([0.0, 0.0]), np.array([True, False]))
        1.0
    """
    llrs, same = np.asarray(llrs, np.float64), np.asarray(same, bool)
    genuine = np.logaddexp(0, -llrs[same]).mean()
    impostor = np.logaddexp(0, llrs[~same]).mean()
    return float((genuine + impostor) / (2 * np.log(2)))


def min_cllr(scores: np.ndarray, same: np.ndarray) -> float:
    """The least `cllr` that any rising curve over the scores (P,) reaches on these pairs.

    It is found by the pool-adjacent-violators algorithm and measures how well the scores tell
    people apart; what a calibration costs beyond it is the calibration's own fault.

    Examples:
        >>> min_cllr(np.array([0.9, 0.1]), np.array([True, False]))
        0.0
    """
    scores, same = check_both(scores, same)
    _, p, index = pool(scores, same)
    with np.errstate(divide="ignore"):
        return cllr((np.log(p) - np.log1p(-p))[index], same)


@dataclass(frozen=True)
class Reliability:
    """Pairs grouped by their probability, B bins of equal width; empty bins are left out.

    Attributes:
        predicted: (B,) mean probability.
        observed: (B,) share of genuine pairs, both kinds counted as half of the whole.
        low, high: (B,) Wilson's 95 % interval of ``observed``.
        share: (B,) of the whole; sums to 1.
        pairs: int (B,) pairs in each.
    """

    predicted: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    share: np.ndarray
    pairs: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error: mean distance of ``predicted`` and ``observed``."""
        return float(self.share @ np.abs(self.predicted - self.observed))


def reliability(probabilities: np.ndarray, same: np.ndarray, bins: int = BINS) -> Reliability:
    """Compare probabilities (P,) at prior ½ with the truth.

    Examples:
        >>> same = np.array([True, True, False, False])
        >>> found = reliability(np.array([0.75, 0.75, 0.25, 0.25]), same)
        >>> found.observed.tolist(), found.ece
        ([0.0, 1.0], 0.25)
    """
    p, same = check_both(probabilities, same)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"probabilities must lie in [0, 1], got {p.min():g} to {p.max():g}.")
    where = np.minimum((p * bins).astype(np.int64), bins - 1)
    weight = balance(same)

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(where, values, minlength=bins)

    share, pairs = total(weight), np.bincount(where, minlength=bins)
    filled = pairs > 0
    share, pairs = share[filled], pairs[filled]
    # Wilson's interval of the raw share, its odds then brought to as many pairs of either kind.
    z = 1.959964
    raw = total(same.astype(float))[filled] / pairs
    centre = (raw + z**2 / (2 * pairs)) / (1 + z**2 / pairs)
    half = z / (1 + z**2 / pairs) * np.sqrt(raw * (1 - raw) / pairs + z**2 / (4 * pairs**2))
    ratio = (~same).sum() / same.sum()

    def balanced(q: np.ndarray) -> np.ndarray:
        q = q.clip(0, 1)
        return q * ratio / (q * ratio + 1 - q)

    return Reliability(
        predicted=total(weight * p)[filled] / share,
        observed=total(weight * same)[filled] / share,
        low=balanced(centre - half),
        high=balanced(centre + half),
        share=share,
        pairs=pairs,
    )


def quality(
    scores: np.ndarray, same: np.ndarray, calibration: Calibration, *, fitted_here: bool = False
) -> CalibrationQuality:
    """A calibration's figures on pairs: scores (P,), same bool (P,)."""
    thresholds = {far: one.threshold for far, one in calibration.thresholds.items()}
    return CalibrationQuality(
        method=calibration.method,
        ece=reliability(calibration.probability(scores), same).ece,
        cllr=cllr(calibration.llr(scores), same),
        min_cllr=min_cllr(scores, same),
        far={far: float(np.mean(scores[~same] >= t)) for far, t in thresholds.items()},
        tar={far: float(np.mean(scores[same] >= t)) for far, t in thresholds.items()},
        fitted_here=fitted_here,
    )
