"""Identification metrics: who in a gallery is this, if anybody.

A probe is searched in a gallery of people. A person's score is the highest inner product of the
probe with one of their gallery embeddings. A probe is *enrolled* if its person is in the gallery;
its *rank* is then one more than the number of other people who score at least as high as its own
person, to rounding, so that a tie counts as a miss. Closed-set figures look at enrolled probes
only; open-set ones ask for a threshold too, which the probes of people outside the gallery must not
reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sphereface2.errors import UserError, check_count
from sphereface2.evaluation.bootstrap import (
    NONE,
    Bootstrap,
    Interval,
    own_threshold_intervals,
    ratio_intervals,
)
from sphereface2.evaluation.results import (
    FLAT,
    OperatingPoint,
    Rate,
    Resampling,
    Result,
    unmeasured,
)
from sphereface2.evaluation.verification import ROUNDING, error_bounds, far_beside

RANKS = (1, 5, 10)
FPIRS = (1e-1, 1e-2, 1e-3)
_SCORES = 1 << 24  # that a block of probes makes with the gallery
People = Sequence[str] | Sequence[int] | np.ndarray


@dataclass(frozen=True)
class Searches:
    """What the searches of Q probes in one gallery gave.

    Attributes:
        enrolled: bool (Q,), whether the probe's person is in the gallery.
        score: float32 (Q,), the own person's score where enrolled, elsewhere the best of anybody.
        rank: int64 (Q,), the own person's rank, 1 is best; 0 where not enrolled.
    """

    enrolled: np.ndarray
    score: np.ndarray
    rank: np.ndarray


@dataclass(frozen=True, kw_only=True)
class GalleryResult(Result):
    """Identification in one gallery.

    Attributes:
        templates, people: in the gallery.
        probes: searched in it; ``enrolled`` of them are of its people.
        rank: share of the enrolled probes whose own person has at most rank k, for each k.
        tpir: at each FPIR.
    """

    templates: int
    people: int
    probes: int
    enrolled: int
    rank: tuple[Rate, ...] = field(metadata=FLAT)
    tpir: tuple[OperatingPoint, ...]


def search(
    probes: np.ndarray,
    probe_people: People,
    gallery: np.ndarray,
    gallery_people: People,
    *,
    block: int | None = None,
) -> Searches:
    """Search each probe's embedding in the gallery, exhaustively.

    Scores are inner products in float32, computed in blocks of probes and never stored. Memory:
    a sorted copy of the gallery and some 100 MiB, whatever the number of probes.

    Args:
        probes: float32 (Q, d), rows of length 1 for cosine scores.
        probe_people: (Q,), the person of each probe, numbers or strings.
        gallery: float32 (M, d).
        gallery_people: (M,), the person of each gallery row; a person may have several.
        block: probes at a time; by default as many as make 16 million scores.

    Raises:
        UserError: the gallery is empty, or embeddings are not finite.
        ValueError: not one person for each probe, or for each gallery row; embeddings of different
            dimensions; people who are numbers here and text there.

    Examples:
        >>> found = search(np.eye(3), ["a", "b", "x"], np.eye(3)[:2], ["a", "b"])
        >>> found.enrolled.tolist(), found.rank.tolist()
        ([True, True, False], [1, 1, 0])
    """
    probes, gallery = (np.asarray(e).astype(np.float32, copy=False) for e in (probes, gallery))
    for what, rows, owners in (
        ("probes", probes, probe_people),
        ("gallery rows", gallery, gallery_people),
    ):
        if len(rows) != len(owners):
            raise ValueError(
                f"{len(rows)} {what} were given, but people for {len(owners)}; "
                "expected one person for each."
            )
    if not len(gallery):
        raise UserError("the gallery is empty; identification needs at least one person in it")
    if not probes.ndim == gallery.ndim == 2 or probes.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"the probes have the shape {probes.shape} and the gallery {gallery.shape}; expected "
            "(Q, d) and (M, d)."
        )
    wanted, columns = np.asarray(probe_people), np.asarray(gallery_people)
    kinds = {people.dtype.kind for people in (wanted, columns)} if len(wanted) else set()
    if kinds & set("US") and kinds & set("biuf"):
        raise ValueError(
            f"the probes' people are {wanted.dtype} and the gallery's {columns.dtype}, of which "
            "none equals another; give both as numbers or both as text."
        )
    order = np.argsort(columns, kind="stable")
    gallery, columns = gallery[order], columns[order]
    people, starts = np.unique(columns, return_index=True)
    own_column = np.minimum(np.searchsorted(people, wanted), len(people) - 1)
    enrolled = people[own_column] == wanted
    score, rank = np.empty(len(probes), np.float32), np.zeros(len(probes), np.int64)
    size = max(1, _SCORES // len(gallery)) if block is None else block
    check_count("block", size, 1)
    longest = _lengths(gallery).max()
    for first in range(0, len(probes), size):
        part = slice(first, first + size)
        scores = np.matmul(probes[part], gallery.T)
        if not np.isfinite(scores).all():
            raise UserError("the scores hold NaN or infinite values: the embeddings are unusable")
        if len(people) < len(columns):
            scores = np.maximum.reduceat(scores, starts, axis=1)
        own = np.take_along_axis(scores, own_column[part, None], axis=1)
        score[part] = np.where(enrolled[part], own[:, 0], scores.max(axis=1))
        rounding = (ROUNDING * longest * _lengths(probes[part])).astype(np.float32)
        as_high = np.count_nonzero(scores >= own - rounding[:, None], axis=1)
        rank[part] = np.where(enrolled[part], as_high, 0)
    return Searches(enrolled, score, rank)


def _lengths(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nd,nd->n", rows, rows, dtype=np.float64))


def rank_k(
    found: Searches,
    ranks: Sequence[int] = RANKS,
    *,
    people: np.ndarray | None = None,
    bootstrap: Bootstrap = NONE,
) -> list[Rate]:
    """Closed-set identification: the share of enrolled probes whose own person has at most rank k.

    Probes of people outside the gallery are left out of account.

    Args:
        ranks: each 1 or more.
        people: (Q,), each probe's person; by default each probe is a person of its own.
        bootstrap: over people, of the intervals.

    Raises:
        UserError: no probe is enrolled.

    Examples:
        >>> found = search(np.eye(3), [0, 1, 2], np.eye(3)[[0, 2, 1]], [0, 1, 2])
        >>> [round(rate.value, 2) for rate in rank_k(found, [1, 3])]
        [0.33, 1.0]
    """
    own_ranks = _own_ranks(found)
    hits = [own_ranks <= k for k in ranks]
    who = _numbers(found, people)[found.enrolled]
    cis = ratio_intervals(_by_person(who, hits), np.bincount(who), bootstrap)
    return [Rate(k, float(h.mean()), ci) for k, h, ci in zip(ranks, hits, cis, strict=True)]


def tpir_at_fpir(
    found: Searches,
    fpirs: Sequence[float] = FPIRS,
    *,
    people: np.ndarray | None = None,
    bootstrap: Bootstrap = NONE,
) -> list[OperatingPoint]:
    """Open-set identification: TPIR at each FPIR, exact on the observed scores.

    At a threshold t, FPIR is the share of probes of people outside the gallery whose best score is
    at least t, and TPIR is the share of enrolled probes whose own person has rank 1 and scores at
    least t (IJB's definition). The threshold for an FPIR f is the smallest observed score with
    FPIR <= f. An FPIR below 1 / (number of probes of people outside) cannot be measured on the set
    and its TPIR is None.

    Args:
        fpirs: each in (0, 1].
        people, bootstrap: as in `rank_k`; the threshold is that of each resample, to first order
            (`sphereface2.evaluation.bootstrap.at_own_threshold`).

    Raises:
        UserError: no probe is enrolled.

    Examples:
        >>> probes = np.array([[0.9, 0.1], [0.2, 0.3], [0.5, 0.4]])
        >>> found = search(probes, [0, 1, 2], np.eye(2), [0, 1])
        >>> [(point.value, point.threshold) for point in tpir_at_fpir(found, [1.0, 0.5])]
        [(1.0, 0.30000001192092896), (None, None)]
    """
    first, own_scores = _own_ranks(found) == 1, found.score[found.enrolled]
    best = found.score[~found.enrolled]
    bounds = error_bounds([*fpirs, far_beside(fpirs, len(best))], best, found.score)
    hits = [first & (own_scores > bound) for _, bound, _ in bounds]
    cis: Sequence[Interval | None] = [None] * len(bounds)
    if bootstrap.replicates and len(best):
        accepted, who = [best > bound for _, bound, _ in bounds], _numbers(found, people)
        inside, outside = who[found.enrolled], who[~found.enrolled]
        total = int(who.max()) + 1
        cis = own_threshold_intervals(
            _by_person(inside, hits, total),
            np.bincount(inside, minlength=total),
            _by_person(outside, accepted, total),
            np.bincount(outside, minlength=total),
            bootstrap,
            sides=1,
            most=_by_person(inside, [first], total)[0],  # whoever is not first is never found
        )
    return [
        OperatingPoint(fpir, float(hit.mean()), ci, threshold) if k else OperatingPoint(fpir, None)
        for fpir, (k, _, threshold), hit, ci in zip(fpirs, bounds, hits, cis, strict=False)
    ]


def _own_ranks(found: Searches) -> np.ndarray:
    if not found.enrolled.any():
        raise UserError(
            "no probe shows a person of the gallery; identification needs at least one that does"
        )
    return found.rank[found.enrolled]


def _numbers(found: Searches, people: np.ndarray | None) -> np.ndarray:
    """Each probe's person, from 0."""
    who = np.arange(len(found.enrolled)) if people is None else np.asarray(people)
    return np.unique(who, return_inverse=True)[1]


def _by_person(who: np.ndarray, hits: Sequence[np.ndarray], people: int = 0) -> np.ndarray:
    """Hits of each kind, bool (Q,), by person: (K, people)."""
    return np.stack([np.bincount(who, weights=hit, minlength=people) for hit in hits])


def evaluate_gallery(
    name: str,
    probes: np.ndarray,
    probe_people: np.ndarray,
    gallery: np.ndarray,
    gallery_people: np.ndarray,
    *,
    bootstrap: Bootstrap = NONE,
) -> GalleryResult:
    """Every figure of the searches of probes in one gallery; arguments as in `search`, `rank_k`.

    Examples:
        >>> found = evaluate_gallery("G", np.eye(3), np.arange(3), np.eye(3)[:2], np.arange(2))
        >>> found.enrolled, found.rank[0].value
        (2, 1.0)
    """
    found = search(probes, probe_people, gallery, gallery_people)
    tpir = tuple(tpir_at_fpir(found, people=probe_people, bootstrap=bootstrap))
    outside = int(np.count_nonzero(~found.enrolled))
    return GalleryResult(
        name=name,
        templates=len(gallery),
        people=len(np.unique(gallery_people)),
        probes=len(probes),
        enrolled=len(probes) - outside,
        rank=tuple(rank_k(found, people=probe_people, bootstrap=bootstrap)),
        tpir=tpir,
        notes=unmeasured("TPIR at FPIR", tpir, outside, f"probes of people outside {name}"),
        intervals=Resampling.of(bootstrap, "first order"),
    )
