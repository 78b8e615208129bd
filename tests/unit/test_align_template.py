import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sphereface2.align import TEMPLATE, similarity, warp
from sphereface2.errors import UserError


def moved(points, scale, angle, shift):
    c, s = np.cos(angle), np.sin(angle)
    return scale * points @ np.array([[c, s], [-s, c]]) + shift


@settings(deadline=None, max_examples=50)
@given(
    scale=st.floats(0.05, 30),
    angle=st.floats(-3.1, 3.1),
    x=st.floats(-500, 5000),
    y=st.floats(-500, 5000),
)
def test_a_known_similarity_is_recovered(scale, angle, x, y):
    points = moved(TEMPLATE, scale, angle, (x, y))
    matrix = similarity(points, TEMPLATE)
    back = points @ matrix[:, :2].T + matrix[:, 2]
    np.testing.assert_allclose(back, TEMPLATE, atol=1e-6)
    np.testing.assert_allclose(np.linalg.det(matrix[:, :2]), scale**-2, rtol=1e-6)


def test_it_is_the_least_squares_solution():
    rng = np.random.default_rng(0)
    points = moved(TEMPLATE, 2, 0.4, (30, 70)) + rng.normal(0, 3, (5, 2))
    matrix = similarity(points, TEMPLATE)
    # The same as an ordinary linear system in a, b, tx, ty of [[a, -b, tx], [b, a, ty]].
    rows = [row for x, y in points for row in ((x, -y, 1, 0), (y, x, 0, 1))]
    a, b, tx, ty = np.linalg.lstsq(np.array(rows), TEMPLATE.ravel(), rcond=None)[0]
    np.testing.assert_allclose(matrix, [[a, -b, tx], [b, a, ty]], atol=1e-9)


def test_mirrored_points_are_not_mirrored_back():
    mirrored = TEMPLATE * (-1, 1)
    assert np.linalg.det(similarity(mirrored, TEMPLATE)[:, :2]) > 0


def dots(landmarks, shape, radius):
    """A picture with a white disc at each landmark, drawn with subpixel places."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    grey = np.zeros(shape)
    for px, py in landmarks:
        grey = np.maximum(grey, np.clip(radius + 0.5 - np.hypot(x - px, y - py), 0, 1))
    return np.repeat((255 * grey).astype(np.uint8)[..., None], 3, axis=2)


@pytest.mark.parametrize("scale", [0.4, 1.0, 2.5, 9.3])
@pytest.mark.parametrize("size", [112, 96])
def test_landmarks_land_on_the_template(scale, size):
    landmarks = moved(TEMPLATE, scale, 0.5, (70 * scale + 20, 10))
    shape = tuple(np.ceil(landmarks.max(axis=0) + 60 * scale).astype(int)[::-1])
    crop = warp(dots(landmarks, shape, 4 * scale), landmarks, size)
    assert crop.shape == (size, size, 3) and crop.dtype == np.uint8
    mask = (crop[..., 0] > 127).astype(np.uint8)
    centres = cv2.connectedComponentsWithStats(mask)[3]
    expected = (TEMPLATE + 0.5) * size / 112 - 0.5
    assert len(centres) == 6
    for point in expected:
        assert np.linalg.norm(centres[1:] - point, axis=1).min() < 0.3


def test_a_large_face_is_averaged_not_sampled():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1200, 1200, 3), dtype=np.uint8)
    crop = warp(noise, TEMPLATE * 10 + 20)
    assert crop.std() < 12  # single pixels would keep the noise's 74


def test_outside_the_picture_is_black():
    image = np.full((50, 50, 3), 200, np.uint8)
    assert warp(image, TEMPLATE + 500).max() == 0
    assert warp(image, TEMPLATE * 8 + 5000).max() == 0


@pytest.mark.parametrize(
    ("landmarks", "told"),
    [
        (np.full((5, 2), 3.0), "coincide"),
        (np.where(np.arange(10).reshape(5, 2) == 4, np.nan, TEMPLATE), "finite"),
        (TEMPLATE[:4], "five"),
    ],
)
def test_useless_landmarks_are_named(landmarks, told):
    with pytest.raises(UserError, match=told):
        warp(np.zeros((9, 9, 3), np.uint8), landmarks)


@pytest.mark.parametrize(
    ("image", "size", "told"),
    [
        ("a.jpg", 112, "array of uint8, got str: read_image makes it"),
        (np.zeros((9, 9, 3)), 112, "array of uint8, got float64"),
        (np.zeros((9, 9, 3), np.uint8), 0, "size must be an integer ≥ 1, got 0"),
    ],
)
def test_what_cannot_be_cropped_is_named(image, size, told):
    with pytest.raises(UserError, match=told):
        warp(image, TEMPLATE, size)
