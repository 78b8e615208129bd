"""Template features and scores against loops over dictionaries."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphereface2.data.ijb import People, TemplateSet
from sphereface2.evaluation.all_pairs import evaluate_all_pairs
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.templates import (
    TemplateAverager,
    evaluate_templates,
    subjects,
    template_pair_scores,
)


def by_hand(embeddings, template, media, weights):
    frames = {}
    for row, t, m, w in zip(embeddings.astype(np.float64), template, media, weights, strict=True):
        frames.setdefault(t, {}).setdefault(m, []).append(row * w)
    features = []
    for t in range(len(frames)):
        total = sum(sum(rows) / len(rows) for rows in frames[t].values())
        features.append(total / np.linalg.norm(total))
    return np.array(features)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), min_size=1, max_size=40),
    st.integers(1, 9),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_features_are_sums_over_media_of_means_over_frames(images, step, weighted):
    """Templates and media come in any order, and the stream may be cut anywhere."""
    template = np.unique([t for t, _ in images], return_inverse=True)[1]
    media = np.array([m for _, m in images])
    rng = np.random.default_rng(len(images))
    embeddings = rng.normal(size=(len(images), 8)).astype(np.float32)
    weights = rng.uniform(0.1, 1, len(images)) if weighted else None
    averager = TemplateAverager(template, media, weights)
    for start in range(0, len(images), step):
        averager.add(embeddings[start : start + step])
    expected = by_hand(
        embeddings, template, media, np.ones(len(images)) if weights is None else weights
    )
    np.testing.assert_allclose(averager.features(), expected, atol=1e-6)


def test_frames_of_a_video_count_as_one_picture():
    averager = TemplateAverager([0, 0, 0, 0], [7, 7, 7, 8])
    averager.add(np.array([[1, 0], [1, 0], [1, 0], [0, 1]], np.float32))
    np.testing.assert_allclose(averager.features(), [[0.5**0.5, 0.5**0.5]], rtol=1e-6)


def test_an_unfinished_template_is_not_given():
    averager = TemplateAverager([0, 1], [0, 0], [1.0, 0.0])
    averager.add(np.ones((1, 2), np.float32))
    with pytest.raises(ValueError, match="1 of 2 images"):
        averager.features()
    averager.add(np.ones((1, 2), np.float32))
    assert averager.features()[1].tolist() == [0, 0]  # nothing is known of it


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_pair_scores_in_any_order_and_block(block):
    rng = np.random.default_rng(0)
    features = rng.choice([-1, 1], (40, 64)).astype(np.float32) / 8  # exact in float32
    pairs = rng.integers(40, size=(500, 2)).astype(np.int32)
    pairs[:, 0] //= 2  # some templates are on no left side
    done = []
    scores = template_pair_scores(features, pairs, block=block, progress=done.append)
    assert scores.tolist() == [float(features[a] @ features[b]) for a, b in pairs]
    assert sum(done) == pytest.approx(1)


def test_templates_without_weight_are_noted():
    people = np.arange(30)
    rows = np.eye(30, dtype=np.float32)[np.concatenate([people, people])]
    rows[7] = 0
    pairs = np.array([(a, b) for a in range(30) for b in range(30, 60)], np.int32)
    found = evaluate_templates(
        rows,
        TemplateSet(
            name="ijbc",
            folder=Path(),
            names=[""] * 60,
            landmarks=np.zeros((60, 5, 2), np.float32),
            scores=np.zeros(60, np.float32),
            template=np.arange(60),
            media=np.arange(60),
            template_ids=np.arange(60),
            pairs=pairs,
            same=pairs[:, 0] == pairs[:, 1] - 30,
            galleries=[People("G1", people[:20], people[:20])],
            probes=People("probes", people + 30, people),
            notes=["said before"],
        ),
        detector_weights=True,
        bootstrap=Bootstrap(20),
    )
    assert found.notes[0] == "said before"
    assert found.notes[1].startswith("1 of 60 templates have a feature of zeros")
    content = found.to_dict()
    assert content["verification"]["tar"]["1e-1"] == pytest.approx(29 / 30)
    assert content["identification"]["rank1"] == content["identification"]["galleries"][0]["rank1"]
    assert content["identification"]["rank1"] == pytest.approx(19 / 20)
    assert content["identification"]["tpir"]["1e-1"] == pytest.approx(19 / 20)


@pytest.mark.parametrize("lists", [True, False])
def test_intervals_are_those_of_all_pairs(lists):
    """The 1:N lists say who is who, and without them the genuine pairs do."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), 3)
    rows = rng.standard_normal((40, 16))[labels] + 0.8 * rng.standard_normal((120, 16))
    rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
    pairs = np.stack(np.triu_indices(120, 1), axis=1).astype(np.int32)
    every = np.arange(120)
    templates = TemplateSet(
        name="ijbc",
        folder=Path(),
        names=[""] * 120,
        landmarks=np.zeros((120, 5, 2), np.float32),
        scores=np.zeros(120, np.float32),
        template=every,
        media=every,
        template_ids=every,
        pairs=pairs,
        same=labels[pairs[:, 0]] == labels[pairs[:, 1]],
        galleries=[People("G1", every[::3], 10**12 + labels[::3])] if lists else [],
        probes=People("probes", every[1::3], 10**12 + labels[1::3]) if lists else None,
        notes=[],
    )
    assert subjects(templates).tolist() == labels.tolist()
    found = evaluate_templates(rows, templates, bootstrap=Bootstrap(100)).verification
    expected = evaluate_all_pairs(rows, labels, bootstrap=Bootstrap(100))
    assert found.intervals == expected.intervals
    for mine, theirs in zip(found.tar, expected.tar, strict=True):
        assert (mine.at, mine.value) == (theirs.at, theirs.value)
        assert mine.ci == pytest.approx(theirs.ci)
    assert found.tar[1].ci[0] < found.tar[1].value < found.tar[1].ci[1]
