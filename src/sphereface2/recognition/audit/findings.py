"""What an audit finds, the file of it that a person can edit, and the set with it applied."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from sphereface2 import console
from sphereface2.data.convert import Conversion, write_source
from sphereface2.data.folder import FolderSource, ImageSource
from sphereface2.data.listfile import ListSource
from sphereface2.data.recordio import RecordIOSource
from sphereface2.data.source import Source, Subset, write_names
from sphereface2.errors import UserError
from sphereface2.files import atomic_folder, atomic_write, printable, read_text, writing

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
    """Read ``findings.csv``, perhaps edited; UserError if a line says something else."""
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


def cleaned(source: Source, findings: Sequence[Finding]) -> Subset:
    """A set with findings applied; labels are numbered anew, without those that became empty.

    Raises:
        UserError: a finding is of another set, or nothing is left.
    """
    given = np.asarray(source.labels)
    labels = given.copy() if len(given) else np.zeros(len(source), np.int64)
    removed = np.zeros(len(labels), bool)
    merged = []
    for finding in findings:
        here = source.num_classes if finding.kind == "same person" else len(labels)
        fits = 0 <= finding.index < here
        if finding.action in ("move", "merge"):
            fits &= 0 <= finding.other < source.num_classes
        if fits and finding.image:
            fits = printable(source.name(finding.index)) == finding.image
        if not fits:
            raise UserError(
                f"the finding about {finding.image or finding.label!r} is of another set than "
                "this one: give the set that was audited"
            )
        if finding.action == "remove":
            removed[finding.index] = True
        elif finding.action == "move":
            labels[finding.index] = finding.other
        elif finding.action == "merge":
            merged.append((finding.index, finding.other))
    labels = firsts(max(source.num_classes, 1), merged)[labels]
    index = np.flatnonzero(~removed)
    if not len(index):
        raise UserError("the findings remove every image; edit the actions in findings.csv")
    people, anew = np.unique(labels[index], return_inverse=True)
    names = source.class_names
    return Subset(
        source, index, anew.astype(np.int64), [names[i] for i in people] if names else None
    )


def firsts(count: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """For each of ``count`` things the first of all those that pairs put together with it."""
    one, other = np.array(pairs, np.int64).reshape(-1, 2).T
    graph = coo_array((np.ones(len(one)), (one, other)), shape=(count, count))
    found = connected_components(graph, directed=False)[1]
    return np.unique(found, return_index=True)[1][found]


def write_set(chosen: Subset, target: Path) -> Conversion:
    """Write the set to a new folder that ``fit`` takes.

    Of a set of files it is a list, ``train.txt``, of the files where they lie; a packed set is
    packed again, as RecordIO or WebDataset.

    Raises:
        UserError: ``target`` exists, or a path cannot stand in a list.
    """
    target = Path(target)
    if target.exists():
        raise UserError(f"{target} exists already; give --write a new folder")
    source = chosen.source
    if isinstance(source, FolderSource | ImageSource):
        root = source.root
    elif isinstance(source, ListSource):
        root = source.path.parent
    else:
        layout = "recordio" if isinstance(source, RecordIOSource) else "webdataset"
        return write_source(chosen, target, layout)
    order = np.argsort(chosen.labels, kind="stable").tolist()
    lines = []
    for i in order:
        path = str(root.resolve() / chosen.name(i))
        if printable(path) != path or any(c in path for c in "\n\r\t"):
            raise UserError(
                f"{printable(path)!r} cannot stand in a list, for its line breaks, tabs or bytes "
                "that are not UTF-8; rename it"
            )
        lines.append(f"{path}\t{chosen.labels[i]}\n")
    with atomic_folder(target) as folder:
        (folder / "train.txt").write_text("".join(lines), encoding="utf-8")
        write_names(folder, chosen.class_names)
    return Conversion(target, len(lines), chosen.num_classes)


def show(
    summary: dict[str, Any], parts: Sequence[Table | str], as_json: bool, done: Conversion | None
) -> dict[str, Any]:
    """Print a summary as JSON, or ``parts`` that tell of it, and the set that was written."""
    if done is not None:
        people = done.people
        summary["written"] = {"path": str(done.target), "images": done.images, "people": people}
        parts = [*parts, f"{done.images:,} images of {people:,} people in {done.target}"]
    console.tell(as_json, summary, *parts)
    return summary
