"""One threshold for everybody: what a fixed threshold does on a set, and whether one can serve it.

A threshold is chosen on some people and used on others. `all_pairs_at` measures what becomes of it
there: the FAR that is reached, beside the one that was asked for, and the TAR, over all pairs of a
labelled set or of one group of it. `uniform_accuracy` asks how many images a single threshold can
serve at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from threading import Lock
from typing import Any, NamedTuple

import numpy as np

from sphereface2.errors import UserError
from sphereface2.evaluation.bootstrap import NONE, Bootstrap, draws, interval, ratio_intervals
from sphereface2.evaluation.results import Estimate, Resampling, Result, least_far, to_dict
from sphereface2.evaluation.tiles import Tiles
from sphereface2.evaluation.verification import ROUNDING

_KEPT = 4_000_000  # accepted impostor pairs that are held before they are counted


@dataclass(frozen=True)
class AtThreshold:
    """What a fixed threshold does on all pairs of a set.

    Attributes:
        threshold: a pair is accepted at a similarity of at least this.
        far: share of the impostor pairs that are accepted; interval over people.
        tar: share of the genuine pairs that are accepted; interval over people.
        genuine, impostor: numbers of pairs.
        accepted: impostor pairs among them that are accepted.
        asked: the FAR that the threshold was chosen for elsewhere, or None.
    """

    threshold: float
    far: Estimate
    tar: Estimate
    genuine: int
    impostor: int
    accepted: int
    asked: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it, with ``transfer``."""
        found = to_dict(self)
        if (transfer := self.transfer) is not None:
            found |= {"transfer": transfer.value, "transfer_ci": transfer.ci}
        return found

    @property
    def transfer(self) -> Estimate | None:
        """log10 of the FAR reached over the FAR asked for: 0 is a threshold that carries over.

        Where no impostor pair was accepted, half a pair is counted, or the share asked for where
        that is less: a set too small to tell is no reproach. Nor is it praise: the interval then
        reaches up to three pairs, whose absence is as likely as 5 %. None without ``asked``.

        Examples:
            >>> far, tar = Estimate(1e-2, (5e-3, 2e-2)), Estimate(0.9)
            >>> found = AtThreshold(0.4, far, tar, 10, 1000, 10, asked=1e-3).transfer
            >>> round(found.value, 6), [round(end, 3) for end in found.ci]
            (1.0, [0.699, 1.301])
        """
        if self.asked is None:
            return None
        least, asked = least_far(self.impostor, self.asked), self.asked

        def decades(far: float) -> float:
            return math.log10(max(far, least) / asked)

        most = 0.0 if self.accepted else 3 / self.impostor
        ci = self.far.ci and (decades(self.far.ci[0]), decades(max(self.far.ci[1], most)))
        return Estimate(decades(self.far.value), ci)


@dataclass(frozen=True)
class CheckedSet:
    """What the thresholds of a calibration do on a labelled set that it was not fitted on.

    Attributes:
        name: of the set.
        fingerprint: of the set, see `Source.fingerprint`.
        images, people: numbers of the set.
        unreadable: images left out.
        thresholds: on all pairs of the set, each with the FAR that was asked of it; rates and
            `AtThreshold.transfer` have intervals over people.
    """

    name: str
    fingerprint: str
    images: int
    people: int
    unreadable: int
    thresholds: tuple[AtThreshold, ...]

    def to_dict(self) -> dict[str, Any]:
        """As ``calibration.json`` has it."""
        found = {one.name: getattr(self, one.name) for one in fields(self)[:-1]}
        rates = [
            one.to_dict() | {"far_ci": one.far.ci, "tar_ci": one.tar.ci} for one in self.thresholds
        ]
        return {**found, "thresholds": rates}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> CheckedSet:
        """What `to_dict` gave."""
        thresholds = []
        for one in content["thresholds"]:
            far, tar = (Estimate(one[key], tuple(one[f"{key}_ci"])) for key in ("far", "tar"))
            counts = {key: int(one[key]) for key in ("genuine", "impostor", "accepted")}
            at = AtThreshold(one["threshold"], far, tar, **counts, asked=one["asked"])
            thresholds.append(at)
        facts = {one.name: content[one.name] for one in fields(cls)[:-1]}
        return cls(**facts, thresholds=tuple(thresholds))


