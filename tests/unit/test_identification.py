"""Identification metrics against loops over probes and people."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphereface2.errors import UserError
from sphereface2.evaluation.bootstrap import Bootstrap, draws, interval, ratio_intervals
from sphereface2.evaluation.distractors import evaluate_distractors
from sphereface2.evaluation.identification import (
    rank_k,
    search,
    tpir_at_fpir,
)

RANKS = (1, 2, 5, 10)


def search_scores(scores, probe_people, gallery_people):
    """With unit vectors in the gallery the scores are the probes' own coordinates."""
    return search(scores, probe_people, np.eye(len(gallery_people)), gallery_people)


FPIRS = (1.0, 0.5, 0.3, 0.1, 0.01)


def brute_force(scores, probe_people, columns):
    """(person, own rank or None, {person: score}) of each probe, by dictionaries."""
    results = []
    for row, person in zip(scores.tolist(), probe_people, strict=True):
        best = {}
        for score, who in zip(row, columns, strict=True):
            best[who] = max(score, best.get(who, -9.0))
        rank = None
        if person in best:
            rank = 1 + sum(s >= best[person] for who, s in best.items() if who != person)
        results.append((person, rank, best))
    return results


def check(found, scores, probe_people, columns):
    expected = brute_force(scores, probe_people, columns)
    enrolled = [(rank, best[person]) for person, rank, best in expected if rank is not None]
    strangers = [max(best.values()) for _, rank, best in expected if rank is None]
    assert found.enrolled.tolist() == [rank is not None for _, rank, _ in expected]
    assert found.rank.tolist() == [rank or 0 for _, rank, _ in expected]
    if not enrolled:
        for figure in (rank_k, tpir_at_fpir):
            with pytest.raises(UserError, match="no probe shows a person of the gallery"):
                figure(found)
        return
    for rate in rank_k(found, RANKS):
        assert rate.value == sum(rank <= rate.at for rank, _ in enrolled) / len(enrolled)
    observed = sorted(strangers + [score for _, score in enrolled])
    for rate in tpir_at_fpir(found, FPIRS):
        if not strangers or rate.at < 1 / len(strangers):
            assert (rate.value, rate.threshold) == (None, None)
            continue
        # Every observed score is tried, and one above them all.
        for threshold in [*observed, 2.0]:
            if sum(s >= threshold for s in strangers) / len(strangers) <= rate.at:
                break
        assert rate.threshold == (None if threshold == 2.0 else threshold)
        accepted = sum(rank == 1 and score >= threshold for rank, score in enrolled)
        assert rate.value == accepted / len(enrolled)


@st.composite
def tables(draw):
    """Few people and coarse scores: ties are everywhere."""
    columns = draw(st.lists(st.integers(0, 6), min_size=1, max_size=9))
    probes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=14))
    levels = draw(st.sampled_from([2, 5, 100]))
    cells = st.lists(st.integers(0, levels), min_size=len(columns) * len(probes), max_size=999)
    scores = np.array(draw(cells)[: len(columns) * len(probes)], np.float32)
    return scores.reshape(len(probes), len(columns)) / 128, probes, columns


@given(tables())
@settings(max_examples=200, deadline=None)
def test_every_figure_on_scores_with_ties(table):
    scores, probes, columns = table
    check(search_scores(scores, probes, columns), scores, probes, columns)


@pytest.mark.parametrize("block", [None, 1, 7])
def test_embeddings_are_searched_in_blocks(block):
    """Eighths of ±1: inner products are exact in float32, and often equal."""
    rng = np.random.default_rng(1)
    base = rng.choice([-1, 1], (30, 64)).astype(np.float32) / 8
    gallery_people = rng.integers(20, size=60)
    probe_people = rng.integers(30, size=200)
    flips = [np.where(rng.random((n, 64)) < 0.3, -1, 1) for n in (60, 200)]
    gallery, probes = base[gallery_people] * flips[0], base[probe_people] * flips[1]
    scores = probes.astype(np.float64) @ gallery.T
    found = search(probes, probe_people, gallery, gallery_people, block=block)
    assert 0.3 < rank_k(found, [1])[0].value < 1
    check(found, scores, probe_people.tolist(), gallery_people.tolist())


