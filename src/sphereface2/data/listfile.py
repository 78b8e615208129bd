"""A list file: one line an image, its path and its label."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np

from sphereface2.data.source import check_labels, read_names
from sphereface2.errors import UserError
from sphereface2.files import csv_fields, digest, one_name, read_lines

#: Suffixes of list files.
LIST_SUFFIXES: Final = frozenset({".txt", ".lst", ".csv", ".tsv"})
_LOOKED_FOR = 100
#: Names of columns, the surest first.
_PATH_COLUMNS: Final = (r"((image|img|file)_?)?path|image|img|file", r"((image|img|file)_?)?name")
_LABEL_COLUMNS: Final = (r"(label|class|identity|person|subject|target)(_?id)?", r"id|name")

#: A line's fields and what separated them.
_Fields: TypeAlias = tuple[list[str], str]
#: From a line's fields to a path and a label, or None if they are too few.
_Layout: TypeAlias = Callable[[list[str], str], tuple[str, str] | None]


class ListSource:
    """Lines of a path and a label; paths relative to the list.

    The layouts of the field are distinguished by which of them finds its files: ``path label``,
    ``path label …``, ``label path``, ``index label … path``, ``flag path label …``, and a CSV whose
    first line names its columns. Fields are separated by tabs, commas (with CSV's quotes) or
    blanks. Labels are whole numbers (``3.0`` too), or names, which are numbered in their order.
    Empty lines and lines that begin with # are skipped.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._folder = self.path.parent
        lines = read_lines(self.path, "a list of a path and a label a line")
        if not lines:
            raise UserError(f"{self.path} lists no images")
        header = _header(_split(lines[0][1])[0])
        lines = lines[1:] if header else lines
        split, layout, slash = self._understand([line for _, line in lines[:_LOOKED_FOR]], header)
        self._files: list[str] = []
        labels: list[str] = []
        for number, line in lines:
            found = layout(*split(line))
            if found is None or not all(found):
                raise UserError(
                    f"{self.path} line {number}: expected a path and a label, found {line[:60]!r}"
                )
            self._files.append(found[0].replace("\\", slash))
            labels.append(one_name(found[1]))
        values, names = self._values(labels, [number for number, _ in lines])
        self.labels = check_labels(values, self.path)
        self.num_classes = int(self.labels.max()) + 1
        self.class_names = names or read_names(self._folder, self.num_classes)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        return (self._folder / self._files[index]).read_bytes()

    def name(self, index: int) -> str:
        return self._files[index]

    def fingerprint(self) -> str:
        return digest("list", "\0".join(self._files), self.labels)

    def _understand(
        self, sample: list[str], header: _Layout | None
    ) -> tuple[Callable[[str], _Fields], _Layout, str]:
        """How to split lines, their layout and what "\\" becomes: what finds the most files."""
        layouts = [header] if header else _LAYOUTS
        best, most = None, 0
        splits = (_by_commas, _by_blanks, _split)
        for split, layout, slash in product(splits, layouts, ("\\", "/")):
            names = [pair[0] for line in sample if (pair := layout(*split(line)))]
            exist = sum(os.path.isfile(self._folder / name.replace("\\", slash)) for name in names)
            if exist > most:
                best, most = (split, layout, slash), exist
                if exist == len(sample):
                    break
        if best is not None:
            return best
        found = [pair[0] for line in sample if (pair := layouts[0](*_split(line)))]
        if len(found) < len(sample):
            return _split, layouts[0], "\\"  # whose caller names the line
        raise UserError(
            f"{self.path}: none of the first {len(found)} files it lists exists ({found[0]}, "
            "…); paths are relative to the list's folder"
        )

    def _values(self, labels: list[str], numbers: list[int]) -> tuple[np.ndarray, list[str] | None]:
        """Labels as numbers, and the people's names if the labels are names."""
        numeric = np.array([_is_number(label) for label in labels])
        if numeric.all():
            return np.array(labels, np.float64), None
        if numeric.any():
            odd = int(np.argmin(numeric) if numeric.mean() >= 0.5 else np.argmax(numeric))
            raise UserError(
                f"{self.path} line {numbers[odd]}: the label {labels[odd]!r} stands among labels "
                "of another kind; give whole numbers alone or names alone"
            )
        names, values = np.unique(labels, return_inverse=True)
        return values, names.tolist()


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return label.lower() not in ("nan", "inf", "infinity")  # some people are called Nan


def _by_commas(line: str) -> _Fields:
    if "\t" in line:
        return [field.strip() for field in line.split("\t")], "\t"
    return csv_fields(line), ","


def _by_blanks(line: str) -> _Fields:
    return _by_commas(line) if "\t" in line else (line.split(" "), " ")


def _split(line: str) -> _Fields:
    """By what the line itself holds, for lists of several kinds of lines."""
    return _by_commas(line) if "," in line else _by_blanks(line)


def _header(columns: list[str]) -> _Layout | None:
    """The layout that a CSV's first line names, if it names one."""
    path = _column(columns, _PATH_COLUMNS)
    label = _column(["" if i == path else name for i, name in enumerate(columns)], _LABEL_COLUMNS)
    if path is None or label is None:
        return None
    last = max(path, label)
    return lambda fields, _: (fields[path], fields[label]) if len(fields) > last else None


def _column(columns: list[str], patterns: tuple[str, ...]) -> int | None:
    found = (
        i
        for pattern in patterns
        for i, name in enumerate(columns)
        if re.fullmatch(pattern, name, re.IGNORECASE)
    )
    return next(found, None)


def _path_label(fields: list[str], separator: str) -> tuple[str, str] | None:
    """The label is last, so that paths may hold what separates."""
    path = separator.join(fields[:-1]).strip()
    return (path, fields[-1]) if len(fields) > 1 else None


def _label_path(fields: list[str], separator: str) -> tuple[str, str] | None:
    path = separator.join(fields[1:]).strip()
    return (path, fields[0]) if len(fields) > 1 else None


def _index_label_path(fields: list[str], separator: str) -> tuple[str, str] | None:
    """MXNet's: the last field is the path, the first label the person."""
    return (fields[-1], fields[1]) if len(fields) > 2 else None


def _flag_path_label(fields: list[str], separator: str) -> tuple[str, str] | None:
    """InsightFace's: whether the image is aligned, its path, the person, a box and landmarks."""
    return (fields[1], fields[2]) if len(fields) > 2 else None


def _path_label_more(fields: list[str], separator: str) -> tuple[str, str] | None:
    return (fields[0], fields[1]) if len(fields) > 2 else None


_LAYOUTS: Final[list[_Layout]] = [
    _path_label,
    _index_label_path,
    _flag_path_label,
    _path_label_more,
    _label_path,
]
