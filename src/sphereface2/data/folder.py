"""Folders of pictures: of people, or of pictures alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from sphereface2.errors import UserError
from sphereface2.files import digest
from sphereface2.images import SUFFIXES


class _Files:
    """Pictures that are files below ``root``."""

    root: Path
    _files: list[str]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        return (self.root / self._files[index]).read_bytes()

    def name(self, index: int) -> str:
        return self._files[index]

    def _sizes(self) -> np.ndarray:
        return np.array([(self.root / name).stat().st_size for name in self._files], np.int64)


class FolderSource(_Files):
    """``root/person/image``: people sorted by name, images sorted by path within a person.

    A person's images may lie in further folders below; see `pictures_below` for what counts.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.class_names: list[str] | None = []
        self._files: list[str] = []
        labels: list[int] = []
        for person in sorted(entry for entry in self.root.iterdir() if entry.is_dir()):
            if person.name.startswith("."):
                continue
            files = [f"{person.name}/{name}" for name in pictures_below(person)]
            if files:
                labels += [len(self.class_names)] * len(files)
                self._files += files
                self.class_names.append(person.name)
        if not self._files:
            raise UserError(f"{self.root} holds no person/image.(jpg|png|…) files")
        self.labels = np.array(labels, dtype=np.int64)
        self.num_classes = len(self.class_names)

    def fingerprint(self) -> str:
        return digest("folder", "\0".join(self._files), self._sizes(), self.labels)


class PictureSource(_Files):
    """All pictures of a folder and below it, sorted by path. It knows no people."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._files = pictures_below(root)
        self.labels = np.zeros(0, np.int64)
        self.num_classes = 0
        self.class_names: list[str] | None = None

    def fingerprint(self) -> str:
        return digest("pictures", "\0".join(self._files), self._sizes())


def pictures_below(root: Path) -> list[str]:
    """The pictures in ``root`` and below it: sorted paths relative to it, with slashes.

    Folders are followed through symbolic links too, except a link that leads back to a folder
    above it or above ``root``. Hidden folders and what `is_picture` refuses are passed over.
    """
    found: list[str] = []
    real = root.resolve()
    above = {str(root): frozenset(map(_identity, (real, *real.parents)))}
    for folder, below, files in os.walk(root, followlinks=True):
        place = Path(folder)
        relative = place.relative_to(root)
        found += [(relative / name).as_posix() for name in files if is_picture(place / name)]
        passed = above.pop(folder)
        inner = {name: _identity(place / name) for name in below if not name.startswith(".")}
        below[:] = [name for name, identity in inner.items() if identity not in passed]
        above |= {os.path.join(folder, name): passed | {inner[name]} for name in below}
    return sorted(found)


def _identity(folder: Path) -> tuple[int, int]:
    told = folder.stat()
    return told.st_dev, told.st_ino


def is_picture(entry: Path) -> bool:
    """Whether ``entry`` is a file with an image's suffix, and not a hidden one."""
    return entry.suffix.lower() in SUFFIXES and not entry.name.startswith(".") and entry.is_file()
