"""Verification sets: which images to compare and which pairs show one person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sphereface2.errors import UserError
from sphereface2.files import digest

Image = bytes | np.ndarray
#: Of a verification set, LFW's number.
FOLDS = 10


def content(image: Image) -> bytes:
    """What tells an image, encoded or decoded, from others."""
    return image if isinstance(image, bytes) else f"{image.shape}".encode() + image.tobytes()


class ImageFiles(Sequence[bytes]):
    """Image files as a sequence of their encoded bytes, read when asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return ImageFiles(self.paths[index])
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.paths[index]}: {error.strerror}") from error


@dataclass(frozen=True)
class PairSet:
    """A verification set of P pairs over N distinct images.

    Attributes:
        name: what to call the set, the file's stem.
        images: N encoded images (bytes) or decoded ones (uint8 RGB, (H, W, 3)).
        pairs: int64 (P, 2), indices into ``images``.
        same: bool (P,), whether the pair shows one person.
        folds: int64 (P,), the fold of each pair, 0 to K-1; all 0 where there are no folds.
        people: int64 (N,), the identity of each image, or None where the set does not say.
        image_names: N names for messages, or None.
        class_names: the name of each of ``people``, or None.
    """

    name: str
    images: Sequence[Image]
    pairs: np.ndarray
    same: np.ndarray
    folds: np.ndarray
    people: np.ndarray | None = None
    image_names: Sequence[str] | None = field(default=None, repr=False)
    class_names: Sequence[str] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.pairs)

    def fingerprint(self) -> str:
        """sha256 over the images and the pairs; reads every image."""
        images = (content(self.images[i]) for i in range(len(self.images)))
        return digest(self.pairs.astype(np.int64), self.same.astype(bool), *images)

    def image_name(self, index: int) -> str:
        """Name image ``index`` in a message."""
        if self.image_names is not None:
            return self.image_names[index]
        where = np.argwhere(self.pairs == index)
        return f"{self.name}: image {where[0, 1]} of pair {where[0, 0]}" if len(where) else "image"


def consecutive_folds(pairs: int, folds: int = FOLDS) -> np.ndarray:
    """The fold of each pair when nothing says otherwise: int64 (pairs,).

    Consecutive blocks as even as can be, the first ``pairs % folds`` one longer: the convention of
    the field (scikit-learn's ``KFold(10, shuffle=False)``), and LFW's own folds when the pairs
    stand in the official order. Fewer pairs than folds cannot be split and are all in fold 0.
    """
    if pairs < folds:
        return np.zeros(pairs, np.int64)
    sizes = np.full(folds, pairs // folds)
    sizes[: pairs % folds] += 1
    return np.repeat(np.arange(folds), sizes)


class _Chain(Sequence[Image]):
    """Sequences of images one after the other."""

    def __init__(self, parts: Sequence[Sequence[Image]]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: Any) -> Any:
        part = int(np.searchsorted(self.ends, index, side="right"))
        return self.parts[part][index - int(self.ends[part]) + len(self.parts[part])]


def union(name: str, sets: Sequence[PairSet]) -> PairSet:
    """One set of all pairs of ``sets``: fold k holds the pairs of their folds k.

    A person may be in several of them under different numbers, so ``people`` is None.
    """
    shifts = np.cumsum([0, *(len(s.images) for s in sets)])
    return PairSet(
        name=name,
        images=_Chain([s.images for s in sets]),
        pairs=np.concatenate([s.pairs + n for s, n in zip(sets, shifts, strict=False)]),
        same=np.concatenate([s.same for s in sets]),
        folds=np.concatenate([s.folds for s in sets]),
        image_names=[s.image_name(i) for s in sets for i in range(len(s.images))],
    )
