"""The pictures are PNGs that show what they are given."""

import cv2
import numpy as np
import pytest

from sphereface2.evaluation import plots
from sphereface2.evaluation.all_pairs import evaluate_all_pairs


@pytest.fixture
def scored():
    rng = np.random.default_rng(0)
    same = np.arange(400) < 200
    return rng.normal(np.where(same, 0.6, 0.1), 0.1), same


def test_both_pictures_of_a_set(tmp_path, scored):
    scores, same = scored
    paths = plots.plot_pairs("faces", scores, same, 0.35, tmp_path / "new" / "folder")
    assert [p.name for p in paths] == ["faces_roc.png", "faces_scores.png"]
    assert sorted(p.name for p in paths[0].parent.iterdir()) == [p.name for p in paths]
    for path in paths:
        image = cv2.imread(str(path))
        assert image.shape == (660, 960, 3)
        assert image.std() > 5


def test_roc_draws_the_points_it_is_given(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "write", lambda canvas, path: drawn.append(canvas.figure))
    far, tar = np.array([0, 1e-3, 0.1, 1]), np.array([0.2, 0.5, 0.9, 1])
    plots.plot_roc({"a": (far, tar), "b": (far[1:], tar[1:] / 2)}, tmp_path / "roc.png")
    axes = drawn[0].axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), far[1:])
    np.testing.assert_array_equal(axes.lines[1].get_ydata(), tar[1:] / 2)
    assert axes.get_xscale() == "log"
    assert axes.get_xlim() == (1e-3, 1)


def test_the_roc_of_all_pairs_has_every_threshold(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "write", lambda canvas, path: drawn.append(canvas.figure))
    rng = np.random.default_rng(0)
    labels = np.arange(40) // 4
    rows = rng.normal(size=(40, 8)) + rng.normal(size=(10, 8))[labels]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    evaluate_all_pairs(rows.astype(np.float32), labels, [0.1], plots=tmp_path)
    (line,) = drawn[0].axes[0].lines
    i, j = np.triu_indices(40, 1)
    scores, same = (
        (rows.astype(np.float32) @ rows.T.astype(np.float32))[i, j],
        labels[i] == labels[j],
    )
    for far in (0.003, 0.02, 0.1, 0.5):
        at = np.searchsorted(line.get_xdata(), far, "right") - 1
        bar = np.sort(scores[~same])[::-1][int(far * (~same).sum() + 1e-9)]
        assert line.get_ydata()[at] == pytest.approx((scores[same] > bar).mean(), abs=1e-6)


def test_each_histogram_sums_to_one(tmp_path, monkeypatch, scored):
    drawn = []
    monkeypatch.setattr(plots, "write", lambda canvas, path: drawn.append(canvas.figure))
    plots.plot_scores(*scored, tmp_path / "scores.png", threshold=0.35)
    plots.plot_scores(np.ones(5), np.arange(5) < 2, tmp_path / "equal.png")
    for figure in drawn:
        for patch in figure.axes[0].patches:
            # The outline goes up and down once a bin: twice the sum of the heights.
            steps = patch.get_xy()
            area = 0.5 * abs(
                np.dot(steps[:-1, 0], steps[1:, 1]) - np.dot(steps[1:, 0], steps[:-1, 1])
            )
            width = np.unique(steps[:, 0])[1] - np.unique(steps[:, 0])[0]
            assert area / width == pytest.approx(1, rel=1e-6)