def all_pairs_at(
    embeddings: np.ndarray,
    labels: np.ndarray,
    thresholds: Mapping[float, float] | Sequence[float],
    *,
    block: int = 1024,
    workers: int | None = None,
    bootstrap: Bootstrap = NONE,
    progress: Callable[[float], None] | None = None,
) -> list[AtThreshold]:
    """FAR and TAR at each threshold over all N(N-1)/2 pairs, exact.

    Args:
        embeddings: float32 (N, d), rows of length 1.
        labels: int (N,), the person of each row.
        thresholds: similarities, or by the FAR that each was chosen for.
        block: rows of a tile.
        workers: threads; by default the CPUs this process may use.
        bootstrap: over people, of the intervals.
        progress: called with the share of the work done since the last call.

    Memory grows with the pairs of people that share a false accept, not with the pairs.

    Raises:
        UserError: no genuine or no impostor pair, or embeddings that are not of length 1.

    Examples:
        >>> found, = all_pairs_at(np.eye(3)[[0, 0, 1, 1, 2]], np.array([7, 7, 8, 8, 9]), [0.5])
        >>> found.far.value, found.tar.value, found.impostor
        (0.0, 1.0, 8)
    """
    tiles, genuine, impostor = Tiles.of(embeddings, labels, block, workers)
    asked = list(thresholds) if isinstance(thresholds, Mapping) else [None] * len(thresholds)
    values = thresholds.values() if isinstance(thresholds, Mapping) else thresholds
    limits = np.array([*values], np.float32)
    if not np.isfinite(limits).all():
        raise UserError(f"thresholds must be finite, got {[*values]}")
    accepted = _accepted_impostors(tiles, limits, progress)
    hits, trials = tiles.genuine_hits(np.nextafter(limits, np.float32(-np.inf)))
    tar_cis = ratio_intervals(hits, trials, bootstrap)
    far_cis = _far_intervals(accepted, np.bincount(tiles.people), bootstrap)
    return [
        AtThreshold(
            float(limit),
            Estimate(float(pairs[2].sum() / impostor), far_ci),
            Estimate(float(hit.sum() / genuine), tar_ci),
            genuine,
            impostor,
            int(pairs[2].sum()),
            far,
        )
        for limit, pairs, hit, far_ci, tar_ci, far in zip(
            limits, accepted, hits, far_cis, tar_cis, asked, strict=True
        )
    ]


