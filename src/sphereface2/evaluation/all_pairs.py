"""TAR at FAR over every pair of a labelled set, exact, in bounded memory.

N embeddings make N(N-1)/2 pairs: too many to store, and a FAR of 1e-6 asks for one score at an
exact rank among billions. The scores are computed tile by tile and selected as they pass:

1. A sample of pairs brackets, for each FAR, the score at the wanted rank.
2. One pass over all tiles counts the impostor scores above each bracket and tallies those inside
   it by value. If a bracket missed, or held more distinct values than the tally keeps apart, it is
   replaced by the interval now known to hold the score and the pass repeated (rarely needed).
3. The tiles that hold genuine pairs are computed again and compared with the exact bounds.

Intervals need each person's accepted impostor pairs, too. Pass 2 counts them at the sample's own
guess of the score, which sampling misses by a share of 1/√(sampled scores above it), a quarter at
most; the intervals hang on how unequal people are, not on that. Where the sample says less, few
images have a score as high, and only theirs are scored again with the exact bound.

A tile's scores are the same float32 numbers whenever it is computed, so the passes agree. Rank-1
identification comes along: it needs each image's best score only.

Memory: a sorted copy of the embeddings, at most about ``16 * block**2`` bytes a worker and some
tens of megabytes of tallies, whatever the number of pairs. Time: the matrix product, N² d / 2
multiply-adds, and a fraction of it for the counting (``benchmarks/all_pairs.py`` measures both).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sphereface2.evaluation.bootstrap import (
    NONE,
    Bootstrap,
    Interval,
    own_threshold_intervals,
)
from sphereface2.evaluation.results import (
    OperatingPoint,
    PairsVerified,
    Resampling,
    unmeasured,
)
from sphereface2.evaluation.selection import HIGHEST, LOWEST, Search, keys_of
from sphereface2.evaluation.tiles import Accepted, Tiles, one_thread
from sphereface2.evaluation.verification import FARS, allowed_accepts, far_beside, roc

_SAMPLE = 2_000_000  # pairs drawn to place the brackets
_GUESSED = 16  # sampled scores above it that make a guess good enough to count people's pairs at
_EXACT_CURVE = 4_000_000  # pairs up to which the plotted ROC has every threshold


@dataclass(frozen=True, kw_only=True)
class AllPairsResult(PairsVerified):
    """The figures of all pairs of a labelled set.

    A TAR's threshold is the float32 next above the highest impostor score that must be rejected.

    Attributes:
        images, people: that were compared.
        rank1: share of images, of people with several, whose nearest other image shows the same
            person; a tie with somebody else is a miss.
        unreadable: images left out; ``unreadable_names`` has the first of them.
    """

    images: int
    people: int
    rank1: float
    unreadable: int
    unreadable_names: tuple[str, ...]


def evaluate_all_pairs(
    embeddings: np.ndarray,
    labels: np.ndarray,
    fars: Sequence[float] = FARS,
    *,
    name: str = "all pairs",
    unreadable: Sequence[str] = (),
    block: int = 1024,
    workers: int | None = None,
    bootstrap: Bootstrap = NONE,
    plots: Path | None = None,
    progress: Callable[[float], None] | None = None,
) -> AllPairsResult:
    """TAR at each FAR over all N(N-1)/2 pairs, each pair once; same definition as `tar_at_far`.

    Args:
        embeddings: float32 (N, d), rows of length 1.
        labels: int (N,), the person of each row.
        fars: each in (0, 1].
        name: of the set.
        unreadable: names of images that were left out.
        block: rows of a tile.
        workers: threads; by default the CPUs this process may use.
        bootstrap: over people, of the intervals of TAR, each resample's at its own threshold, to
            first order (`sphereface2.evaluation.bootstrap.at_own_threshold`). Its seed draws a
            sample too, on which no other figure depends.
        plots: folder for ``NAME_all_pairs_roc.png``.
        progress: called with the share of the work done since the last call.

    Raises:
        UserError: no genuine or no impostor pair, or embeddings that are not of length 1.

    Examples:
        >>> found = evaluate_all_pairs(np.eye(3)[[0, 0, 1, 1, 2]], np.array([7, 7, 8, 8, 9]), [0.5])
        >>> found.genuine, found.impostor, found.tar[0].value, found.rank1
        (2, 8, 1.0, 1.0)
    """
    tiles, genuine, impostors = Tiles.of(embeddings, labels, block, workers)
    rows, people = tiles.rows, tiles.people
    exact = genuine + impostors <= _EXACT_CURVE
    curve = np.zeros(0) if plots is None or exact else np.logspace(-6, 0, 97)
    points = _points(fars, curve, tiles, impostors, bootstrap, progress)
    tar = tuple(points[: len(fars)])
    equal = ["all images have the same embedding, as a network with weights of 0 gives them"]
    return AllPairsResult(
        name=name,
        images=len(rows),
        people=int(people[-1]) + 1,
        genuine=genuine,
        impostor=impostors,
        tar=tar,
        rank1=tiles.rank1(),
        unreadable=len(unreadable),
        unreadable_names=tuple(unreadable[:20]),
        notes=unmeasured("TAR at FAR", tar, impostors, "impostor pairs")
        + (equal if (rows == rows[0]).all() else []),
        intervals=Resampling.of(bootstrap, "first order"),
        plots=() if plots is None else _plot(name, points[len(fars) :], rows, people, plots),
    )


def _points(
    fars: Sequence[float],
    curve: np.ndarray,
    tiles: Tiles,
    impostors: int,
    bootstrap: Bootstrap,
    progress: Callable[[float], None] | None,
) -> list[OperatingPoint]:
    """TAR at each FAR, with its interval, then at those of the curve."""
    every, resampled = [*fars, *curve], []
    if not all(0 < far <= 1 for far in every):
        raise ValueError(f"a FAR must lie in (0, 1], got {every}.")
    if bootstrap.replicates:
        resampled = [*fars, far_beside(fars, impostors)]
    ranks = [allowed_accepts(far, impostors) for far in [*resampled, *every]]
    searches = {k: Search(k) for k in set(ranks) if 0 < k < impostors}
    with one_thread():  # many small products
        _bracket(list(searches.values()), tiles, impostors, bootstrap.seed)
    own = ranks[: len(resampled)]
    counted = _search(searches, own, tiles, progress)
    # The highest impostor score that must be rejected: none when all may be accepted.
    bounds = np.array([_bound(searches, k) for k in ranks], np.float32)
    hits, trials = tiles.genuine_hits(bounds)
    cis: list[Interval | None] = [None] * len(every)
    if own:
        images = np.bincount(tiles.people)
        accepted = _accepted(own, searches, counted, tiles)
        impostor_pairs = images * (len(tiles.rows) - images)
        found = own_threshold_intervals(
            hits[: len(own)], trials, accepted, impostor_pairs, bootstrap
        )
        cis[: len(fars)] = found[: len(fars)]
    points = []
    first = len(own)
    for far, k, bound, hit, ci in zip(
        every, ranks[first:], bounds[first:], hits[first:], cis, strict=False
    ):
        if not k:
            points.append(OperatingPoint(far, None))
            continue
        next_above = float(np.nextafter(bound, np.float32(np.inf))) if bound > -np.inf else -1.0
        points.append(OperatingPoint(far, float(hit.sum() / trials.sum()), ci, next_above))
    return points


def _bound(searches: Mapping[int, Search], k: int) -> float:
    """The score that an accepted one must exceed so that ``k`` impostor pairs are accepted."""
    if k in searches:
        return float(searches[k].bound)  # type: ignore[arg-type]
    return -np.inf if k else np.inf


def _search(
    searches: Mapping[int, Search],
    asked: Sequence[int],
    tiles: Tiles,
    progress: Callable[[float], None] | None,
) -> dict[int, np.ndarray]:
    """Find every bound; of those asked that are guessed, each image's pairs at the guess, (N,).

    They are brought to the number that was wanted, which each pair has two images of.
    """
    guesses = {k: searches[k].guess for k in asked if k in searches}
    guesses = {k: guess for k, guess in guesses.items() if guess is not None}
    accepted = Accepted(np.array([*guesses.values()], np.float32), len(tiles.rows))
    first = True
    while (unsettled := [s for s in searches.values() if s.bound is None]) or first:
        tiles.count(unsettled, progress if first else None, accepted if first and guesses else None)
        for search in unsettled:
            search.conclude()
        first = False
    rows = zip(guesses, accepted.counts, strict=True)
    # None reaches a guess among equal scores where the sample's lie a last bit above the tiles'.
    return {k: row * (2 * k / row.sum()) for k, row in rows if row.any()}


def _accepted(
    asked: Sequence[int],
    searches: Mapping[int, Search],
    counted: dict[int, np.ndarray],
    tiles: Tiles,
) -> np.ndarray:
    """Accepted impostor pairs of each person at each rank asked: (K, people)."""
    images = np.bincount(tiles.people)[tiles.people]
    everything = len(tiles.rows) - images
    rare = [k for k in searches if k in asked and k not in counted]
    above = np.nextafter([np.float32(_bound(searches, k)) for k in rare], np.float32(np.inf))
    found = counted | dict(zip(rare, tiles.accepted(above), strict=True))
    rows = [found.get(k, everything if k else np.zeros_like(images)) for k in asked]
    return np.stack([np.bincount(tiles.people, row) for row in rows])


def _bracket(searches: list[Search], tiles: Tiles, impostors: int, seed: int) -> None:
    """Place each bracket where a sample says the wanted score lies, wide enough to hold it."""
    if impostors <= _SAMPLE:
        return  # the tally alone holds about as much
    # Small random squares of the score matrix: a row serves few pairs, yet each is a product.
    rows, people, rng = tiles.rows, tiles.people, np.random.default_rng(seed)
    side = min(64, len(rows) // 2)
    sample = []
    for _ in range(-(-_SAMPLE // side**2)):
        drawn = rng.choice(len(rows), size=2 * side, replace=False, shuffle=False)
        i, j = drawn[:side], drawn[side:]
        sample.append((rows[i] @ rows[j].T)[people[i, None] != people[j]])
    scores = np.sort(np.concatenate(sample))[::-1]
    for search in searches:
        at = search.rank / impostors * len(scores)
        if at >= _GUESSED:
            search.guess = scores[min(int(at), len(scores) - 1)]
        # Six standard deviations of a random sample's rank, and 3 % since pairs that share a row
        # are not independent. A miss costs a second pass, nothing else.
        margin = 6 * np.sqrt(at) + 0.03 * at + 12
        first, last = int(at - margin), int(at + margin)
        keys = keys_of(scores[[max(first, 0), min(last, len(scores) - 1)]])
        search.bracket = (
            int(keys[1]) if last < len(scores) else LOWEST,
            int(keys[0]) + 1 if first >= 0 else HIGHEST,
        )


def _plot(
    name: str,
    points: Sequence[OperatingPoint],
    rows: np.ndarray,
    people: np.ndarray,
    folder: Path,
) -> tuple[str, ...]:
    from sphereface2.evaluation.plots import plot_roc  # matplotlib is slow to import

    if points:
        measured = [(point.at, point.value) for point in points if point.value is not None]
        far, tar = np.array(measured, float).reshape(-1, 2).T
    else:
        scores = np.concatenate([rows[k + 1 :] @ row for k, row in enumerate(rows)])
        same = np.concatenate([people[k + 1 :] == who for k, who in enumerate(people)])
        far, tar, _ = roc(scores, same)
    path = folder / f"{name}_all_pairs_roc.png"
    pairs = len(rows) * (len(rows) - 1) // 2
    plot_roc({name: (far, tar)}, path, title=f"{name}: ROC of all {pairs:,} pairs")
    return (str(path),)
