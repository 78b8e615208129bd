"""One decoder and one encoder for the whole package: images as uint8 RGB the right way up."""

from __future__ import annotations

import importlib.util
import io
import re
import struct
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from sphereface2.errors import UserError
from sphereface2.extras import require

if TYPE_CHECKING:
    import torch

#: What `read_image` takes.
ImageLike: TypeAlias = "Path | str | bytes | Image.Image | np.ndarray | torch.Tensor"

#: Pixels of an image, unless told otherwise.
MAX_PIXELS = 100_000_000
#: Pillow's decoders that may be tried, those that know their files by a signature first. Some of
#: the others start programs or follow file names.
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI", "DIB"),
    *("SGI", "SUN", "PCX", "TGA"),
)
_HEIF = frozenset({".heic", ".heif", ".hif"})
#: Suffixes of the image files that can be read here; HEIC's are among them with ``pillow-heif``.
SUFFIXES = frozenset(
    f".{name}"
    for name in re.split(
        r"\s+",
        "jpg jpeg jpe jif jfif jfi mpo png apng webp gif bmp dib tif tiff pbm pgm ppm pnm pfm avif "
        "jp2 j2k j2c jpf jpx jpc qoi sgi ras pcx tga",
    )
) | (_HEIF if importlib.util.find_spec("pillow_heif") else frozenset())

_ORIENTATION = 0x0112
#: Files that OpenCV decodes to the same pixels as Pillow, several times faster: JPEG whose headers
#: up to the frame's are JFIF, Adobe's YCbCr, tables and restart intervals, hence without EXIF, in
#: three components or one; and WebP in its simple lossy form, without alpha and metadata. Each
#: alternative has one group, the sides.
_PLAIN = re.compile(
    rb"\xff\xd8(?:\xff\xe0\x00\x10JFIF\0.{9})?(?:\xff\xee\x00\x0eAdobe.{6}\x01)?"
    rb"(?:\xff\xdb\x00(?:\x43.{65}|\x84.{130})|\xff\xdd\x00\x04..)+"
    rb"\xff[\xc0\xc2]\x00(?:\x11\x08(....)\x03|\x0b\x08(....)\x01)"
    rb"|RIFF.{4}WEBPVP8 .{7}\x9d\x01\x2a(....)",
    re.DOTALL,
)
_WEBP = 3
_SIDES = {1: struct.Struct(">HH"), 2: struct.Struct(">HH"), _WEBP: struct.Struct("<HH")}


