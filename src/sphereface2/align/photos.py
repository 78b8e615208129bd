"""Any picture a user may have, as uint8 RGB the right way up; anything else as a UserError."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError

from sphereface2.errors import UserError

if TYPE_CHECKING:
    import torch

Photo: TypeAlias = "Path | str | bytes | Image.Image | np.ndarray | torch.Tensor"

#: The decoders that may be tried; some of Pillow's others start programs or follow file names.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
#: Pixels of a picture, unless told otherwise.
MAX_PIXELS = 100_000_000
_ORIENTATION = 0x0112


def read_photo(image: Photo, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A picture as a uint8 array (H, W, 3) in RGB, the right way up.

    Args:
        image: a file's path, its bytes, a PIL image, a uint8 array (H, W, 3) in RGB or (H, W) in
            grey, or a uint8 tensor (3, H, W). Of files and PIL images, EXIF's rotation is applied,
            transparency is laid over white, 16-bit grey is scaled to 8, CMYK and palettes become
            RGB, and an animation gives its first frame.
        max_pixels: a picture with more is refused from its header, before it is decoded.

    Raises:
        UserError: no such file, empty, truncated, not an image, too many pixels, or an array of
            another type or shape.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image, max_pixels)
    if "torch" in sys.modules and isinstance(image, sys.modules["torch"].Tensor):
        return _from_tensor(image, max_pixels)
    name = "the picture"
    if isinstance(image, str | Path):
        name = str(image)
        try:
            image = Path(image).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{name} cannot be read: {reason}") from error
    if isinstance(image, bytes | bytearray | memoryview):
        if not len(image):
            raise UserError(f"{name} is empty; give a JPEG, PNG, WebP or other image file")
        return _from_bytes(image, name, max_pixels)
    if isinstance(image, Image.Image):
        _check_pixels(*image.size, name, max_pixels)
        return _from_pil(image, name)
    raise UserError(
        f"cannot read a picture from a {type(image).__name__}; give a path, bytes, a PIL image, "
        "an array or a tensor"
    )


def _from_array(array: np.ndarray, max_pixels: int) -> np.ndarray:
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    ):
        raise UserError(
            f"a picture as an array must be uint8 (H, W, 3) in RGB or (H, W) in grey, not "
            f"{array.dtype} {array.shape}"
        )
    _check_pixels(array.shape[1], array.shape[0], "the picture", max_pixels)
    if array.ndim == 2:
        array = np.repeat(array[..., None], 3, axis=2)
    return np.ascontiguousarray(array)


def _from_tensor(tensor: torch.Tensor, max_pixels: int) -> np.ndarray:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != "uint8" or tensor.ndim != 3 or tensor.shape[0] != 3:
        raise UserError(
            f"a picture as a tensor must be uint8 (3, H, W) in RGB, not {dtype} "
            f"{tuple(tensor.shape)}"
        )
    return _from_array(tensor.detach().cpu().permute(1, 2, 0).numpy(), max_pixels)


def _from_bytes(data: bytes | bytearray | memoryview, name: str, max_pixels: int) -> np.ndarray:
    # Pillow's own limit, the whole process's, goes up to the one asked for. It stays in force: it
    # holds for a WebP's canvas and a TIFF's tiles, which are made before or beside the header.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has too many pixels; reduce it first") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{name} is not an image that can be read; give a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM "
            "or AVIF file"
        ) from error
    except Exception as error:  # a damaged header makes Pillow's parsers raise almost anything
        raise UserError(f"{name} is damaged and cannot be read: {_told(error)}") from error
    with opened:
        _check_pixels(*opened.size, name, max_pixels)
        return _from_pil(opened, name)


def _from_pil(image: Image.Image, name: str) -> np.ndarray:
    try:
        image.load()
        turned = _upright(image)
        array = _to_rgb(turned)
    except Exception as error:  # as above, of damaged pixels
        raise UserError(f"{name} is damaged and cannot be read: {_told(error)}") from error
    return np.ascontiguousarray(array)


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


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "RGB":
        return np.asarray(image)
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it
        grey = np.asarray(image)
        if image.mode != "I" or grey.max() > 255:
            grey = grey >> 8
        narrow = np.empty(grey.shape, np.uint8)  # straight into bytes: large pictures are large
        np.clip(grey, 0, 255, out=narrow, casting="unsafe")
        return np.repeat(narrow[..., None], 3, axis=2)
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return np.asarray(Image.alpha_composite(white, image).convert("RGB"))
    return np.asarray(image.convert("RGB"))


def _check_pixels(width: int, height: int, name: str, max_pixels: int) -> None:
    if width < 1 or height < 1:
        raise UserError(f"{name} has no pixels ({width}x{height})")
    if width * height > max_pixels:
        raise UserError(
            f"{name} has {width}x{height} pixels, more than the {max_pixels:,} allowed; reduce it "
            "first"
        )


def _told(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
