"""`Augmentation` as tensor operations over a whole batch, on whichever device holds its pixels.

The draws are the same and so is what they mean. The pixels are those of the path of single images
to about a grey level: it computes in whole numbers, and this in float32.

What the host decides for a batch goes to the device as one table, and what is done there depends on
no value of it: a step that may happen to an image is done to all, and kept where it was drawn. So
a batch is started in few steps of the host, or as a CUDA graph.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from sphereface2.data.hardening import FULL, GAMMA, before_turning, normals
from sphereface2.data.transforms import GREY, Augmentation

_COLUMNS = {
    "back": 6,  # where each pixel comes from: x, y, 1 -> x, y, from -1 to 1 across the image
    "colours": 12,  # the colour map of `Plan.colours`, the offset for grey 1
    "box": 4,  # of erasing: top, height, left, width
    "colour": 3,
    "small": 1,
    "quality": 1,
    "lamp": 4,
    "degrees": 1,
    "yaw": 1,  # these six: whether it happens
    "low_resolution": 1,
    "light": 1,
    "photometric": 1,
    "jpeg": 1,
    "erase": 1,
}
COLUMNS = sum(_COLUMNS.values())
"""Numbers of an image in `table`; even, so that they are pairs of 8 bytes."""


def table(augmentation: Augmentation, draws: np.ndarray, height: int, width: int) -> np.ndarray:
    """What draws (B, D) of `Augmentation.draw` do to images (height, width).

    Returns:
        float32 (B, `COLUMNS`), for `transformed`.
    """
    plan = augmentation.plan(draws)
    forward = np.zeros((len(draws), 3, 3))
    forward[:, :2] = plan.matrix(slice(None), height, width).transpose(2, 0, 1)
    forward[:, 2, 2] = 1
    unit = np.array([[2 / (width - 1), 0, -1], [0, 2 / (height - 1), -1], [0, 0, 1]])
    columns = [
        (unit @ np.linalg.inv(unit @ forward))[:, :2],
        plan.colours(np.arange(len(draws)), 1.0),
        np.stack([plan.top, plan.height, plan.left, plan.width], 1),
        plan.colour,
        *(plan.small, plan.quality, plan.lamp, plan.degrees),
        *(plan.yaw, plan.low_resolution, plan.light, plan.photometric, plan.jpeg, plan.erase),
    ]
    return np.concatenate([one.reshape(len(draws), -1) for one in columns], 1, dtype=np.float32)


def transformed(augmentation: Augmentation, images: Tensor, numbers: Tensor) -> Tensor:
    """Augment a batch of images of one size; the host does not wait for it.

    Args:
        augmentation: what may happen to them.
        images: uint8 (B, 3, H, W).
        numbers: of `table`, on the device of ``images``.

    Returns:
        uint8 (B, 3, S, S) in channels-last memory, on the device of ``images``.
    """
    side = augmentation.size
    part = dict(zip(_COLUMNS, numbers.split(list(_COLUMNS.values()), 1), strict=True))
    pixels = images.float().contiguous(memory_format=torch.channels_last)
    back = part["back"].reshape(-1, 2, 3)
    if augmentation.affine or augmentation.crop:
        pixels = _moved(pixels, back)
    elif augmentation.flip:
        pixels = torch.where(back[:, :1, :1, None] < 0, pixels.flip(3), pixels)
    if tuple(pixels.shape[2:]) != (side, side):
        pixels = _grey_levels(
            functional.interpolate(pixels, (side, side), mode="bilinear", antialias=True)
        )
    for name, step in (
        ("yaw", _turned),
        ("low_resolution", _low_resolution),
        ("light", _relit),
        ("photometric", _photometric),
        ("jpeg", _jpeg),
        ("erase", _erase),
    ):
        if getattr(augmentation, name):
            pixels = torch.where(part[name][:, :, None, None] > 0, step(pixels, part), pixels)
    return pixels.to(torch.uint8).contiguous(memory_format=torch.channels_last)


def pinned(values: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the host from which ``device`` copies without being waited for."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.type == "cuda" else tensor


@functools.cache
def _constant(name: str, device: torch.device) -> Tensor:
    """A table of `_CONSTANTS`, float32, which goes to the device once."""
    return torch.from_numpy(_CONSTANTS[name].astype(np.float32)).to(device)


def _grey_levels(pixels: Tensor) -> Tensor:
    return pixels.round_().clamp_(0, 255)


def _moved(pixels: Tensor, back: Tensor) -> Tensor:
    """Mirrored, turned, scaled and shifted by (B, 2, 3), zeros around."""
    y, x = (torch.linspace(-1, 1, side, device=pixels.device) for side in pixels.shape[2:])
    of_x, of_y, shift = back[:, None, None].unbind(4)  # (B, 1, 1, 2) each
    grid = of_x * x[:, None] + (of_y * y[:, None, None] + shift)  # (B, H, W, 2)
    return _grey_levels(functional.grid_sample(pixels, grid, align_corners=True))


def _turned(pixels: Tensor, part: dict[str, Tensor]) -> Tensor:
    """As `hardening.turn`."""
    side, angle = pixels.shape[3], torch.deg2rad(part["degrees"])
    x = (torch.arange(side, device=pixels.device) + 0.5) * 2 / side - 1
    source = before_turning(x, angle, angle.sin(), torch)
    at = ((source + 1) * side / 2 - 0.5).clamp_(0, side - 1)
    # Each new column is a mixture of two old ones.
    columns = torch.arange(side, device=pixels.device)[:, None]
    mixture = (1 - (columns - at[:, None]).abs()).clamp_min_(0)  # (B, S, S)
    return _grey_levels(pixels.contiguous() @ mixture[:, None])


@functools.cache
def _scalings(side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Matrices (side + 1, side, side): row n of the first averages ``side`` pixels to n, by area;
    of the second, interpolates n to ``side``. What n has no use for is zero."""
    down = np.zeros((side + 1, side, side), np.float32)
    up = np.zeros((side + 1, side, side), np.float32)
    places = np.arange(side)
    for n in range(1, side + 1):
        edges = np.arange(n + 1) * side / n
        overlap = np.minimum(edges[1:, None], places + 1) - np.maximum(edges[:-1, None], places)
        down[n, :n] = np.maximum(overlap, 0) * n / side
        at = np.clip((places + 0.5) * n / side - 0.5, 0, n - 1)
        low = np.minimum(at.astype(int), max(n - 2, 0))
        up[n, places, low] = 1 - (at - low)
        up[n, places, np.minimum(low + 1, n - 1)] += at - low
    return torch.from_numpy(down).to(device), torch.from_numpy(up).to(device)


