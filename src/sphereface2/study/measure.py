"""What a study keeps of a trained cell: sums by person, from which figures are resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sphereface2.data.pairs import PairSet
from sphereface2.evaluation.all_pairs import evaluate_all_pairs
from sphereface2.evaluation.one_threshold import best_threshold
from sphereface2.evaluation.results import OperatingPoint
from sphereface2.evaluation.tiles import count_pairs, sorted_rows
from sphereface2.evaluation.verification import allowed_accepts, kfold_accuracy

FARS = (1e-2, 1e-3, 1e-4, 1e-5)
OWN_FARS = (1e-2, 1e-3)
TRANSFERRED = (1e-2, 1e-3, 1e-4)
"""FARs whose thresholds on the validation people are used on other sets."""
BINS = np.linspace(-1, 1, 101)


@dataclass(frozen=True)
class ScoreDistribution:
    """Cosines of many pairs: ``histogram`` counts them over 100 bins of [-1, 1]."""

    mean: float
    std: float
    histogram: list[int]


@dataclass(frozen=True)
class PeopleMeasures:
    """All pairs of a cell's test people.

    Lists have an entry for each person, in ascending order of label.

    Attributes:
        people, images: their numbers.
        tar, threshold: by FAR, exact over all pairs; None where there are too few.
        genuine: genuine pairs.
        hits: by FAR, the genuine pairs that score at least the threshold.
        impostors: pairs with anybody else.
        false_accepts: by FAR, those of them that score at least the threshold common to all.
        own_threshold: by FAR, the lowest that keeps the person's own FAR; None where the person
            has too few pairs.
        probes: images with another of the person.
        found: those of them whose nearest other image shows the person.
        rank1: sum of ``found`` over sum of ``probes``.
        genuine_scores, impostor_scores: their distributions.
        uniform: the largest share of ``probes`` that one threshold serves, which has every other
            image of the person at least at it and everybody else below; None in old cells.
    """

    people: int
    images: int
    tar: dict[float, float | None]
    threshold: dict[float, float | None]
    genuine: list[int]
    hits: dict[float, list[int]]
    impostors: list[int]
    false_accepts: dict[float, list[int]]
    own_threshold: dict[float, list[float | None]]
    probes: list[int]
    found: list[int]
    rank1: float
    genuine_scores: ScoreDistribution
    impostor_scores: ScoreDistribution
    uniform: float | None = None

    @property
    def gap(self) -> float:
        """Distance of the genuine mean from the impostor mean, nan where it is 0."""
        return self.genuine_scores.mean - self.impostor_scores.mean or float("nan")


@dataclass(frozen=True)
class FixedThreshold:
    """A threshold that was not chosen on the set that it is used on.

    Attributes:
        asked: the FAR that it has on the validation people; None: where the head's binary
            classifiers are undecided, which is -b/r for t = 1.
        threshold: a pair is accepted at a similarity of at least this.
        far, tar: shares of the impostor and the genuine pairs that are accepted.
        accepts: of each person, the impostor pairs that are accepted; of the head's own threshold
            none are kept.
    """

    asked: float | None
    threshold: float
    far: float
    tar: float
    accepts: list[int]


@dataclass(frozen=True)
class TransferMeasures:
    """Thresholds of the validation people on all pairs of other images.

    Attributes:
        name: of the set of images.
        units: names its people: sets with equal ``units`` have the same.
        images: of each person, in ascending order of label.
        thresholds: one for each of `TRANSFERRED`, and the head's own if it has one.
    """

    name: str
    units: str
    images: list[int]
    thresholds: list[FixedThreshold]


@dataclass(frozen=True)
class PairMeasures:
    """A verification set.

    Attributes:
        fingerprint: of the set; ``sets/FINGERPRINT.json`` beside the cells describes it.
        name: of the set.
        accuracy: k-fold.
        fold_accuracy: on each fold.
        right: bits, in hexadecimal: whether the verdict on each pair was right.
    """

    fingerprint: str
    name: str
    accuracy: float
    fold_accuracy: list[float]
    right: str


@dataclass(frozen=True)
class PairSetFacts:
    """What all cells that were judged on a verification set share.

    Attributes:
        name: of the set.
        pairs: their number P.
        same: bits, in hexadecimal: whether each pair is genuine.
        people: (P, 2), numbered from 0, or None where unknown.
    """

    name: str
    pairs: int
    same: str
    people: list[list[int]] | None


def measure_people(embeddings: np.ndarray, labels: np.ndarray) -> PeopleMeasures:
    """Measure all pairs of test people: embeddings float32 (N, d) of length 1, labels int (N,)."""
    points = evaluate_all_pairs(embeddings, labels, FARS).tar
    measured = [p for p in points if p.value is not None and p.threshold is not None]
    people, of = np.unique(labels, return_inverse=True)
    order = np.argsort(of, kind="stable")
    rows = embeddings[order].astype(np.float32, copy=False)
    starts = np.searchsorted(of[order], np.arange(len(people) + 1))
    sums = _Sums(len(people), measured)
    for person, (first, last) in enumerate(pairwise(starts)):
        sums.add(person, rows[first:last] @ rows.T, first, last)
    fars = [point.at for point in measured]
    return PeopleMeasures(
        people=len(people),
        images=len(rows),
        tar={point.at: point.value for point in points},
        threshold={point.at: point.threshold for point in points},
        genuine=sums.genuine.tolist(),
        hits=dict(zip(fars, sums.hits.tolist(), strict=True)),
        impostors=sums.impostors.tolist(),
        false_accepts=dict(zip(fars, sums.false_accepts.tolist(), strict=True)),
        own_threshold={
            far: [None if np.isnan(value) else round(float(value), 4) for value in values]
            for far, values in zip(OWN_FARS, sums.own_threshold, strict=True)
        },
        probes=sums.probes.tolist(),
        found=sums.found.tolist(),
        rank1=float(sums.found.sum() / sums.probes.sum()),
        uniform=best_threshold(*sums.bounds_of_images()).share.value,
        genuine_scores=_distribution(sums.moments[0], sums.histograms[0]),
        # Each impostor pair was met twice, once from either side.
        impostor_scores=_distribution(sums.moments[1], sums.histograms[1] // 2),
    )


class _Sums:
    """What is counted for each of K people, at each of the FARs measured."""

    def __init__(self, people: int, measured: list[OperatingPoint]) -> None:
        self.bounds = np.array([point.threshold for point in measured], np.float32)
        self.genuine, self.impostors, self.probes, self.found = np.zeros((4, people), np.int64)
        self.hits, self.false_accepts = np.zeros((2, len(measured), people), np.int64)
        self.own_threshold = np.full((len(OWN_FARS), people), np.nan)
        self.moments = np.zeros((2, 3))  # genuine, impostor: count, sum, sum of squares
        self.histograms = np.zeros((2, len(BINS) - 1), np.int64)
        self.sides: list[tuple[np.ndarray, np.ndarray, int]] = []

    def bounds_of_images(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of images of people with several: least genuine and greatest impostor score, whose."""
        lowest, highest, people = zip(*self.sides, strict=True)
        return (
            np.concatenate(lowest),
            np.concatenate(highest),
            np.repeat(people, [len(part) for part in lowest]),
        )

    def add(self, person: int, scores: np.ndarray, first: int, last: int) -> None:
        """Count a person's images, rows ``first`` to ``last``, by their scores with all images."""
        same = scores[:, first:last]
        genuine = same[np.triu_indices(last - first, 1)]
        others = np.delete(scores, np.s_[first:last], axis=1)
        impostors = others.ravel()
        self.genuine[person], self.impostors[person] = len(genuine), len(impostors)
        self.hits[:, person] = (genuine[None] >= self.bounds[:, None]).sum(axis=1)
        self.false_accepts[:, person] = [(impostors >= bound).sum() for bound in self.bounds]
        for k, far in enumerate(OWN_FARS):
            allowed = allowed_accepts(far, len(impostors))
            if 0 < allowed < len(impostors):
                place = len(impostors) - allowed - 1
                rejected = np.partition(impostors, place)[place]
                self.own_threshold[k, person] = np.nextafter(rejected, np.float32(np.inf))
        if last - first > 1:
            nearest = others.max(axis=1)
            np.fill_diagonal(same, np.inf)
            self.sides.append((same.min(axis=1), nearest, person))
            np.fill_diagonal(same, -np.inf)
            self.probes[person] = last - first
            self.found[person] = (same.max(axis=1) > nearest).sum()
        for row, values in enumerate((genuine, impostors)):
            wide = values.astype(np.float64)
            self.moments[row] += len(wide), wide.sum(), (wide**2).sum()
            self.histograms[row] += np.histogram(np.clip(values, -1, 1), len(BINS) - 1, (-1, 1))[0]


