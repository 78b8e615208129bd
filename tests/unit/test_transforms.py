"""Each augmentation against what it must do to pixels that can be followed by eye."""

import cv2
import numpy as np
import pytest
import torch
from torch.nn import functional

from sphereface2.data import hardening
from sphereface2.data.transforms import Augmentation
from sphereface2.errors import UserError
from sphereface2.images import decode


def faces(count, size=32, seed=0):
    """Smooth random pictures."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC) for image in small]


def run(images, seed=0, **options):
    options = {"size": images[0].shape[0], "flip": 0.0} | options
    batch = Augmentation(**options)(images, np.random.default_rng(seed))
    return batch.permute(0, 2, 3, 1).numpy()


def test_decode_is_rgb_and_refuses_rubbish():
    red = np.zeros((8, 6, 3), np.uint8)
    red[..., 0] = 250
    encoded = cv2.imencode(".png", red[..., ::-1])[1].tobytes()
    assert np.array_equal(decode(encoded), red)
    grey = cv2.imencode(".png", red[..., 0])[1].tobytes()
    assert decode(grey).shape == (8, 6, 3)
    for rubbish in (b"", b"rubbish", encoded[:20]):
        with pytest.raises(UserError, match=r"empty|as an image|damaged"):
            decode(rubbish)


def test_what_is_no_decoded_image_is_refused():
    for wrong in (faces(1)[0] / 255, faces(1)[0][..., 0], np.zeros((8, 8, 4), np.uint8)):
        with pytest.raises(UserError, match="images to augment must be uint8"):
            run([wrong])


def test_nothing_asked_nothing_done():
    images = faces(5)
    batch = Augmentation.none(32)(images, np.random.default_rng(0))
    assert batch.shape == (5, 3, 32, 32)
    assert batch.dtype == torch.uint8
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(batch.permute(0, 2, 3, 1).numpy(), np.stack(images))


def test_flip_mirrors_with_its_probability():
    images = faces(400, 8)
    out = run(images, flip=0.3)
    flipped = np.array([np.array_equal(o, i[:, ::-1]) for o, i in zip(out, images, strict=True)])
    kept = np.array([np.array_equal(o, i) for o, i in zip(out, images, strict=True)])
    assert (flipped ^ kept).all()
    assert 0.2 < flipped.mean() < 0.4


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_crop_is_a_shift_with_zeros_around(flip):
    images = [np.maximum(image, 1) for image in faces(60, 20)]
    out = run(images, crop=1.0, crop_pad=0.2, flip=flip)
    shifts = set()
    for result, image in zip(out, images, strict=True):
        image = image[:, ::-1] if flip else image
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        matches = [
            (dy, dx)
            for dy in range(-4, 5)
            for dx in range(-4, 5)
            if np.array_equal(result, padded[4 - dy : 24 - dy, 4 - dx : 24 - dx])
        ]
        assert len(matches) == 1
        shifts.add(matches[0])
    assert len(shifts) > 25
    assert {dy for dy, _ in shifts} == {dx for _, dx in shifts} == set(range(-4, 5))


def test_affine_turns_about_the_middle():
    image = np.zeros((41, 41, 3), np.uint8)
    image[18:23, 18:23] = 200  # the middle
    image[18:23, 32:37] = 255  # a mark 14 to its right
    out = run([image] * 200, affine=1.0, rotation=30.0, scale=0.2)
    angles, lengths = [], []
    for result in out:
        assert result[20, 20, 0] > 150
        bright = result[..., 0].astype(float)
        yy, xx = np.mgrid[:41, :41]
        far = (np.hypot(yy - 20, xx - 20) > 7) * bright
        y, x = (far * yy).sum() / far.sum() - 20, (far * xx).sum() / far.sum() - 20
        angles.append(np.degrees(np.arctan2(-y, x)))
        lengths.append(np.hypot(x, y) / 14)
    assert 27 < max(angles) < 31
    assert -31 < min(angles) < -27
    assert 1.15 < max(lengths) < 1.23
    assert 0.77 < min(lengths) < 0.85
    mirrored = run([image] * 20, affine=1.0, rotation=0.0, scale=0.0, flip=1.0)
    assert np.array_equal(mirrored, np.stack([image[:, ::-1]] * 20))


def test_low_resolution_only_removes_detail():
    sharp = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    out = run([sharp] * 50, low_resolution=1.0, low_resolution_min=0.25)
    spread = out.reshape(50, -1).astype(float).std(axis=1)
    assert (spread < 0.98 * sharp.std()).all()
    assert spread.max() > 2 * spread.min()  # from a little to a lot
    assert abs(out.mean() - sharp.mean()) < 2
    flat = np.full((64, 64, 3), 77, np.uint8)
    assert (run([flat] * 5, low_resolution=1.0) == 77).all()


def test_photometric_jitter_per_channel_map():
    grey = np.full((16, 16, 3), 100, np.uint8)
    out = run([grey] * 300, photometric=1.0, brightness=0.3, contrast=0.0, saturation=0.9)
    # Grey stays grey whatever the saturation (to OpenCV's fixed-point rounding).
    assert np.abs(out.astype(int) - out[:, :1, :1, :1]).max() <= 1
    levels = out[:, 0, 0, 0].astype(int)
    assert levels.min() in range(70, 74)
    assert levels.max() in range(127, 131)
    # Contrast keeps the mean and scales the spread.
    image = faces(1, 32)[0] // 2 + 64
    out = run([image] * 100, photometric=1.0, brightness=0.0, contrast=0.4, saturation=0.0)
    luma = np.array([0.299, 0.587, 0.114])
    mean = (out @ luma).mean(axis=(1, 2))
    assert np.abs(mean - (image @ luma).mean()).max() < 1
    ratio = out.reshape(100, -1).std(axis=1) / image.std()
    assert 0.58 < ratio.min() < 0.68
    assert 1.3 < ratio.max() < 1.42
    # Saturation moves every pixel along the line to its own grey.
    out = run([image] * 50, photometric=1.0, brightness=0.0, contrast=0.0, saturation=0.5)
    chroma = out - (out @ luma)[..., None]
    original = image - (image @ luma)[..., None]
    share = (chroma * original).sum(axis=(1, 2, 3)) / (original**2).sum()
    assert np.abs(chroma - share[:, None, None, None] * original).max() < 2
    assert share.min() < 0.6
    assert share.max() > 1.4


def test_jpeg_is_a_jpeg_of_the_right_colours():
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :16] = (220, 40, 30)
    image[:, 16:] = (20, 60, 200)
    out = run([image] * 20, jpeg=1.0, jpeg_quality=40)
    assert np.abs(out[:, :, :6].astype(int) - (220, 40, 30)).max() < 12
    assert (out != image).any(axis=(1, 2, 3)).all()
    assert len({result.tobytes() for result in out}) > 3  # several qualities


def test_erasing_fills_one_rectangle_with_one_colour():
    image = faces(1, 40)[0]
    out = run([image] * 200, erase=1.0, erase_area=(0.05, 0.25))
    shares = []
    for result in out:
        changed = (result != image).any(axis=2)
        ys, xs = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        box = result[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
        assert (box == box[0, 0]).all()
        shares.append(box.shape[0] * box.shape[1] / 1600)
    assert min(shares) > 0.035
    assert max(shares) < 0.28
    assert max(shares) > 0.2


def test_resize_is_antialiased_and_mixes_shapes():
    images = [*faces(20, 56), *faces(3, 40), *faces(2, 28), *faces(1, 16)]
    out = run(images, size=28)
    for result, image in zip(out, images, strict=True):
        tensor = torch.from_numpy(image).permute(2, 0, 1)[None].double()
        expected = functional.interpolate(tensor, (28, 28), mode="bilinear", antialias=True)
        assert np.abs(result - expected[0].permute(1, 2, 0).numpy()).max() <= 1.01
    wide = [cv2.resize(image, (40, 24)) for image in faces(3)]
    assert run(wide, size=28).shape == (3, 28, 28, 3)


def test_every_draw_belongs_to_its_row():
    """An image's augmentation does not depend on its neighbours, only on its row of draws."""
    images = [*faces(3, 48), *faces(3, 40)]
    steps = ("affine", "crop", "yaw", "low_resolution", "light", "photometric", "jpeg", "erase")
    everything = Augmentation(32, 0.5, **dict.fromkeys(steps, 0.5))
    draws = everything.draw(6, np.random.default_rng(3))
    whole = everything.apply(images, draws)
    for rows in ([4, 1], [0], [5, 3, 2]):
        part = everything.apply([images[i] for i in rows], draws[rows])
        assert torch.equal(part, whole[rows])


