"""From decoded images to a uint8 batch: augmentation and resizing.

Images are uint8 RGB. A batch is a uint8 tensor (B, 3, S, S) in channels-last memory, which is the
order pixels come out of the decoder: nothing is transposed on the way to the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cv2
import numpy as np
import torch
from torch.nn import functional

from sphereface2.data.hardening import normals, relight, turn
from sphereface2.errors import UserError, check_number

# One image is far too small to be worth OpenCV's own threads, which fight with the workers'.
cv2.setNumThreads(0)

# Columns of the matrix of draws: seven decisions, then the parameters.
_STEPS = ("flip", "affine", "crop", "low_resolution", "photometric", "jpeg", "erase")
FLIP, _AFFINE, _CROP, _LOW = range(4)
_ANGLE, _SCALE, _SHIFT_X, _SHIFT_Y, _LOW_SIDE, _BRIGHT, _CONTRAST, _SATURATE = range(7, 15)
_QUALITY, _AREA, _ASPECT, _ERASE_X, _ERASE_Y, _RED, _GREEN, _BLUE = range(15, 23)
_DRAWS = 23
# Drawn only where there is a lamp, so that the draws of everything else stay as they are.
_LIGHT, _AROUND, _ABOVE, _AMBIENT, _DRAWS_WITH_LIGHT = range(23, 28)
# Likewise, where heads are turned.
_YAW, _TURN, _DRAWS_WITH_YAW = range(27, 30)
#: Weights of red, green and blue in grey.
GREY = np.array([0.299, 0.587, 0.114])
#: Images resized in one go: enough to amortise the call, few enough to stay in the cache.
_CHUNK = 16


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training image, each step with its own probability.

    In the order applied: mirror image; affine (rotation up to ``rotation`` degrees, scale within 1
    ± ``scale``); random crop with zero padding (a shift by up to ``crop_pad`` of the side); a turn
    of the head by up to ``yaw_degrees`` to either side (as in `hardening.turn`); low resolution
    (down to no less than ``low_resolution_min`` of the side, and back); one lamp from a random
    direction (as in `hardening.light`), with a share of ambient light from ``light_ambient`` to 1;
    photometric jitter (brightness, contrast, saturation within 1 ± the strength); JPEG at a quality
    from ``jpeg_quality`` to 95; erasing a rectangle of ``erase_area`` (smallest, largest share of
    the area) by one random colour.

    ``size`` is the side S of the result. Geometry is applied at the source's size, everything
    else after resizing, so strengths are relative to the side.
    """

    size: int = 112
    """Side S of the result in pixels: that of the network's input."""
    flip: float = 0.5
    """Probability of the mirror image."""
    alternate_flip: bool = False
    """``flip``: an image of a `FaceDataset` in every other pass, instead of at random."""
    affine: float = 0.0
    """Probability of turning and scaling the image about its middle."""
    rotation: float = 10.0
    """``affine``: most degrees turned."""
    scale: float = 0.1
    """``affine``: size within 1 ± this."""
    crop: float = 0.0
    """Probability of a shift, with black where nothing is left."""
    crop_pad: float = 0.06
    """``crop``: most of the shift, as a share of the side."""
    yaw: float = 0.0
    """Probability of a head turned about the vertical axis, as if it were a cylinder."""
    yaw_degrees: float = 45.0
    """``yaw``: most degrees turned, to either side."""
    low_resolution: float = 0.0
    """Probability of a smaller image, enlarged again."""
    low_resolution_min: float = 0.3
    """``low_resolution``: smallest side, as a share of the side."""
    light: float = 0.0
    """Probability of one lamp from any side or the front, and shade where it does not reach."""
    light_ambient: float = 0.08
    """``light``: least of the light that shade keeps."""
    photometric: float = 0.0
    """Probability of other brightness, contrast and saturation."""
    brightness: float = 0.2
    """``photometric``: within 1 ± this."""
    contrast: float = 0.2
    """``photometric``: within 1 ± this."""
    saturation: float = 0.2
    """``photometric``: within 1 ± this."""
    jpeg: float = 0.0
    """Probability of JPEG's artefacts."""
    jpeg_quality: int = 30
    """``jpeg``: lowest quality; 95 is the highest."""
    erase: float = 0.0
    """Probability of a rectangle of one random colour."""
    erase_area: tuple[float, float] = (0.02, 0.15)
    """``erase``: smallest and largest area, as shares of the image's."""

    def __post_init__(self) -> None:
        def check(names: str, **bounds: float) -> None:
            for name in names.split():
                check_number(f"augmentation.{name}", getattr(self, name), **bounds)

        check("size", least=8)
        check("flip affine crop yaw low_resolution light photometric jpeg erase", least=0, most=1)
        check("light_ambient", least=0, most=1)
        check("yaw_degrees", least=0, below=90)
        check("scale crop_pad brightness contrast saturation", least=0, below=1)
        check("low_resolution_min", above=0, most=1)
        check("jpeg_quality", least=1, most=95)
        check("rotation")
        if self.alternate_flip and not self.flip:
            raise UserError("augmentation.alternate_flip needs augmentation.flip above 0")
        low, high = self.erase_area
        if not 0 < low <= high <= 1:
            raise UserError(f"augmentation.erase_area must ascend in (0, 1], got {self.erase_area}")

    @classmethod
    def none(cls, size: int = 112) -> Augmentation:
        """Only the resizing."""
        return cls(size=size, flip=0.0)

    def __call__(self, images: Sequence[np.ndarray], rng: np.random.Generator) -> torch.Tensor:
        """Augment decoded images (H, W, 3) into uint8 (B, 3, S, S), channels-last."""
        return self.apply(images, self.draw(len(images), rng))

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """float32 (count, D) uniform draws, one row an image: all the randomness there is."""
        columns = _DRAWS_WITH_YAW if self.yaw else _DRAWS_WITH_LIGHT if self.light else _DRAWS
        return rng.random((count, columns), dtype=np.float32)

    def apply(self, images: Sequence[np.ndarray], draws: np.ndarray) -> torch.Tensor:
        """Augment by given draws (B, D), one row an image."""
        batch = torch.empty((len(images), self.size, self.size, 3), dtype=torch.uint8)
        self.apply_into(batch, images, draws)
        return batch.permute(0, 3, 1, 2)

    def apply_into(
        self, out: torch.Tensor, images: Iterable[np.ndarray], draws: np.ndarray
    ) -> None:
        """Like ``apply``, into a contiguous uint8 tensor (B, S, S, 3).

        ``images`` may be a generator: each image is placed while it is fresh in the cache.
        """
        plan = self.plan(draws)
        array = out.numpy()
        flips = plan.flip.tolist()
        moves = (plan.affine | plan.crop).tolist()
        resizer = _Resizer(out)
        whole = array.shape[1:]
        size: tuple[int, int] | None = None  # of the first image, and most often of all
        for i, image in enumerate(images):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
                raise UserError(
                    "images to augment must be uint8 (H, W, 3) in RGB, not "
                    f"{image.dtype} {image.shape}"
                )
            if image.shape == whole and not (moves[i] or resizer.waiting):  # the shortest way
                if flips[i]:
                    cv2.flip(image, 1, dst=array[i])
                else:
                    array[i] = image
                continue
            room = resizer.room_for(i, image.shape, array)
            height, width = image.shape[:2]
            if moves[i] and plan.affine[i]:
                if size is None:
                    size, matrices = (height, width), plan.matrix(slice(None), height, width)
                alike = size == (height, width)
                matrix = matrices[:, :, i] if alike else plan.matrix(i, height, width)
                cv2.warpAffine(image, matrix, (width, height), dst=room, flags=cv2.INTER_LINEAR)
            elif moves[i]:
                right, down = plan.shifts(i, height, width)
                _shift(room, image, int(right), int(down), flips[i])
            else:
                room[...] = image
                if flips[i]:  # cheaper after the resizing
                    resizer.mirrored.append(i)
        resizer.flush()
        for i in resizer.mirrored:
            array[i] = cv2.flip(array[i], 1)
        if self._any_pixel_step:
            self._pixel_steps(array, plan)

    @cached_property
    def _probabilities(self) -> np.ndarray:
        """In the order of the decision columns."""
        return np.array([getattr(self, step) for step in _STEPS], np.float32)

    @cached_property
    def _any_pixel_step(self) -> bool:
        return bool(self.yaw or self.light or (self._probabilities[_LOW:] > 0).any())

    def plan(self, draws: np.ndarray) -> Plan:
        """What draws (B, D) do to the images of a batch."""
        hits = (draws[:, : len(self._probabilities)] < self._probabilities).T
        u = draws.T.astype(np.float64)
        angle = np.radians((2 * u[_ANGLE] - 1) * self.rotation)
        scale = 1 + (2 * u[_SCALE] - 1) * self.scale
        side, low = self.size, self.low_resolution_min
        smallest, largest = self.erase_area
        area = (smallest + (largest - smallest) * u[_AREA]) * side * side
        aspect = 4 ** (u[_ASPECT] - 0.5)  # height / width in [1/2, 2]
        height = np.clip(np.rint((area * aspect) ** 0.5), 1, side)
        width = np.clip(np.rint((area / aspect) ** 0.5), 1, side)
        best = 95 - self.jpeg_quality
        lit, lamp = np.zeros(len(draws), bool), np.zeros((len(draws), 4))
        if self.light:
            lit = draws[:, _LIGHT] < np.float32(self.light)
            around, above = 2 * np.pi * u[_AROUND], np.pi / 2 * u[_ABOVE]
            lamp[:, :2] = (np.cos(above) * (np.cos(around), np.sin(around))).T
            lamp[:, 2] = np.sin(above)
            lamp[:, 3] = self.light_ambient + (1 - self.light_ambient) * u[_AMBIENT]
        turned, degrees = np.zeros(len(draws), bool), np.zeros(len(draws))
        if self.yaw:
            turned = draws[:, _YAW] < np.float32(self.yaw)
            degrees = (2 * u[_TURN] - 1) * self.yaw_degrees
        return Plan(
            **dict(zip(_STEPS, hits, strict=True)),
            yaw=turned,
            degrees=degrees,
            light=lit,
            lamp=lamp,
            cos=np.where(hits[_AFFINE], scale * np.cos(angle), 1.0),
            sin=np.where(hits[_AFFINE], scale * np.sin(angle), 0.0),
            shift=np.where(hits[_CROP], u[_SHIFT_X : _SHIFT_Y + 1], np.nan),
            small=np.maximum(4, np.rint(side * (low + (1 - low) * u[_LOW_SIDE]))).astype(int),
            brightness=1 + (2 * u[_BRIGHT] - 1) * self.brightness,
            contrast=1 + (2 * u[_CONTRAST] - 1) * self.contrast,
            saturation=1 + (2 * u[_SATURATE] - 1) * self.saturation,
            quality=np.rint(self.jpeg_quality + best * u[_QUALITY]).astype(int),
            top=(u[_ERASE_Y] * (side - height + 1)).astype(int),
            left=(u[_ERASE_X] * (side - width + 1)).astype(int),
            height=height.astype(int),
            width=width.astype(int),
            colour=(256 * u[_RED : _BLUE + 1]).astype(int).T,
            crop_pad=self.crop_pad,
        )

    def _pixel_steps(self, out: np.ndarray, plan: Plan) -> None:
        """A turned head, low resolution, lamp, photometric jitter, JPEG, erasing, in place on
        (B, S, S, 3)."""
        side = self.size
        hit = plan.yaw | plan.low_resolution | plan.light
        for i in np.flatnonzero(hit | plan.photometric | plan.jpeg | plan.erase).tolist():
            image = out[i]
            if plan.yaw[i]:
                image[...] = turn(image, plan.degrees[i])
            if plan.low_resolution[i]:
                small = int(plan.small[i])
                reduced = cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA)
                cv2.resize(reduced, (side, side), dst=image, interpolation=cv2.INTER_LINEAR)
            if plan.light[i]:
                *lamp, ambient = plan.lamp[i].tolist()
                image[...] = relight(image, normals(side, side) @ np.array(lamp), ambient)
            if plan.photometric[i]:
                mean = float(GREY @ np.array(cv2.mean(image)[:3]))
                cv2.transform(image, plan.colours(i, mean), dst=image)
            if plan.jpeg[i]:
                bgr = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
                quality = [cv2.IMWRITE_JPEG_QUALITY, int(plan.quality[i])]
                encoded = cv2.imencode(".jpg", bgr, quality)[1]
                image[...] = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)
            if plan.erase[i]:
                top, left = plan.top[i], plan.left[i]
                box = image[top : top + plan.height[i], left : left + plan.width[i]]
                box[...] = plan.colour[i]


