"""Verification of pairs: every figure of a set of pairs, and pairs out of labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sphereface2.data.pairs import PairSet
from sphereface2.evaluation import verification as metrics
from sphereface2.evaluation.bootstrap import NONE, Bootstrap
from sphereface2.evaluation.calibration import Calibration
from sphereface2.evaluation.reliability import CalibrationQuality, quality, reliability
from sphereface2.evaluation.results import PairsVerified, unmeasured

#: Pairs of either kind that a calibration takes from a labelled set at most: enough for a FAR of
#: 1e-5.
MOST_PAIRS = 3_000_000


@dataclass(frozen=True, kw_only=True)
class PairsResult(PairsVerified, metrics.Folds, metrics.CurveFigures):
    """The figures of a verification set.

    Attributes:
        images, people: in it; ``people`` is None where they are unknown.
        calibration: how good the network's calibration is on the set, or None.
    """

    images: int
    people: int | None
    calibration: CalibrationQuality | None = None


def evaluate_pairs(
    scores: np.ndarray,
    pair_set: PairSet,
    *,
    fars: Sequence[float] = metrics.FARS,
    bootstrap: Bootstrap = NONE,
    calibration: Calibration | None = None,
    plots: Path | None = None,
) -> PairsResult:
    """Every figure of a verification set.

    Args:
        scores: (P,), the score of each pair.
        pair_set: the pairs.
        fars: where TAR is wanted.
        bootstrap: over people (over pairs where the set does not know them), of the intervals.
        calibration: of the network that gave the scores, to be judged on the set.
        plots: folder for ``NAME_roc.png``, ``NAME_scores.png`` and, with a calibration,
            ``NAME_reliability.png``.

    Examples:
        >>> pairs, same = np.arange(40).reshape(20, 2), np.arange(20) % 2 == 0
        >>> pair_set = PairSet("lfw", [b""] * 40, pairs, same, np.arange(20) // 2)
        >>> found = evaluate_pairs(np.where(same, 0.7, 0.1), pair_set, fars=[0.1])
        >>> found.accuracy, found.eer.value, found.tar[0].value, found.tar[0].threshold
        (1.0, 0.0, 1.0, 0.7)
    """
    same, people = pair_set.same, pair_set.people
    folds = metrics.kfold_accuracy(scores, same, pair_set.folds)
    who = None if people is None else people[pair_set.pairs]
    curve = metrics.curve_figures(scores, same, fars, people=who, bootstrap=bootstrap)
    impostors = int(np.count_nonzero(~same))
    judged = None if calibration is None else _judge(calibration, scores, pair_set)
    return PairsResult(
        name=pair_set.name,
        images=len(pair_set.images),
        people=None if people is None else len(np.unique(people)),
        genuine=len(pair_set) - impostors,
        impostor=impostors,
        **vars(folds),
        **vars(curve),
        notes=[
            *unmeasured("TAR at FAR", curve.tar, impostors, "impostor pairs"),
            *_doubts(scores, pair_set, judged),
        ],
        calibration=judged,
        plots=() if plots is None else _plot(scores, pair_set, folds, calibration, plots),
    )


def _judge(calibration: Calibration, scores: np.ndarray, pair_set: PairSet) -> CalibrationQuality:
    here = pair_set.fingerprint() in calibration.fitted_on
    return quality(scores, pair_set.same, calibration, fitted_here=here)


def _doubts(scores: np.ndarray, pair_set: PairSet, judged: CalibrationQuality | None) -> list[str]:
    """What makes a set's figures doubtful."""
    notes = []
    if scores.min() == scores.max():
        notes.append(
            "all pairs have the same score: the network gives every image the same embedding, as "
            "one whose weights are all 0 does"
        )
    one_kind = [
        int(fold)
        for fold in np.unique(pair_set.folds)
        if len(np.unique(pair_set.same[pair_set.folds == fold])) == 1
    ]
    if one_kind:
        notes.append(
            f"{len(one_kind)} of {len(np.unique(pair_set.folds))} folds hold pairs of one kind "
            f"only, the first is fold {one_kind[0]}: the accuracy depends on how the set is ordered"
        )
    sides = np.sort(pair_set.pairs, axis=1)
    if alone := int(np.count_nonzero(sides[:, 0] == sides[:, 1])):
        notes.append(f"pairs that compare an image with itself: {alone:,}")
    if again := len(sides) - len(np.unique(sides, axis=0)):
        notes.append(f"pairs that the set holds already and that count again: {again:,}")
    if judged is not None and judged.fitted_here:
        notes.append(
            "the calibration was fitted on these pairs, so its figures here are too optimistic"
        )
    return notes


def _plot(
    scores: np.ndarray,
    pair_set: PairSet,
    folds: metrics.Folds,
    calibration: Calibration | None,
    folder: Path,
) -> tuple[str, ...]:
    from sphereface2.evaluation import plots  # matplotlib is slow to import

    name, same = pair_set.name, pair_set.same
    written = plots.plot_pairs(name, scores, same, folds.threshold, folder)
    if calibration is not None:
        written.append(folder / f"{name}_reliability.png")
        found = reliability(calibration.probability(scores), same)
        plots.plot_reliability(found, written[-1], title=f"{name}: reliability")
    return tuple(map(str, written))


def sample_pairs(
    labels: np.ndarray, rng: np.random.Generator, most: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of N labelled images, or a sample.

    Args:
        labels: int (N,), the person of each image.
        rng: draws the sample.
        most: genuine and impostor pairs at most, ``most`` of either kind, drawn without
            replacement.

    Returns:
        int64 (P, 2), indices of images, and bool (P,), True for genuine pairs.

    Examples:
        >>> pairs, same = sample_pairs(np.array([4, 4, 9]), np.random.default_rng(0), most=10)
        >>> pairs.tolist(), same.tolist()
        ([[0, 1], [0, 2], [1, 2]], [True, False, False])
    """
    labels = np.asarray(labels)
    count = len(labels)
    order = np.argsort(labels, kind="stable")
    starts = np.unique(labels[order], return_index=True)[1]
    of_person = [
        group[np.stack(np.triu_indices(len(group), 1), 1)]
        for group in np.split(order, starts[1:])
        if len(group) > 1
    ]
    genuine = np.concatenate(of_person) if of_person else np.zeros((0, 2), np.int64)
    everything = count * (count - 1) // 2
    impostors = everything - len(genuine)
    if len(genuine) > most:
        genuine = genuine[rng.choice(len(genuine), most, replace=False)]
    if impostors <= most:
        number = np.arange(everything)
    else:
        # A few more than are wanted, since some of them are genuine.
        number = rng.choice(
            everything, min(everything, int(1.1 * most * everything / impostors)), replace=False
        )
    # Pair number n in the order (0, 1), (0, 2), (1, 2), (0, 3), …: n = j(j-1)/2 + i, i < j.
    j = ((1 + np.sqrt(1 + 8 * number.astype(np.float64))) / 2).astype(np.int64)
    j -= j * (j - 1) // 2 > number
    j += j * (j + 1) // 2 <= number
    mixed = np.stack([number - j * (j - 1) // 2, j], 1)
    mixed = mixed[labels[mixed[:, 0]] != labels[mixed[:, 1]]][:most]
    return np.concatenate([genuine, mixed]), np.arange(len(genuine) + len(mixed)) < len(genuine)
