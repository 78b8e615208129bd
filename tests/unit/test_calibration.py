"""Calibrations against what is known: Gaussian scores, exhaustive search, held-out draws."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import trapezoid

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.backbones.bundle import fingerprint
from sphereface2.errors import UserError
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.calibration import Calibration, CalibrationSet, named_by_mistake
from sphereface2.evaluation.pairs import sample_pairs
from sphereface2.evaluation.reliability import cllr, min_cllr, quality, reliability
from sphereface2.evaluation.thresholds import pairs_needed
from sphereface2.recognition.calibrate import shared_bias


def gaussian(genuine, impostor, seed=0):
    """Scores N(0.5, 0.1²) and N(0.1, 0.1²), whose true LLR is 40 (s - 0.3)."""
    rng = np.random.default_rng(seed)
    same = np.arange(genuine + impostor) < genuine
    return rng.normal(np.where(same, 0.5, 0.1), 0.1), same


def true_llr(scores):
    return 40 * (np.asarray(scores) - 0.3)


def fit(scores, same, **options):
    return Calibration.fit(
        scores, same, **{"fingerprint": "f", "bootstrap": Bootstrap(100)} | options
    )


# --- curves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["logistic", "isotonic"])
@pytest.mark.parametrize("genuine", [1000, 20_000])
def test_the_true_llr_is_recovered_whatever_the_share_of_genuine_pairs(method, genuine):
    calibration = fit(*gaussian(genuine, 20_000), method=method)
    x = np.linspace(0.2, 0.4, 21)
    error = calibration.llr(x) - true_llr(x)
    limit = {"logistic": 0.3, "isotonic": 1.2}[method] * math.sqrt(20_000 / genuine)
    assert np.abs(error).max() < limit
    assert (np.diff(calibration.llr(np.linspace(-1, 1, 999))) >= 0).all()
    # What it costs beyond the truth, on other draws.
    scores, same = gaussian(20_000, 20_000, seed=1)
    assert cllr(calibration.llr(scores), same) < cllr(true_llr(scores), same) + 0.006


def test_logistic_is_that_of_scikit_learn_with_platts_targets():
    from sklearn.linear_model import LogisticRegression

    scores, same = gaussian(300, 900)
    # A target between 0 and 1 is a pair that stands there twice, with both answers.
    target = np.where(same, 301 / 302, 1 / 902)
    weight = np.where(same, 1 / 300, 1 / 900) * 1000
    peer = LogisticRegression(C=1e12, tol=1e-10, max_iter=10_000)
    peer.fit(
        np.concatenate([scores, scores])[:, None],
        np.arange(2400) < 1200,
        sample_weight=np.concatenate([weight * target, weight * (1 - target)]),
    )
    x = np.array([-0.2, 0.3, 0.9])
    ours = fit(scores, same, fars=[0.1]).llr(x)
    np.testing.assert_allclose(ours, peer.decision_function(x[:, None]), rtol=1e-4, atol=1e-4)


def test_separable_scores_give_a_finite_curve():
    scores, same = (
        np.r_[np.linspace(0, 0.2, 2000), np.linspace(0.8, 1, 50)],
        np.arange(2050) >= 2000,
    )
    for method in ("logistic", "isotonic"):
        calibration = fit(scores, same, method=method)
        llr = calibration.llr([-1, 0.1, 0.9, 1])
        assert np.isfinite(llr).all()
        assert llr[1] < -2 and llr[2] > 2
    # Fifty genuine pairs above two thousand others speak for no more than that.
    assert calibration.llr(1.0) < math.log(51 * 2001)


def test_probability_is_bayes_rule():
    calibration = fit(*gaussian(500, 2000))
    scores = np.array([[-50, 0.1], [0.3, 50]])
    for prior in (0.5, 0.01):
        odds = np.exp(calibration.llr(scores[0, 1])) * prior / (1 - prior)
        p = calibration.probability(scores, prior)
        assert p.shape == scores.shape
        assert p[0, 1] == pytest.approx(odds / (1 + odds))
        assert p[0, 0] == 0 and p[1, 1] == 1
    with pytest.raises(UserError, match="prior"):
        calibration.probability(0.3, 1.0)


# --- Cllr ----------------------------------------------------------------------------------------


def test_cllr_of_gaussians_is_the_integral():
    z = np.linspace(-8, 8, 20_001)
    density = np.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    llr = 40 * (0.5 + 0.1 * z - 0.3)  # of genuine pairs; of impostor pairs it is the mirror image
    expected = trapezoid(density * np.log1p(np.exp(-llr)), z) / math.log(2)
    scores, same = gaussian(200_000, 200_000)
    assert cllr(true_llr(scores), same) == pytest.approx(expected, rel=0.03)
    assert cllr(np.zeros(4), np.arange(4) < 2) == 1
    assert cllr([np.inf, -np.inf], [True, False]) == 0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=9))
def test_min_cllr_is_the_best_of_all_rising_curves(drawn):
    """Every way to cut the distinct scores into runs, each run at its own odds."""
    scores, same = np.array([s for s, _ in drawn], float), np.array([y for _, y in drawn])
    if same.all() or not same.any():
        return
    values = np.unique(scores)
    best = math.inf
    for cuts in range(2 ** (len(values) - 1)):
        run = np.cumsum([0, *((cuts >> k) & 1 for k in range(len(values) - 1))])
        of = run[np.searchsorted(values, scores)]
        share = [((of == r) & same).sum() / same.sum() for r in range(run[-1] + 1)]
        other = [((of == r) & ~same).sum() / (~same).sum() for r in range(run[-1] + 1)]
        with np.errstate(divide="ignore"):
            llr = np.log(share) - np.log(other)
        if (llr[1:] >= llr[:-1]).all():
            best = min(best, cllr(llr[of], same))
    assert min_cllr(scores, same) == pytest.approx(best, abs=1e-9)


# --- reliability ---------------------------------------------------------------------------------


def test_reliability_by_hand():
    p = np.array([0.05, 0.1, 0.9, 1.0, 0.95])
    same = np.array([False, True, True, True, False])
    found = reliability(p, same, bins=2)
    # Weights: 1/6 for a genuine pair, 1/4 for an impostor pair.
    low, high = 1 / 4 + 1 / 6, 2 / 6 + 1 / 4
    np.testing.assert_allclose(found.share, [low, high])
    np.testing.assert_allclose(found.observed, [(1 / 6) / low, (2 / 6) / high])
    predicted = [(0.05 / 4 + 0.1 / 6) / low, (1.9 / 6 + 0.95 / 4) / high]
    np.testing.assert_allclose(found.predicted, predicted)
    assert found.pairs.tolist() == [2, 3]
    gaps = np.abs(found.predicted - found.observed)
    assert found.ece == pytest.approx(found.share @ gaps)
    assert (found.low <= found.observed).all() and (found.observed <= found.high).all()


def test_true_probabilities_are_reliable_and_others_are_not():
    scores, same = gaussian(4000, 40_000)
    p = 1 / (1 + np.exp(-true_llr(scores)))
    found = reliability(p, same)
    assert found.ece < 0.005
    inside = (found.low <= found.predicted) & (found.predicted <= found.high)
    assert inside.mean() > 0.7
    assert reliability(p**0.3, same).ece > 0.05


# --- thresholds ----------------------------------------------------------------------------------


def test_a_far_needs_enough_pairs():
    assert [pairs_needed(far) for far in (0.1, 1e-2, 1e-3, 0.3)] == [100, 1000, 10_000, 34]
    with pytest.raises(UserError, match="a FAR must be a number > 0 and < 1, got 0"):
        pairs_needed(0)
    scores, same = gaussian(100, 999)
    with pytest.raises(UserError, match=r"999 impostor pairs are too few .* 1e-2: 1,000 are"):
        fit(scores, same, fars=[0.1, 1e-2])
    fit(*gaussian(100, 1000), fars=[0.1, 1e-2])
    for far in (0, 1, -0.1, math.nan):
        with pytest.raises(UserError, match="between 0 and 1"):
            fit(scores, same, fars=[far])


def test_no_threshold_where_copies_of_an_image_are_several_people():
    """Twenty impostor pairs of one image: whoever is accepted, they are too."""
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(0.6, 0.1, 500), rng.normal(0.1, 0.1, 980), np.ones(20)])
    same = np.arange(1500) < 500
    with pytest.raises(UserError, match=r"no threshold has a FAR of 1e-2.*of all, 1\.0000"):
        Calibration.fit(scores, same, fingerprint="x", fars=[0.01])
    found = Calibration.fit(scores, same, fingerprint="x", fars=[0.05])
    assert 0 < found.threshold() < 0.5


def test_thresholds_hold_their_far_and_intervals_cover_the_true_one():
    """The true threshold of FAR f is 0.1 + 0.1 z(1 - f); 40 sets of 2,000 impostor pairs."""
    truth = {0.1: 0.1 + 0.1 * 1.281552, 0.01: 0.1 + 0.1 * 2.326348}
    covered, far_covered = [], []
    for seed in range(40):
        scores, same = gaussian(200, 2000, seed)
        found = fit(scores, same, fars=list(truth), bootstrap=Bootstrap(200, seed)).thresholds
        for far, one in found.items():
            assert np.mean(scores[~same] >= one.threshold) <= far
            assert one.tar == np.mean(scores[same] >= one.threshold)
            covered.append(one.ci[0] <= truth[far] <= one.ci[1])
            real = 0.5 * math.erfc((one.threshold - 0.1) / (0.1 * math.sqrt(2)))
            far_covered.append(one.far_ci[0] <= real <= one.far_ci[1])
    assert np.mean(covered) > 0.85
    assert np.mean(far_covered) > 0.85


def people_scores(seed, people=60, images=4):
    """All pairs of people of whom some are like everybody: their pairs depend on each other."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(people), images)
    pairs, same = sample_pairs(labels, rng, 10_000)
    likeness = rng.normal(0, 0.08, people)
    mean = np.where(same, 0.6, likeness[labels[pairs]].sum(1))
    return rng.normal(mean, 0.05), same, labels[pairs]


