"""Hardened conditions, each against what its definition says of pixels known beforehand."""

import numpy as np
import pytest

from sphereface2.data.hardening import (
    AMBIENT,
    CONDITIONS,
    HEAD,
    Hardening,
    cover,
    hardenings,
    light,
    misalign,
    reduce,
    smooth,
    turn,
)
from sphereface2.errors import UserError

SIDE = 112
NOISE = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def column(image):
    """Where the one bright column stands, in half widths from the middle."""
    bright = image[SIDE // 2, :, 0].astype(float)
    return ((np.arange(SIDE) + 0.5) * bright).sum() / bright.sum() * 2 / SIDE - 1


@pytest.mark.parametrize("degrees", [-40, -10, 25, 45])
@pytest.mark.parametrize("at", [-0.3, 0.0, 0.25])
def test_a_line_on_the_head_turns_with_the_cylinder(degrees, at):
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    place = round((at + 1) * SIDE / 2)
    image[:, place - 1 : place + 1] = 255  # two columns, centred on the border between them
    angle = np.arcsin((place * 2 / SIDE - 1) / HEAD) + np.radians(degrees)
    expected = HEAD * (np.sin(angle) - np.sin(np.radians(degrees)))
    turned = turn(image, degrees)
    assert column(turned) == pytest.approx(expected, abs=0.02)
    assert (turned == turned[:1]).all()  # about the vertical axis: rows stay rows


def test_turning_is_symmetric_and_the_middle_and_no_turn_stay():
    assert np.abs(turn(NOISE, 0).astype(int) - NOISE).max() <= 1
    mirrored = turn(NOISE[:, ::-1].copy(), -30)[:, ::-1]
    assert np.abs(turn(NOISE, 30).astype(int) - mirrored).max() <= 1
    middle = np.zeros((SIDE, SIDE, 3), np.uint8)
    middle[:, SIDE // 2 - 1 : SIDE // 2 + 1] = 255
    assert column(turn(middle, 40)) == pytest.approx(0, abs=0.01)
    # The side that turns away is squeezed, the other one stretched.
    ramp = np.repeat(np.arange(SIDE, dtype=np.uint8)[None, :, None], SIDE, 0).repeat(3, 2)
    slope = np.diff(turn(ramp, 30)[0, :, 0].astype(float))
    assert slope[70:76].mean() > 1.2 > 0.9 > slope[36:42].mean()


def test_few_pixels_are_the_means_of_their_areas():
    side = 100
    image = np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8)
    small = reduce(image)
    areas = image.reshape(20, 5, 20, 5, 3).mean((1, 3))
    # At the middle of an area, bilinear enlargement by an odd factor gives the area's own value.
    assert np.abs(small[2::5, 2::5] - areas).max() <= 1
    assert len(np.unique(small[:, 2], axis=0)) > 20  # smooth between them, no blocks


def test_a_lamp_lights_its_side_and_leaves_the_other_in_shade():
    grey = np.full((SIDE, SIDE, 3), 100, np.uint8)
    lit = light(grey, 0)
    row = lit[SIDE // 2, :, 0]
    assert row[0] == round(100 * AMBIENT ** (1 / 2.2))  # the shade: ambient light in linear light
    assert (np.diff(row[SIDE // 2 : SIDE - 8].astype(int)) >= 0).all() and row[-12] > 100
    assert np.array_equal(light(grey, 180), lit[:, ::-1])
    assert np.array_equal(light(grey, 90), lit.transpose(1, 0, 2))
    # Towards the viewer the normal is (0, 0, 1), of which the lamp at 15° sees sin 15°.
    gain = AMBIENT + (1 - AMBIENT) * np.sin(np.radians(15)) / 0.6
    assert lit[SIDE // 2, SIDE // 2, 0] == pytest.approx(100 * gain ** (1 / 2.2), abs=2)
    assert light(np.full_like(grey, 250), 0).max() == 255  # overexposed, not wrapped round


@pytest.mark.parametrize(
    ("half", "kept"), [(0, np.s_[:, 56:]), (1, np.s_[:, :56]), (2, np.s_[:56])]
)
def test_a_half_is_covered_and_the_other_untouched(half, kept):
    covered = cover(NOISE, half, (1, 2, 3))
    assert np.array_equal(covered[kept], NOISE[kept])
    assert (covered == (1, 2, 3)).all(axis=2).sum() == SIDE * SIDE // 2


def test_smoothing_takes_wrinkles_and_keeps_edges():
    image = np.full((SIDE, SIDE, 3), 60, np.uint8)
    image[:, SIDE // 2 :] = 220
    wrinkled = image + np.random.default_rng(2).integers(0, 13, image.shape).astype(np.uint8)
    smoothed = smooth(wrinkled, 0.4).astype(float)
    assert smoothed[:, :40].std() < 0.3 * wrinkled[:, :40].std()
    assert smoothed[:, 60:].mean() - smoothed[:, :52].mean() > 150
    assert np.array_equal(smooth(wrinkled, 0), wrinkled)


def test_a_misaligned_face_is_turned_scaled_and_shifted_about_the_middle():
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[54:58, 76:80] = 255  # 22 pixels to the right of the middle
    shift = (0.05, -0.1)
    moved = misalign(image, 30, 1.1, shift)[..., 0].astype(float)
    y, x = np.indices((SIDE, SIDE))
    place = np.array([(x * moved).sum(), (y * moved).sum()]) / moved.sum() - 55.5
    angle = np.radians(-30)  # rows count downwards
    expected = 22 * 1.1 * np.array([np.cos(angle), np.sin(angle)]) + np.array(shift) * SIDE
    assert place == pytest.approx(expected, abs=0.1)
    assert moved.sum() / image[..., 0].sum() == pytest.approx(1.1**2, rel=0.05)
    assert np.array_equal(misalign(NOISE, 0, 1, (0, 0)), NOISE)
    assert (misalign(NOISE, 0, 1, (0.25, 0))[:, :28] == NOISE[:, :1]).all()


def test_draws_differ_by_image_condition_and_seed_and_repeat():
    before = NOISE.copy()
    for harden in hardenings(["all"]):
        first = [harden(NOISE, index) for index in range(6)]
        again = [Hardening(harden.name)(NOISE, index) for index in range(6)]
        assert np.array_equal(first, again)
        assert all(one.shape == NOISE.shape and one.dtype == np.uint8 for one in first)
        if harden.name != "low_resolution":  # which draws nothing
            assert len({one.tobytes() for one in first}) == 6
            other = [Hardening(harden.name, 1)(NOISE, index) for index in range(6)]
            assert not np.array_equal(first, other)
        assert not np.array_equal(first[0], NOISE)
    assert np.array_equal(NOISE, before)
    assert [one.name for one in hardenings(["all"])] == list(CONDITIONS)
    with pytest.raises(UserError, match=r"no condition 'yav' .did you mean 'yaw'"):
        hardenings(["yav"])
