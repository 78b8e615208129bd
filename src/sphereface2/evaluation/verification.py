"""Verification metrics on scored pairs.

Throughout, a pair is accepted ("same person") when its score is at least the threshold; FAR is the
share of mismatched pairs accepted, TAR the share of matched pairs accepted. Every metric depends
on the scores only through their order, except the thresholds it reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sphereface2.errors import UserError

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)


@dataclass(frozen=True)
class FoldResult:
    """K-fold accuracy.

    Attributes:
        accuracy: mean over folds, 0 to 1.
        std: standard deviation over folds, of the population (``ddof=0``), as the field reports it.
        thresholds: float64 (K,), the threshold that each fold was judged with.
        per_fold: float64 (K,), the accuracy on each fold.
    """

    accuracy: float
    std: float
    thresholds: np.ndarray
    per_fold: np.ndarray


@dataclass(frozen=True)
class Tar:
    """TAR at one FAR.

    Attributes:
        far: the FAR asked for.
        tar: share of matched pairs accepted; None where the set cannot tell (``far`` below one
            mismatched pair in all of them).
        threshold: the smallest observed score at which the FAR is at most ``far``; None where the
            set cannot tell or no score qualifies.
        ci: bounds of the 95 % bootstrap interval, or None.
    """

    far: float
    tar: float | None
    threshold: float | None
    ci: tuple[float, float] | None = None


def far_key(far: float) -> str:
    """The spelling of a FAR in reports: 0.001 -> "1e-3"."""
    mantissa, exponent = f"{far:e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def pair_scores(embeddings: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cosine of each pair: embeddings (N, d) of length 1, pairs (P, 2) -> float64 (P,)."""
    scores = np.empty(len(pairs))
    for start in range(0, len(pairs), 16384):
        a, b = pairs[start : start + 16384].T
        scores[start : start + 16384] = np.einsum(
            "pd,pd->p", embeddings[a].astype(np.float64), embeddings[b].astype(np.float64)
        )
    return scores


def _check(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, same = np.asarray(scores, np.float64), np.asarray(same, bool)
    if scores.shape != same.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and same {same.shape} must be equally long rows.")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite.")
    return scores, same