def test_a_copy_under_another_name_is_a_tie():
    """Equal products differ in their last bits from column to column."""
    rng = np.random.default_rng(0)
    for people in range(2, 40):
        rows, noise = rng.standard_normal((2, people, 129)) / 12
        found = search(rows + noise, range(people), np.tile(rows, (2, 1)), range(2 * people))
        closest = search(rows + noise, range(people), rows, range(people))
        assert found.rank.tolist() == (2 * closest.rank).tolist()


def test_names_serve_as_people():
    found = search(np.eye(3), ["eve", "ann", "zoe"], np.eye(3)[:2] * 0.5, ["eve", "bob"])
    assert found.enrolled.tolist() == [True, False, False]
    assert found.score.tolist() == [0.5, 0.5, 0.0]
    assert [rate.value for rate in tpir_at_fpir(found, [1.0, 0.5, 0.1])] == [1.0, 1.0, None]


def test_intervals_are_over_people():
    rng = np.random.default_rng(0)
    people = np.repeat(np.arange(40), 10)
    skill = rng.random(40)  # one person is found often, another rarely
    right = rng.random(400) < skill[people]
    scores = np.where(right[:, None], [[0.9, 0.1]], [[0.1, 0.9]])
    found = search_scores(scores, np.zeros(400, int), np.arange(2))
    wide = rank_k(found, [1], people=people, bootstrap=Bootstrap(500))[0]
    narrow = rank_k(found, [1], bootstrap=Bootstrap(500))[0]
    assert wide.ci[0] < wide.value < wide.ci[1]
    share = np.array([right[people == p].mean() for p in range(40)])
    assert wide.ci[1] - wide.ci[0] == pytest.approx(2 * 1.96 * share.std() / np.sqrt(40), rel=0.15)
    assert narrow.ci[1] - narrow.ci[0] < 0.6 * (wide.ci[1] - wide.ci[0])


def test_intervals_of_tpir_have_the_threshold_of_each_resample():
    rng = np.random.default_rng(1)
    people = np.repeat(np.arange(90), 5)
    enrolled = people < 60
    likeness = 0.3 + 0.08 * rng.standard_normal(90)[people] + 0.1 * rng.standard_normal(450)
    scores = np.where(enrolled, likeness, likeness / 2)[:, None] * [1, 0]
    found = search_scores(scores, np.where(enrolled, 0, 1 + people), [0, 1])
    (point,) = tpir_at_fpir(found, [0.1], people=people, bootstrap=Bootstrap(1000))
    shares = []
    for c in np.concatenate([*draws(90, 1000)]):
        order = np.argsort(-found.score[~enrolled])
        drawn = np.cumsum(c[people[~enrolled]][order])
        first_rejected = np.searchsorted(drawn / drawn[-1], 0.1, side="right")
        bound = found.score[~enrolled][order][first_rejected]
        shares.append(np.average(found.score[enrolled] > bound, weights=c[people[enrolled]]))
    exact = np.ptp(interval(np.array(shares)))
    assert np.ptp(point.ci) == pytest.approx(exact, rel=0.15)
    hits = np.bincount(people[enrolled], weights=found.score[enrolled] >= point.threshold)
    (fixed,) = ratio_intervals(hits[None], np.full(60, 5), Bootstrap(1000))
    assert np.ptp(fixed) < 0.8 * exact


def test_an_interval_of_tpir_ends_where_rank_1_does():
    """Where no accepted probe is drawn it went up to 1, though most are never first."""
    people = np.repeat(np.arange(60), 5)
    rows = np.random.default_rng(0).normal(size=(60, 6))[people]
    rows = rows + np.random.default_rng(1).normal(size=rows.shape)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    found = search(rows, people, rows[:150:5] / 2 + rows[1:150:5] / 2, people[:150:5])
    every = Bootstrap(100)
    (rate,) = rank_k(found, [1], people=people, bootstrap=every)
    low, high = tpir_at_fpir(found, [0.1, 0.01], people=people, bootstrap=every)[1].ci
    assert low < rate.value < high < rate.ci[1] + 0.1 < 0.9


