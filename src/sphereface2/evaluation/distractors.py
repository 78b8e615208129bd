"""Identification among distractors, MegaFace's protocol: is an image found among N strangers?

For each ordered pair of two images of a person, one is searched in a gallery of the other and N
distractors; it is found if the other image scores above all distractors, by more than rounding: a
copy of it among them is a miss. Distractors are taken block by block and forgotten; for each probe
only its best score is kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sphereface2.errors import UserError
from sphereface2.evaluation.bootstrap import NONE, Bootstrap, ratio_intervals
from sphereface2.evaluation.results import Rate, Resampling, Result
from sphereface2.evaluation.verification import ROUNDING, embedding_rows

SIZES = tuple(10**k for k in range(1, 10))
_SCORES = 1 << 24  # that a block of distractors makes with the probes


@dataclass(frozen=True, kw_only=True)
class DistractorResult(Result):
    """Rank-1 identification among a growing number of distractors.

    Attributes:
        images, people: probes and whom they show.
        distractors: number of images of other people.
        searches: how many ordered pairs of two images of a person were tried at each size.
        rank1: share found, a rate for each number of distractors.
        unreadable: images left out.
        seed: of the distractors' order.
    """

    images: int
    people: int
    distractors: int
    searches: int
    rank1: tuple[Rate, ...]
    unreadable: int
    seed: int


def evaluate_distractors(
    probes: np.ndarray,
    people: np.ndarray,
    distractors: Iterable[np.ndarray],
    sizes: Sequence[int] = SIZES,
    *,
    name: str = "distractors",
    bootstrap: Bootstrap = NONE,
) -> DistractorResult:
    """Rank-1 identification of probes among the first N distractors, for each N.

    Args:
        probes: float32 (Q, d), rows of length 1.
        people: (Q,), the person of each; who has one image only is left out of the searches.
        distractors: blocks (n, d) of embeddings of other people.
        sizes: the N wanted, each at least 1; those beyond the number of distractors are dropped,
            and that number itself is always reported.
        name: of the set.
        bootstrap: over the probes' people, of the intervals; the distractors are held fixed.

    Raises:
        UserError: nobody has two images, there are no distractors, or embeddings are not of
            length 1.

    Examples:
        >>> probes, people = np.eye(4, dtype=np.float32)[[0, 0, 1, 1]], np.array([5, 5, 6, 6])
        >>> found = evaluate_distractors(probes, people, [np.eye(4, dtype=np.float32)[1:]], [1])
        >>> [(rate.at, rate.value) for rate in found.rank1]
        [(1, 0.5), (3, 0.5)]
    """
    if len(people) != len(probes):
        raise ValueError(
            f"{len(probes)} probes were given, but people for {len(people)}; expected one person "
            "for each."
        )
    probes = embedding_rows(probes).astype(np.float32, copy=False)
    best = _best_scores(probes, distractors, sizes)
    hits, trials = _count(probes, np.unique(people, return_inverse=True)[1], [*best.values()])
    if not trials.sum():
        raise UserError(
            "no person among the probes has two images; MegaFace's protocol needs two of a person"
        )
    cis = ratio_intervals(hits, trials, bootstrap)
    return DistractorResult(
        name=name,
        images=len(probes),
        people=len(trials),
        distractors=max(best),
        searches=int(trials.sum()),
        rank1=tuple(
            Rate(size, float(row.sum() / trials.sum()), ci)
            for size, row, ci in zip(best, hits, cis, strict=True)
        ),
        unreadable=0,
        notes=[],
        seed=bootstrap.seed,
        intervals=Resampling.of(bootstrap, "fixed"),
    )


def _count(
    probes: np.ndarray, people: np.ndarray, rivals: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Searches that succeed against each of ``rivals`` (S, people), and all searches (people,)."""
    hits = np.zeros((len(rivals), int(people.max(initial=-1)) + 1), np.int64)
    trials = np.zeros(hits.shape[1], np.int64)
    order = np.argsort(people, kind="stable")
    for person, own in enumerate(np.split(order, np.cumsum(np.bincount(people)))[:-1]):
        scores = probes[own] @ probes[own].T
        others = ~np.eye(len(own), dtype=bool)
        trials[person] = others.sum()
        for row, rival in zip(hits, rivals, strict=True):
            row[person] = np.count_nonzero((scores > rival[own, None] + ROUNDING) & others)
    return hits, trials


def _best_scores(
    probes: np.ndarray, distractors: Iterable[np.ndarray], sizes: Sequence[int]
) -> dict[int, np.ndarray]:
    """Each probe's best score among the first N distractors, by N, in ascending order."""
    best = np.full(len(probes), -np.inf, np.float32)
    wanted, seen = sorted(set(sizes)), 0
    reached: dict[int, np.ndarray] = {}
    rows = max(1, _SCORES // max(1, len(probes)))
    for whole in map(embedding_rows, distractors):
        # Cut where a size is reached, so that each snapshot is of exactly N distractors.
        cuts = {n - seen for n in wanted if seen < n < seen + len(whole)}
        edges = sorted({*range(0, len(whole), rows), *cuts, len(whole)})
        for start, stop in pairwise(edges):
            top = (probes @ whole[start:stop].T).max(axis=1)
            np.maximum(best, top, out=best)
            if seen + stop in wanted:
                reached[seen + stop] = best.copy()
        seen += len(whole)
    if not seen:
        raise UserError("there are no distractors")
    return reached | {seen: best}