def _low_resolution(pixels: Tensor, part: dict[str, Tensor]) -> Tensor:
    down, up = _scalings(pixels.shape[2], pixels.device)
    which = part["small"][:, 0].long()
    for matrices in (down[which][:, None], up[which][:, None]):
        pixels = _grey_levels(matrices @ pixels.contiguous() @ matrices.mT)
    return pixels


@functools.cache
def _normals(side: int, device: torch.device) -> Tensor:
    """(side², 3)."""
    return torch.from_numpy(normals(side, side).astype(np.float32)).flatten(0, 1).to(device)


def _relit(pixels: Tensor, part: dict[str, Tensor]) -> Tensor:
    side, lamp = pixels.shape[2], part["lamp"]
    facing = (lamp[:, :3] @ _normals(side, pixels.device).T).clamp_min_(0)
    ambient = lamp[:, 3:]
    gain = (ambient + (1 - ambient) / FULL * facing).pow_(1 / GAMMA)
    return _grey_levels(pixels * gain.view(-1, 1, side, side))


def _photometric(pixels: Tensor, part: dict[str, Tensor]) -> Tensor:
    grey = (pixels.mean((2, 3)) * _constant("grey", pixels.device)).sum(1)
    maps = part["colours"].reshape(-1, 3, 4)
    offset = maps[:, :, 3:] * grey[:, None, None]
    mapped = torch.baddbmm(offset, maps[:, :, :3], pixels.flatten(2))
    return _grey_levels(mapped.view_as(pixels))


def _erase(pixels: Tensor, part: dict[str, Tensor]) -> Tensor:
    place = torch.arange(pixels.shape[2], device=pixels.device)
    top, height, left, width = part["box"][:, :, None].unbind(1)
    down = (place >= top) & (place < top + height)
    across = (place >= left) & (place < left + width)
    colour = part["colour"][:, :, None, None]
    return torch.where((down[:, :, None] & across[:, None])[:, None], colour, pixels)