def test_what_cannot_be_searched():
    with pytest.raises(UserError, match="gallery is empty"):
        search(np.eye(2), [0, 1], np.zeros((0, 2)), [])
    with pytest.raises(UserError, match="NaN"):
        search(np.eye(2) * np.nan, [0, 1], np.eye(2), [0, 1])
    with pytest.raises(
        ValueError, match="2 probes were given, but people for 3; expected one person"
    ):
        search(np.eye(2), [0, 1, 2], np.eye(2), [0, 1])
    with pytest.raises(ValueError, match="2 gallery rows were given, but people for 1;"):
        search(np.eye(2), [0, 1], np.eye(2), [0])
    with pytest.raises(ValueError, match=r"the probes have the shape \(2, 2\) and the gallery"):
        search(np.eye(2), [0, 1], np.eye(3), [0, 1, 2])
    with pytest.raises(UserError, match="block must be an integer ≥ 1, got -1"):
        search(np.eye(2), [0, 1], np.eye(2), [0, 1], block=-1)
    for people in ([0, 1], ["0", "1"]):
        with pytest.raises(ValueError, match="both as numbers or both as text"):
            search(np.eye(2), people, np.eye(2), ["0", "1"] if people == [0, 1] else [0, 1])
    texts = np.array(["0", "1"], object)
    assert search(np.eye(2), ["0", "1"], np.eye(2), texts).rank.tolist() == [1, 1]
    assert not len(search(np.zeros((0, 2)), [], np.eye(2), ["0", "1"]).rank)
    found = search(np.eye(2), [0, 1], np.eye(2), [0, 2])
    with pytest.raises(ValueError, match="FPIR"):
        tpir_at_fpir(found, [0.0])


@pytest.mark.parametrize("size", [1, 3, 8, 40])
def test_distractors_in_any_blocks(size):
    rng = np.random.default_rng(3)
    base = rng.choice([-1, 1], (6, 64)).astype(np.float32) / 8
    people = np.array([0, 0, 0, 1, 1, 2, 3, 3, 3, 3])  # person 2 has one image
    probes = base[people] * np.where(rng.random((10, 64)) < 0.35, -1, 1)
    crowd = rng.choice([-1, 1], (40, 64)).astype(np.float32) / 8
    found = evaluate_distractors(
        probes,
        people,
        np.split(crowd, range(size, 40, size)),
        [1, 10, 33, 999],
        bootstrap=Bootstrap(50),
    )
    assert [rate.at for rate in found.rank1] == [1, 10, 33, 40]
    pairs = [(i, j) for i in range(10) for j in range(10) if i != j and people[i] == people[j]]
    assert found.searches == len(pairs) == 20
    for rate in found.rank1:
        hits = [
            all(probes[i] @ probes[j] > probes[i] @ other for other in crowd[: int(rate.at)])
            for i, j in pairs
        ]
        assert rate.value == np.mean(hits)
        assert rate.ci[0] <= rate.value <= rate.ci[1]
    assert found.rank1[0].value > found.rank1[-1].value


def test_crowds_that_hide_nobody():
    with pytest.raises(UserError, match="no distractors"):
        evaluate_distractors(np.eye(2), np.zeros(2), [], [10])
    with pytest.raises(UserError, match="two images"):
        evaluate_distractors(np.eye(2), np.arange(2), [np.eye(2)], [1])
    with pytest.raises(UserError, match="two images"):
        evaluate_distractors(np.eye(2)[:0], np.arange(0), [np.eye(2)], [1])
    with pytest.raises(UserError, match="NaN"):
        evaluate_distractors(np.eye(2), np.zeros(2), [np.eye(2) * np.nan], [1])
