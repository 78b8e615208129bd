"""Templates: one feature for several images of a person, and the scores of pairs of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class TemplateAverager:
    """Sums image embeddings into template features as they come, so that none need be kept.

    A template's feature is the sum over its media of the mean over the medium's images, at length
    1: a video counts as much as a photograph, however many frames it has.

    Args:
        template: int (N,), the template of each image, 0 to T-1, each with an image.
        media: int (N,), the medium of each image.
        weights: (N,), factors on the images' embeddings (the detector's scores); by default 1. The
            mean stays that over the number of images, so that a doubtful medium counts for less.
    """

    def __init__(
        self, template: np.ndarray, media: np.ndarray, weights: np.ndarray | None = None
    ) -> None:
        self.template = np.asarray(template)
        both = np.stack([self.template, np.asarray(media)], axis=1)
        _, medium, counts = np.unique(both, axis=0, return_inverse=True, return_counts=True)
        self.factors = 1.0 / counts[medium.reshape(-1)]
        if weights is not None:
            self.factors *= weights
        self.done = 0
        self.sums = np.zeros((0, 0))

    def add(self, embeddings: np.ndarray) -> None:
        """Take the embeddings (n, d) of the next n images, rows of length 1."""
        if not self.sums.size:
            self.sums = np.zeros((int(self.template.max()) + 1, embeddings.shape[1]))
        part = slice(self.done, self.done + len(embeddings))
        order = np.argsort(self.template[part], kind="stable")
        templates, starts = np.unique(self.template[part][order], return_index=True)
        rows = embeddings[order] * self.factors[part][order, None]
        self.sums[templates] += np.add.reduceat(rows, starts, axis=0)
        self.done += len(embeddings)

    def features(self) -> np.ndarray:
        """The templates' features when all images are in: float32 (T, d), rows of length 1.

        Where embeddings cancel out exactly, or all weights are 0, a row is 0.
        """
        if self.done != len(self.template):
            raise ValueError(f"{self.done} of {len(self.template)} images were added.")
        norms = np.linalg.norm(self.sums, axis=1, keepdims=True)
        return (self.sums / np.where(norms > 0, norms, 1)).astype(np.float32)


def template_pair_scores(
    features: np.ndarray,
    pairs: np.ndarray,
    *,
    block: int = 1024,
    progress: Callable[[float], None] | None = None,
) -> np.ndarray:
    """Inner product of each pair of templates: float32 (P,).

    A template is in thousands of pairs, so products of whole blocks of templates, of which the
    pairs' entries are picked, are faster than fetching two features a pair. Memory: the result,
    12 bytes a pair for their order, and ``4 * block * T`` bytes for a product.

    Args:
        features: float32 (T, d).
        pairs: int (P, 2), rows of ``features``.
        block: templates on the left of a product.
        progress: called with the share of the work done since the last call.
    """
    scores = np.empty(len(pairs), np.float32)
    left, right = pairs[:, 0], pairs[:, 1]
    order = np.argsort(left, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(left, minlength=len(features)))])
    for first in range(0, len(features), block):
        last = min(first + block, len(features))
        chosen = order[starts[first] : starts[last]]
        if len(chosen):
            columns, column = np.unique(right[chosen], return_inverse=True)
            product = features[first:last] @ features[columns].T
            scores[chosen] = product[left[chosen] - first, column]
        if progress is not None:
            progress((last - first) / len(features))
    return scores
