"""Where to accept for a wanted FAR, and how far chance may have moved that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sphereface2.errors import UserError, check_count, check_number
from sphereface2.evaluation.bootstrap import (
    USUAL,
    Bootstrap,
    Interval,
    draws,
    interval,
    pair_weights,
)
from sphereface2.evaluation.results import far_key
from sphereface2.evaluation.verification import (
    allowed_accepts,
    check_both,
    check_people,
    tar_at_far,
)

#: How many false accepts a threshold must rest on: it then allows the FAR within about a third.
FALSE_ACCEPTS = 10


@dataclass(frozen=True)
class Threshold:
    """Where to accept for one FAR.

    Attributes:
        far: the FAR wanted.
        threshold: accept a similarity of at least this; the smallest score of the pairs at which
            their FAR is at most ``far``.
        ci: bootstrap interval of ``threshold``, 95 %, in similarity.
        far_ci: interval of the FAR at ``threshold``.
        tar: share of the genuine pairs accepted there.
        impostors: number of impostor pairs that it was found on.
    """

    far: float
    threshold: float
    ci: Interval
    far_ci: Interval
    tar: float
    impostors: int


def pairs_needed(far: float) -> int:
    """Impostor pairs that a threshold for ``far`` needs: enough for `FALSE_ACCEPTS`.

    Examples:
        >>> pairs_needed(1e-3)
        10000
    """
    check_number("a FAR", far, above=0, below=1)
    needed = math.ceil(FALSE_ACCEPTS / far)
    while allowed_accepts(far, needed) < FALSE_ACCEPTS:
        needed += 1
    while allowed_accepts(far, needed - 1) >= FALSE_ACCEPTS:
        needed -= 1
    return needed


def check_fars(fars: Sequence[float], impostors: int) -> None:
    """UserError unless so many impostor pairs suffice for a threshold at each FAR."""
    if not fars:
        raise UserError("a calibration needs a FAR: give --far, for example --far 1e-2")
    for far in fars:
        if not 0 < far < 1:
            raise UserError(f"a FAR must lie between 0 and 1, got {far:g}")
        if allowed_accepts(far, impostors) < FALSE_ACCEPTS:
            raise UserError(
                f"{impostors:,} impostor pairs are too few for a FAR of {far_key(far)}: "
                f"{pairs_needed(far):,} are needed, so that at least {FALSE_ACCEPTS} are accepted "
                "by mistake; give more pairs (--all-pairs uses every pair of a set) or a larger "
                "--far"
            )


def find_thresholds(
    scores: np.ndarray,
    same: np.ndarray,
    fars: Sequence[float],
    *,
    people: np.ndarray | None = None,
    bootstrap: Bootstrap = USUAL,
) -> dict[float, Threshold]:
    """The threshold of each FAR with its intervals.

    Args:
        scores: (P,) similarities.
        same: bool (P,), True for genuine pairs.
        fars: each in (0, 1), with enough impostor pairs for it (`check_fars`).
        people: int (P, 2), the two identities of each pair, over which intervals are bootstrapped;
            None resamples pairs, which makes them too narrow where pairs share people.
        bootstrap: of the intervals, with resamples.

    Raises:
        UserError: so many impostor pairs share the greatest similarity that no score has the FAR,
            or no resample has impostor pairs.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> same = np.arange(3000) < 1000
        >>> found = find_thresholds(rng.normal(np.where(same, 0.6, 0.1), 0.1), same, [0.01])[0.01]
        >>> bool(0.3 < found.threshold < 0.35), found.impostors
        (True, 2000)
    """
    check_count("bootstrap.replicates", bootstrap.replicates, 1)
    scores, same = check_both(scores, same)
    points = tar_at_far(scores, same, fars)
    limits = []
    for point in points:
        if point.threshold is None:
            raise UserError(
                f"no threshold has a FAR of {far_key(point.at)}: more impostor pairs than it "
                f"allows have the greatest similarity of all, {scores.max():.4f}; are copies of "
                "one image under several people? `sphereface2 data audit` finds them; or give a "
                "larger --far"
            )
        limits.append(point.threshold)
    limit_replicates, far_replicates = _resample(
        scores, same, np.array(fars), np.array(limits), people, bootstrap
    )
    found = {}
    for k, point in enumerate(points):
        ci, far_ci = interval(limit_replicates[:, k]), interval(far_replicates[:, k])
        if ci is None or far_ci is None:
            raise UserError("the set is too small for intervals: no resample has impostor pairs")
        impostors = int(np.count_nonzero(~same))
        tar = float(point.value or 0)
        found[point.at] = Threshold(point.at, float(limits[k]), ci, far_ci, tar, impostors)
    return found


def _resample(
    scores: np.ndarray,
    same: np.ndarray,
    fars: np.ndarray,
    limits: np.ndarray,
    people: np.ndarray | None,
    bootstrap: Bootstrap,
) -> tuple[np.ndarray, np.ndarray]:
    """In each resample, the threshold for each FAR and the FAR at each of ``limits``: (R, F) each.

    Only high impostor scores can become a threshold, so the others are counted, not sorted: first
    many more than a resample mostly accepts, then, for resamples that left out the people of those,
    more and more. A resample without impostor pairs gives NaN.
    """
    from scipy.sparse import coo_matrix

    impostors = scores[~same]
    count = units = len(impostors)
    order = np.argsort(-impostors, kind="stable")
    who = together = None
    if people is not None:
        who = np.unique(check_people(people, len(same))[~same], return_inverse=True)[1]
        who = who.reshape(-1, 2)
        units = int(who.max()) + 1
        together = coo_matrix((np.ones(count), (who[:, 0], who[:, 1])), (units, units)).tocsr()
    ordered = np.sort(scores)
    found = np.full((2, bootstrap.replicates, len(fars)), np.nan)
    unsettled = np.ones(bootstrap.replicates, bool)
    length = 4 * allowed_accepts(float(fars.max()), count) + 1000
    while unsettled.any():
        tail = order[:length]
        top = impostors[tail]
        last = np.flatnonzero(np.append(top[1:] != top[:-1], True))
        # The next score above each impostor score, which is the threshold that rejects it.
        following = np.searchsorted(ordered, np.append(top[last], top[-1]), side="right")
        above = ordered[np.minimum(following, len(ordered) - 1)]
        within = (top[:, None] >= limits).sum(axis=0)
        start = 0
        for counts in draws(units, *bootstrap, numbers=len(tail)):
            rows = start + np.flatnonzero(unsettled[start : start + len(counts)])
            counts, start = counts[rows - start], start + len(counts)
            if who is None or together is None:
                weights, total = counts[:, tail], counts.sum(axis=1)
            else:
                weights = pair_weights(counts, np.zeros(len(tail), bool), who[tail])
                total = (counts * (counts @ together)).sum(axis=1)
            rows, weights, total = rows[total > 0], weights[total > 0], total[total > 0]
            rates = np.cumsum(np.pad(weights, ((0, 0), (1, 0))), axis=1) / total[:, None]
            # Column 0 accepts nothing, the others all scores down to the end of a run of equals.
            runs = rates[:, np.append(0, last + 1)]
            found[0, rows] = np.stack([above[(runs <= far).sum(axis=1) - 1] for far in fars], 1)
            found[1, rows] = rates[:, within]
            unsettled[rows] = rates[:, -1] <= fars.max()
        # Without impostor pairs a resample stays NaN.
        unsettled &= np.isfinite(found[0, :, 0]) & (length < count)
        length *= 8
    return found[0], found[1]
