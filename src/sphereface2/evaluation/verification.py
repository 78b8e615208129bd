"""Verification metrics on scored pairs.

Throughout, a pair is accepted ("same person") when its score is at least the threshold; FAR is the
share of impostor pairs accepted, TAR the share of genuine pairs accepted. Every metric depends on
the scores only through their order, except the thresholds it reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sphereface2.data.source import check_indices
from sphereface2.errors import UserError, counted
from sphereface2.evaluation.bootstrap import NONE, Bootstrap, draws, interval, pair_weights
from sphereface2.evaluation.results import Estimate, OperatingPoint, Resampling

FARS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
#: Cosines in float32 that differ by no more are equal: those of copies of one image do in their
#: last bits, as their products come from blocks of other shapes.
ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class Folds:
    """K-fold accuracy.

    Attributes:
        folds: K.
        accuracy: mean over folds, 0 to 1.
        accuracy_std: standard deviation over folds, of the population (``ddof=0``), as the field
            reports it.
        threshold: mean over folds.
        fold_accuracy, fold_threshold: K of each, the threshold being what the fold was judged with.
    """

    folds: int
    accuracy: float
    accuracy_std: float
    threshold: float
    fold_accuracy: tuple[float, ...]
    fold_threshold: tuple[float, ...]


def embedding_rows(embeddings: np.ndarray) -> np.ndarray:
    """Embeddings (N, d) as they are; UserError unless each is of length 1, or 0.

    Inner products of others are no cosines, and their figures look like any.

    Examples:
        >>> embedding_rows(np.array([[3.0, 4.0]]))
        Traceback (most recent call last):
        sphereface2.errors.UserError: embedding 0 has the length 5; expected embeddings of length \
1: divide each by its norm
    """
    rows = np.asarray(embeddings)
    if rows.ndim != 2:
        raise UserError(f"embeddings must have the shape (N, d), got {rows.shape}")
    lengths = np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))
    if not np.isfinite(lengths).all():
        raise UserError("the embeddings hold NaN or infinite values")
    wrong = np.flatnonzero((np.abs(lengths - 1) > 0.01) & (lengths > 0))
    if len(wrong):
        raise UserError(
            f"embedding {wrong[0]} has the length {lengths[wrong[0]]:g}; expected embeddings of "
            "length 1: divide each by its norm"
        )
    return rows


def pair_scores(embeddings: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Cosine of each pair: embeddings (N, d) of length 1, pairs (P, 2) -> float64 (P,).

    Raises:
        UserError: embeddings of another length, or pairs of another shape or of no such row.

    Examples:
        >>> pair_scores(np.array([[1.0, 0], [0, 1], [0.6, 0.8]]), np.array([[0, 1], [1, 2]]))
        array([0. , 0.8])
    """
    pairs = np.asarray(pairs)
    if pairs.ndim != 2 or pairs.shape[1] != 2:
        raise UserError(f"pairs must have the shape (P, 2), got {pairs.shape}")
    embeddings, scores = embedding_rows(embeddings), np.empty(len(pairs))
    check_indices(pairs.ravel(), len(embeddings))
    for start in range(0, len(pairs), 16384):
        a, b = pairs[start : start + 16384].T
        scores[start : start + 16384] = np.einsum(
            "pd,pd->p", embeddings[a].astype(np.float64), embeddings[b].astype(np.float64)
        )
    return scores