def _accepted_impostors(
    tiles: Tiles, limits: np.ndarray, progress: Callable[[float], None] | None
) -> list[np.ndarray]:
    """By limit, pairs of people with accepted impostor pairs: int64 (3, K), a, b, their number."""
    lock, order = Lock(), np.argsort(limits)
    people = int(tiles.people[-1]) + 1
    kept: list[list[np.ndarray]] = [[] for _ in limits]
    counted = [np.zeros((2, 0), np.int64) for _ in limits]

    def tally(k: int) -> None:
        keys = np.concatenate([counted[k][0], *kept[k]])
        weights = np.concatenate([counted[k][1], np.ones(len(keys) - counted[k].shape[1], int)])
        found, at = np.unique(keys, return_inverse=True)
        counted[k] = np.stack([found, np.bincount(at, weights, len(found)).astype(np.int64)])
        kept[k] = []

    def work(i: int, j: int, a: np.ndarray, b: np.ndarray, scores: np.ndarray) -> None:
        keys = tiles.people[i + a].astype(np.int64) * people + tiles.people[j + b]
        with lock:
            for k in order:
                inside = scores >= limits[k]
                keys, scores = keys[inside], scores[inside]
                if len(keys):
                    kept[k].append(keys)
                if sum(map(len, kept[k])) > _KEPT:
                    tally(k)

    tiles.impostors_from(float(limits.min(initial=np.inf)), work, progress)
    for k in range(len(limits)):
        tally(k)
    return [np.stack([keys // people, keys % people, count]) for keys, count in counted]


def _far_intervals(
    accepted: list[np.ndarray], images: np.ndarray, bootstrap: Bootstrap
) -> list[tuple[float, float] | None]:
    """The interval of each FAR over people: impostor pairs (a, b) count c_a·c_b times."""
    if not bootstrap.replicates:
        return [None] * len(accepted)
    rates: list[list[np.ndarray]] = [[] for _ in accepted]
    for counts in draws(len(images), *bootstrap):
        drawn = counts * images
        total = (drawn.sum(1) ** 2 - (drawn**2).sum(1)) / 2
        total[total == 0] = np.nan
        for k, (a, b, weight) in enumerate(accepted):
            sums = np.zeros(len(counts))
            for part in np.array_split(np.arange(len(a)), max(1, len(a) // 20_000)):
                sums += (counts[:, a[part]] * counts[:, b[part]]) @ weight[part].astype(float)
            rates[k].append(sums / total)
    return [interval(np.concatenate(parts)) for parts in rates]


class Boundary(NamedTuple):
    """Where the binary classifiers of a head are undecided, margins aside: r·g(cos) + b = 0.

    Attributes:
        bias, r, t: b, of the head; r times the scale that it has learned, if it has.
        g: -b/r.
        reached: the cosine there, ±inf where no cosine reaches it.
    """

    bias: float
    r: float
    t: float
    g: float
    reached: float


def boundary(metadata: Mapping[str, Any]) -> Boundary | None:
    """That of the head that a network was trained with; None where it has no shared bias.

    Args:
        metadata: of the network; ``head`` holds ``bias``, ``r`` and ``t``, and maybe ``scale``.

    Examples:
        >>> boundary({"head": {"bias": -2.0, "r": 10.0, "t": 1.0}}).reached
        0.2
    """
    head: Any = metadata.get("head")
    try:
        bias, r, t = (float(head[key]) for key in ("bias", "r", "t"))
        r *= float(head.get("scale", 1.0))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    if not (math.isfinite(bias) and r > 0 and t >= 1):
        return None
    g = -bias / r
    if not -1 <= g <= 1:
        return Boundary(bias, r, t, g, math.copysign(math.inf, g))
    return Boundary(bias, r, t, g, g if t == 1 else 2 * ((g + 1) / 2) ** (1 / t) - 1)


@dataclass(frozen=True)
class UniformAccuracy:
    """How many images one threshold can serve.

    Attributes:
        share: of the images of people with several: those that a single threshold serves, which
            has every other image of the person at least at it and everybody else below it.
        threshold: the one that serves most.
        images: number of images judged.
    """

    share: Estimate
    threshold: float
    images: int


def uniform_accuracy(
    embeddings: np.ndarray,
    labels: np.ndarray,
    *,
    block: int = 1024,
    workers: int | None = None,
    bootstrap: Bootstrap = NONE,
) -> UniformAccuracy:
    """The largest share of images that one threshold serves (arXiv 2403.07289, on images).

    Args:
        embeddings: float32 (N, d), rows of length 1.
        labels: int (N,), the person of each row.
        block: rows of a tile.
        workers: threads.
        bootstrap: over people, of the share's interval; each resample finds its own threshold.

    Raises:
        UserError: no genuine or no impostor pair, or embeddings that are not of length 1.

    Examples:
        >>> found = uniform_accuracy(np.eye(3)[[0, 0, 1, 1, 2]], np.array([7, 7, 8, 8, 9]))
        >>> found.share.value, found.threshold, found.images
        (1.0, 1.0, 4)
    """
    tiles, _, _ = Tiles.of(embeddings, labels, block, workers)
    rows, people = tiles.rows, tiles.people
    tiles.count([])
    starts = np.searchsorted(people, np.arange(people[-1] + 2))
    lowest = np.full(len(rows), np.inf, np.float32)
    for first, last in pairwise(starts):
        for start in range(first, last, block) if last - first > 1 else ():
            scores = rows[start : min(start + block, last)] @ rows[first:last].T
            np.fill_diagonal(scores[:, start - first :], np.inf)
            lowest[start : start + len(scores)] = scores.min(axis=1)
    judged = np.isfinite(lowest)
    return best_threshold(lowest[judged], tiles.nearest_other[judged], people[judged], bootstrap)


def best_threshold(
    lowest: np.ndarray, highest: np.ndarray, people: np.ndarray, bootstrap: Bootstrap = NONE
) -> UniformAccuracy:
    """The threshold t that most images have in (highest impostor, lowest genuine], to rounding.

    Args:
        lowest: (N,), the least genuine score of each image of a person with several.
        highest: (N,), its greatest impostor score.
        people: (N,), whose it is.
        bootstrap: as in `uniform_accuracy`.
    """
    served = highest + np.float32(ROUNDING) < lowest
    places = np.unique(lowest[served]) if served.any() else lowest[:1]
    # Images whose interval opens at or below the place, less those that it has closed before.
    reached = places - np.float32(ROUNDING)
    opens = np.searchsorted(reached, highest[served], side="right")
    closes = np.searchsorted(reached, lowest[served], side="right")
    numbers, who = np.unique(people, return_inverse=True)

    def shares(counts: np.ndarray) -> np.ndarray:
        """(R, places), from how often each person counts (R, people)."""
        weights = counts[:, who[served]]
        change = np.zeros((len(counts), len(places) + 1))
        for row, weight in zip(change, weights, strict=True):
            row += np.bincount(opens, weight, len(row)) - np.bincount(closes, weight, len(row))
        return np.cumsum(change[:, :-1], axis=1) / np.maximum(counts @ np.bincount(who), 1)[:, None]

    whole = shares(np.ones((1, len(numbers))))[0]
    best = int(whole.argmax())
    ci = None
    if bootstrap.replicates:
        found = [
            shares(counts).max(axis=1)
            for counts in draws(len(numbers), *bootstrap, numbers=len(places))
        ]
        ci = interval(np.concatenate(found))
    return UniformAccuracy(Estimate(float(whole[best]), ci), float(places[best]), len(lowest))


@dataclass(frozen=True, kw_only=True)
class OneThresholdResult(Result):
    """How well one threshold serves a labelled set.

    Attributes:
        images, people: of the set.
        uniform: accuracy of the best single threshold.
        thresholds: the fixed thresholds on all pairs of the set.
        groups: the same within each group.
    """

    images: int
    people: int
    uniform: UniformAccuracy
    thresholds: tuple[AtThreshold, ...]
    groups: dict[str, tuple[AtThreshold, ...]]


def judge_thresholds(
    embeddings: np.ndarray,
    labels: np.ndarray,
    thresholds: Mapping[float, float],
    *,
    name: str,
    groups: Sequence[str | None] | None = None,
    bootstrap: Bootstrap = NONE,
) -> OneThresholdResult:
    """`all_pairs_at`, `uniform_accuracy` and, where there are groups, `by_group` of a set."""
    at = all_pairs_at(embeddings, labels, thresholds, bootstrap=bootstrap) if thresholds else []
    return OneThresholdResult(
        name=name,
        images=len(labels),
        people=len(np.unique(labels)),
        uniform=uniform_accuracy(embeddings, labels, bootstrap=bootstrap),
        thresholds=tuple(at),
        groups={}
        if groups is None
        else by_group(groups, embeddings, labels, thresholds, bootstrap=bootstrap),
        notes=[],
        intervals=Resampling.of(bootstrap, "fixed"),
    )


def by_group(
    groups: Sequence[str | None],
    embeddings: np.ndarray,
    labels: np.ndarray,
    thresholds: Mapping[float, float],
    *,
    bootstrap: Bootstrap = NONE,
) -> dict[str, tuple[AtThreshold, ...]]:
    """`all_pairs_at` within each group at the same thresholds.

    Pairs are of two images of the group: a threshold that serves all can fail a group whose people
    look more alike to the network than others do.

    Args:
        groups: the group of each of the N images; None is in no group.
        embeddings, labels, thresholds, bootstrap: as in `all_pairs_at`.

    Raises:
        UserError: a group without genuine or without impostor pairs.
    """
    if len(groups) != len(embeddings):
        raise ValueError(f"{len(groups)} groups were given for {len(embeddings)} images.")
    names = np.array([group or "" for group in groups])
    found = {}
    for name in sorted(set(names.tolist()) - {""}):
        inside = names == name
        try:
            found[name] = tuple(
                all_pairs_at(embeddings[inside], labels[inside], thresholds, bootstrap=bootstrap)
            )
        except UserError as error:
            raise UserError(f"group {name!r} cannot be judged: {error}") from error
    return found
