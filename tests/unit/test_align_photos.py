import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sphereface2.align import read_photo
from sphereface2.errors import UserError

SHAPE = (24, 40)


@pytest.fixture
def picture():
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return np.stack([4 * x, 8 * y, 255 - 3 * x], axis=2).astype(np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# What a camera stored, given how the picture should be seen (EXIF's table).
STORED = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, 1),
    7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
    8: lambda p: np.rot90(p, -1),
}


@pytest.mark.parametrize("orientation", STORED)
def test_exif_rotation_is_applied(picture, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](picture)))
    path = tmp_path / "photo.png"
    stored.save(path, exif=exif)
    np.testing.assert_array_equal(read_photo(path), picture)
    np.testing.assert_array_equal(read_photo(Image.open(path)), picture)


def test_every_form_of_the_same_picture(picture, tmp_path):
    image = Image.fromarray(picture)
    path = tmp_path / "a.png"
    image.save(path)
    forms = [
        path,
        str(path),
        path.read_bytes(),
        image,
        picture,
        torch.tensor(picture).permute(2, 0, 1),
    ]
    for form in forms:
        found = read_photo(form)
        assert found.dtype == np.uint8 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, picture)
    grey = picture[..., 0]
    for form in (grey, Image.fromarray(grey), encoded(Image.fromarray(grey), "PNG")):
        np.testing.assert_array_equal(read_photo(form), np.repeat(grey[..., None], 3, 2))


def test_other_modes_become_rgb(picture):
    image = Image.fromarray(picture)
    deep = Image.fromarray(picture[..., 0].astype(np.uint16) * 257)
    np.testing.assert_array_equal(
        read_photo(encoded(deep, "PNG")), np.repeat(picture[..., :1], 3, 2)
    )
    seen = image.copy()
    seen.putalpha(Image.fromarray(np.full(SHAPE, 0, np.uint8)))
    assert (read_photo(encoded(seen, "PNG")) == 255).all()
    cmyk = read_photo(encoded(image.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(cmyk.astype(int) - picture).mean() < 4
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_photo(moving)[4, 4].tolist() == [255, 0, 0]
    assert read_photo(Image.new("1", (1, 1), 1)).tolist() == [[[255, 255, 255]]]


def png_header(width, height):
    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", b"not decoded") + chunk(b"IEND", b"")


def test_a_bomb_is_refused_by_its_header():
    # Its pixel data are no deflate stream: the error would be another one were they decoded.
    with pytest.raises(UserError, match="pixels"):
        read_photo(png_header(20_000, 20_000))
    with pytest.raises(UserError, match=r"10000x9999 pixels, more than the 1,000 allowed"):
        read_photo(png_header(10_000, 9_999), max_pixels=1000)


def test_the_number_of_pixels_asked_for_counts_and_not_pillow_s(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    wide = encoded(Image.new("RGB", (40, 25)), "TIFF")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_photo(wide, max_pixels=1000).shape == (25, 40, 3)
        assert Image.MAX_IMAGE_PIXELS == 1000
        assert read_photo(encoded(Image.new("L", (9, 9)), "PNG"), max_pixels=81).shape == (9, 9, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_what_is_no_picture_is_named(picture, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("hello")
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    jpeg = encoded(Image.fromarray(picture), "JPEG")
    for bad, told in [
        (text, "text.jpg is not an image"),
        (empty, "empty.jpg is empty"),
        (tmp_path / "none.jpg", "none.jpg cannot be read: No such file"),
        (tmp_path, "cannot be read"),
        ("a\0b.jpg", "cannot be read"),
        (jpeg[:-200], "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
        (picture.astype(np.float32), "uint8"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
        (torch.zeros(4, 4, 3), "uint8"),
        (42, "int"),
    ]:
        with pytest.raises(UserError, match=told):
            read_photo(bad)


SEEDS = [
    encoded(Image.fromarray(np.arange(2700, dtype=np.uint8).reshape(30, 30, 3)), kind)
    for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM")
]


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_bytes_end_in_a_picture_or_a_user_error(data):
    seed = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 6))):
        seed[data.draw(st.integers(0, len(seed) - 1))] = data.draw(st.integers(0, 255))
    damaged = bytes(seed[: data.draw(st.integers(0, len(seed)))])
    try:
        found = read_photo(damaged, max_pixels=1_000_000)
    except UserError:
        return
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3
