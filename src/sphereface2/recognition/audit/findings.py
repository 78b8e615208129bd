"""What an audit finds, and the file of it that a person can edit."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from sphereface2.errors import UserError
from sphereface2.files import atomic_write, read_text, writing

KINDS = {
    "unreadable": "images that cannot be read or show no face",
    "duplicate": "images that are one photograph, of one label",
    "duplicate across labels": "images that are one photograph, of two labels",
    "wrong label": "images that do not belong to their label",
    "same person": "pairs of labels that are one person",
    "quality": "images that are blurred, dark, bright or without contrast",
}
"""Kinds of findings, and what they are."""
ACTIONS = ("keep", "remove", "move", "merge")


@dataclass(frozen=True)
class Finding:
    """A line of ``findings.csv``.

    Attributes:
        kind: one of `KINDS`.
        index: of the image in the set; of "same person", the first label's number.
        image: its name; empty for "same person".
        label: its person.
        other: where there is one, the other image's index or the other label's number, else -1.
        about: the other image, the other person, or what is wrong.
        score: probability of a wrong label; correlation of duplicates; mean cosine of two people
            relative to those of each alone; the measure of quality.
        action: what a cleaned set does: "keep", "remove" the image, "move" it to the label
            ``other``, or "merge" label ``other`` into ``index``.
    """

    kind: str
    index: int
    image: str
    label: str
    other: int
    about: str
    score: float
    action: str


def write_findings(path: Path, findings: Sequence[Finding]) -> None:
    """Write ``findings.csv``."""
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow([field.name for field in fields(Finding)])
    rows.writerows([*astuple(f)[:6], f"{f.score:.4f}", f.action] for f in findings)
    with writing(path):
        atomic_write(path, text.getvalue().encode())


def read_findings(path: Path) -> list[Finding]:
    """Read ``findings.csv``, perhaps edited.

    Raises:
        UserError: it is no such file, or a line of it says something else.
    """
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
    names = [field.name for field in fields(Finding)]
    if rows.fieldnames is None or set(names) - set(rows.fieldnames):
        raise UserError(f"{path} is no findings.csv: its columns must be {', '.join(names)}")
    found = []
    for row in rows:
        try:
            values: dict[str, Any] = {name: row[name] for name in names}
            values |= {name: int(row[name]) for name in ("index", "other")}
            one = Finding(**values | {"score": float(row["score"])})
        except (TypeError, ValueError) as error:
            raise UserError(f"{path} line {rows.line_num}: {error}") from error
        if one.kind not in KINDS or one.action not in ACTIONS:
            raise UserError(
                f"{path} line {rows.line_num}: {one.kind!r}, {one.action!r} is no kind and action; "
                f"actions are {', '.join(ACTIONS)}"
            )
        found.append(one)
    return found