def test_intervals_over_people_see_that_pairs_share_people():
    # Two people add up: sd sqrt(2 · 0.08² + 0.05²) around 0.
    truth = math.sqrt(2 * 0.08**2 + 0.05**2) * 1.644854
    covered, widths = {"people": [], "pairs": []}, {"people": [], "pairs": []}
    for seed in range(20):
        scores, same, who = people_scores(seed)
        for over, people in (("people", who), ("pairs", None)):
            found = fit(scores, same, fars=[0.05], people=people)
            assert found.intervals.over == over
            low, high = found.thresholds[0.05].ci
            covered[over].append(low <= truth <= high)
            widths[over].append(high - low)
    assert np.mean(covered["people"]) > 0.7
    assert np.mean(covered["pairs"]) < 0.5
    assert np.mean(widths["people"]) > 3 * np.mean(widths["pairs"])


@pytest.mark.parametrize(("people", "images", "far"), [(12, 3, 0.1), (4, 60, 1e-3)])
def test_the_bootstrap_over_people_is_the_plain_one(people, images, far):
    """Against one replicate after another, each on the pairs repeated as often as drawn.

    The two most alike people of few make all of the highest impostor scores: most resamples leave
    one of them out, and some have a single person, hence no impostor pair.
    """
    scores, same, who = people_scores(3, people=people, images=images)
    if people == 4:
        scores[(who == 0).any(axis=1) & (who == 1).any(axis=1)] += 1
    found = fit(scores, same, fars=[far], people=who, bootstrap=Bootstrap(300, 5))
    rng = np.random.default_rng(5)
    limits, fars = [], []
    impostors = scores[~same]
    for _ in range(300):
        counts = np.bincount(rng.integers(people, size=people), minlength=people)
        drawn = np.repeat(impostors, counts[who[~same, 0]] * counts[who[~same, 1]])
        if len(drawn) == 0:
            continue
        allowed = math.floor(far * len(drawn) + 1e-9)
        bound = np.sort(drawn)[::-1][allowed]
        limits.append(min(scores[scores > bound], default=scores.max()))
        fars.append(np.mean(drawn >= found.thresholds[far].threshold))
    one = found.thresholds[far]
    np.testing.assert_allclose(one.ci, np.quantile(limits, [0.025, 0.975]))
    np.testing.assert_allclose(one.far_ci, np.quantile(fars, [0.025, 0.975]))


