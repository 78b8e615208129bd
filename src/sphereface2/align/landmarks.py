"""Landmark files: one line an image, ``path x1 y1 … x5 y5``, perhaps with a score behind."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import numpy as np

from sphereface2.errors import UserError
from sphereface2.files import read_lines

_NUMBERS = 10


@dataclass
class Landmarks:
    """What a landmark file holds.

    ``points`` gives each usable image's landmarks, (5, 2) float64 in the template's order;
    ``bad`` says, by image, what is wrong with the line of each other one.
    """

    points: dict[str, np.ndarray] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)


def read_landmarks(path: str | Path) -> Landmarks:
    """Read a landmark file, as IJB's ``name_5pts_score.txt``.

    Fields are separated by tabs, commas or blanks; a path with blanks needs tabs or commas. Empty
    lines and lines that begin with # are skipped. A line with a coordinate that is missing or not
    a finite number, with a path seen before, none, or one that leads out of the image folder is
    kept in ``bad``.

    Raises:
        UserError: the file cannot be read, is no text, or has no usable line.
    """
    found = Landmarks()
    for number, line in read_lines(path, "a list of 'path x1 y1 … x5 y5'"):
        separator = next((s for s in ("\t", ",") if s in line), None)
        name, *values = [part.strip() for part in line.split(separator)]
        name = str(PurePosixPath(name))
        try:
            if name == ".":
                raise ValueError("there is no path")
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError("the path leads out of the image folder")
            if name in found.points:
                raise ValueError("the image was named before")
            found.points[name] = _points(values)
        except ValueError as error:
            found.bad.setdefault(name, f"{path} line {number}: {error}")
    if not found.points:
        first = next(iter(found.bad.values()), f"{path} is empty")
        raise UserError(f"{path} has no usable line 'path x1 y1 … x5 y5'; {first}")
    return found


def _points(values: list[str]) -> np.ndarray:
    if len(values) not in (_NUMBERS, _NUMBERS + 1):  # the last one is a score
        raise ValueError(f"expected {_NUMBERS} coordinates after the path, found {len(values)}")
    numbers = []
    for i, value in enumerate(values[:_NUMBERS]):
        try:
            number = float(value)
        except ValueError:
            number = float("nan")
        if not np.isfinite(number):
            raise ValueError(f"{'xy'[i % 2]}{i // 2 + 1} is {value!r}, not a finite number")
        numbers.append(number)
    return np.array(numbers).reshape(5, 2)
