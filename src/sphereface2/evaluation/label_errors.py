"""Which labels of a set are wrong: images beside their person, and people under two labels.

Nothing but the set itself says what a score is worth. An image is scored against the centre of the
*other* images of its label and against the nearest other label's centre. Scores between images and
labels drawn at random show how impostors score, f(s); the own scores are a mixture

    p(s) = (1 - w) g(s) + w f(s),

whose share of wrong labels w is bounded by the low end, where genuine scores are rare (the
two-group model of Efron, "Large-Scale Simultaneous Hypothesis Testing", JASA 99, 2004). The
posterior w f(s) / p(s) joins what the nearest other label says: a wrong image either belongs to
that label, whose score is then a genuine one, or to nobody here.

Two labels are one person where their images are about as alike as those of one label are, and more
than those of so many pairs of different people would be: the mean cosine of the pairs across,
relative to those within, m(A, B) / sqrt(m(A, A) m(B, B)), free of how well a person's images agree.
The expected number of different people above a score is extrapolated from the bulk of all pairs, so
the share of false ones among the pairs above it (their false discovery rate) holds for any number
of labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sphereface2.data.embedding_table import unit
from sphereface2.evaluation.neighbours import nearest_other, pairs_from

_GRID = np.linspace(-1, 1, 401)
_SAMPLE = 400_000  # impostor scores, drawn
_LEAST = 500  # images of a group of labels of like size
_PRIOR = 10.0
_TAIL = 4000  # pairs of labels that the tail is fitted on, at least


@dataclass(frozen=True)
class LabelScores:
    """What each of N images says of its label.

    Attributes:
        own: float32 (N,), cosine to the centre of the label's other images; NaN if there are none.
        other: float32 (N,), cosine to the nearest other label's centre.
        nearest: int64 (N,), that label.
        wrong: float32 (N,), probability that the image does not belong to its label.
        moves: float32 (N,), probability that it belongs to ``nearest`` instead.
        share: estimated share of wrong labels.
    """

    own: np.ndarray
    other: np.ndarray
    nearest: np.ndarray
    wrong: np.ndarray
    moves: np.ndarray
    share: float


def score_labels(
    rows: np.ndarray,
    labels: np.ndarray,
    *,
    copies: np.ndarray | None = None,
    rounds: int = 3,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> LabelScores:
    """Score each image of a labelled set.

    Args:
        rows: float32 (N, d), of length 1.
        labels: int64 (N,), from 0, at least two different ones.
        copies: bool (N,), images that are copies of others of their label and no evidence.
        rounds: that weigh images by the last round's result, so that wrong ones leave the centres.
        seed: of the sample of impostor scores.
        progress: called with the share of the work done since the last call.
    """
    rng = np.random.default_rng(seed)
    count = np.bincount(labels)
    others = count[labels] - 1
    groups = _groups(others)
    once = np.ones(len(rows), np.float32) if copies is None else (~copies).astype(np.float32)
    wrong = np.zeros(len(rows), np.float32)
    for _ in range(rounds):
        sums = weighted_sums(rows, labels, once * (1 - wrong))
        own = _own(rows, labels, sums, once * (1 - wrong))
        impostors, sizes = _impostors(rows, labels, sums, count, rng)
        found = [_two_groups(own[g], impostors[np.isin(sizes, others[g])]) for g in groups]
        for group, (posterior, *_) in zip(groups, found, strict=True):
            wrong[group] = posterior
    other, nearest = nearest_other(rows, labels, unit(sums), progress=progress)
    moves = np.zeros(len(rows), np.float32)
    strange = _density(other, 1 - wrong)  # of the best score among labels of other people
    for group, (_, share, genuine, impostor) in zip(groups, found, strict=True):
        first, second = _three(own[group], other[group], share, genuine, impostor, strange)
        wrong[group], moves[group] = first, second
    return LabelScores(own, other, nearest, wrong, moves, float(wrong.mean()))


def weighted_sums(rows: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sum of each label's weighted rows, float32 (labels, d)."""
    from scipy.sparse import csr_array

    matrix = csr_array(
        (weights.astype(np.float32), (labels, np.arange(len(rows)))),
        shape=(int(labels.max()) + 1, len(rows)),
    )
    return np.asarray(matrix @ rows, np.float32)


def _own(rows: np.ndarray, labels: np.ndarray, sums: np.ndarray, weights: np.ndarray) -> np.ndarray:
    result = np.full(len(rows), np.nan, np.float32)
    for start in range(0, len(rows), 65536):
        part = slice(start, start + 65536)
        rest = sums[labels[part]] - weights[part, None] * rows[part]
        length = np.linalg.norm(rest, axis=1)
        some = length > 1e-3
        dot = np.einsum("nd,nd->n", rest, rows[part])
        result[part][some] = dot[some] / length[some]
    return result