def test_a_threshold_is_asked_for_by_its_far():
    calibration = fit(*gaussian(100, 2000), fars=[0.1, 0.01])
    assert calibration.far_default == 0.1
    assert calibration.threshold() == calibration.thresholds[0.1].threshold
    assert calibration.threshold(1e-2) > calibration.threshold(0.1)
    with pytest.raises(UserError, match=r"FAR of 1e-3, it has 1e-1, 1e-2"):
        calibration.threshold(1e-3)


def test_scores_that_tell_nothing_are_refused():
    scores, same = gaussian(300, 300)
    with pytest.raises(UserError, match="no higher"):
        fit(-scores, same, fars=[0.1])
    with pytest.raises(UserError, match="one of 'logistic', 'isotonic'"):
        fit(scores, same, fars=[0.1], method="magic")


# --- the file ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    net = backbones.build("sfnet4", width=0.125, input_size=32, embedding_dim=8)
    bundle.save(net, folder)
    return folder, net


@pytest.mark.parametrize("method", ["logistic", "isotonic"])
def test_a_calibration_survives_its_file(model, method):
    folder, net = model
    assert fingerprint(bundle.load(folder)) == fingerprint(net)
    data = [CalibrationSet("made", 2200, 200, 2000, None, "abc")]
    made = fit(*gaussian(200, 2000), fingerprint=fingerprint(net), method=method, data=data)
    path = made.save(folder)
    assert path.name == "calibration.json"
    assert [p.name for p in folder.iterdir() if p.name.endswith(".tmp")] == []
    read = Calibration.load(folder, fingerprint=fingerprint(net))
    x = np.linspace(-1, 1, 101)
    np.testing.assert_array_equal(read.llr(x), made.llr(x))
    assert read.to_dict() == made.to_dict()
    assert read.thresholds == made.thresholds
    path.unlink()
    assert Calibration.load(folder, fingerprint=fingerprint(net)) is None