@dataclass(frozen=True)
class Plan:
    """What happens to each of B images; arrays of B, the fields in `Augmentation`'s order."""

    flip: np.ndarray
    affine: np.ndarray
    crop: np.ndarray
    low_resolution: np.ndarray
    photometric: np.ndarray
    jpeg: np.ndarray
    erase: np.ndarray
    cos: np.ndarray
    """Of the rotation, times the scale."""
    sin: np.ndarray
    shift: np.ndarray
    """(2, B) in [0, 1): right and down, from all to the left or up to all to the right or down;
    NaN: none."""
    yaw: np.ndarray
    degrees: np.ndarray
    """Of the turned head, to the image's right."""
    small: np.ndarray
    """Side of the low resolution."""
    light: np.ndarray
    lamp: np.ndarray
    """(B, 4): the lamp's direction to the right, down and towards the camera, and the ambient
    light."""
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    quality: np.ndarray
    top: np.ndarray
    left: np.ndarray
    height: np.ndarray
    width: np.ndarray
    colour: np.ndarray
    """int (B, 3)."""
    crop_pad: float

    def shifts(self, which: int | slice, height: int, width: int) -> tuple[Any, Any]:
        """Pixels to the right and down."""
        most = round(self.crop_pad * width), round(self.crop_pad * height)
        right, down = (
            np.nan_to_num(np.floor(self.shift[axis, which] * (2 * most[axis] + 1)) - most[axis])
            for axis in range(2)
        )
        return right, down

    def matrix(self, which: int | slice, height: int, width: int) -> np.ndarray:
        """float64 (2, 3) or (2, 3, B): where the pixels (x, y, 1) of an image go: mirrored, turned
        and scaled about the middle, shifted."""
        cos, sin, flip = self.cos[which], self.sin[which], self.flip[which]
        x, y = (width - 1) / 2, (height - 1) / 2
        right, down = self.shifts(which, height, width)
        sign, mirrored = 1 - 2 * flip, flip * (width - 1)
        return np.array(
            [
                [sign * cos, sin, cos * mirrored + (1 - cos) * x - sin * y + right],
                [-sign * sin, cos, -sin * mirrored + sin * x + (1 - cos) * y + down],
            ]
        )

    def colours(self, which: int | np.ndarray, mean: Any) -> Any:
        """The colour map of brightness, then contrast about the mean, then saturation.

        x -> saturate(contrast·(brightness·x - μ) + μ) with μ = brightness·mean, the mean grey of
        the brightened image, and saturate(y) = s·y + (1 - s)·grey(y).

        Args:
            which: an image, or an array of them.
            mean: grey of the image, or 0.

        Returns:
            float32 (3, 4), or (N, 3, 4).
        """
        s, c, b = (
            np.asarray(v[which])[..., None, None]
            for v in (self.saturation, self.contrast, self.brightness)
        )
        mix = c * b * (s * np.eye(3) + (1 - s) * np.tile(GREY, (3, 1)))
        offset = np.broadcast_to((1 - c) * b * mean, (*mix.shape[:-1], 1))
        return np.concatenate([mix, offset], axis=-1).astype(np.float32)


