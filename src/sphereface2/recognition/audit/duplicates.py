"""Images that are one photograph: equal pixels, or equal once scaled, cropped or mirrored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from sphereface2.evaluation.neighbours import pairs_from
from sphereface2.recognition.feature_parts import SIDE

#: Least cosine of two embeddings, and least correlation of their thumbnails before they are laid
#: over each other and after: `benchmarks/audit.py` says what they find.
SIMILAR, ALIKE, SAME = 0.8, 0.6, 0.98
_SAMPLE = 1_000_000
_FEW = 20_000  # pairs, which are always compared
_NEAR = 0.85  # correlation after a few steps from which the fit is worth many
_BEND = 1.08  # ratio of the scales of two axes
_AS_IS = np.eye(2, 3, dtype=np.float32)


@dataclass(frozen=True)
class Duplicate:
    """Two images that are one photograph; ``first < second``, indices of rows.

    ``score`` is 1 for equal pixels, else the correlation of the thumbnails laid over each other.
    """

    first: int
    second: int
    score: float


def find_duplicates(
    rows: np.ndarray,
    thumbnails: np.ndarray,
    pixels: np.ndarray,
    *,
    progress: Callable[[float], None] | None = None,
) -> list[Duplicate]:
    """All pairs of images that are one photograph; of equal ones, each with the first alone.

    Args:
        rows: float32 (N, d), embeddings of length 1.
        thumbnails: uint8 (N, SIDE * SIDE), grey.
        pixels: bytes (N,), equal where the images are.
        progress: called with the share of the work done since the last call.
    """
    _, first, group = np.unique(pixels, return_index=True, return_inverse=True)
    copies = np.flatnonzero(first[group] != np.arange(len(rows)))
    found = [Duplicate(int(first[group[i]]), int(i), 1.0) for i in copies]
    one = np.sort(first)  # one image of each group
    different = rows[one] if len(one) < len(rows) else rows

    def compare(a: np.ndarray, b: np.ndarray, _: np.ndarray) -> None:
        for x, y, score in _same(thumbnails, one[a], one[b]):
            found.append(Duplicate(x, y, score))

    pairs_from(different, _limit(different), compare, progress=progress)
    return sorted(found, key=lambda d: (d.first, d.second))


def _limit(rows: np.ndarray) -> float:
    """`SIMILAR`, or more where a weak network makes more pairs so similar than images there are."""
    a, b = np.random.default_rng(0).integers(len(rows), size=(2, _SAMPLE))
    parts = np.array_split(np.flatnonzero(a != b), 16)
    scores = [np.einsum("nd,nd->n", rows[a[part]], rows[b[part]]) for part in parts]
    pairs = len(rows) * (len(rows) - 1) / 2
    share = min(1.0, max(len(rows), _FEW) / max(pairs, 1))
    found = np.concatenate(scores)
    return float(np.clip(np.quantile(found, 1 - share), SIMILAR, 0.9)) if len(found) else 1.0


def _same(flat: np.ndarray, a: np.ndarray, b: np.ndarray) -> Iterator[tuple[int, int, float]]:
    for start in range(0, len(a), 4096):
        i, j = a[start : start + 4096], b[start : start + 4096]
        x, y = _normal(flat[i]), _normal(flat[j])
        mirrored = y.reshape(-1, SIDE, SIDE)[..., ::-1].reshape(len(y), -1)
        plain, turned = np.einsum("nd,nd->n", x, y), np.einsum("nd,nd->n", x, mirrored)
        for k in np.flatnonzero(np.maximum(plain, turned) >= ALIKE):
            score = overlaid(flat[i[k]], flat[j[k]], mirror=bool(turned[k] > plain[k]))
            if score >= SAME:
                yield int(i[k]), int(j[k]), score


def _normal(flat: np.ndarray) -> np.ndarray:
    values = flat.astype(np.float32)
    values -= values.mean(axis=1, keepdims=True)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-6)


def overlaid(first: np.ndarray, second: np.ndarray, *, mirror: bool = False) -> float:
    """Correlation of two thumbnails where they overlap, moved, turned and scaled to fit.

    The fit maximises the enhanced correlation coefficient (Evangelidis and Psarakis, "Parametric
    Image Alignment Using Enhanced Correlation Coefficient Maximization", PAMI 30, 2008).

    Args:
        first, second: uint8 (SIDE * SIDE,).
        mirror: the second.

    Examples:
        >>> image = np.random.default_rng(0).integers(256, size=SIDE * SIDE, dtype=np.uint8)
        >>> overlaid(image, image) > 0.999
        True
    """
    one, other = first.reshape(SIDE, SIDE), second.reshape(SIDE, SIDE)
    other = np.ascontiguousarray(other[:, ::-1]) if mirror else other
    start = float(_normal(one.reshape(1, -1))[0] @ _normal(other.reshape(1, -1))[0])
    if start >= SAME:
        return start
    best, found = _fitted(one, other, _AS_IS, 5)
    if max(start, best) < _NEAR or best >= SAME:
        return max(start, best)
    best, found = _fitted(one, other, found, 95)
    if best < SAME:  # a part fits the whole better than the whole fits a part
        back = cv2.invertAffineTransform(found) if best else _AS_IS
        best = max(best, _fitted(other, one, back, 100)[0])
    return max(start, best)


def _fitted(
    one: np.ndarray, other: np.ndarray, matrix: np.ndarray, steps: int
) -> tuple[float, np.ndarray]:
    """Correlation once `other` is laid over `one`, and how it lies, starting from ``matrix``.

    0 where that does not succeed or bends it.
    """
    everywhere = np.full((SIDE, SIDE), 255, np.uint8)
    criteria = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, steps, 1e-4)
    try:
        score, matrix = cv2.findTransformECC(
            one, other, matrix.copy(), cv2.MOTION_AFFINE, criteria, everywhere, 3
        )
    except cv2.error:  # it does not converge: they are too different, or one has no contrast
        return 0.0, matrix
    # A corner laid over a corner, or a face that is bent to fit another one, says nothing.
    large, small = np.linalg.svd(np.asarray(matrix)[:, :2])[1]
    whole = 0.7 < small <= large < 1.4 and np.abs(matrix[:, 2]).max() < SIDE / 3
    return float(score) if whole and large / small < _BEND else 0.0, matrix