def test_an_exported_file_has_its_own_calibration_or_its_checkpoints(model):
    folder, net = model
    exported = folder / "x.onnx"
    exported.touch()
    ours = fit(*gaussian(200, 2000), fingerprint=fingerprint(net))
    ours.save(folder)
    assert Calibration.load(exported, fingerprint=fingerprint(net)).to_dict() == ours.to_dict()
    # An int8 file lies there too, and is another network.
    assert Calibration.load(exported, fingerprint="int8") is None
    # `export runs/NAME` writes into the run, whose best checkpoint has the calibration.
    best = folder / "checkpoints" / "best"
    best.mkdir(parents=True)
    (folder / "calibration.json").rename(best / "calibration.json")
    assert Calibration.load(exported, fingerprint=fingerprint(net)).to_dict() == ours.to_dict()
    assert Calibration.load(exported, fingerprint="int8") is None
    (best / "calibration.json").rename(folder / "calibration.json")
    path = fit(*gaussian(200, 2000), fingerprint="int8").save(exported)
    assert path == folder / "x.calibration.json"
    assert Calibration.load(exported, fingerprint="int8").fingerprint == "int8"
    with pytest.raises(UserError, match=r"x\.calibration\.json belongs to another network"):
        Calibration.load(exported, fingerprint=fingerprint(net))
    for leftover in (path, exported, folder / "calibration.json"):
        leftover.unlink()
    shutil.rmtree(best.parent)
    with pytest.raises(UserError, match="cannot be written"):
        ours.save(folder / "absent")


def test_the_words_of_older_calibrations_are_read(model):
    folder, net = model
    made = fit(*gaussian(200, 2000), fingerprint=fingerprint(net))
    content = made.to_dict()
    old = {"name": "a", "pairs": 9, "matched": 4, "mismatched": 5, "people": 3, "fingerprint": "b"}
    (folder / "calibration.json").write_text(json.dumps(content | {"data": [old]}))
    found = Calibration.load(folder, fingerprint=fingerprint(net))
    assert found.data == (CalibrationSet("a", 9, 4, 5, 3, "b"),)
    (folder / "calibration.json").unlink()


def test_another_network_or_a_damaged_file_is_told(model):
    folder, net = model
    fit(*gaussian(200, 2000), fingerprint="0" * 64).save(folder)
    with pytest.raises(UserError, match="another network"):
        Calibration.load(folder, fingerprint=fingerprint(net))
    good = fit(*gaussian(200, 2000), fingerprint=fingerprint(net)).to_dict()
    path = folder / "calibration.json"
    for change in (
        {"format": "x"},
        {"format_version": 2},
        {"method": "magic"},
        {"scores": [0.1]},
        {"scores": [0.2, 0.1]},
        {"llrs": [0, "a"]},
        {"llrs": [0, None]},
        {"thresholds": []},
        {"thresholds": [{"far": 0.1}]},
        {"thresholds": [good["thresholds"][0] | {"threshold": math.nan}]},
        {"thresholds": [good["thresholds"][0] | {"far": 2}]},
        {"data": 3},
        {"model": None},
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match="calibration"):
            Calibration.load(folder, fingerprint=fingerprint(net))
    for text in ("", "{", "[]", "3", "[" * 100_000, json.dumps(good).replace('"f', '"')):
        path.write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            Calibration.load(folder, fingerprint=fingerprint(net))
    path.unlink()