def _groups(others: np.ndarray) -> list[np.ndarray]:
    """Indices of images whose labels have like numbers of other images: 1, 2, 3–4, 5–8, …

    Images that are alone with their label are in none. Small groups join the next.
    """
    octave = np.ceil(np.log2(np.maximum(others, 1))).astype(int)
    result: list[np.ndarray] = []
    waiting = np.zeros(0, np.int64)
    for size in np.unique(octave[others > 0]):
        waiting = np.concatenate([waiting, np.flatnonzero((octave == size) & (others > 0))])
        if len(waiting) >= _LEAST:
            result.append(waiting)
            waiting = waiting[:0]
    if len(waiting):
        result[-1:] = [np.concatenate([*result[-1:], waiting])]
    return result


def _impostors(
    rows: np.ndarray,
    labels: np.ndarray,
    sums: np.ndarray,
    count: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of images and centres of other labels, and how many images made each centre."""
    images = rng.integers(len(rows), size=_SAMPLE)
    # As images are distributed over labels, so that centres are as good as those of own scores.
    against = labels[rng.integers(len(rows), size=_SAMPLE)]
    different = labels[images] != against
    images, against = images[different], against[different]
    centres = unit(sums)
    parts = np.array_split(np.arange(len(images)), max(1, len(images) // 65536))
    scores = [np.einsum("nd,nd->n", rows[images[p]], centres[against[p]]) for p in parts]
    # An own score's centre lacks the image itself; a centre of n here stands for n others, or for
    # n - 1 where no label is larger.
    sizes = np.minimum(count[against], count.max() - 1)
    return np.concatenate(scores), sizes


def _density(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Smoothed histogram on the grid, of mass 1 and nowhere 0."""
    from scipy.ndimage import gaussian_filter1d

    edges = np.append(_GRID, _GRID[-1] + _GRID[1] - _GRID[0]) - (_GRID[1] - _GRID[0]) / 2
    heights = np.histogram(np.clip(values, -1, 1), edges, weights=weights)[0].astype(float)
    total = heights.sum()
    # Silverman's width, for the number of values.
    spread = float(np.std(values)) if len(values) > 1 else 0.1
    width = 0.9 * spread * max(len(values), 1) ** -0.2 / (_GRID[1] - _GRID[0])
    smooth = gaussian_filter1d(heights / max(total, 1e-9), max(width, 1.0), mode="nearest")
    return smooth + 1e-9


def _at(density: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.interp(values, _GRID, density)


def _two_groups(
    own: np.ndarray, impostors: np.ndarray
) -> tuple[np.ndarray, float, np.ndarray, np.ndarray]:
    """Posterior of a wrong label, its share, and the densities of genuine and impostor scores."""
    from scipy.optimize import isotonic_regression

    known = own[np.isfinite(own)]
    mixed, impostor = _density(known), _density(impostors)
    # Genuine scores add to the share below each quantile, so the least estimate is the nearest. One
    # more than was counted, as in few scores none may lie below a low one.
    levels = np.linspace(0.05, 0.5, 10)
    bounds = np.quantile(impostors, levels)
    below = (np.searchsorted(np.sort(known), bounds, side="right") + 1) / max(len(known), 1)
    share = float(np.clip((below / levels).min(), 1e-4, 0.9))
    ratio = np.clip(share * impostor / mixed, 0, 1)
    # It falls with the score; values where there are no scores follow their neighbours.
    ratio = isotonic_regression(ratio, weights=mixed, increasing=False).x
    genuine = np.maximum(mixed - share * impostor, 0) * (1 - ratio) + 1e-9
    genuine /= genuine.sum()
    posterior = np.where(np.isfinite(own), _at(ratio, np.nan_to_num(own)), 0)
    return posterior.astype(np.float32), share, genuine, impostor


def _three(
    own: np.ndarray,
    other: np.ndarray,
    share: float,
    genuine: np.ndarray,
    impostor: np.ndarray,
    strange: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Posteriors of a wrong label, and of belonging to the nearest other one."""
    # The best score where one of the labels is the right one: the higher of a genuine score and
    # the best of strangers.
    below = np.cumsum(strange) / strange.sum()
    both = np.diff(np.cumsum(genuine) * below, prepend=0) + 1e-9
    # The share of it in which the right label is the nearest one.
    ahead = np.clip(genuine * below / both, 0, 1)
    o = np.nan_to_num(own)
    right = (1 - share) * _at(genuine, o) * _at(strange, other)
    false = share * _at(impostor, o)
    part = 0.5
    for _ in range(50):
        moved = part * false * _at(both, other)
        nobody = (1 - part) * false * _at(strange, other)
        total = right + moved + nobody
        mass = float((moved / total).sum()), float((nobody / total).sum())
        part = float(np.clip(mass[0] / max(sum(mass), 1e-9), 0.01, 0.99))
    known = np.isfinite(own)
    wrong = np.where(known, (moved + nobody) / total, 0)
    moves = np.where(known, moved / total * _at(ahead, other), 0)
    return wrong.astype(np.float32), moves.astype(np.float32)


@dataclass(frozen=True)
class AlikeLabels:
    """Pairs of labels, the most alike first.

    Attributes:
        pairs: int64 (K, 2).
        scores: float32 (K,), mean cosine across relative to those within, about 1 for one person.
        rate: float64 (K,), the share of false ones among this pair and those before it.
    """

    pairs: np.ndarray
    scores: np.ndarray
    rate: np.ndarray


def alike_labels(
    rows: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    *,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> AlikeLabels:
    """The pairs of labels that are the most alike, among all.

    How alike a label's own images are is known the less the fewer there are: the mean of all labels
    counts as `_PRIOR` pairs of them.

    Args:
        rows: float32 (N, d), of length 1.
        labels: int64 (N,), from 0.
        weights: (N,) of each image in its label.
        seed: of the sample that finds where the tail begins.
        progress: called with the share of the work done since the last call.
    """
    sums = weighted_sums(rows, labels, weights)
    there = np.flatnonzero(np.linalg.norm(sums, axis=1) > 1e-3)
    total, squares = (np.bincount(labels, w)[there] for w in (weights, weights**2))
    scaled = _scaled(sums[there], total, squares)
    people, pairs = len(there), len(there) * (len(there) - 1) // 2
    rng = np.random.default_rng(seed)
    drawn = rng.integers(people, size=(2, _SAMPLE))
    drawn = drawn[:, drawn[0] != drawn[1]]
    sample = np.einsum("nd,nd->n", scaled[drawn[0]], scaled[drawn[1]])
    wanted = min(1.0, max(_TAIL, 2 * people) / max(pairs, 1))
    limit = float(np.quantile(sample, 1 - wanted)) if pairs else 1.0
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    pairs_from(scaled, limit, lambda *found: kept.append(found), progress=progress)
    a, b, scores = (np.concatenate(part) for part in zip(*kept, strict=True))
    order = np.lexsort((b, a, -scores))
    a, b, scores = a[order], b[order], scores[order]
    return AlikeLabels(np.stack([there[a], there[b]], axis=1), scores, false_discovery_rate(scores))


def _scaled(sums: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Vectors of labels whose products are the mean cosines across, relative to those within.

    Args:
        sums: of each label's weighted rows.
        total, squares: of its weights, and of their squares.
    """
    pairs = np.maximum(total**2 - squares, 0)
    within = np.einsum("nd,nd->n", sums, sums) - squares  # without each row's product with itself
    mean = max(float(within.sum() / max(pairs.sum(), 1e-6)), 1e-3)
    within = np.maximum((within + _PRIOR * mean) / (pairs + _PRIOR), mean / 10)
    return (sums / (total * np.sqrt(within))[:, None]).astype(np.float32)


def false_discovery_rate(scores: np.ndarray) -> np.ndarray:
    """The share of impostors among the scores down to each, float64 (K,), never falling.

    The logarithm of the number of impostors above a score is taken for a parabola that is fitted
    on the lower three quarters of the scores, where genuine ones are a trifle, as the tail of a
    normal distribution is; it is extrapolated to the higher ones.

    Args:
        scores: (K,), falling: the upper tail of many impostor scores and a few genuine ones.
    """
    ranks = np.arange(1, len(scores) + 1)
    bulk = slice(len(scores) // 4, None)
    if len(scores) < 40 or np.ptp(scores[bulk]) <= 0:
        return np.minimum(ranks / max(len(scores), 1), 1.0)
    centre = float(scores[-1])
    x, y = scores[bulk].astype(np.float64) - centre, np.log(ranks[bulk])
    square, slope, level = np.polyfit(x, y, 2)
    if square > 0:  # no tail gets lighter more slowly than an exponential one
        square, (slope, level) = 0.0, np.polyfit(x, y, 1)
    above = scores.astype(np.float64) - centre
    expected = np.exp(np.minimum(square * above**2 + slope * above + level, 50))
    rate = np.minimum(expected / ranks, 1.0)
    return np.minimum.accumulate(rate[::-1])[::-1]