def decode(
    content: bytes | bytearray | memoryview,
    *,
    name: str = "the image",
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decode an image file's content.

    EXIF's orientation is applied; transparency is laid over white; 16-bit channels keep their high
    bytes; grey, palettes, CMYK and LAB become RGB; floating-point values are taken from [0, 1] or,
    if one is above 1, from [0, 255]; an animation gives its first frame.

    Args:
        content: the file's bytes.
        name: what to call the image in an error message.
        max_pixels: an image with more is refused from its header, before it is decoded.

    Returns:
        uint8 (H, W, 3) RGB, contiguous and writable.

    Raises:
        UserError: empty, truncated, not an image, or too many pixels.
    """
    plain = _PLAIN.match(content)
    if plain:
        kind = plain.lastindex or 0
        one, other = _SIDES[kind].unpack(plain[kind])
        if one * other <= max_pixels and (kind == _WEBP or content[-1] == 0xD9):
            image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
            if image is not None:
                return image
    return _decode_any(content, name, max_pixels)


def read_image(image: ImageLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read an image from wherever it is: uint8 (H, W, 3) RGB, the right way up.

    Args:
        image: a file's path, its content, a PIL image, a uint8 array (H, W, 3) in RGB or (H, W) in
            grey, or a uint8 tensor (3, H, W). Files and PIL images are read as `decode` does.
        max_pixels: an image with more is refused.

    Raises:
        UserError: no such file, empty, truncated, not an image, too many pixels, or an array of
            another type or shape.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, max_pixels)
    if "torch" in sys.modules and isinstance(image, sys.modules["torch"].Tensor):
        return _from_tensor(image, max_pixels)
    if isinstance(image, str | Path):
        try:
            content = Path(image).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{image} cannot be read: {reason}") from error
        return decode(content, name=str(image), max_pixels=max_pixels)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode(image, max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        _check_pixels(*image.size, "the image", max_pixels)
        return _from_pil(image, "the image")
    raise UserError(
        f"cannot read an image from a {type(image).__name__}; give a path, bytes, a PIL image, "
        "an array or a tensor"
    )


def is_one(images: object) -> bool:
    """Whether ``images`` is a single image; UserError if it is neither one nor many."""
    dimensions = getattr(images, "ndim", None)
    if dimensions is not None:  # an array or a tensor
        # Of three dimensions, one that is no image: grey images look like one with alpha.
        return dimensions in (2, 3)
    one = isinstance(images, str | bytes | bytearray | memoryview | Path | Image.Image)
    if not one and not isinstance(images, Iterable):
        raise UserError(f"there is no image: {images!r} was given")
    return one


def encode_image(pixels: np.ndarray, suffix: str, quality: int | None = None) -> bytes:
    """The file of an image.

    Args:
        pixels: uint8 RGB (H, W, 3).
        suffix: ``.jpg``, ``.png`` or ``.webp``.
        quality: 1 to 100 of a JPEG or WebP; by default OpenCV's.
    """
    flag = {".jpg": cv2.IMWRITE_JPEG_QUALITY, ".jpeg": cv2.IMWRITE_JPEG_QUALITY}.get(
        suffix, cv2.IMWRITE_WEBP_QUALITY
    )
    options = [] if quality is None or suffix == ".png" else [flag, quality]
    return cv2.imencode(suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def _from_array(array: np.ndarray, max_pixels: int) -> np.ndarray:
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    ):
        raise UserError(
            f"an image as an array must be uint8 (H, W, 3) in RGB or (H, W) in grey, not "
            f"{array.dtype} {array.shape}"
        )
    _check_pixels(array.shape[1], array.shape[0], "the image", max_pixels)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    return np.ascontiguousarray(array)


def _from_tensor(tensor: torch.Tensor, max_pixels: int) -> np.ndarray:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != "uint8" or tensor.ndim != 3 or tensor.shape[0] != 3:
        raise UserError(
            f"an image as a tensor must be uint8 (3, H, W) in RGB, not {dtype} "
            f"{tuple(tensor.shape)}"
        )
    return _from_array(tensor.detach().cpu().permute(1, 2, 0).numpy(), max_pixels)


def _decode_any(content: bytes | bytearray | memoryview, name: str, max_pixels: int) -> np.ndarray:
    if not len(content):
        raise UserError(f"{name} is empty; give a JPEG, PNG, WebP or other image file")
    # Pillow's own limit, the whole process's, goes up to the one asked for. It stays in force: it
    # holds for a WebP's canvas and a TIFF's tiles, which are made before or beside the header.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        opened = Image.open(io.BytesIO(content), formats=_formats_for(content, name))
    except UserError:
        raise
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has too many pixels; reduce it first") from error
    except UnidentifiedImageError as error:
        floats = _float_tiff(content, name, max_pixels)
        if floats is not None:
            return floats
        raise UserError(
            f"{name} cannot be read as an image; give a JPEG, PNG, WebP, GIF, BMP, TIFF, "
            "AVIF or JPEG 2000 file"
        ) from error
    except Exception as error:  # a damaged header makes Pillow's parsers raise almost anything
        raise UserError(f"{name} is damaged and cannot be read: {_first_line(error)}") from error
    with opened:
        _check_pixels(*opened.size, name, max_pixels)
        return _from_pil(opened, name)


def _formats_for(content: bytes | bytearray | memoryview, name: str) -> tuple[str, ...]:
    brand = bytes(content[4:12])
    if brand[:4] != b"ftyp" or brand[4:6] in (b"av", b"jp"):  # AVIF, JPEG 2000
        return _FORMATS
    require(f"HEIC images such as {name}", "pillow_heif")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return (*_FORMATS, "HEIF")


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    try:
        image.load()
        return np.require(_to_rgb(_upright(image), name), requirements=["C", "W"])
    except UserError:
        raise
    except Exception as error:  # as above, of damaged pixels
        raise UserError(f"{name} is damaged and cannot be read: {_first_line(error)}") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF says nothing of the pixels
        return image
    turn = Image.Transpose
    turns: dict[object, Image.Transpose] = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    return image.transpose(turns[orientation]) if orientation in turns else image


def _to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.asarray(image)
    if image.mode == "F":
        return np.repeat(_from_floats(np.asarray(image), name)[..., None], 3, axis=2)
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow's own conversion would clip them
        deep = np.asarray(image)
        grey = deep >> 8 if image.mode != "I" or image.format == "PPM" or deep.max() > 255 else deep
        narrow = np.empty(grey.shape, np.uint8)  # straight into bytes: large images are large
        np.clip(grey, 0, 255, out=narrow, casting="unsafe")
        if isinstance(image.info.get("transparency"), int):
            narrow[deep == image.info["transparency"]] = 255
        return np.repeat(narrow[..., None], 3, axis=2)
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _float_tiff(
    content: bytes | bytearray | memoryview, name: str, max_pixels: int
) -> np.ndarray | None:
    """A TIFF of floating-point RGB, which Pillow does not know; None if it is something else."""
    file = io.BytesIO(content)
    try:
        tags = TiffImagePlugin.ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        width, height, kind = tags[256], tags[257], tags.get(339, (1,))
        if set(kind) != {3} or tags.get(262) != 2:  # sample format, photometric interpretation
            return None
    except Exception:  # the caller says that this is no image
        return None
    _check_pixels(width, height, name, max_pixels)
    try:
        values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        values = None
    if values is None or values.ndim != 3 or values.shape[2] not in (3, 4):
        raise UserError(f"{name} is damaged and cannot be read")
    codes = (cv2.COLOR_BGR2RGB, cv2.COLOR_BGRA2RGBA)
    pixels = _from_floats(values, name)
    return _to_rgb(Image.fromarray(cv2.cvtColor(pixels, codes[pixels.shape[2] - 3])), name)


def _from_floats(values: np.ndarray, name: str) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high <= 255:
        raise UserError(
            f"{name} holds floating-point values in [{low:g}, {high:g}]; expected [0, 1] or "
            "[0, 255]"
        )
    return np.rint(values * 255 if high <= 1 else values).astype(np.uint8)


def _check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise UserError(f"{name} has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise UserError(
            f"{name} has {width}x{height} pixels, more than the {max_pixels:,} allowed; reduce it "
            "first"
        )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:120] if text else type(error).__name__