def test_a_weight_changes_the_fingerprint_and_metadata_does_not(model):
    _, net = model
    other = backbones.build("sfnet4", width=0.125, input_size=32, embedding_dim=8)
    other.load_state_dict(net.state_dict())
    other.metadata = {"step": 3}
    assert fingerprint(other) == fingerprint(net)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    assert fingerprint(other) != fingerprint(net)


# --- pairs and the shared bias -------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-2, 3), min_size=2, max_size=25), st.integers(1, 40))
def test_sample_pairs_is_every_pair_once_or_a_sample_of_them(drawn, most):
    labels = np.array(drawn)
    i, j = np.triu_indices(len(labels), 1)
    every = {(a, b) for a, b in zip(i.tolist(), j.tolist(), strict=True)}
    alike = {(a, b) for a, b in every if labels[a] == labels[b]}
    pairs, same = sample_pairs(labels, np.random.default_rng(0), most)
    found = [tuple(sorted(pair)) for pair in pairs.tolist()]
    assert len(set(found)) == len(found)
    assert {pair for pair, y in zip(found, same, strict=True) if y} <= alike
    assert {pair for pair, y in zip(found, same, strict=True) if not y} <= every - alike
    assert same.sum() == min(most, len(alike))
    assert (~same).sum() <= min(most, len(every - alike))
    if len(every - alike) <= most:
        assert (~same).sum() == len(every - alike)


def test_many_pairs_are_sampled_evenly():
    labels = np.arange(3000) // 2
    pairs, same = sample_pairs(labels, np.random.default_rng(0), 100_000)
    assert (same.sum(), (~same).sum()) == (1500, 100_000)
    assert pairs.min() == 0 and pairs.max() == 2999
    # Each image is in as many: 2 · 100,000 / 3,000 a piece.
    counts = np.bincount(pairs[~same].ravel(), minlength=3000)
    assert abs(counts.mean() - 200_000 / 3000) < 1e-9
    assert counts.std() < 1.2 * math.sqrt(200_000 / 3000)


def test_the_shared_bias_as_a_threshold():
    scores, same = np.array([0.1, 0.4, 0.6, 0.9]), np.array([False, True, False, True])
    head = {"bias": -20.0, "r": 40.0, "t": 1.0}
    found = shared_bias({"head": head}, scores, same)
    assert (found.g, found.similarity) == (0.5, 0.5)
    assert (found.far, found.tar) == (0.5, 0.5)
    # g(0.6) = 2 · 0.8³ - 1 = 0.024
    found = shared_bias({"head": {"bias": -0.96, "r": 40, "t": 3}}, scores, same)
    assert found.similarity == pytest.approx(0.6)
    assert shared_bias({"head": head | {"bias": -80.0}}, scores, same).far == 0
    assert shared_bias({"head": head | {"bias": 80.0}}, scores, same).far == 1
    for metadata in ({}, {"head": None}, {"head": {"name": "arcface"}}, {"head": head | {"r": 0}}):
        assert shared_bias(metadata, scores, same) is None


def test_quality_counts_what_the_thresholds_accept():
    scores, same = gaussian(300, 3000)
    calibration = fit(scores, same, fars=[0.1, 0.01])
    found = quality(*gaussian(1000, 1000, seed=9), calibration)
    assert set(found.far) == set(found.tar) == {0.1, 0.01}
    assert found.far[0.1] == pytest.approx(0.1, abs=0.04)
    assert found.min_cllr <= found.cllr < 1
    assert found.ece < 0.05


def test_more_comparisons_name_more_strangers():
    assert named_by_mistake(1e-3, 1) == pytest.approx(1e-3)
    assert named_by_mistake(1e-3, 1_000) == pytest.approx(1 - 0.999**1_000)
    assert named_by_mistake(1e-12, 10) == pytest.approx(1e-11)  # without cancellation
