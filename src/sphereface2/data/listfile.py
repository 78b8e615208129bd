"""A list file: one line an image, ``path label``."""

from __future__ import annotations

from pathlib import Path

from sphereface2.data.sources import check_labels, read_names
from sphereface2.errors import UserError
from sphereface2.files import digest

_LOOKED_FOR = 100


class ListSource:
    """``path label`` lines, separated by a tab, a comma or blanks; paths relative to the list.

    The label is the last field, so that paths may hold blanks; it is a whole number. Empty lines
    and lines that begin with # are skipped.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: list[str] = []
        labels: list[float] = []
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{self.path} is not a text file of 'path label' lines") from None
        for number, line in enumerate(text.splitlines(), 1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            name, label = _split(line)
            try:
                labels.append(int(label))
            except ValueError:
                raise UserError(
                    f"{self.path} line {number}: expected 'path label' with a whole number as "
                    f"label, found {line[:60]!r}"
                ) from None
            if not name:
                raise UserError(f"{self.path} line {number}: expected 'path label', found {line!r}")
            self._files.append(name)
        if not self._files:
            raise UserError(f"{self.path} lists no images")
        first = self._files[:_LOOKED_FOR]
        if not any((self.path.parent / name).exists() for name in first):
            raise UserError(
                f"{self.path}: none of the first {len(first)} files it lists exists ({first[0]}, "
                "…); paths are relative to the list's folder"
            )
        self.labels = check_labels(labels, self.path)
        self.num_classes = int(self.labels.max()) + 1
        self.class_names = read_names(self.path.parent, self.num_classes)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        return (self.path.parent / self._files[index]).read_bytes()

    def name(self, index: int) -> str:
        return self._files[index]

    def fingerprint(self) -> str:
        return digest("list", "\0".join(self._files), self.labels)


def _split(line: str) -> tuple[str, str]:
    for separator in ("\t", ","):
        if separator in line:
            name, _, label = line.rpartition(separator)
            return name.strip(), label.strip()
    name, _, label = line.rpartition(" ")
    return name.strip(), label
