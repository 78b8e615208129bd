"""The file of who is who that a person can edit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sphereface2.data.convert import is_unsafe
from sphereface2.data.source import Source
from sphereface2.errors import UserError
from sphereface2.files import printable, read_lines
from sphereface2.recognition.audit.clean import Chosen

_HEAD, _NOBODY = "==", "-"
_EXPLAINED = f"""\
# Each block below is a person: a line "{_HEAD} NAME", then a line for each image, its number and
# its name, those that look most like the person first. The sheets show the same images.
#   name    write another NAME
#   merge   give two blocks one NAME, or delete the line "{_HEAD} NAME" of the lower one
#   split   write a new line "{_HEAD} NAME" where the second person begins
#   move    put an image's line into another block
#   leave out an image: delete its line, or put it below "{_HEAD} {_NOBODY}"
"""


def people_text(source: Source, people: Sequence[tuple[str, Sequence[int]]]) -> str:
    """The text of people's names and images; an empty name is of images that are nobody's."""
    lines = [_EXPLAINED]
    for name, images in people:
        lines.append(f"\n{_HEAD} {name or _NOBODY}\n")
        lines += [f"{i}\t{_on_a_line(source.name(i))}\n" for i in images]
    return "".join(lines)


def _on_a_line(name: str) -> str:
    return " ".join(printable(name).split())


def read_people(path: Path, source: Source) -> Chosen:
    """The images of a set under the people that a text gives them to, sorted by name.

    Raises:
        UserError: a line says something else, names an image twice or one that the set has not, a
            name can be no folder's, or nobody is left.
    """
    name, person_of = None, {}
    for number, line in read_lines(path):
        where = f"{path} line {number}"
        if line.startswith(_HEAD):
            name = line.removeprefix(_HEAD).strip()
            if is_unsafe(name):
                raise UserError(f"{where}: {name!r} can name no folder; write another name")
            continue
        index, *words = line.split()
        if name is None or not index.isdecimal():
            raise UserError(f'{where}: neither "{_HEAD} NAME" nor an image\'s number and name')
        one, image = int(index), " ".join(words)
        if one >= len(source) or _on_a_line(source.name(one)) != image:
            raise UserError(f"{where}: the set has no image {index} {image!r}; give the same set")
        if one in person_of:
            raise UserError(f"{where}: image {index} stands in the file twice; delete one line")
        person_of[one] = name
    kept = sorted(one for one, name in person_of.items() if name != _NOBODY)
    if not kept:
        raise UserError(f"{path} gives no image to a person")
    names, labels = np.unique([person_of[one] for one in kept], return_inverse=True)
    return Chosen(source, np.array(kept), labels.astype(np.int64), names.tolist())