def measure_transfer(
    name: str,
    units: str,
    embeddings: np.ndarray,
    labels: np.ndarray,
    thresholds: Sequence[tuple[float | None, float]],
) -> TransferMeasures:
    """What each threshold, given with the FAR asked of it, does on all pairs of a set.

    Args:
        name, units: of `TransferMeasures`.
        embeddings: float32 (N, d) of length 1.
        labels: int (N,).
        thresholds: FAR and similarity.
    """
    rows, people = sorted_rows(embeddings, labels)
    count_pairs(people)
    starts = np.searchsorted(people, np.arange(people[-1] + 2))
    limits = np.array([limit for _, limit in thresholds], np.float32)
    hits, accepts = np.zeros((2, len(limits), len(starts) - 1), np.int64)
    first = 0
    while first < len(starts) - 1:  # some whole people at a time
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + 1024)) - 1)
        begin, end = starts[first], starts[last]
        scores = rows[begin:end] @ rows.T
        above = np.stack([(scores >= limit).sum(1) for limit in limits])
        for person in range(first, last):
            a, b = starts[person] - begin, starts[person + 1] - begin
            same = scores[a:b, starts[person] : starts[person + 1]]
            within = same[None] >= limits[:, None, None]
            accepts[:, person] = above[:, a:b].sum(1) - within.sum((1, 2))
            hits[:, person] = within[:, *np.triu_indices(b - a, 1)].sum(1)
        first = last
    images = np.diff(starts)
    genuine = (images * (images - 1) // 2).sum()
    impostors = len(rows) ** 2 - (images**2).sum()  # each from two sides, as it is counted
    return TransferMeasures(
        name,
        units,
        images.tolist(),
        [
            FixedThreshold(
                asked,
                float(limit),
                float(accepted.sum() / impostors),
                float(hit.sum() / genuine),
                [] if asked is None else accepted.tolist(),
            )
            for (asked, _), limit, hit, accepted in zip(
                thresholds, limits, hits, accepts, strict=True
            )
        ],
    )


def measure_pairs(scores: np.ndarray, pair_set: PairSet, fingerprint: str) -> PairMeasures:
    """Measure a verification set from the scores (P,) of its pairs."""
    folds = kfold_accuracy(scores, pair_set.same, pair_set.folds)
    numbers = np.unique(pair_set.folds)
    threshold = np.array(folds.fold_threshold)[np.searchsorted(numbers, pair_set.folds)]
    right = (scores >= threshold) == pair_set.same
    return PairMeasures(
        fingerprint=fingerprint,
        name=pair_set.name,
        accuracy=folds.accuracy,
        fold_accuracy=list(folds.fold_accuracy),
        right=np.packbits(right).tobytes().hex(),
    )


def describe_pairs(pair_set: PairSet) -> PairSetFacts:
    """What is common to all cells scored on a set: who is in each pair, and which are genuine."""
    people = None
    if pair_set.people is not None:
        people = np.unique(pair_set.people, return_inverse=True)[1][pair_set.pairs].tolist()
    same = np.packbits(pair_set.same).tobytes().hex()
    return PairSetFacts(pair_set.name, len(pair_set), same, people)


def bits(packed: str, count: int) -> np.ndarray:
    """The first ``count`` bits of a hexadecimal text, bool (count,).

    Examples:
        >>> bits("a0", 4).tolist()
        [True, False, True, False]
    """
    return np.unpackbits(np.frombuffer(bytes.fromhex(packed), np.uint8), count=count).astype(bool)


def _distribution(moments: np.ndarray, histogram: np.ndarray) -> ScoreDistribution:
    count, total, squares = moments
    mean = total / count
    std = float(np.sqrt(max(squares / count - mean**2, 0)))
    return ScoreDistribution(float(mean), std, histogram.tolist())
