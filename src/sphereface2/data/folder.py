"""A folder of person folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sphereface2.data.sources import IMAGE_SUFFIXES, digest
from sphereface2.errors import UserError


class FolderSource:
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

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        return (self.root / self._files[index]).read_bytes()

    def name(self, index: int) -> str:
        return self._files[index]

    def fingerprint(self) -> str:
        sizes = [(self.root / name).stat().st_size for name in self._files]
        return digest("folder", "\0".join(self._files), np.array(sizes, np.int64), self.labels)