def check_both(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 and verdicts as bool; UserError unless there are pairs of both kinds."""
    scores, same = _check(scores, same)
    if same.all() or not same.any():
        raise UserError("the set needs matched and mismatched pairs, it has only one kind")
    return scores, same


def kfold_accuracy(scores: np.ndarray, same: np.ndarray, folds: np.ndarray) -> FoldResult:
    """K-fold verification accuracy, LFW's protocol (View 2).

    For each fold the threshold is the one of highest accuracy on the other folds, and is then
    applied to the fold. The candidates are all distinct scores of the other folds, and one just
    above the highest of them (accept nothing); of equally accurate ones the lowest is taken.
    O(P log P + K P).

    Args:
        scores: (P,), higher = more alike.
        same: bool (P,).
        folds: int (P,), any K >= 2 distinct numbers; a single one is a UserError.
    """
    scores, same = _check(scores, same)
    folds = np.asarray(folds)
    if folds.shape != scores.shape:
        raise ValueError(f"folds {folds.shape} and scores {scores.shape} must be equally long.")
    numbers = np.unique(folds)
    if len(numbers) < 2:
        raise UserError(
            f"{len(scores)} pairs are too few for 10-fold accuracy: at least 10 are needed"
        )

    order = np.argsort(scores, kind="stable")
    sorted_scores, sorted_same, sorted_folds = scores[order], same[order], folds[order]
    thresholds, per_fold = np.empty(len(numbers)), np.empty(len(numbers))
    for k, number in enumerate(numbers):
        train = sorted_folds != number
        s, y = sorted_scores[train], sorted_same[train]
        # correct[i]: right verdicts when exactly the pairs from the i-th on are accepted.
        rejected = np.concatenate([[0], np.cumsum(~y)])
        accepted = y.sum() - np.concatenate([[0], np.cumsum(y)])
        correct = rejected + accepted
        # Equal scores stand or fall together: only the first of a run can be the threshold.
        candidate = np.concatenate([[True], s[1:] != s[:-1], [True]])
        best = int(np.argmax(np.where(candidate, correct, -1)))
        thresholds[k] = s[best] if best < len(s) else np.nextafter(s[-1], np.inf)
        test = folds == number
        per_fold[k] = np.mean((scores[test] >= thresholds[k]) == same[test])
    return FoldResult(float(per_fold.mean()), float(per_fold.std()), thresholds, per_fold)


def roc(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The full ROC: (far, tar, thresholds), thresholds descending from infinity.

    One point for each distinct score, none dropped, starting at (0, 0).
    """
    scores, same = check_both(scores, same)
    order = np.argsort(-scores, kind="stable")
    s, y = scores[order], same[order]
    last = np.flatnonzero(np.append(s[1:] != s[:-1], True))  # the end of each run of equal scores
    tar = np.cumsum(y)[last] / y.sum()
    far = np.cumsum(~y)[last] / (~y).sum()
    return (
        np.concatenate([[0.0], far]),
        np.concatenate([[0.0], tar]),
        np.concatenate([[np.inf], s[last]]),
    )


def auc(scores: np.ndarray, same: np.ndarray) -> float:
    """Area under the ROC: the chance that a matched pair outscores a mismatched one (ties half)."""
    far, tar, _ = roc(scores, same)
    return float(np.trapezoid(tar, far))


def eer(scores: np.ndarray, same: np.ndarray) -> float:
    """Equal error rate: where FAR = 1 - TAR on the ROC, linear between its points."""
    far, tar, _ = roc(scores, same)
    return float(_eer(far[:, None], tar[:, None])[0])


LEVEL = 0.95


@dataclass(frozen=True)
class Intervals:
    """Bootstrap percentile intervals at `LEVEL`, as (low, high).

    Attributes:
        tar: one a FAR; None where `tar_at_far` gives None.
        eer, auc: of those figures.
        over: "people" or "pairs", what was resampled.
        replicates: how many resamples counted; those without a matched or without a mismatched
            pair do not.
    """

    tar: list[tuple[float, float] | None]
    eer: tuple[float, float]
    auc: tuple[float, float]
    over: str
    replicates: int


def bootstrap(
    scores: np.ndarray,
    same: np.ndarray,
    fars: Sequence[float] = FARS,
    *,
    people: np.ndarray | None = None,
    replicates: int = 1000,
    seed: int = 0,
) -> Intervals:
    """Intervals of TAR at FAR, EER and AUC.

    Pairs that share a person are not independent: somebody who is hard to tell apart spoils many
    pairs at once. So people are resampled where they are known: a replicate draws as many people as
    the set has, with replacement, and where person a was drawn c_a times a matched pair of a counts
    c_a times and a mismatched pair (a, b) counts c_a c_b times; two copies of one person make no
    mismatched pair. The threshold of each FAR is found anew in each replicate, so the interval
    holds its uncertainty too. For mismatched pairs that hardly share people the product of counts
    makes the intervals wider than need be (Owen 2007, "The pigeonhole bootstrap"), not narrower.

    Args:
        scores: (P,), higher = more alike.
        same: bool (P,).
        people: int (P, 2), the two identities of each pair; None resamples pairs instead.
        replicates: number of resamples.
        seed: of the resampling.

    Raises:
        UserError: no resample had pairs of both kinds.
    """
    scores, same = check_both(scores, same)
    order = np.argsort(-scores, kind="stable")
    s, y = scores[order], same[order]
    last = np.flatnonzero(np.append(s[1:] != s[:-1], True))
    drawn = np.arange(len(s))[:, None] if people is None else np.asarray(people)[order]
    if people is not None:
        drawn = np.unique(drawn, return_inverse=True)[1].reshape(-1, 2)
    units = int(drawn.max()) + 1
    rng = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(s))
    tars, eers, aucs = [], [], []
    for start in range(0, replicates, chunk):
        size = min(chunk, replicates - start)
        # (units, size): how often each was drawn.
        counts = np.stack(
            [np.bincount(rng.integers(units, size=units), minlength=units) for _ in range(size)], 1
        ).astype(np.float64)
        weights = counts[drawn[:, 0]]
        if people is not None:
            weights[~y] *= counts[drawn[~y, 1]]
        tar = np.cumsum(np.where(y[:, None], weights, 0), axis=0)[last]
        far = np.cumsum(np.where(y[:, None], 0, weights), axis=0)[last]
        valid = (tar[-1] > 0) & (far[-1] > 0)
        zero = np.zeros((1, int(valid.sum())))
        tar = np.concatenate([zero, tar[:, valid] / tar[-1, valid]])
        far = np.concatenate([zero, far[:, valid] / far[-1, valid]])
        eers.append(_eer(far, tar))
        aucs.append(np.trapezoid(tar, far, axis=0))
        column = np.arange(far.shape[1])
        tars.append(np.stack([tar[(far <= f).sum(axis=0) - 1, column] for f in fars]))
    eer_r, auc_r, tar_r = np.concatenate(eers), np.concatenate(aucs), np.concatenate(tars, axis=1)
    if not len(eer_r):
        raise UserError("the set is too small for intervals: no resample has both kinds of pair")

    impostors = int((~same).sum())
    return Intervals(
        tar=[
            _interval(row) if allowed_accepts(far, impostors) else None
            for far, row in zip(fars, tar_r, strict=True)
        ],
        eer=_interval(eer_r),
        auc=_interval(auc_r),
        over="pairs" if people is None else "people",
        replicates=len(eer_r),
    )