def _check(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, given = np.asarray(scores, np.float64), np.asarray(same)
    same = given.astype(bool)
    if not (given == same).all():  # -1 is true too
        raise ValueError("same must be True for genuine pairs and False for impostor pairs.")
    if scores.shape != same.shape or scores.ndim != 1:
        raise ValueError(f"scores {scores.shape} and same {same.shape} must be equally long rows.")
    if not np.isfinite(scores).all():
        raise ValueError("scores must be finite.")
    return scores, same


def check_both(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores as float64 and verdicts as bool; UserError unless there are pairs of both kinds."""
    scores, same = _check(scores, same)
    if same.all() or not same.any():
        kind = "genuine" if same.any() else "impostor"
        raise UserError(f"the set has only {kind} pairs: genuine and impostor pairs are needed")
    return scores, same


def kfold_accuracy(scores: np.ndarray, same: np.ndarray, folds: np.ndarray) -> Folds:
    """K-fold verification accuracy, LFW's protocol (View 2).

    For each fold the threshold is the one of highest accuracy on the other folds, and is then
    applied to the fold. The candidates are all distinct scores of the other folds, and one just
    above the highest of them (accept nothing); of equally accurate ones the lowest is taken.
    O(P log P + K P).

    Args:
        scores: (P,), higher = more alike.
        same: bool (P,), True for genuine pairs.
        folds: int (P,), any K >= 2 distinct numbers.

    Raises:
        UserError: there is only one fold.

    Examples:
        >>> same = np.array([True, False] * 4)
        >>> kfold_accuracy(np.where(same, 0.7, 0.1), same, np.arange(8) // 4).accuracy
        1.0
    """
    scores, same = _check(scores, same)
    folds = np.asarray(folds)
    if folds.shape != scores.shape:
        raise ValueError(f"folds {folds.shape} and scores {scores.shape} must be equally long.")
    numbers = np.unique(folds)
    if len(numbers) < 2:
        raise UserError(
            f"k-fold accuracy needs two folds or more, and {counted(len(scores), 'pair')} in one "
            "were given; a file of pairs has folds from 10 pairs on"
        )

    order = np.argsort(scores, kind="stable")
    sorted_scores, sorted_same, sorted_folds = scores[order], same[order], folds[order]
    thresholds, per_fold = np.empty(len(numbers)), np.empty(len(numbers))
    for k, number in enumerate(numbers):
        train = sorted_folds != number
        thresholds[k] = _best_threshold(sorted_scores[train], sorted_same[train])
        test = folds == number
        per_fold[k] = np.mean((scores[test] >= thresholds[k]) == same[test])
    return Folds(
        folds=len(numbers),
        accuracy=float(per_fold.mean()),
        accuracy_std=float(per_fold.std()),
        threshold=float(thresholds.mean()),
        fold_accuracy=tuple(per_fold.tolist()),
        fold_threshold=tuple(thresholds.tolist()),
    )


def _best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The lowest threshold of highest accuracy on pairs in ascending order of their score."""
    # correct[i]: right verdicts when exactly the pairs from the i-th on are accepted.
    rejected = np.concatenate([[0], np.cumsum(~same)])
    accepted = same.sum() - np.concatenate([[0], np.cumsum(same)])
    # Equal scores are accepted or rejected together: only the first of a run can be the threshold.
    candidate = np.concatenate([[True], scores[1:] != scores[:-1], [True]])
    best = int(np.argmax(np.where(candidate, rejected + accepted, -1)))
    return float(scores[best] if best < len(scores) else np.nextafter(scores[-1], np.inf))


def roc(scores: np.ndarray, same: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The full ROC: (far, tar, thresholds), thresholds descending from infinity.

    One point for each distinct score, none dropped, starting at (0, 0).

    Examples:
        >>> far, tar, thresholds = roc(np.array([0.9, 0.8, 0.3]), np.array([True, False, True]))
        >>> far.tolist(), tar.tolist(), thresholds.tolist()
        ([0.0, 0.0, 1.0, 1.0], [0.0, 0.5, 0.5, 1.0], [inf, 0.9, 0.8, 0.3])
    """
    scores, same = check_both(scores, same)
    order, last = _descending(scores)
    s, y = scores[order], same[order]
    tar = np.cumsum(y)[last] / y.sum()
    far = np.cumsum(~y)[last] / (~y).sum()
    return (
        np.concatenate([[0.0], far]),
        np.concatenate([[0.0], tar]),
        np.concatenate([[np.inf], s[last]]),
    )


def _descending(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of falling scores, and where in it each run of equal scores ends."""
    order = np.argsort(-scores, kind="stable")
    s = scores[order]
    return order, np.flatnonzero(np.append(s[1:] != s[:-1], True))


def auc(scores: np.ndarray, same: np.ndarray) -> float:
    """Area under the ROC: how often a genuine pair outscores an impostor pair (ties count half).

    Examples:
        >>> auc(np.array([0.9, 0.8, 0.3]), np.array([True, False, True]))
        0.5
    """
    far, tar, _ = roc(scores, same)
    return float(_area(tar, far))


def _area(tar: np.ndarray, far: np.ndarray) -> np.ndarray:
    """Under each curve, by trapezoids; numpy's function for it has another name before 2.0."""
    return np.sum(np.diff(far) * (tar[..., 1:] + tar[..., :-1]) / 2, axis=-1)


def eer(scores: np.ndarray, same: np.ndarray) -> float:
    """Equal error rate: where FAR = 1 - TAR on the ROC, linear between its points.

    Examples:
        >>> eer(np.array([0.9, 0.8, 0.7, 0.3]), np.array([True, False, True, False]))
        0.5
    """
    far, tar, _ = roc(scores, same)
    return float(_eer(far[None], tar[None])[0])


def _eer(far: np.ndarray, tar: np.ndarray) -> np.ndarray:
    """EER of each row of (replicates, points) curves that start at 0 and end at 1."""
    gap = far - (1 - tar)  # from -1 up to 1, never falling
    after = np.argmax(gap >= 0, axis=1)
    row = np.arange(len(far))
    g0, g1 = gap[row, after - 1], gap[row, after]
    f0, f1 = far[row, after - 1], far[row, after]
    return f0 + (f1 - f0) * (-g0 / (g1 - g0))


@dataclass(frozen=True, kw_only=True)
class CurveFigures:
    """The figures of one ROC: EER, AUC and TAR at each FAR; how their intervals were made."""

    eer: Estimate
    auc: Estimate
    tar: tuple[OperatingPoint, ...]
    intervals: Resampling | None = None


def curve_figures(
    scores: np.ndarray,
    same: np.ndarray,
    fars: Sequence[float] = FARS,
    *,
    people: np.ndarray | None = None,
    bootstrap: Bootstrap = NONE,
) -> CurveFigures:
    """EER, AUC and TAR at FAR with bootstrap intervals, over people where they are known.

    The threshold of each FAR is found anew in each resample, so the interval holds its uncertainty
    too. Resamples without a genuine or without an impostor pair do not count.
    `sphereface2.evaluation.bootstrap` says how pairs count.

    Args:
        scores: (P,), higher = more alike.
        same: bool (P,), True for genuine pairs.
        fars: where TAR is wanted, each in (0, 1].
        people: int (P, 2), the two identities of each pair; None resamples pairs instead.
        bootstrap: of the intervals.

    Raises:
        UserError: no resample had pairs of both kinds.

    Examples:
        >>> same = np.arange(40) < 20
        >>> found = curve_figures(np.where(same, 0.7, 0.1), same, [0.1], bootstrap=Bootstrap(50))
        >>> found.tar[0].ci, found.eer
        ((1.0, 1.0), Estimate(value=0.0, ci=(0.0, 0.0)))
    """
    found = CurveFigures(
        eer=Estimate(eer(scores, same)),
        auc=Estimate(auc(scores, same)),
        tar=tuple(tar_at_far(scores, same, fars)),
    )
    if not bootstrap.replicates:
        return found
    eers, aucs, tars = _resample(*check_both(scores, same), fars, people, bootstrap)
    return CurveFigures(
        eer=replace(found.eer, ci=interval(eers)),
        auc=replace(found.auc, ci=interval(aucs)),
        tar=tuple(
            point if point.value is None else replace(point, ci=interval(again))
            for point, again in zip(found.tar, tars, strict=True)
        ),
        intervals=Resampling("pairs" if people is None else "people", len(eers), bootstrap.seed),
    )


def _resample(
    scores: np.ndarray,
    same: np.ndarray,
    fars: Sequence[float],
    people: np.ndarray | None,
    bootstrap: Bootstrap,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """EER (R,), AUC (R,) and TAR at each FAR (F, R) of R resamples."""
    order, last = _descending(scores)
    y, units, who = same[order], len(scores), None
    if people is not None:
        who = np.unique(check_people(people, len(scores))[order], return_inverse=True)[1]
        who = who.reshape(-1, 2)
        units = int(who.max()) + 1
    eers, aucs, tars = [], [], []
    for counts in draws(units, *bootstrap, numbers=len(scores)):
        weights = pair_weights(counts, y, who)
        tar = np.cumsum(np.where(y, weights, 0), axis=1)[:, last]
        far = np.cumsum(np.where(y, 0, weights), axis=1)[:, last]
        valid = (tar[:, -1] > 0) & (far[:, -1] > 0)
        zero = np.zeros((int(valid.sum()), 1))
        tar = np.concatenate([zero, tar[valid] / tar[valid, -1:]], axis=1)
        far = np.concatenate([zero, far[valid] / far[valid, -1:]], axis=1)
        eers.append(_eer(far, tar))
        aucs.append(_area(tar, far))
        row = np.arange(len(far))
        tars.append(np.stack([tar[row, (far <= f).sum(axis=1) - 1] for f in fars]))
    if not sum(map(len, eers)):
        raise UserError("the set is too small for intervals: no resample has both kinds of pair")
    return np.concatenate(eers), np.concatenate(aucs), np.concatenate(tars, axis=1)


def check_people(people: np.ndarray, pairs: int) -> np.ndarray:
    """The identities of pairs; ValueError unless they are (P, 2), two for each pair."""
    if np.shape(people) != (pairs, 2):
        raise ValueError(f"people must have the shape ({pairs}, 2), got {np.shape(people)}.")
    return np.asarray(people)


def allowed_accepts(far: float, impostors: int) -> int:
    """The largest k with ``k / impostors <= far``, free of rounding in ``far * impostors``.

    Examples:
        >>> allowed_accepts(0.01, 3000), allowed_accepts(1e-4, 3000)
        (30, 0)
    """
    k = min(int(far * impostors), impostors)
    while k < impostors and (k + 1) / impostors <= far:
        k += 1
    while k > 0 and k / impostors > far:
        k -= 1
    return k


def error_bounds(
    rates: Sequence[float], impostor_scores: np.ndarray, observed: np.ndarray
) -> list[tuple[int, float, float | None]]:
    """What keeps each error rate, FAR or FPIR, on observed scores.

    With k the largest number of impostors that the rate allows, those accepted are the scores
    strictly above the (k+1)-th highest impostor score.

    Args:
        rates: each in (0, 1].
        impostor_scores: (I,).
        observed: all scores that can be a threshold.

    Returns:
        For each rate k, the bound that an accepted score must exceed, and the threshold: the
        smallest observed score above the bound, None where there is none or k = 0.
    """
    impostors, ordered = np.sort(impostor_scores)[::-1], np.sort(observed)
    found: list[tuple[int, float, float | None]] = []
    for rate in rates:
        if not 0 < rate <= 1:
            raise ValueError(f"a FAR or FPIR must lie in (0, 1], got {rate}.")
        k = allowed_accepts(rate, len(impostors))
        bound = float(impostors[k]) if k < len(impostors) else -np.inf
        above = np.searchsorted(ordered, bound, side="right")
        found.append((k, bound, float(ordered[above]) if k and above < len(ordered) else None))
    return found


def far_beside(fars: Sequence[float], impostors: int) -> float:
    """A FAR next to the lowest that can be measured, since an ROC's slope takes two.

    Half of its accepted impostors, or two where one is accepted.

    Examples:
        >>> far_beside([0.1, 1e-4], 1000), far_beside([1e-3], 1000)
        (0.05, 0.002)
    """
    least = min((k for far in fars if (k := allowed_accepts(far, impostors))), default=1)
    return min(1.0, (least // 2 or 2) / max(impostors, 1))


def tar_at_far(
    scores: np.ndarray, same: np.ndarray, fars: Sequence[float] = FARS
) -> list[OperatingPoint]:
    """TAR at each FAR, exact on the observed scores, without interpolation.

    The threshold is the smallest observed score t with FAR(score >= t) <= far. A FAR below
    1 / (number of impostor pairs) cannot be measured on the set, and its TAR is None.

    Examples:
        >>> scores, same = np.array([0.9, 0.8, 0.7, 0.3]), np.array([True, True, False, False])
        >>> [point.value for point in tar_at_far(scores, same, [0.5, 0.1])]
        [1.0, None]
    """
    scores, same = check_both(scores, same)
    genuine = np.sort(scores[same])
    points = []
    for far, (k, bound, threshold) in zip(
        fars, error_bounds(fars, scores[~same], scores), strict=True
    ):
        accepted = len(genuine) - np.searchsorted(genuine, bound, side="right")
        value = float(accepted / len(genuine)) if k else None
        points.append(OperatingPoint(far, value, threshold=threshold))
    return points