# JPEG, as libjpeg does it: ITU-T T.81 with the tables of its Annex K, JFIF's colours, colour at
# half the resolution.
_LUMINANCE = (
    "16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 "
    "62 18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 "
    "98 112 100 103 99"
)
_CHROMINANCE = (
    "17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66 99 99 99 99 99 "
    "99" + 32 * " 99"
)


def _quantisers() -> np.ndarray:
    """(96, 2, 8, 8): what the coefficients of luminance and chrominance are divided by at a
    quality."""
    quality = np.arange(96).clip(1)
    percent = np.where(quality < 50, 5000 // quality, 200 - 2 * quality)[:, None, None]
    tables = np.stack([np.array(t.split(), int) for t in (_LUMINANCE, _CHROMINANCE)])
    return np.clip((tables * percent + 50) // 100, 1, 255).reshape(-1, 2, 8, 8)


_COSINES = np.cos(np.pi / 8 * np.outer(np.arange(8), np.arange(8) + 0.5)) / 2
_COSINES[0] /= 2**0.5
_CONSTANTS = {
    "grey": GREY,
    "to_ycc": np.array(
        [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    ),
    "from_ycc": np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]]),
    "cosines": _COSINES,
    "quantisers": _quantisers(),
}


def _jpeg(pixels: Tensor, part: dict[str, Tensor]) -> Tensor:
    side = pixels.shape[2]
    steps = _constant("quantisers", pixels.device)[part["quality"][:, 0].long()]
    luminance, chrominance = steps[:, :, None, None, None].unbind(1)  # (N, 1, 1, 1, 8, 8)
    ycc = _coloured(pixels, "to_ycc", 128.0)
    whole = functional.pad(ycc, (0, -side % 16, 0, -side % 16), mode="replicate")
    brightness = _quantised(whole[:, :1], luminance)
    quarter = functional.avg_pool2d(whole[:, 1:], 2) * 4
    bias = torch.arange(quarter.shape[3], device=pixels.device) % 2 + 1
    colour = _quantised(quarter.add_(bias).div_(4).floor_(), chrominance)
    half = (side + 1) // 2
    colour = _doubled(colour[..., :half, :half])
    joined = torch.cat([brightness[..., :side, :side], colour[..., :side, :side]], 1)
    return _coloured(joined, "from_ycc", -128.0)


def _coloured(pixels: Tensor, matrix: str, middle: float) -> Tensor:
    """Pixels by a colour matrix; ``middle`` is added to the two colours after, or before (< 0)."""
    shift = torch.zeros(3, 1, 1, device=pixels.device)
    shift[1:] = middle
    inputs = pixels + shift if middle < 0 else pixels
    mapped = (_constant(matrix, pixels.device) @ inputs.flatten(2)).view_as(pixels)
    return _grey_levels(mapped + shift if middle > 0 else mapped)


def _quantised(pixels: Tensor, steps: Tensor) -> Tensor:
    """(N, C, H, W) through the quantised cosine transform of its 8×8 blocks."""
    n, c, h, w = pixels.shape
    transform = _constant("cosines", pixels.device)
    blocks = (pixels - 128).reshape(n, c, h // 8, 8, w // 8, 8).transpose(3, 4)
    # As exact as libjpeg's: quarters between the passes, eighths after them, halves away from zero.
    quarters = (blocks @ transform.T).mul_(4 * 8**0.5).add_(0.5).floor_()
    eighths = (transform @ quarters).mul_(8**0.5 / 4).add_(0.5).floor_()
    coefficients = eighths.sign() * (eighths.abs() / (8 * steps) + 0.5).floor_() * steps
    quarters = (transform.T @ coefficients).mul_(4 * 8**0.5).add_(0.5).floor_()
    back = (quarters @ transform).mul_(8**0.5 / 32).transpose(3, 4).reshape(n, c, h, w)
    return back.add_(128.5).floor_().clamp_(0, 255)


def _doubled(pixels: Tensor) -> Tensor:
    """Twice the resolution, each new pixel three parts of the nearest old one and one of the next,
    along both axes, rounded once."""
    near = functional.pad(pixels, (1, 1, 1, 1), mode="replicate")
    rows = torch.stack([near[:, :, :-2], near[:, :, 2:]], 3) + 3 * near[:, :, 1:-1, None]
    tall = rows.flatten(2, 3)
    columns = torch.stack([tall[..., :-2] + 8, tall[..., 2:] + 7], 4) + 3 * tall[..., 1:-1, None]
    return columns.flatten(3, 4).div_(16).floor_()
