"""What a network expects of its images, kept beside its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sphereface2.errors import UserError, check_choice

if TYPE_CHECKING:
    from torch import Tensor


def as_size(value: int | Sequence[int], what: str = "input_size") -> tuple[int, int]:
    """``112`` or ``(112, 96)`` as (height, width); anything else is a UserError."""
    sides = tuple(value) if isinstance(value, Sequence) else (value, value)
    if len(sides) != 2 or not all(
        isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides
    ):
        raise UserError(
            f"{what} must be a positive integer or a (height, width) pair, got {value!r}"
        )
    return sides


@dataclass(frozen=True)
class Preprocessing:
    """uint8 RGB images to the normalised float tensor a network was trained on.

    Attributes:
        size: (height, width) in pixels.
        mean: subtracted from each channel, in 0..255 units, in the order of `colour_order`.
        std: divides each channel, in 0..255 units, in the order of `colour_order`.
        colour_order: "RGB" or "BGR", the channel order of the network's input.
    """

    size: tuple[int, int] = (112, 112)
    mean: tuple[float, float, float] = (127.5, 127.5, 127.5)
    std: tuple[float, float, float] = (128.0, 128.0, 128.0)
    colour_order: str = "RGB"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", as_size(self.size, "preprocessing size"))
        for name in ("mean", "std"):
            value = getattr(self, name)
            try:
                numbers = tuple(float(number) for number in value)
            except (TypeError, ValueError):
                numbers = ()
            if len(numbers) != 3 or not all(math.isfinite(number) for number in numbers):
                raise UserError(f"{name} must be three numbers in 0..255 units, not {value!r}")
            object.__setattr__(self, name, numbers)
        if min(self.std) <= 0:
            raise UserError(f"std must be positive, not {self.std!r}")
        check_choice("colour_order", self.colour_order, ("RGB", "BGR"))

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise uint8 RGB images (B, 3, H, W) to float32 (B, 3, height, width).

        Images of another size are resized (bilinear, antialiased). The memory format is kept.
        """
        import torch
        from torch.nn import functional as F

        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                "preprocessing takes uint8 images of shape (B, 3, H, W), "
                f"not {images.dtype} of shape {tuple(images.shape)}"
            )
        if self.colour_order == "BGR":
            images = images.flip(1)
        pixels = images.float()
        if tuple(pixels.shape[2:]) != self.size:
            pixels = F.interpolate(
                pixels, size=self.size, mode="bilinear", antialias=True, align_corners=False
            )
        if len(set(self.mean)) == 1 and len(set(self.std)) == 1:
            # Scalars run several times faster than broadcasting three numbers over channels.
            return pixels.sub_(self.mean[0]).div_(self.std[0])
        mean = pixels.new_tensor(self.mean).view(1, 3, 1, 1)
        std = pixels.new_tensor(self.std).view(1, 3, 1, 1)
        return pixels.sub_(mean).div_(std)

    def arrays(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Normalise uint8 RGB images, each (H, W, 3), to float32 (B, 3, height, width).

        This is `__call__` without torch: equal to it where no image is resized, and to about one
        thousandth of a grey level where one is.
        """
        pixels = np.stack([self._resized(image) for image in images])
        if self.colour_order == "BGR":
            pixels = pixels[..., ::-1]
        pixels -= np.array(self.mean, np.float32)
        pixels /= np.array(self.std, np.float32)
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    def _resized(self, image: np.ndarray) -> np.ndarray:
        pixels = image.astype(np.float32)
        if image.shape[:2] == self.size:
            return pixels
        bands = [
            Image.fromarray(band).resize(self.size[::-1], Image.Resampling.BILINEAR)
            for band in np.moveaxis(pixels, 2, 0)
        ]
        return np.stack([np.asarray(band) for band in bands], axis=2)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dictionary that `from_dict` takes back."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Inverse of `to_dict`; unknown or missing keys are a UserError."""
        expected = set(cls.__dataclass_fields__)
        if not isinstance(values, dict) or set(values) != expected:
            raise UserError(f"a preprocessing needs exactly the keys {sorted(expected)}")
        return cls(**values)
