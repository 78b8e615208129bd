"""Folders of pictures: of people, or of pictures alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sphereface2.data.sources import IMAGE_SUFFIXES, digest
from sphereface2.errors import UserError


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

    A person's images may lie in further folders below. Files with no image suffix are ignored.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)
        self.class_names: list[str] | None = []
        self._files: list[str] = []
        labels: list[int] = []
        for person in sorted(entry for entry in self.root.iterdir() if entry.is_dir()):
            if person.name.startswith("."):
                continue
            files = sorted(
                path.relative_to(self.root).as_posix()
                for path in person.rglob("*")
                if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file()
            )
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
        self._files = sorted(
            entry.relative_to(root).as_posix() for entry in root.rglob("*") if is_picture(entry)
        )
        self.labels = np.zeros(0, np.int64)
        self.num_classes = 0
        self.class_names: list[str] | None = None

    def fingerprint(self) -> str:
        return digest("pictures", "\0".join(self._files), self._sizes())


def is_picture(entry: Path) -> bool:
    """Whether ``entry`` is a file with an image's suffix, and not a hidden one."""
    return (
        entry.suffix.lower() in IMAGE_SUFFIXES
        and not entry.name.startswith(".")
        and entry.is_file()
    )