def ratio_intervals(
    hits: np.ndarray, trials: np.ndarray, replicates: int, rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Bootstrap interval at `LEVEL` of each ratio of sums over people, drawn with replacement.

    Args:
        hits: (K, people), what each of K ratios counts for each person.
        trials: (people,), out of how many; who has none is not drawn.
        replicates: number of resamples.
        rng: draws them.
    """
    has = np.flatnonzero(trials)
    counted = np.concatenate([hits[:, has], trials[None, has]]).astype(np.float64)
    totals = np.empty((replicates, len(counted)))
    for r in range(replicates):
        totals[r] = counted @ np.bincount(rng.integers(len(has), size=len(has)), minlength=len(has))
    return [_interval(ratio) for ratio in (totals[:, :-1] / totals[:, -1:]).T]


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _eer(far: np.ndarray, tar: np.ndarray) -> np.ndarray:
    """EER of each column of (points, replicates) curves that start at 0 and end at 1."""
    gap = far - (1 - tar)  # from -1 up to 1, never falling
    after = np.argmax(gap >= 0, axis=0)
    column = np.arange(far.shape[1])
    g0, g1 = gap[after - 1, column], gap[after, column]
    f0, f1 = far[after - 1, column], far[after, column]
    return f0 + (f1 - f0) * (-g0 / (g1 - g0))


def allowed_accepts(far: float, impostors: int) -> int:
    """The largest k with ``k / impostors <= far``, free of rounding in ``far * impostors``."""
    k = min(int(far * impostors), impostors)
    while k < impostors and (k + 1) / impostors <= far:
        k += 1
    while k > 0 and k / impostors > far:
        k -= 1
    return k


def tar_at_far(scores: np.ndarray, same: np.ndarray, fars: Sequence[float] = FARS) -> list[Tar]:
    """TAR at each FAR, exact on the observed scores, without interpolation.

    The threshold is the smallest observed score t with FAR(score >= t) <= far. With k the largest
    number of mismatched pairs that ``far`` allows, the pairs accepted are those that score strictly
    above the (k+1)-th highest mismatched score. A FAR below 1 / (number of mismatched pairs),
    k = 0, cannot be measured on this set and is reported as None.
    """
    scores, same = check_both(scores, same)
    impostors = np.sort(scores[~same])[::-1]
    ordered = np.sort(scores)
    genuine = np.sort(scores[same])
    results = []
    for far in fars:
        if not 0 < far <= 1:
            raise ValueError(f"a FAR lies in (0, 1], not {far}.")
        k = allowed_accepts(far, len(impostors))
        if k == 0:
            results.append(Tar(far, None, None))
            continue
        bound = impostors[k] if k < len(impostors) else -np.inf
        accepted = len(genuine) - np.searchsorted(genuine, bound, side="right")
        first = np.searchsorted(ordered, bound, side="right")
        threshold = float(ordered[first]) if first < len(ordered) else None
        results.append(Tar(far, float(accepted / len(genuine)), threshold))
    return results
