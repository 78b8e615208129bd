"""What a study keeps of a trained cell: sums by person, from which figures are resampled."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from sphereface2.data.verification import PairSet
from sphereface2.evaluation.all_pairs import all_pairs_tar
from sphereface2.evaluation.verification import allowed_accepts, far_key, kfold_accuracy

FARS = (1e-2, 1e-3, 1e-4, 1e-5)
OWN_FARS = (1e-2, 1e-3)
BINS = np.linspace(-1, 1, 101)


def measure_people(embeddings: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """All pairs of test people, told by person; JSON-able.

    Args:
        embeddings: float32 (N, d), rows of length 1.
        labels: int (N,).

    Returns:
        ``tar`` and ``threshold`` by FAR, exact over all pairs (None where there are too few);
        by person, in ascending order of label: ``genuine`` pairs, ``hits`` by FAR (genuine pairs
        that score at least the threshold), ``impostors`` (pairs with anybody else),
        ``false_accepts`` by FAR (of them, at the threshold common to all), ``own_threshold`` by
        FAR (the lowest that keeps the person's own FAR), ``probes`` and ``found`` (images with
        another of the person, and those whose nearest other image shows the person);
        ``rank1``; ``genuine_scores`` and ``impostor_scores``: ``mean``, ``std`` and ``histogram``
        over 100 bins of [-1, 1].
    """
    tars = all_pairs_tar(embeddings, labels, FARS).tars
    told = [t for t in tars if t.tar is not None and t.threshold is not None]
    keys = [far_key(t.far) for t in told]
    bounds = np.array([t.threshold for t in told], np.float32)
    people, of = np.unique(labels, return_inverse=True)
    order = np.argsort(of, kind="stable")
    rows, of = embeddings[order].astype(np.float32, copy=False), of[order]
    starts = np.searchsorted(of, np.arange(len(people) + 1))

    count = len(people)
    genuine, impostors, probes, found = (np.zeros(count, np.int64) for _ in range(4))
    hits, false = (np.zeros((len(told), count), np.int64) for _ in range(2))
    own = np.full((len(OWN_FARS), count), np.nan)
    sums = np.zeros((2, 3))  # genuine, impostor: count, sum, sum of squares
    histograms = np.zeros((2, len(BINS) - 1), np.int64)
    for person, (first, last) in enumerate(pairwise(starts)):
        scores = rows[first:last] @ rows.T
        same = scores[:, first:last]
        matched = same[np.triu_indices(last - first, 1)]
        others = np.delete(scores, np.s_[first:last], axis=1)
        genuine[person], impostors[person] = len(matched), others.size
        hits[:, person] = (matched[None] >= bounds[:, None]).sum(axis=1)
        false[:, person] = [(others >= bound).sum() for bound in bounds]
        flat = others.ravel()
        for k, far in enumerate(OWN_FARS):
            allowed = allowed_accepts(far, flat.size)
            if 0 < allowed < flat.size:
                rejected = np.partition(flat, flat.size - allowed - 1)[flat.size - allowed - 1]
                own[k, person] = np.nextafter(rejected, np.float32(np.inf))
        if last - first > 1:
            np.fill_diagonal(same, -np.inf)
            probes[person] = last - first
            found[person] = (same.max(axis=1) > others.max(axis=1)).sum()
        for row, values in enumerate((matched, flat)):
            wide = values.astype(np.float64)
            sums[row] += len(wide), wide.sum(), (wide**2).sum()
            histograms[row] += np.histogram(np.clip(values, -1, 1), BINS)[0]
    return {
        "people": count,
        "images": len(rows),
        "tar": {far_key(t.far): t.tar for t in tars},
        "threshold": {far_key(t.far): t.threshold for t in tars},
        "genuine": genuine.tolist(),
        "hits": dict(zip(keys, hits.tolist(), strict=True)),
        "impostors": impostors.tolist(),
        "false_accepts": dict(zip(keys, false.tolist(), strict=True)),
        "own_threshold": {
            far_key(far): [None if np.isnan(v) else round(float(v), 4) for v in values]
            for far, values in zip(OWN_FARS, own, strict=True)
        },
        "probes": probes.tolist(),
        "found": found.tolist(),
        "rank1": float(found.sum() / probes.sum()),
        "genuine_scores": _distribution(sums[0], histograms[0]),
        # Each impostor pair was met twice, once from either side.
        "impostor_scores": _distribution(sums[1], histograms[1] // 2),
    }


def measure_pairs(scores: np.ndarray, pair_set: PairSet) -> dict[str, Any]:
    """A verification set: k-fold ``accuracy`` and, by pair, whether the verdict was ``right``."""
    folds = kfold_accuracy(scores, pair_set.same, pair_set.folds)
    numbers = np.unique(pair_set.folds)
    threshold = folds.thresholds[np.searchsorted(numbers, pair_set.folds)]
    right = (scores >= threshold) == pair_set.same
    return {
        "name": pair_set.name,
        "accuracy": folds.accuracy,
        "fold_accuracy": folds.per_fold.tolist(),
        "right": np.packbits(right).tobytes().hex(),
    }


def describe_pairs(pair_set: PairSet) -> dict[str, Any]:
    """What is common to all cells scored on a set: who is in each pair, and which match."""
    people: Sequence[Any] | None = None
    if pair_set.people is not None:
        people = np.unique(pair_set.people, return_inverse=True)[1][pair_set.pairs].tolist()
    return {
        "name": pair_set.name,
        "pairs": len(pair_set),
        "same": np.packbits(pair_set.same).tobytes().hex(),
        "people": people,
    }


def _distribution(sums: np.ndarray, histogram: np.ndarray) -> dict[str, Any]:
    count, total, squares = sums
    mean = total / count
    return {
        "mean": float(mean),
        "std": float(np.sqrt(max(squares / count - mean**2, 0))),
        "histogram": histogram.tolist(),
    }
