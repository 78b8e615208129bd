"""Templates, one feature for several images of a person: IJB's 1:1 and 1:N figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sphereface2.data.ijb import TemplateSet
from sphereface2.errors import check_count
from sphereface2.evaluation.bootstrap import NONE, Bootstrap, Interval, own_threshold_intervals
from sphereface2.evaluation.identification import GalleryResult, evaluate_gallery
from sphereface2.evaluation.results import (
    PairsVerified,
    Resampling,
    Result,
    far_key,
    unmeasured,
)
from sphereface2.evaluation.verification import FARS, far_beside, tar_at_far


@dataclass(frozen=True, kw_only=True)
class TemplatesResult(Result):
    """IJB-B's or IJB-C's figures.

    Attributes:
        images, templates: counts.
        detector_weights: whether images were weighted by the detector's scores.
        verification: 1:1, or None where its file is absent.
        galleries: 1:N, a result for each gallery; empty where its files are absent.
    """

    images: int
    templates: int
    detector_weights: bool
    verification: PairsVerified | None
    galleries: tuple[GalleryResult, ...]

    def means(self, figure: str) -> dict[float, float | None]:
        """Means over the galleries of "rank" or "tpir" by k or FPIR; None where one has none."""
        rows = zip(*(getattr(gallery, figure) for gallery in self.galleries), strict=True)
        values = {row[0].at: [rate.value for rate in row] for row in rows}
        return {at: None if None in v else float(np.mean(v)) for at, v in values.items()}

    def to_dict(self) -> dict[str, Any]:
        """As JSON: ``identification`` holds the means and ``galleries``, or is None."""
        found = super().to_dict()
        galleries = found.pop("galleries")
        found["identification"] = None
        if galleries:
            found["identification"] = {
                **{f"rank{k}": mean for k, mean in self.means("rank").items()},
                "tpir": {far_key(fpir): mean for fpir, mean in self.means("tpir").items()},
                "galleries": galleries,
            }
        return found


class TemplateAverager:
    """Sums image embeddings into template features as they come, so that none need be kept.

    A template's feature is the sum over its media of the mean over the medium's images, at length
    1: a video counts as much as a photograph, however many frames it has.

    Args:
        template: int (N,), the template of each image, 0 to T-1, each with an image.
        media: int (N,), the medium of each image.
        weights: (N,), factors on the images' embeddings (the detector's scores); by default 1. The
            mean stays that over the number of images, so that a doubtful medium counts for less.

    Examples:
        >>> averager = TemplateAverager(np.array([0, 0, 1]), np.array([7, 8, 9]))
        >>> averager.add(np.array([[1.0, 0], [0, 1], [1, 0]]))
        >>> averager.features().round(2).tolist()
        [[0.7099999785423279, 0.7099999785423279], [1.0, 0.0]]
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
            raise ValueError(f"{self.done} of {len(self.template)} images have been added.")
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

    Examples:
        >>> template_pair_scores(np.eye(2, dtype=np.float32), np.array([[0, 0], [0, 1]])).tolist()
        [1.0, 0.0]
    """
    check_count("block", block, 1)
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


def evaluate_templates(
    features: np.ndarray,
    templates: TemplateSet,
    *,
    detector_weights: bool = False,
    bootstrap: Bootstrap = NONE,
    progress: Callable[[float], None] | None = None,
) -> TemplatesResult:
    """IJB's figures from the features of its templates.

    Args:
        features: float32 (T, d) of `TemplateAverager`, rows of length 1.
        templates: from `sphereface2.data.ijb.load`.
        detector_weights: whether the features were weighted, for the result.
        bootstrap: over people, of the intervals; the thresholds are those of each resample, to
            first order (`sphereface2.evaluation.bootstrap.at_own_threshold`).
        progress: called with the share of the 1:1 scores done since the last call.
    """
    notes, verification, probes = list(templates.notes), None, templates.probes
    if empty := int(np.count_nonzero(~features.any(axis=1))):
        notes.append(
            f"{empty:,} of {len(features):,} templates have a feature of zeros: the weights of "
            "their images are all 0, or their embeddings cancel out"
        )
    if templates.pairs is not None and templates.same is not None:
        scores = template_pair_scores(features, templates.pairs, progress=progress)
        verification = _verify(scores, templates, bootstrap)
    galleries: Sequence[GalleryResult] = []
    if probes is not None:
        galleries = [
            evaluate_gallery(
                gallery.name,
                features[probes.templates],
                probes.people,
                features[gallery.templates],
                gallery.people,
                bootstrap=bootstrap,
            )
            for gallery in templates.galleries
        ]
    return TemplatesResult(
        name=templates.name,
        images=len(templates),
        templates=len(templates.template_ids),
        detector_weights=detector_weights,
        verification=verification,
        galleries=tuple(galleries),
        notes=notes,
    )


def subjects(templates: TemplateSet) -> np.ndarray:
    """The person of each template, numbered from 0: int (T,).

    Templates show one person where a list of the 1:N protocol names the same, or where genuine
    pairs join them: in IJB's 1:1 list those join each probe to its person's gallery template.
    """
    total, named = len(templates.template_ids), [*templates.galleries]
    named += [templates.probes] if templates.probes is not None else []
    people = np.concatenate([np.zeros(0, np.int64), *(who.people for who in named)])
    names, number = np.unique(people, return_inverse=True)
    rows = np.concatenate([np.zeros(0, np.int64), *(who.templates for who in named)])
    left, right = rows, total + number  # a node for each person of the lists, too
    if templates.pairs is not None:
        genuine = templates.pairs[templates.same]
        left, right = np.append(left, genuine[:, 0]), np.append(right, genuine[:, 1])
    nodes = total + len(names)
    joined = coo_array((np.ones(len(left), bool), (left, right)), (nodes, nodes))
    of = connected_components(joined, directed=False)[1][:total]
    return np.unique(of, return_inverse=True)[1]


def _verify(scores: np.ndarray, templates: TemplateSet, bootstrap: Bootstrap) -> PairsVerified:
    pairs, same = templates.pairs, templates.same
    assert pairs is not None and same is not None
    impostors = int(np.count_nonzero(~same))
    points = tar_at_far(scores, same, [*FARS, far_beside(FARS, impostors)])
    cis: Sequence[Interval | None] = [None] * len(points)
    if bootstrap.replicates:
        who = subjects(templates)
        people = int(who.max()) + 1

        def by_person(chosen: np.ndarray) -> np.ndarray:
            """Pairs of each person, genuine ones twice: only their ratios count."""
            sides = [np.bincount(who[pairs[chosen, k]], minlength=people) for k in (0, 1)]
            return sides[0] + sides[1]

        hits, accepted = [], []
        for point in points:
            # Where no score qualifies none is accepted.
            kept = scores >= (np.inf if point.threshold is None else point.threshold)
            hits.append(by_person(kept & same))
            accepted.append(by_person(kept & ~same))
        cis = own_threshold_intervals(
            np.stack(hits), by_person(same), np.stack(accepted), by_person(~same), bootstrap
        )
    tar = tuple(
        p if p.value is None else replace(p, ci=ci)
        for p, ci in zip(points[: len(FARS)], cis, strict=False)
    )
    return PairsVerified(
        name="1:1 verification",
        genuine=len(scores) - impostors,
        impostor=impostors,
        tar=tar,
        notes=unmeasured("TAR at FAR", tar, impostors, "impostor pairs"),
        intervals=Resampling.of(bootstrap, "first order"),
    )
