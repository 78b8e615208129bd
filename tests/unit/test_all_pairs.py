"""All-pairs TAR against every pair in memory, where tiles, brackets and tallies are tiny."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphereface2.errors import UserError
from sphereface2.evaluation import all_pairs, selection
from sphereface2.evaluation.all_pairs import evaluate_all_pairs
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.clustering import cluster
from sphereface2.evaluation.distractors import evaluate_distractors
from sphereface2.evaluation.one_threshold import all_pairs_at, uniform_accuracy
from sphereface2.evaluation.selection import Tally, keys_of, value_of
from sphereface2.evaluation.tiles import Accepted, Tiles
from sphereface2.evaluation.verification import curve_figures, pair_scores, tar_at_far

FARS = [1.0, 0.5, 0.1, 0.01, 1e-3, 1e-6]


def brute_force(embeddings, labels, fars):
    i, j = np.triu_indices(len(labels), 1)
    scores = (embeddings[i].astype(np.float64) * embeddings[j]).sum(1)
    return tar_at_far(scores, labels[i] == labels[j], fars)


@st.composite
def sets(draw):
    """Embeddings on a grid, whose sums are exact in float32; ties, also at zero, abound."""
    n = draw(st.integers(4, 150))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.sampled_from([1, 3, 50]))
    embeddings = np.zeros((n, 14), np.float32)
    embeddings[:, :6] = rng.integers(-levels, levels + 1, (n, 6)) / 128
    rest = np.rint(128 * np.sqrt(1 - (embeddings**2).sum(1))) / 128  # to a length of about 1
    embeddings[np.arange(n), rng.integers(6, 14, n)] = rest * rng.choice([-1, 1], n)
    labels = rng.integers(7, 7 + max(2, n // draw(st.integers(1, 20))), n)
    labels[:3] = [7, 7, 8]
    return embeddings, labels


@given(sets(), st.data())
@settings(max_examples=60, deadline=None)
def test_equal_to_brute_force(data_set, data):
    embeddings, labels = data_set
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(all_pairs, "_SAMPLE", data.draw(st.sampled_from([10, 300, 10**6])))
        patch.setattr(selection, "_DISTINCT", data.draw(st.sampled_from([2, 30, 10**6])))
        patch.setattr(selection, "_PENDING", data.draw(st.sampled_from([1, 50, 10**6])))
        found = evaluate_all_pairs(
            embeddings, labels, FARS, block=data.draw(st.sampled_from([9, 33, 200])), workers=2
        )
    expected = brute_force(embeddings, labels, FARS)
    assert [t.value for t in found.tar] == [t.value for t in expected]
    i, j = np.triu_indices(len(labels), 1)
    assert found.genuine == (labels[i] == labels[j]).sum()
    assert found.genuine + found.impostor == len(i)
    scores = embeddings.astype(np.float64) @ embeddings.T
    mates = (labels[:, None] == labels) & ~np.eye(len(labels), dtype=bool)
    best_same = np.where(mates, scores, -np.inf).max(1)
    best_other = np.where(labels[:, None] != labels, scores, -np.inf).max(1)
    assert found.rank1 == np.mean((best_same > best_other)[mates.any(1)])


def faces(people=80, images=5, dim=64, noise=2.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(people), images))
    e = rng.standard_normal((people, dim))[labels] + noise * rng.standard_normal((len(labels), dim))
    return (e / np.linalg.norm(e, axis=1, keepdims=True)).astype(np.float32), labels


def test_a_copy_under_another_name_is_a_tie_in_blocks_of_any_shape():
    """Equal products differ in their last bits from block to block."""
    rows, labels = faces(people=40, images=2, dim=129)
    copies = rows[np.unique(labels, return_index=True)[1]]  # of one image of each person
    both, people = np.concatenate([rows, copies]), np.concatenate([labels, 100 + np.arange(40)])
    for block in (9, 33, 200):
        assert evaluate_all_pairs(both, people, [0.5], block=block).rank1 == 0
        assert uniform_accuracy(both, people, block=block).share.value == 0
    assert evaluate_distractors(rows, labels, [copies[:15], copies[15:]]).rank1[-1].value == 0


def test_embeddings_of_other_lengths_are_refused():
    """Their inner products are no cosines, and the figures would look like any."""
    long, labels = faces(people=5)
    long[3] *= 20
    for figure in (
        lambda: evaluate_all_pairs(long, labels),
        lambda: pair_scores(long, np.array([[0, 1]])),
        lambda: cluster(long, 0.5),
        lambda: evaluate_distractors(long, labels, [long]),
        lambda: evaluate_distractors(long[:3], labels[:3], [long]),
    ):
        with pytest.raises(UserError, match="embedding 3 has the length 20; expected"):
            figure()
    with pytest.raises(ValueError, match="people for 2"):
        evaluate_distractors(long[:3], labels[:2], [long[:3]])


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        ([[0, 30]], "indices must lie in 0 … 24, got 0 … 30"),
        ([[0, -1]], "indices must lie in 0 … 24, got -1 … 0"),
        ([[0.0, 1.0]], "indices must be whole numbers"),
        ([0, 1], r"pairs must have the shape \(P, 2\), got \(2,\)"),
    ],
)
def test_pairs_of_no_image_are_refused(pairs, told):
    with pytest.raises(UserError, match=told):
        pair_scores(faces(people=5)[0], pairs)


def count_passes(monkeypatch):
    """A list that gets an entry whenever all tiles are computed."""
    passes, count = [], Tiles.count
    monkeypatch.setattr(Tiles, "count", lambda *args: passes.append(0) or count(*args))
    return passes


def test_one_pass_and_the_threshold_decides_alike(monkeypatch):
    monkeypatch.setattr(all_pairs, "_SAMPLE", 20_000)  # of 79,000: brackets are in use
    passes = count_passes(monkeypatch)
    embeddings, labels = faces()
    found = evaluate_all_pairs(embeddings, labels, FARS[1:5], block=64)
    assert len(passes) == 1
    i, j = np.triu_indices(len(labels), 1)
    scores, same = (embeddings @ embeddings.T)[i, j], labels[i] == labels[j]
    for tar, expected in zip(found.tar, tar_at_far(scores, same, FARS[1:5]), strict=True):
        assert tar.value == pytest.approx(expected.value, abs=1e-6)
        assert np.mean(scores[~same] >= tar.threshold) <= tar.at + 1e-5
        assert np.mean(scores[same] >= tar.threshold) == pytest.approx(tar.value, abs=1e-6)


def test_neither_seed_nor_threads_nor_tiles_matter(monkeypatch):
    monkeypatch.setattr(all_pairs, "_SAMPLE", 5000)
    embeddings, labels = faces(noise=1.0)
    results = [
        evaluate_all_pairs(
            embeddings, labels, FARS, bootstrap=Bootstrap(0, seed), workers=workers, block=100
        )
        for seed, workers in [(0, 1), (1, 2), (2, 3)]
    ]
    assert results[0].tar == results[1].tar == results[2].tar


def test_a_missed_bracket_costs_a_pass_and_no_exactness(monkeypatch):
    """A sample of one cluster puts every bracket in the wrong place."""
    embeddings, labels = faces(people=40)

    def misplaced(searches, *_):
        for k, search in enumerate(searches):
            low = int(keys_of(np.float32([0.9 if k % 2 else -0.9]))[0])
            search.bracket = (low, low + 5)

    expected = evaluate_all_pairs(embeddings, labels, FARS, block=50)
    monkeypatch.setattr(all_pairs, "_bracket", misplaced)
    passes = count_passes(monkeypatch)
    found = evaluate_all_pairs(embeddings, labels, FARS, block=50)
    assert len(passes) > 1
    assert found.tar == expected.tar


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_keys_order_as_floats_do(values):
    scores = np.array(values, np.float32)
    keys = keys_of(scores)
    np.testing.assert_array_equal(np.sign(keys[:, None] - keys), np.sign(scores[:, None] - scores))
    assert [value_of(int(key)) for key in keys] == (scores + np.float32(0)).tolist()
    with np.errstate(over="ignore"):
        following = int(keys_of(np.nextafter(scores[:1], np.float32(np.inf)))[0])
    assert following == keys[0] + 1


@given(st.lists(st.integers(-50, 50), min_size=1, max_size=200), st.integers(2, 40))
def test_a_tally_counts_in_bounded_memory(values, distinct):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_DISTINCT", distinct)
        patch.setattr(selection, "_PENDING", 7)
        tally = Tally()
        scores = np.array(values, np.float32) / 64
        for part in np.array_split(scores, 5):
            tally.add(part)
        tally.flush()
    assert len(tally.entries) <= distinct
    entries, counts = np.unique(keys_of(scores) >> tally.shift, return_counts=True)
    np.testing.assert_array_equal(tally.entries, entries)
    np.testing.assert_array_equal(tally.counts, counts)


def test_intervals_are_over_people():
    embeddings, labels = faces(people=30, noise=1.5)
    found = evaluate_all_pairs(embeddings, labels, [0.01], bootstrap=Bootstrap(400))
    low, high = found.tar[0].ci
    assert low < found.tar[0].value < high
    # By hand: at the fixed threshold, the s.d. of a ratio of sums over people.
    i, j = np.triu_indices(len(labels), 1)
    hit = ((embeddings @ embeddings.T)[i, j] >= found.tar[0].threshold)[labels[i] == labels[j]]
    who = labels[i][labels[i] == labels[j]]
    per_person = np.array([hit[who == p].mean() for p in range(30)])
    assert high - low == pytest.approx(2 * 1.96 * per_person.std() / np.sqrt(30), rel=0.2)


def people_and_goats(people, seed, images=4, dim=24):
    """Every tenth person may lean to one side, so that false accepts hang on a few of them."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((people, dim))
    centres[:, 0] += (rng.random(people) < 0.1) * 8 * rng.random(people)
    labels = np.repeat(np.arange(people), images)
    noise = 0.9 * (0.6 + 0.8 * rng.random((people, 1)))
    rows = centres[labels] + noise[labels] * rng.standard_normal((len(labels), dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def widths(points):
    return [point.ci[1] - point.ci[0] for point in points]


@pytest.mark.parametrize("seed", [0, 2])
def test_intervals_are_as_wide_as_of_thresholds_found_in_each_resample(seed):
    embeddings, labels = people_and_goats(100, seed)
    i, j = np.triu_indices(len(labels), 1)
    scores, who = (embeddings @ embeddings.T)[i, j], np.stack([labels[i], labels[j]], axis=1)
    fars, bootstrap = [1e-2, 3e-3, 1e-3], Bootstrap(500, seed)  # 790, 237 and 79 accepted
    exact = curve_figures(scores, labels[i] == labels[j], fars, people=who, bootstrap=bootstrap)
    found = evaluate_all_pairs(embeddings, labels, fars, bootstrap=bootstrap)
    assert widths(found.tar) == pytest.approx(widths(exact.tar), rel=0.15)


def test_intervals_hold_the_populations_tar():
    """Those of thresholds that stay hold it less often."""
    large = [evaluate_all_pairs(*people_and_goats(1000, s), [1e-3]) for s in range(1000, 1003)]
    truth = np.mean([found.tar[0].value for found in large])
    held = np.zeros(2)
    for seed in range(100):
        people, bootstrap = people_and_goats(80, seed), Bootstrap(200, seed)
        own = evaluate_all_pairs(*people, [1e-3], bootstrap=bootstrap).tar[0]
        (fixed,) = all_pairs_at(*people, [own.threshold], bootstrap=bootstrap)
        held += [low <= truth <= high for low, high in (own.ci, fixed.tar.ci)]
    assert held[0] >= 88
    assert held[1] <= held[0] - 5


def test_peoples_pairs_are_counted_alike_at_a_guess(monkeypatch):
    embeddings, labels = people_and_goats(100, 1)
    found = [evaluate_all_pairs(embeddings, labels, [0.1, 1e-2], bootstrap=Bootstrap(300))]
    monkeypatch.setattr(all_pairs, "_SAMPLE", 40_000)  # 4,000 and 400 above the guesses
    found.append(
        evaluate_all_pairs(embeddings, labels, [0.1, 1e-2], bootstrap=Bootstrap(300), block=33)
    )
    assert widths(found[0].tar) == pytest.approx(widths(found[1].tar), rel=0.05)
    assert widths(found[0].tar) != widths(found[1].tar)


def test_a_guess_that_no_score_reaches_is_not_used(monkeypatch):
    embeddings, labels = faces()
    expected = evaluate_all_pairs(embeddings, labels, [0.01], bootstrap=Bootstrap(50))

    def high(searches, *_):
        for search in searches:
            search.guess = np.float32(1.5)

    monkeypatch.setattr(all_pairs, "_bracket", high)
    found = evaluate_all_pairs(embeddings, labels, [0.01], bootstrap=Bootstrap(50))
    assert found.tar == expected.tar


@given(sets(), st.sampled_from([9, 33, 200]))
@settings(max_examples=30, deadline=None)
def test_accepted_pairs_of_images(data_set, block):
    embeddings, labels = data_set
    tiles, _, _ = Tiles.of(embeddings, labels, block, 2)
    limits = np.array([0.5, -0.25, 0.9], np.float32)
    tiles.count([], accepted=(passing := Accepted(limits, len(labels))))
    scores = np.where(tiles.people[:, None] == tiles.people, -2, tiles.rows @ tiles.rows.T)
    expected = [(scores >= limit).sum(axis=1).tolist() for limit in limits]
    assert passing.counts.tolist() == tiles.accepted(limits).tolist() == expected


def test_intervals_are_seeded_and_know_no_order_of_images():
    embeddings, labels = faces(people=30, noise=1.5)
    order = np.random.default_rng(0).permutation(len(labels))
    assert evaluate_all_pairs(embeddings, labels, [0.01]).tar[0].ci is None
    first, again, shuffled, other = (
        evaluate_all_pairs(embeddings[rows], labels[rows], [0.01], bootstrap=Bootstrap(50, seed))
        for rows, seed in ((order, 1), (order, 1), (np.arange(len(labels)), 1), (order, 2))
    )
    assert first.tar[0].ci == again.tar[0].ci != other.tar[0].ci
    assert first.tar[0].ci == pytest.approx(shuffled.tar[0].ci)
    assert first.to_dict()["intervals"]["thresholds"] == "first order"


def test_sets_that_cannot_be_scored():
    embeddings = np.eye(4, dtype=np.float32)
    with pytest.raises(UserError, match="no genuine pair"):
        evaluate_all_pairs(embeddings, np.arange(4))
    with pytest.raises(UserError, match="0 images of 0 people make no genuine pair"):
        evaluate_all_pairs(embeddings[:0], np.arange(0))  # none could be read
    with pytest.raises(UserError, match="no impostor pair"):
        evaluate_all_pairs(embeddings, np.zeros(4, int))
    with pytest.raises(UserError, match="NaN"):
        evaluate_all_pairs(embeddings * np.nan, np.array([0, 0, 1, 1]))
    with pytest.raises(ValueError, match="FAR"):
        evaluate_all_pairs(embeddings, np.array([0, 0, 1, 1]), [2.0])


def test_an_error_in_a_thread_is_not_lost():
    embeddings, labels = faces(people=10)

    def broken(share):
        raise RuntimeError("in a thread")

    with pytest.raises(RuntimeError, match="in a thread"):
        evaluate_all_pairs(embeddings, labels, progress=broken, block=10)
