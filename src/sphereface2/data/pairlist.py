"""Verification sets as text lists beside image files, in the layouts of the field.

LFW's ``pairs.txt``; lists of two paths and a verdict; the lists of CALFW and CPLFW, two lines of
``image label`` a pair; and CFP's protocol folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Final

import numpy as np

from sphereface2.data.pairs import FOLDS, ImageFiles, PairSet, consecutive_folds
from sphereface2.errors import UserError
from sphereface2.files import csv_fields, one_name, read_lines
from sphereface2.images import SUFFIXES

_SAME: Final = frozenset(("1", "1.0", "true"))
_DIFFERENT: Final = frozenset(("0", "0.0", "-1", "-1.0", "false"))
_VERDICT_COLUMNS: Final = frozenset(
    ("label", "same", "issame", "is_same", "match", "genuine", "target", "verdict", "y")
)
_PATH_COLUMN: Final = re.compile(r"path|image|img|file", re.IGNORECASE)

_WANTED: Final = "a pairs.txt, or a list of two images and 1 or 0 a line, 1 for one person"

#: A line's number and its fields.
_Row = tuple[int, list[str]]


def read(path: Path, root: Path) -> PairSet:
    """Read a list of pairs whose images lie under ``root``.

    Fields are separated by tabs, by commas (with CSV's quotes) or by blanks; a first line that
    names the columns is recognised.

    Raises:
        UserError: the list is of no known layout, or names images that do not exist.
    """
    rows = _rows(path)
    if not root.is_dir():
        raise UserError(f"there is no image folder {root}: give the one that holds the images")
    first = rows[0][1]
    if _is_count(first) or 2 * sum(_is_lfw(fields) for _, fields in rows) > len(rows):
        return _read_lfw(path, rows, root)
    if len(first) == 2 and PurePath(first[0]).suffix.lower() in SUFFIXES and _is_number(first[1]):
        return _read_two_lines(path, rows, root)
    return _read_pairs(path, rows, root)


def read_people(names: Path, of: Path, same: np.ndarray) -> tuple[list[str], np.ndarray]:
    """The person of each of the 2P images of a ``.bin`` and the fold of each pair.

    Args:
        names: the pairs.txt in whose order the ``.bin`` was written.
        of: the ``.bin``, for messages.
        same: bool (P,), its verdicts.

    Raises:
        UserError: the list is of other pairs.
    """
    entries, listed, folds = _parse_lfw(names, _rows(names, "the pairs.txt of the .bin"))
    if len(entries) != len(same):
        raise UserError(f"{names} lists {len(entries)} pairs, {of} has {len(same)}")
    wrong = np.flatnonzero(listed != same)
    if len(wrong):
        raise UserError(f"{names} and {of} disagree on pair {wrong[0]}: is it another set's list?")
    return [one_name(person) for pair in entries for person, _ in pair], folds


def _rows(path: Path, wanted: str = _WANTED) -> list[_Row]:
    rows = [(number, _fields(line)) for number, line in read_lines(path, wanted)]
    if not rows:
        raise UserError(f"{path} lists no pairs")
    return rows


def _fields(line: str) -> list[str]:
    if "\t" in line:
        fields = line.split("\t")
    elif "," in line:
        fields = csv_fields(line)
    else:
        fields = line.split()
    fields = [field.strip() for field in fields]
    while fields and not fields[-1]:  # LFW's CSV ends its shorter lines with a comma
        fields.pop()
    return fields


def _is_number(field: str) -> bool:
    """Whether a field is the number of an image, of pairs or of a fold."""
    return field.isdecimal() and len(field) < 10


def _is_header(fields: list[str]) -> bool:
    return len(fields) > 2 and all(re.fullmatch(r"[A-Za-z_][\w ]*", field) for field in fields)


def _pair_set(
    path: Path,
    root: Path,
    pairs: Sequence[tuple[Path, Path]],
    same: np.ndarray,
    folds: np.ndarray,
    person_of: Callable[[Path], str],
    name: str | None = None,
) -> PairSet:
    """The set of these pairs of files; ``person_of`` is believed if it agrees with ``same``."""
    if not pairs:
        raise UserError(f"{path} lists no pairs")
    files: dict[Path, int] = {}
    index = np.array([[files.setdefault(p, len(files)) for p in pair] for pair in pairs], np.int64)
    known: dict[Path, dict[str, Path]] = {}
    paths = [_existing(p, known) for p in files]
    missing = [p for p in paths if not os.path.isfile(p)]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(paths)} images that {path} lists are missing, "
            f"the first is {missing[0]}: is {root} the right image folder?"
        )
    names, labels = np.unique([one_name(person_of(p)) for p in files], return_inverse=True)
    people = labels.astype(np.int64)
    agrees = np.array_equal(people[index[:, 0]] == people[index[:, 1]], same)
    return PairSet(
        name=name or path.stem,
        images=ImageFiles(paths),
        pairs=index,
        same=same,
        folds=folds,
        people=people if agrees else None,
        image_names=[str(p) for p in paths],
        class_names=names.tolist() if agrees else None,
    )


def _existing(path: Path, known: dict[Path, dict[str, Path]]) -> Path:
    """``path``, or if there is no such file the image of its name under another suffix."""
    if os.path.isfile(path):  # False, not an error, for a name that is too long
        return path
    if path.parent not in known:
        entries = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
        images = [entry for entry in entries if entry.suffix.lower() in SUFFIXES]
        known[path.parent] = {entry.stem: entry for entry in reversed(images)}
    stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
    return known[path.parent].get(stem, path)


# --- LFW's pairs.txt -----------------------------------------------------------------------------


def _is_count(fields: list[str]) -> bool:
    """pairs.txt opens with "folds pairs", or "pairs" in View 1."""
    return len(fields) <= 2 and all(map(_is_number, fields))


def _is_lfw(fields: list[str]) -> bool:
    numbers = fields[1:] if len(fields) == 3 else fields[1::2]
    return len(fields) in (3, 4) and all(map(_is_number, numbers))


def _parse_lfw(
    path: Path, rows: list[_Row]
) -> tuple[list[tuple[tuple[str, int], tuple[str, int]]], np.ndarray, np.ndarray]:
    """Pairs of (person, number), whether they show one person, and their folds."""
    header = [int(field) for field in rows[0][1]] if _is_count(rows[0][1]) else []
    entries, same = [], []
    for number, fields in rows[1:] if header or _is_header(rows[0][1]) else rows:
        if not _is_lfw(fields):
            raise UserError(f"{path} line {number}: expected 'name n1 n2' or 'name1 n1 name2 n2'")
        one, other = (fields[0], fields[1]), (fields[-2] if len(fields) == 4 else fields[0])
        entries.append(((one[0], int(one[1])), (other, int(fields[-1]))))
        same.append(one[0] == other)
    per_fold = 2 * header[-1] if header else 0
    count = header[0] if len(header) == 2 else 1
    if header and len(entries) != count * per_fold:
        raise UserError(
            f"{path} announces {count * per_fold} pairs in its first line and has {len(entries)}"
        )
    folds = np.arange(count).repeat(per_fold) if count > 1 else consecutive_folds(len(entries))
    return entries, np.array(same), folds


def _read_lfw(path: Path, rows: list[_Row], root: Path) -> PairSet:
    entries, same, folds = _parse_lfw(path, rows)

    def file(person: str, number: int) -> Path:
        return root / person / f"{person}_{number:04d}.jpg"

    pairs = [(file(*one), file(*other)) for one, other in entries]
    return _pair_set(path, root, pairs, same, folds, lambda file: file.parent.name)


# --- lists of paths ------------------------------------------------------------------------------


def _verdict(field: str) -> bool | None:
    word = field.lower()
    return True if word in _SAME else False if word in _DIFFERENT else None


def _columns(path: Path, rows: list[_Row]) -> tuple[list[_Row], tuple[int, int, int]]:
    """The rows of pairs, and the columns of the verdict and of the two paths."""
    header = [field.lower() for field in rows[0][1]]
    if _is_header(header) and not any(_verdict(field) is not None for field in rows[0][1]):
        verdicts = [i for i, field in enumerate(header) if field in _VERDICT_COLUMNS]
        paths = [i for i, field in enumerate(header) if _PATH_COLUMN.search(field)]
        paths = paths if len(paths) == 2 else [i for i in range(len(header)) if i not in verdicts]
        if len(rows) > 1 and len(verdicts) == 1 and len(paths) == 2:
            return rows[1:], (verdicts[0], paths[0], paths[1])
        rows = rows[1:] or rows
    whole = [fields for _, fields in rows if len(fields) == 3]
    first, last = (sum(_verdict(fields[i]) is not None for fields in whole) for i in (0, 2))
    return rows, (0, 1, 2) if first >= last else (2, 0, 1)


def _read_pairs(path: Path, rows: list[_Row], root: Path) -> PairSet:
    rows, (verdict, one, other) = _columns(path, rows)
    width = max(3, 1 + max(verdict, one, other))
    pairs, same = [], []
    for number, fields in rows:
        decided = _verdict(fields[verdict]) if len(fields) >= width else None
        if decided is None or (width == 3 and len(fields) != 3):
            raise UserError(
                f"{path} line {number}: expected 'label path path' or 'path path label' with label "
                "1 or 0"
            )
        same.append(decided)
        pairs.append((root / fields[one], root / fields[other]))
    # root/person/image is the usual layout.
    folds = consecutive_folds(len(pairs))
    return _pair_set(path, root, pairs, np.array(same), folds, lambda file: str(file.parent))


def _read_two_lines(path: Path, rows: list[_Row], root: Path) -> PairSet:
    """CALFW's and CPLFW's list: 0 marks an impostor pair; a genuine one has 1, or its fold."""
    if len(rows) % 2:
        raise UserError(f"{path} has {len(rows)} lines: expected two a pair")
    pairs, marks = [], []
    for (number, one), (_, other) in zip(rows[::2], rows[1::2], strict=True):
        fields = [*one, *other]
        if len(fields) != 4 or not _is_number(fields[1]) or fields[1] != fields[3]:
            raise UserError(f"{path} line {number}: expected two lines 'image label', labels equal")
        if int(fields[1]) > FOLDS:
            raise UserError(
                f"{path} line {number}: the label of a pair is 0, 1 or its fold up to {FOLDS}, not "
                f"{fields[1]}; a list of images and people is no verification set"
            )
        marks.append(int(fields[1]))
        pairs.append((root / fields[0], root / fields[2]))
    label = np.array(marks)
    # The genuine pairs may all stand before the others: each kind is split for itself.
    folds = np.empty(len(label), np.int64)
    for kind in (label > 0, label == 0):
        folds[kind] = consecutive_folds(int(kind.sum()))
    if label.max() > 1:
        folds[label > 0] = label[label > 0] - 1
    return _pair_set(
        path, root, pairs, label > 0, folds, lambda file: re.sub(r"_\d+$", "", file.stem)
    )


# --- CFP -----------------------------------------------------------------------------------------


def read_cfp(root: str | Path, protocol: str) -> PairSet:
    """Read CFP in its authors' layout.

    ``root/Protocol/Pair_list_F.txt`` and ``Pair_list_P.txt`` number the frontal and the profile
    images by ``number path`` lines, paths relative to ``Protocol``;
    ``root/Protocol/Split/FP/01/same.txt`` to ``10/diff.txt`` hold the folds, a line
    ``number,number`` a pair.

    Args:
        root: the folder with ``Protocol`` and ``Data``.
        protocol: "FF" (frontal against frontal) or "FP" (frontal against profile).

    Raises:
        UserError: a file is missing or says something else.
    """
    folder = Path(root) / "Protocol"
    frontal = _cfp_images(folder / "Pair_list_F.txt")
    second = frontal if protocol == "FF" else _cfp_images(folder / "Pair_list_P.txt")
    split = folder / "Split" / protocol
    folds_at = sorted(p for p in split.iterdir() if p.is_dir()) if split.is_dir() else []
    if len(folds_at) < 2:
        raise UserError(f"{split} holds {len(folds_at)} folds: expected the folders 01 to 10")
    pairs, same, folds = [], [], []
    for fold, place in enumerate(folds_at):
        for name in ("same.txt", "diff.txt"):
            for number, fields in _rows(place / name, "CFP's list of 'number,number'"):
                if len(fields) != 2 or fields[0] not in frontal or fields[1] not in second:
                    raise UserError(
                        f"{place / name} line {number}: expected two numbers of the pair lists"
                    )
                pairs.append((frontal[fields[0]], second[fields[1]]))
                same.append(name == "same.txt")
                folds.append(fold)
    # Data/Images/PERSON/frontal/01.jpg
    return _pair_set(
        split,
        Path(root),
        pairs,
        np.array(same),
        np.array(folds, np.int64),
        lambda file: str(file.parent.parent),
        name=f"cfp_{protocol.lower()}",
    )


def _cfp_images(path: Path) -> dict[str, Path]:
    found = {}
    for number, line in read_lines(path, "CFP's list of 'number path'"):
        fields = line.split(maxsplit=1)
        if len(fields) != 2 or not fields[0].isdecimal():
            raise UserError(f"{path} line {number}: expected 'number path'")
        found[fields[0]] = Path(os.path.normpath(path.parent / fields[1]))
    return found