def test_a_lamp_lights_as_the_hardened_condition_and_moves_no_other_draw():
    """By the same lamp the two agree; without lamps everything is drawn as it was before them."""
    image = faces(1, 32)[0]
    lamps = Augmentation(32, 0.0, light=1.0, light_ambient=hardening.AMBIENT)
    draws = lamps.draw(1, np.random.default_rng(0))
    draws[0, -3:] = 0.25, 15 / 90, 0.0  # a quarter of the way round, 15° up, no more than AMBIENT
    lit = lamps.apply([image], draws)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(lit, hardening.light(image, 90.0, 15.0))
    assert lit[-8:].mean() > 2 * lit[:8].mean()  # y points down
    dark = Augmentation(32, light=0.0).draw(2, np.random.default_rng(0))
    assert np.array_equal(dark, np.random.default_rng(0).random((2, 23), dtype=np.float32))


def test_a_head_turns_as_under_the_hardened_condition_to_either_side():
    image = faces(1, 32)[0]
    heads = Augmentation(32, 0.0, yaw=1.0, yaw_degrees=60.0)
    draws = heads.draw(2, np.random.default_rng(0))
    draws[:, -1] = 0.25, 1.0  # of what goes from -60° to 60°
    turned = heads.apply([image] * 2, draws).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(turned, [hardening.turn(image, -30.0), hardening.turn(image, 60.0)])


@pytest.mark.parametrize(
    "options",
    [
        {"size": 4},
        {"flip": 1.5},
        {"jpeg": -0.1},
        {"light_ambient": 1.5},
        {"yaw_degrees": 90.0},
        {"crop_pad": 1.0},
        {"low_resolution_min": 0.0},
        {"jpeg_quality": 0},
        {"erase_area": (0.3, 0.1)},
        {"brightness": -0.1},
    ],
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(UserError, match=next(iter(options)).split("_")[0]):
        Augmentation(**options)
