import io
import struct
import sys
import warnings
import zlib

import cv2
import numpy as np
import pillow_heif
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from sphereface2 import images
from sphereface2.data import Augmentation, BatchKey, FaceDataset, open_source
from sphereface2.errors import UserError
from sphereface2.images import SUFFIXES, decode, encode_image, read_image

SHAPE = (32, 32)


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
    np.testing.assert_array_equal(read_image(path), picture)
    np.testing.assert_array_equal(read_image(Image.open(path)), picture)


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
        found = read_image(form)
        assert found.dtype == np.uint8 and found.flags.c_contiguous
        np.testing.assert_array_equal(found, picture)
    grey = picture[..., 0]
    for form in (grey, Image.fromarray(grey), encoded(Image.fromarray(grey), "PNG")):
        np.testing.assert_array_equal(read_image(form), np.repeat(grey[..., None], 3, 2))


def test_other_modes_become_rgb(picture):
    image = Image.fromarray(picture)
    deep = Image.fromarray(picture[..., 0].astype(np.uint16) * 257)
    np.testing.assert_array_equal(
        read_image(encoded(deep, "PNG")), np.repeat(picture[..., :1], 3, 2)
    )
    seen = image.copy()
    seen.putalpha(Image.fromarray(np.full(SHAPE, 0, np.uint8)))
    assert (read_image(encoded(seen, "PNG")) == 255).all()
    cmyk = read_image(encoded(image.convert("CMYK"), "JPEG", quality=100))
    assert np.abs(cmyk.astype(int) - picture).mean() < 4
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    moving = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert read_image(moving)[4, 4].tolist() == [255, 0, 0]
    assert read_image(Image.new("1", (1, 1), 1)).tolist() == [[[255, 255, 255]]]


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
        read_image(png_header(20_000, 20_000))
    with pytest.raises(UserError, match=r"10000x9999 pixels, more than the 1,000 allowed"):
        read_image(png_header(10_000, 9_999), max_pixels=1000)


