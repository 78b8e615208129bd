"""Folders of images: a folder a person, or images alone."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sphereface2.data.source import NoImagesError
from sphereface2.errors import UserError, counted
from sphereface2.files import digest, one_name
from sphereface2.images import SUFFIXES

_NAMED = 5
_BROKEN = "broken link"


@dataclass
class Found:
    """What a walk below a folder found.

    Attributes:
        images: sorted paths relative to the folder, with slashes.
        unread: how many files were passed over, by suffix.
        loops: folders that link to one above them, which were not entered.
    """

    images: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    loops: list[str] = field(default_factory=list)

    def add(self, other: Found, prefix: str) -> None:
        self.images += [f"{prefix}/{name}" for name in other.images]
        self.unread += other.unread
        self.loops += [f"{prefix}/{name}" for name in other.loops]

    def notes(self) -> list[str]:
        """A sentence for each kind of thing that was passed over."""
        notes = []
        if self.unread:
            kinds = [
                counted(count, kind) if kind == _BROKEN else f"{count:,} {kind}"
                for kind, count in self.unread.most_common(_NAMED)
            ]
            more = "" if len(self.unread) <= _NAMED else ", …"
            heic = self.unread.keys() & {".heic", ".heif", ".hif"}
            remedy = "; pip install 'sphereface2[heif]' to read HEIC" if heic else ""
            total = sum(self.unread.values())
            notes.append(
                f"{counted(total, 'file')} {'were' if total > 1 else 'was'} not read: "
                f"{', '.join(kinds)}{more}{remedy}"
            )
        if self.loops:
            notes.append(
                "not entered, as they link to a folder above them: " + ", ".join(self.loops[:5])
            )
        return notes

    def warn(self, root: Path) -> None:
        """Say what was passed over, as warnings."""
        for note in self.notes():
            warnings.warn(f"{root}: {note}", stacklevel=4)


class _Files:
    """Images that are files below ``root``."""

    root: Path
    found: Found

    def __len__(self) -> int:
        return len(self.found.images)

    def read(self, index: int) -> bytes:
        return (self.root / self.found.images[index]).read_bytes()

    def name(self, index: int) -> str:
        return self.found.images[index]

    def _identity(self, kind: str, *more: np.ndarray) -> str:
        names = self.found.images
        sizes = np.array(
            [os.stat(os.path.join(self.root, name)).st_size for name in names], np.int64
        )
        return digest(kind, "\0".join(names), sizes, *more)


class FolderSource(_Files):
    """``root/person/image``: people sorted by name, images sorted by path within a folder.

    Folders whose names differ only in how they are typed (`one_name`) are one person's, who is
    called as the first of them is and has its place.
    A person's images may lie in further folders below; see `images_below` for what counts. Files
    that are not read, images that lie beside the folders of people, and folders that link to the
    set itself are warned of.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.class_names: list[str] | None = []
        self.found = Found()
        labels: list[int] = []
        numbers: dict[str, int] = {}
        above = _folders_above(self.root)
        entries = _entries(self.root)
        first = {one_name(entry.name): entry for entry in reversed(entries)}
        for entry in sorted(entries, key=lambda entry: (first[one_name(entry.name)], entry)):
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                if entry.suffix.lower() in SUFFIXES:
                    self.found.unread[f"{entry.suffix} outside a person's folder"] += 1
                continue
            if _identity(entry) in above:
                self.found.loops.append(entry.name)
                continue
            person = images_below(entry)
            if person.images:
                number = numbers.setdefault(one_name(entry.name), len(numbers))
                labels += [number] * len(person.images)
                if number == len(self.class_names):
                    self.class_names.append(entry.name)
            self.found.add(person, entry.name)
        self.found.warn(self.root)
        if not self.found.images:
            raise NoImagesError(
                f"{self.root} holds no images (.jpg, .png, …) in folders, one a person"
            )
        self.labels = np.array(labels, dtype=np.int64)
        self.num_classes = len(self.class_names)

    def fingerprint(self) -> str:
        return self._identity("folder", self.labels)


class ImageSource(_Files):
    """All images of a folder and below it, sorted by path. It knows no people."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.found = images_below(root)
        self.found.warn(root)
        self.labels = np.zeros(0, np.int64)
        self.num_classes = 0
        self.class_names: list[str] | None = None

    def fingerprint(self) -> str:
        return self._identity("pictures")


def images_below(root: Path) -> Found:
    """The images in ``root`` and below it.

    Folders are followed through symbolic links too, except a link that leads back to a folder
    above it or above ``root``. Hidden files and folders are passed over.

    Raises:
        UserError: a folder cannot be entered.
    """
    found = Found()
    above = {str(root): _folders_above(root)}
    for folder, below, files in os.walk(root, followlinks=True, onerror=_refuse):
        place = Path(folder)
        relative = place.relative_to(root)
        prefix = f"{relative.as_posix()}/" if relative.parts else ""
        for name in files:
            if is_image(os.path.join(folder, name)):  # no Path, which takes longer than the look
                found.images.append(prefix + name)
            elif not name.startswith("."):
                kind = _BROKEN if not (place / name).exists() else Path(name).suffix.lower()
                found.unread[kind or "without a suffix"] += 1
        passed = above.pop(folder)
        inner = {name: _identity(place / name) for name in below if not name.startswith(".")}
        found.loops += [(relative / n).as_posix() for n, who in inner.items() if who in passed]
        below[:] = [name for name, identity in inner.items() if identity not in passed]
        above |= {os.path.join(folder, name): passed | {inner[name]} for name in below}
    found.images.sort()
    return found


def check_outside(target: Path, source: object) -> None:
    """Refuse to write into a folder all of whose images are a set's: they would be taken for more.

    Args:
        target: file or folder that is to be written.
        source: an open set, or the folder of one; sets that are packed or listed may hold others.

    Raises:
        UserError: ``target`` lies in the set.
    """
    root = source if isinstance(source, Path) else getattr(source, "root", None)
    if root is not None and target.resolve().is_relative_to(root.resolve()):
        where = "is" if target.resolve() == root.resolve() else "lies inside"
        raise UserError(
            f"{target} {where} {root}, where its images would count as the set's own: name a place "
            "outside"
        )


def _refuse(error: OSError) -> None:
    raise UserError(
        f"the folder {error.filename} cannot be entered: {error.strerror}; change its "
        "permissions, or remove it from the set"
    ) from error


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        _refuse(error)
        raise


def _folders_above(root: Path) -> frozenset[tuple[int, int]]:
    real = root.resolve()
    return frozenset(map(_identity, (real, *real.parents)))


def _identity(folder: Path) -> tuple[int, int]:
    about = folder.stat()
    return about.st_dev, about.st_ino


def is_image(entry: str | Path) -> bool:
    """Whether ``entry`` is a file with an image's suffix, and not a hidden one."""
    name = os.path.basename(entry)
    suffix = os.path.splitext(name)[1].lower()
    return suffix in SUFFIXES and not name.startswith(".") and os.path.isfile(entry)
