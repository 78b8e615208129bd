"""How good a calibration is: what its log-likelihood ratios cost, how true its probabilities are.

Matched and mismatched pairs count as half of the whole each, whatever their numbers, so that the
figures of different sets compare.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sphereface2.evaluation.verification import check_both, far_key

if TYPE_CHECKING:
    from sphereface2.recognition.calibration import Calibration

BINS = 15


def cllr(llrs: np.ndarray, same: np.ndarray) -> float:
    """Cost of log-likelihood ratios in bits (Brümmer and du Preez, 2006).

    ½ · mean over matched pairs of log2(1 + exp(-llr)) + ½ · mean over mismatched pairs of
    log2(1 + exp(llr)). 0 is perfect, 1 is what knowing nothing costs (every llr 0), more than 1
    is worse than that.

    Args:
        llrs: (P,) natural logarithms; may be infinite.
        same: bool (P,).
    """
    llrs, same = np.asarray(llrs, np.float64), np.asarray(same, bool)
    matched = np.logaddexp(0, -llrs[same]).mean()
    mismatched = np.logaddexp(0, llrs[~same]).mean()
    return float((matched + mismatched) / (2 * np.log(2)))


def min_cllr(scores: np.ndarray, same: np.ndarray) -> float:
    """The least `cllr` that any rising curve over the scores (P,) reaches on these pairs.

    It is found by the pool-adjacent-violators algorithm and measures how well the scores tell
    people apart; what a calibration costs beyond it is the calibration's own fault.
    """
    from sklearn.isotonic import IsotonicRegression

    scores, same = check_both(scores, same)
    weight = np.where(same, 0.5 / same.sum(), 0.5 / (~same).sum())
    regression = IsotonicRegression(y_min=0, y_max=1).fit(scores, same.astype(float), weight)
    p = regression.predict(scores)
    with np.errstate(divide="ignore"):
        return cllr(np.log(p) - np.log1p(-p), same)


@dataclass(frozen=True)
class Reliability:
    """Pairs grouped by their probability, B bins of equal width; empty bins are left out.

    Attributes:
        predicted: (B,) mean probability.
        observed: (B,) share of matched pairs, both kinds counted as half of the whole.
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
    """Compare probabilities (P,) at prior ½ with what is so."""
    p, same = check_both(probabilities, same)
    where = np.minimum((p * bins).astype(np.int64), bins - 1)
    weight = np.where(same, 0.5 / same.sum(), 0.5 / (~same).sum())

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(where, values, minlength=bins)

    share, pairs = total(weight), np.bincount(where, minlength=bins)
    filled = pairs > 0
    share, pairs = share[filled], pairs[filled]
    matched = total(same.astype(float))[filled]
    # Wilson's interval of the raw share, its odds then brought to as many pairs of either kind.
    z = 1.959964
    raw = matched / pairs
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


def quality(scores: np.ndarray, same: np.ndarray, calibration: Calibration) -> dict[str, Any]:
    """A calibration's figures on pairs, JSON-able.

    Keys: ``method``, ``ece``, ``cllr``, ``min_cllr``, and ``far`` and ``tar``: by the FAR wanted,
    the shares of mismatched and of matched pairs that its threshold accepts.
    """
    thresholds = {far_key(far): one.threshold for far, one in calibration.thresholds.items()}
    return {
        "method": calibration.method,
        "ece": reliability(calibration.probability(scores), same).ece,
        "cllr": cllr(calibration.llr(scores), same),
        "min_cllr": min_cllr(scores, same),
        "far": {key: float(np.mean(scores[~same] >= t)) for key, t in thresholds.items()},
        "tar": {key: float(np.mean(scores[same] >= t)) for key, t in thresholds.items()},
    }
