"""Identification metrics: who in a gallery is this, if anybody.

A probe is searched in a gallery of people. A person's score is the highest inner product of the
probe with one of their gallery embeddings. A probe is *mated* if its person is in the gallery; its
*rank* is then one more than the number of other people who score at least as high as its mate, so
that a tie counts as a miss. Closed-set figures look at mated probes only; open-set ones ask for a
threshold too, which the probes of people outside the gallery must not reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sphereface2.errors import UserError
from sphereface2.evaluation.verification import allowed_accepts, ratio_intervals

RANKS = (1, 5, 10)
FPIRS = (1e-1, 1e-2, 1e-3)
_SCORES = 1 << 24  # that a block of probes makes with the gallery


@dataclass(frozen=True)
class Searches:
    """What the searches of Q probes in one gallery gave.

    Attributes:
        mated: bool (Q,), whether the probe's person is in the gallery.
        score: float32 (Q,), the mate's score where mated, elsewhere the best score of anybody.
        rank: int64 (Q,), the mate's rank, 1 is best; 0 where there is no mate.
    """

    mated: np.ndarray
    score: np.ndarray
    rank: np.ndarray


@dataclass(frozen=True)
class Rate:
    """Share of mated probes identified, under one condition.

    Attributes:
        at: the rank k or the FPIR that the figure belongs to.
        value: 0 to 1; None where the set cannot tell (an FPIR below one probe without a mate in all
            of them).
        threshold: of an FPIR: the smallest observed score at which the FPIR is at most ``at``; None
            where no score qualifies.
        ci: bounds of the 95 % bootstrap interval, or None.
    """

    at: float
    value: float | None
    threshold: float | None = None
    ci: tuple[float, float] | None = None


def search(
    probes: np.ndarray,
    probe_people: Sequence[str] | Sequence[int] | np.ndarray,
    gallery: np.ndarray,
    gallery_people: Sequence[str] | Sequence[int] | np.ndarray,
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
    """
    probes, gallery = (np.asarray(e).astype(np.float32, copy=False) for e in (probes, gallery))
    order = np.argsort(gallery_people, kind="stable")
    gallery, who = gallery[order], np.asarray(gallery_people)[order]
    size = block or max(1, _SCORES // max(1, len(gallery)))
    starts = range(0, len(probes), size)
    return _searches(
        (np.matmul(probes[i : i + size], gallery.T) for i in starts), np.asarray(probe_people), who
    )


def search_scores(
    scores: np.ndarray,
    probe_people: Sequence[str] | Sequence[int] | np.ndarray,
    gallery_people: Sequence[str] | Sequence[int] | np.ndarray,
) -> Searches:
    """`search` for scores (Q, M) that are already there; a person may have several columns."""
    scores = np.asarray(scores)
    order = np.argsort(gallery_people, kind="stable")
    return _searches(
        [scores[:, order]], np.asarray(probe_people), np.asarray(gallery_people)[order]
    )


def _searches(
    blocks: Iterable[np.ndarray], probe_people: np.ndarray, columns: np.ndarray
) -> Searches:
    """From blocks of scores whose columns are sorted by person."""
    if not len(columns):
        raise UserError("the gallery is empty: there is nobody to search for")
    people, starts = np.unique(columns, return_index=True)
    mate = np.minimum(np.searchsorted(people, probe_people), len(people) - 1)
    mated = people[mate] == probe_people
    score, rank = np.empty(len(mated), np.float32), np.zeros(len(mated), np.int64)
    done = 0
    for scores in blocks:
        if not np.isfinite(scores).all():
            raise UserError("the scores hold NaN or infinite values: the embeddings are unusable")
        if len(people) < len(columns):
            scores = np.maximum.reduceat(scores, starts, axis=1)
        part = slice(done, done + len(scores))
        own = np.take_along_axis(scores, mate[part, None], axis=1)
        score[part] = np.where(mated[part], own[:, 0], scores.max(axis=1))
        rank[part] = np.where(mated[part], np.count_nonzero(scores >= own, axis=1), 0)
        done += len(scores)
    if done != len(mated):
        raise ValueError(f"{done} probes have scores and {len(mated)} have a person.")
    return Searches(mated, score, rank)


def rank_k(
    found: Searches,
    ranks: Sequence[int] = RANKS,
    *,
    people: np.ndarray | None = None,
    replicates: int = 0,
    seed: int = 0,
) -> list[Rate]:
    """Closed-set identification: the share of mated probes whose mate has at most rank k.

    Probes without a mate are left out of account.

    Args:
        ranks: each 1 or more.
        people: (Q,), each probe's person; by default each probe is a person of its own.
        replicates: with R > 0 each rate gets a 95 % interval from R bootstraps over people.
        seed: of the bootstrap.

    Raises:
        UserError: no probe has a mate.
    """
    ranked = _mates_ranks(found)
    hits = [ranked <= k for k in ranks]
    cis = _cis(found, hits, people, replicates, seed)
    return [Rate(k, float(h.mean()), None, ci) for k, h, ci in zip(ranks, hits, cis, strict=True)]


def tpir_at_fpir(
    found: Searches,
    fpirs: Sequence[float] = FPIRS,
    *,
    people: np.ndarray | None = None,
    replicates: int = 0,
    seed: int = 0,
) -> list[Rate]:
    """Open-set identification: TPIR at each FPIR, exact on the observed scores.

    At a threshold t, FPIR is the share of probes without a mate whose best score is at least t, and
    TPIR is the share of mated probes whose mate has rank 1 and scores at least t (IJB's
    definition). The threshold for an FPIR f is the smallest observed score with FPIR <= f: with k
    the largest number of probes without a mate that f allows, the searches accepted are those that
    score strictly above the (k+1)-th highest best score of such probes. An FPIR below
    1 / (number of such probes), k = 0, cannot be measured on this set and its value is None.

    Args:
        fpirs: each in (0, 1].
        people, replicates, seed: as in `rank_k`; thresholds are held fixed in the bootstrap.

    Raises:
        UserError: no probe has a mate.
    """
    strangers = np.sort(found.score[~found.mated])[::-1]
    observed = np.sort(found.score)
    first = _mates_ranks(found) == 1
    rates, hits = [], []
    for fpir in fpirs:
        if not 0 < fpir <= 1:
            raise ValueError(f"an FPIR lies in (0, 1], not {fpir}.")
        k = allowed_accepts(fpir, len(strangers))
        bound = strangers[k] if k < len(strangers) else -np.inf
        hits.append(first & (found.score[found.mated] > bound))
        if k == 0:
            rates.append(Rate(fpir, None))
            continue
        above = np.searchsorted(observed, bound, side="right")
        threshold = float(observed[above]) if above < len(observed) else None
        rates.append(Rate(fpir, float(hits[-1].mean()), threshold))
    cis = _cis(found, hits, people, replicates, seed)
    return [
        rate if rate.value is None else Rate(rate.at, rate.value, rate.threshold, ci)
        for rate, ci in zip(rates, cis, strict=True)
    ]


def _mates_ranks(found: Searches) -> np.ndarray:
    if not found.mated.any():
        raise UserError("no probe shows a person of the gallery: there is nobody to identify")
    return found.rank[found.mated]


def _cis(
    found: Searches,
    hits: list[np.ndarray],
    people: np.ndarray | None,
    replicates: int,
    seed: int,
) -> Sequence[tuple[float, float] | None]:
    if not replicates:
        return [None] * len(hits)
    who = np.arange(len(found.mated)) if people is None else np.asarray(people)
    who = np.unique(who[found.mated], return_inverse=True)[1]
    counted = np.stack([np.bincount(who, weights=hit) for hit in hits])
    return ratio_intervals(counted, np.bincount(who), replicates, np.random.default_rng(seed))


@dataclass(frozen=True)
class Distractors:
    """Rank-1 identification against a growing crowd.

    Attributes:
        sizes: the numbers of distractors.
        rank1: one rate a size; ``at`` is the size.
        searches: how many pairs of a probe and a mate were tried at each size.
    """

    sizes: list[int]
    rank1: list[Rate]
    searches: int


def distractor_rank1(
    probes: np.ndarray,
    people: np.ndarray,
    distractors: Iterable[np.ndarray],
    sizes: Sequence[int],
    *,
    replicates: int = 0,
    seed: int = 0,
) -> Distractors:
    """MegaFace's identification: does a probe find its mate among N strangers?

    For each ordered pair of two images of a person, one is searched in a gallery of the other and
    the first N distractors; it is found if the mate scores strictly above all of them. Distractors
    are taken block by block and forgotten; for each probe only its best score is kept.

    Args:
        probes: float32 (Q, d), rows of length 1.
        people: (Q,); who has one image only is left out.
        distractors: blocks (n, d) of embeddings of other people.
        sizes: the N wanted, each at least 1; those beyond the number of distractors are dropped,
            and that number itself is always told.
        replicates: with R > 0 each rate gets a 95 % interval from R bootstraps over the probes'
            people, the distractors held fixed.
        seed: of the bootstrap.

    Raises:
        UserError: nobody has two images, there are no distractors, or embeddings are not finite.
    """
    people = np.unique(people, return_inverse=True)[1]
    best = np.full(len(probes), -np.inf, np.float32)
    ends = sorted(set(sizes))
    reached: dict[int, np.ndarray] = {}
    seen = 0
    rows = max(1, _SCORES // max(1, len(probes)))
    for whole in distractors:
        # Cut where a size is reached, so that each snapshot is of exactly N distractors.
        cuts = {n - seen for n in ends if seen < n < seen + len(whole)}
        edges = sorted({*range(0, len(whole), rows), *cuts, len(whole)})
        for start, stop in pairwise(edges):
            top = (probes @ whole[start:stop].T).max(axis=1)
            if not np.isfinite(top).all():
                raise UserError("the embeddings hold NaN or infinite values")
            np.maximum(best, top, out=best)
            if seen + stop in ends:
                reached[seen + stop] = best.copy()
        seen += len(whole)
    if not seen:
        raise UserError("there are no distractors to hide a mate among")
    reached[seen] = best
    told = sorted(reached)
    hits = np.zeros((len(told), int(people.max(initial=-1)) + 1), np.int64)
    trials = np.zeros(hits.shape[1], np.int64)
    for person in range(hits.shape[1]):
        own = np.flatnonzero(people == person)
        scores = probes[own] @ probes[own].T
        others = ~np.eye(len(own), dtype=bool)
        trials[person] = others.sum()
        for row, size in zip(hits, told, strict=True):
            row[person] = np.count_nonzero((scores > reached[size][own, None]) & others)
    if not trials.sum():
        raise UserError("no person among the probes has two images: there is no mate to find")
    cis: Sequence[tuple[float, float] | None] = [None] * len(told)
    if replicates:
        cis = ratio_intervals(hits, trials, replicates, np.random.default_rng(seed))
    rates = [
        Rate(size, float(row.sum() / trials.sum()), None, ci)
        for size, row, ci in zip(told, hits, cis, strict=True)
    ]
    return Distractors(told, rates, int(trials.sum()))