def test_the_number_of_pixels_asked_for_counts_and_not_pillow_s(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    wide = encoded(Image.new("RGB", (40, 25)), "TIFF")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(wide, max_pixels=1000).shape == (25, 40, 3)
        assert Image.MAX_IMAGE_PIXELS == 1000
        assert read_image(encoded(Image.new("L", (9, 9)), "PNG"), max_pixels=81).shape == (9, 9, 3)
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_what_is_no_picture_is_named(picture, tmp_path):
    text = tmp_path / "text.jpg"
    text.write_text("hello")
    empty = tmp_path / "empty.jpg"
    empty.write_bytes(b"")
    jpeg = encoded(Image.fromarray(picture), "JPEG")
    for bad, told in [
        (text, "text.jpg cannot be read as an image"),
        (empty, "empty.jpg is empty"),
        (tmp_path / "none.jpg", "none.jpg cannot be read: No such file"),
        (tmp_path, "cannot be read"),
        ("a\0b.jpg", "cannot be read"),
        (jpeg[:-200], "damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "as an image"),
        (picture.astype(np.float32), "uint8"),
        (np.zeros((0, 4), np.uint8), "no pixels"),
        (torch.zeros(4, 4, 3), "uint8"),
        (42, "int"),
    ]:
        with pytest.raises(UserError, match=told):
            read_image(bad)


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
        found = read_image(damaged, max_pixels=1_000_000)
    except UserError:
        return
    assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3


# --- one meaning for training and use ------------------------------------------------------------


def through_training(content, tmp_path):
    """The pixels that a batch holds of a file in a folder of people."""
    person = tmp_path / "set" / "ann"
    person.mkdir(parents=True)
    (person / "0.png").write_bytes(content)  # the name does not decide what it is
    height, width = SHAPE
    dataset = FaceDataset(open_source(tmp_path / "set"), augmentation=Augmentation.none(height))
    images = dataset[BatchKey(0, 0, np.array([0]))].images
    assert width == height
    return images[0].permute(1, 2, 0).numpy()


def rotated(image, kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(image, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))


def made_by_opencv(values, suffix):
    return cv2.imencode(suffix, values[..., ::-1] if values.ndim == 3 else values)[1].tobytes()


def lab(image):
    """An uncompressed CIELAB TIFF, written by hand: a and b are signed bytes."""
    values = cv2.cvtColor(np.asarray(image).astype(np.float32) / 255, cv2.COLOR_RGB2LAB)
    data = np.stack([values[..., 0] * 2.55, values[..., 1], values[..., 2]], 2).round()
    data = data.astype(np.int16).astype(np.uint8).tobytes()
    height, width = values.shape[:2]
    tags = [(256, width), (257, height), (258, 8), (259, 1), (262, 8), (273, 0), (277, 3)]
    tags += [(278, height), (279, len(data))]
    start = 8 + 2 + 12 * len(tags) + 4
    rows = [struct.pack("<HHII", t, 4, 1, start if t == 273 else value) for t, value in tags]
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + b"".join(rows) + bytes(4) + data


FORMS = {
    "JPEG": (lambda i: encoded(i, "JPEG", quality=95), 3),
    "progressive JPEG": (lambda i: encoded(i, "JPEG", quality=95, progressive=True), 3),
    "grey JPEG": (lambda i: encoded(i.convert("L"), "JPEG", quality=95), "grey"),
    "JPEG with EXIF": (lambda i: rotated(i, "JPEG"), "turned"),
    "CMYK JPEG": (lambda i: encoded(i.convert("CMYK"), "JPEG", quality=95), 8),
    "PNG": (lambda i: encoded(i, "PNG"), 0),
    "PNG with EXIF": (lambda i: rotated(i, "PNG"), "turned"),
    "WebP with EXIF": (lambda i: rotated(i, "WEBP"), "turned"),
    "TIFF with EXIF": (lambda i: rotated(i, "TIFF"), "turned"),
    "transparent PNG": (lambda i: encoded(with_alpha(i), "PNG"), "over white"),
    "transparent WebP": (lambda i: encoded(with_alpha(i), "WEBP", lossless=True), "over white"),
    "transparent TIFF": (lambda i: encoded(with_alpha(i), "TIFF"), "over white"),
    "palette": (lambda i: encoded(i.quantize(256), "PNG"), 12),
    "GIF": (lambda i: encoded(i.quantize(256), "GIF"), 12),
    "16-bit PNG": (lambda i: made_by_opencv(np.asarray(i).astype(np.uint16) * 257, ".png"), 0),
    "16-bit TIFF": (lambda i: made_by_opencv(np.asarray(i).astype(np.uint16) * 257, ".tif"), 0),
    "16-bit grey PNG": (lambda i: made_by_opencv(luma(i).astype(np.uint16) * 257, ".png"), "grey"),
    "16-bit PGM": (lambda i: made_by_opencv(luma(i).astype(np.uint16) * 257, ".pgm"), "grey"),
    "CMYK TIFF": (lambda i: encoded(i.convert("CMYK"), "TIFF"), 1),
    "LAB TIFF": (lab, 12),  # OpenCV's white is D65, LAB of the printing trade is D50
    "float TIFF": (lambda i: made_by_opencv(np.float32(np.asarray(i)) / 255, ".tif"), 0),
    "float TIFF to 255": (lambda i: made_by_opencv(np.float32(np.asarray(i)), ".tif"), 0),
    "grey float TIFF": (lambda i: made_by_opencv(np.float32(luma(i)) / 255, ".tif"), "grey"),
    "WebP": (lambda i: encoded(i, "WEBP", quality=95), 6),
    "AVIF": (lambda i: encoded(i, "AVIF", quality=95), 6),
    "JPEG 2000": (lambda i: encoded(i, "JPEG2000"), 0),
    "HEIC": (lambda i: (pillow_heif.register_heif_opener(), encoded(i, "HEIF", quality=95))[1], 8),
    "BMP": (lambda i: encoded(i, "BMP"), 0),
    "PPM": (lambda i: encoded(i, "PPM"), 0),
    "TGA": (lambda i: encoded(i, "TGA"), 0),
    "QOI": (lambda i: encoded(i, "QOI"), 0),
    "PCX": (lambda i: encoded(i, "PCX"), 0),
    "SGI": (lambda i: encoded(i, "SGI"), 0),
}


def luma(image):
    return np.asarray(image.convert("L"))


def with_alpha(image):
    seen = image.copy()
    seen.putalpha(Image.fromarray(ALPHA))
    return seen


ALPHA = np.tile(np.linspace(0, 255, SHAPE[1]).astype(np.uint8), (SHAPE[0], 1))


@pytest.mark.parametrize("form", FORMS)
def test_a_file_means_the_same_image_in_training_and_in_use(form, picture, tmp_path):
    make, expected = FORMS[form]
    content = make(Image.fromarray(picture))
    used = read_image(content)
    np.testing.assert_array_equal(through_training(content, tmp_path), used)
    if expected == "grey":
        meant, expected = np.repeat(luma(Image.fromarray(picture))[..., None], 3, 2), 3
    elif expected == "turned":
        meant, expected = np.rot90(picture, -1), 8
    elif expected == "over white":
        share = ALPHA[..., None] / 255
        meant, expected = picture * share + 255 * (1 - share), 1
    else:
        meant = picture
    assert np.abs(used - meant.astype(float)).mean() <= expected


def test_every_suffix_is_of_a_format_that_is_read(picture):
    formats = Image.registered_extensions()
    image = Image.fromarray(picture)
    for suffix in SUFFIXES - {".jif", ".jfi", ".pfm", ".pbm"}:
        content = encoded(image, formats[suffix]) if formats[suffix] in Image.SAVE else b""
        if content:
            assert read_image(content).shape == picture.shape, suffix
    line = Image.fromarray(picture[..., 0] > 99)
    np.testing.assert_array_equal(read_image(encoded(line, "PPM"))[..., 0] > 0, np.asarray(line))


def mutated(seed, data):
    content = bytearray(seed)
    for _ in range(data.draw(st.integers(0, 4))):
        # The last two bytes stay: without the end marker the quick way is not taken.
        content[data.draw(st.integers(2, len(seed) - 3))] = data.draw(st.integers(0, 255))
    return bytes(content)


QUICK = [
    encoded(Image.fromarray(noise if colour else noise[..., 0]), "JPEG", **options)
    for noise in [np.random.default_rng(3).integers(0, 256, (37, 51, 3), np.uint8)]
    for colour in (True, False)
    for options in (
        {"quality": 40},
        {"subsampling": 0},
        {"subsampling": 1, "restart_marker_blocks": 3},
        {"progressive": True, "optimize": True},
    )
] + [
    encoded(Image.fromarray(np.random.default_rng(i).integers(0, 256, shape, np.uint8)), "WEBP")
    for i, shape in enumerate([(20, 33, 3), (21, 32, 3), (9, 8, 3)])
]


def test_the_quick_way_gives_the_pixels_of_the_general_one():
    for content in QUICK:
        assert images._PLAIN.match(content)
        np.testing.assert_array_equal(
            decode(content), images._decode_any(content, "it", images.MAX_PIXELS)
        )


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_of_damaged_files_the_quick_way_gives_the_same_pixels_too(data):
    """Or an image where the other refuses: OpenCV fills what follows a stray marker with grey."""
    content = mutated(data.draw(st.sampled_from(QUICK)), data)
    try:
        general = images._decode_any(content, "it", 1_000_000)
    except UserError:
        return
    np.testing.assert_array_equal(decode(content, max_pixels=1_000_000), general)


def test_values_that_no_image_has_are_refused():
    for values in (np.full((4, 4), -1.0), np.full((4, 4, 3), 300.0), np.full((4, 4), np.nan)):
        with pytest.raises(UserError, match="floating-point values"):
            decode(made_by_opencv(values.astype(np.float32), ".tif"))


def test_a_bomb_of_each_quick_form_is_refused():
    for content in QUICK:
        with pytest.raises(UserError, match="more than the 50 allowed"):
            decode(content, max_pixels=50)


def test_heic_without_its_package_names_the_remedy(picture, monkeypatch):
    content = FORMS["HEIC"][0](Image.fromarray(picture))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match=r"pip install 'sphereface2\[heif\]'"):
        decode(content)


def test_an_image_is_encoded_as_it_was_in_the_quality_asked_for():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    assert np.array_equal(Image.open(io.BytesIO(encode_image(pixels, ".png", 50))), pixels)
    for suffix in (".jpg", ".webp"):
        worse, better = (encode_image(pixels, suffix, quality) for quality in (20, 95))
        assert len(worse) < len(better)
    red = np.full((16, 16, 3), (200, 30, 40), np.uint8)
    decoded = np.asarray(Image.open(io.BytesIO(encode_image(red, ".jpg"))), int)
    assert np.abs(decoded - red).max() < 4
