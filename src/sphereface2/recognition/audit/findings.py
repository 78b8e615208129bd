"""What an audit finds, the file of it that a person can edit, and the set with it applied."""

from __future__ import annotations

import csv
import io
import re
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
from sphereface2.data.locate import write_about
from sphereface2.data.recordio import RecordIOSource
from sphereface2.data.source import Source, Subset, write_names
from sphereface2.errors import UserError, counted, did_you_mean
from sphereface2.files import (
    atomic_folder,
    atomic_write,
    one_name,
    printable,
    read_text,
    writing,
)

KINDS = {
    "unreadable": "images that cannot be read or show no face",
    "duplicate": "images that are one photograph, of one label",
    "duplicate across labels": "images that are one photograph, of two labels",
    "wrong label": "images that do not belong to their label",
    "same person": "pairs of labels that are one person",
    "quality": "images that are blurred, dark, bright or without contrast",
}
"""Kinds of findings, and what they are."""
_ACTIONS = dict.fromkeys(KINDS, ("keep", "remove", "move")) | {
    "duplicate": ("keep", "remove"),
    "duplicate across labels": ("keep", "remove"),
    "same person": ("keep", "merge"),
}
"""What can be done about each kind; ``other`` of a duplicate is an image, no label to move to."""


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


def read_findings(path: Path, source: Source) -> list[Finding]:
    """Read ``findings.csv``, perhaps edited: ``other`` may name a person in place of the number.

    Args:
        path: the file.
        source: the set that was audited.

    Raises:
        UserError: a line says something else, is of another set, or contradicts an earlier one.
    """
    text = read_text(path, "the findings.csv that data audit wrote")
    rows = csv.DictReader(io.StringIO(text, newline=""))
    names = [field.name for field in fields(Finding)]
    if rows.fieldnames is None or set(names) - set(rows.fieldnames):
        raise UserError(f"{path} is no findings.csv: its columns must be {', '.join(names)}")
    people = [one_name(printable(name)) for name in source.class_names or ()]
    found, decided = [], dict[Any, str]()
    for row in rows:
        where = f"{path} line {rows.line_num}"
        values: dict[str, Any] = {name: row[name] or "" for name in names}
        for name, kind in (("index", int), ("score", float)):
            try:
                values[name] = kind(values[name])
            except ValueError:
                raise UserError(f"{where}: {name} must be a number, got {row[name]!r}") from None
        one = Finding(**values | {"other": _other(values["other"], people, where)})
        _check(one, source, where)
        # Keep and remove by two kinds are no contradiction: a blurred copy goes as a copy.
        pair = one.other if one.kind == "same person" else None
        says: dict[Any, str] = {(one.kind, one.index, one.about, pair): one.action}
        if one.action == "move":
            says[one.index] = f"move to {one.other}"
        for what, action in says.items():
            if (before := decided.setdefault(what, action)) != action:
                raise UserError(
                    f"{where} says {action} of {one.image or one.label!r} and an earlier line says "
                    f"{before}: leave one of them"
                )
        found.append(one)
    return found


def _other(text: str, people: Sequence[str], where: str) -> int:
    """The number in the column ``other``, or of the label that is called so; -1 of nothing."""
    if not (called := one_name(text)):
        return -1
    if re.fullmatch(r"-1|0|[1-9][0-9]*", called):
        return int(called)
    if called not in people:
        kinds = "a label's number or a person's name" if people else "a label's number"
        raise UserError(
            f"{where}: other must be {kinds}, got {called[:60]!r}{did_you_mean(called, people)}"
        )
    if people.count(called) > 1:
        raise UserError(f"{where}: several labels are called {called!r}; give one's number")
    return people.index(called)


def _check(one: Finding, source: Source, where: str) -> None:
    actions = _ACTIONS.get(one.kind)
    if actions is None:
        raise UserError(f"{where}: no kind {one.kind!r}{did_you_mean(one.kind, KINDS)}")
    if one.action not in actions:
        raise UserError(
            f"{where}: the action for {one.kind!r} must be one of {', '.join(actions)}, got "
            f"{one.action!r}"
        )
    people = one.kind == "same person"
    fits = 0 <= one.index < (source.num_classes if people else len(source))
    if fits and one.image:
        fits = printable(source.name(one.index)) == one.image
    if fits and people and one.label and (names := source.class_names):
        fits = printable(names[one.index]) == one.label
    if not fits:
        raise UserError(
            f"{where}: the finding about {one.image or one.label!r} is of another set than this "
            "one: give the set that was audited"
        )
    if one.action in ("move", "merge") and not 0 <= one.other < source.num_classes:
        raise UserError(
            f"{where}: {one.action} needs a label in the column other, a person's name or a number "
            f"from 0 to below {source.num_classes:,}, got {one.other}"
        )


def cleaned(source: Source, findings: Sequence[Finding]) -> Subset:
    """A set with findings applied; labels are numbered anew, without those that became empty.

    Raises:
        UserError: nothing is left.
    """
    given = np.asarray(source.labels)
    labels = given.copy() if len(given) else np.zeros(len(source), np.int64)
    removed = np.zeros(len(labels), bool)
    merged = []
    for finding in findings:
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


def write_set(chosen: Subset, target: Path, told: str = "") -> Conversion:
    """Write the set to a new folder that ``fit`` takes.

    Of a set of files it is a list, ``train.txt``, of the files where they lie; a packed set is
    packed again, as RecordIO or WebDataset. ``told`` is what is `locate.about` the set.

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
        return write_source(chosen, target, layout, told=told)
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
        write_about(folder, told)
    return Conversion(target, len(lines), chosen.num_classes)


def show(
    summary: dict[str, Any], parts: Sequence[Table | str], as_json: bool, done: Conversion | None
) -> dict[str, Any]:
    """Print a summary as JSON, or ``parts`` that tell of it, and the set that was written."""
    if done is not None:
        people = done.people
        summary["written"] = {"path": str(done.target), "images": done.images, "people": people}
        images = counted(done.images, "image")
        parts = [*parts, f"{images} of {counted(people, 'person')} in {done.target}"]
    console.tell(as_json, summary, *parts)
    return summary