class _Resizer:
    """Gives images of another size a place to wait, and resizes those of one shape together."""

    def __init__(self, out: torch.Tensor) -> None:
        self.out = out
        self.side = out.shape[1]
        self.staging: torch.Tensor | None = None
        self.array = np.empty(0, dtype=np.uint8)
        self.first = self.waiting = 0
        self.mirrored: list[int] = []

    def room_for(self, index: int, shape: tuple[int, ...], direct: np.ndarray) -> np.ndarray:
        """Where to write image ``index``: its place in ``direct`` if it has the final size."""
        if shape[0] == self.side and shape[1] == self.side:
            if self.waiting:
                self.flush()
            return direct[index]
        if self.waiting == _CHUNK or (self.waiting and self.array.shape[1:] != shape):
            self.flush()
        if self.array.shape[1:] != shape:
            self.staging = torch.empty((_CHUNK, *shape), dtype=torch.uint8)
            self.array = self.staging.numpy()
        if not self.waiting:
            self.first = index
        self.waiting += 1
        return self.array[self.waiting - 1]

    def flush(self) -> None:
        """Resize what waits, bilinear and antialiased, into its places."""
        if self.waiting and self.staging is not None:
            resized = functional.interpolate(
                self.staging[: self.waiting].permute(0, 3, 1, 2),
                size=(self.side, self.side),
                mode="bilinear",
                antialias=True,
                align_corners=False,
            )
            self.out[self.first : self.first + self.waiting] = resized.permute(0, 2, 3, 1)
        self.waiting = 0


def _shift(out: np.ndarray, image: np.ndarray, dx: int, dy: int, flip: bool) -> None:
    """``image``, mirrored if asked, moved dx right and dy down into ``out``, zeros around it."""
    height, width = image.shape[:2]
    left, right = max(dx, 0), width + min(dx, 0)
    top, bottom = max(dy, 0), height + min(dy, 0)
    out[:top] = 0
    out[bottom:] = 0
    out[top:bottom, :left] = 0
    out[top:bottom, right:] = 0
    rows = slice(top - dy, bottom - dy)
    if flip:
        source = image[rows, width - (right - dx) : width - (left - dx)]
        cv2.flip(source, 1, dst=out[top:bottom, left:right])
    else:
        out[top:bottom, left:right] = image[rows, left - dx : right - dx]
