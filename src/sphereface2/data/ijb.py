"""IJB-B and IJB-C in the layout of their meta files.

A template is a set of images of one person, some of them frames of the same video. Per set ``x``
(``ijbb`` or ``ijbc``): ``x_face_tid_mid.txt`` says which template and medium each image belongs to,
``x_name_5pts_score.txt`` where its landmarks are, ``x_template_pair_label.txt`` which templates are
compared (1:1), and the gallery and probe CSVs whom they show (1:N).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sphereface2.errors import UserError
from sphereface2.images import read_image


@dataclass(frozen=True)
class People:
    """Templates and whom they show, a gallery's or the probes'.

    Attributes:
        name: "G1", "G2" or "probes".
        templates: int64 (M,), rows of the set's templates, each once.
        people: int64 (M,), subject ids.
    """

    name: str
    templates: np.ndarray
    people: np.ndarray


@dataclass(frozen=True)
class TemplateSet:
    """N images in T templates, pairs of templates, galleries and probes.

    Attributes:
        name: "ijbb" or "ijbc".
        folder: where the images are.
        names: N file names.
        landmarks: float32 (N, 5, 2), pixels of the image, in the template's order.
        scores: float32 (N,), the detector's confidence in each face.
        template: int64 (N,), the row of each image's template, 0 to T-1.
        media: int64 (N,), the medium (photograph or video) of each image.
        template_ids: int64 (T,), ascending.
        pairs: int32 (P, 2), rows of templates, or None without the 1:1 list.
        same: bool (P,), or None.
        galleries: G1 and G2; empty without the 1:N lists.
        probes: those searched in each gallery, or None.
        notes: what is left out, and why.
    """

    name: str
    folder: Path
    names: list[str]
    landmarks: np.ndarray
    scores: np.ndarray
    template: np.ndarray
    media: np.ndarray
    template_ids: np.ndarray
    pairs: np.ndarray | None
    same: np.ndarray | None
    galleries: list[People]
    probes: People | None
    notes: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def image(self, index: int) -> np.ndarray:
        """Image ``index`` as it is: uint8 RGB (H, W, 3)."""
        return read_image(self.folder / self.names[index])


def load(name: str, root: str | Path) -> TemplateSet:
    """Read IJB-B or IJB-C.

    The meta files may lie in ``meta``, in ``protocols`` or beside the images' folder
    ``loose_crop``, under ``root`` or under ``root/IJBB`` or ``root/IJBC``. One of the two tasks may
    be absent: 1:1 needs the list of pairs, 1:N both galleries and the probes.

    Args:
        name: "ijbb" or "ijbc".
        root: the set's folder or the one above it.

    Raises:
        UserError: files are missing (all that were looked for are named), damaged, or disagree.
    """
    files, notes = _find(name, Path(root))
    faces = _table(files.faces, {"name": "string", "template": "int64", "media": "int64"})
    columns = {"name": "string", **{f"p{i}": "float32" for i in range(10)}, "score": "float32"}
    located = _table(files.points, columns)
    names = faces["name"]
    numbers = np.stack([located[column] for column in columns if column != "name"], axis=1)
    bad = np.flatnonzero(~np.isfinite(numbers).all(axis=1))
    if len(bad):
        raise UserError(
            f"line {bad[0] + 1} of {files.points} is damaged: a landmark or the score of "
            f"{names[bad[0]]} is not a finite number"
        )
    if names != located["name"]:
        raise UserError(
            f"{files.faces} and {files.points} do not list the same images in the same order"
        )
    template_ids, template = np.unique(faces["template"], return_inverse=True)

    def rows(ids: np.ndarray, path: Path) -> np.ndarray:
        at = np.minimum(np.searchsorted(template_ids, ids), len(template_ids) - 1)
        unknown = template_ids[at] != ids
        if unknown.any():
            raise UserError(
                f"{path} names template {np.asarray(ids)[unknown][0]}, "
                f"of which {files.faces} has no image"
            )
        return at

    compared = same = None
    if files.pairs is not None:
        compared, same = _pairs(files.pairs, rows)
    shown = [_people(path, rows) for path in files.identification]
    return TemplateSet(
        name=name,
        folder=files.images,
        names=names,
        landmarks=numbers[:, :10].reshape(-1, 5, 2),
        scores=located["score"],
        template=template,
        media=faces["media"],
        template_ids=template_ids,
        pairs=compared,
        same=same,
        galleries=[People(f"G{i}", *who) for i, who in enumerate(shown[:2], 1)],
        probes=People("probes", *shown[2]) if shown else None,
        notes=notes,
    )


class _Files(NamedTuple):
    """Where a set's files are; None or nothing for a task whose files are absent."""

    faces: Path
    points: Path
    images: Path
    pairs: Path | None
    identification: list[Path]


def _find(name: str, root: Path) -> tuple[_Files, list[str]]:
    """The files of a set, and notes on what is absent."""
    bases = [root, root / name.upper()]
    metas = [base / folder for base in bases for folder in ("meta", "", "protocols")]
    faces_name, points_name = f"{name}_face_tid_mid.txt", f"{name}_name_5pts_score.txt"
    meta = next((m for m in metas if (m / faces_name).is_file()), None)
    if meta is None:
        raise UserError(
            f"suite {name} is not under {root}: looked for "
            + ", ".join(str(m / faces_name) for m in metas)
        )
    base = meta.parent if meta.name in ("meta", "protocols") and meta not in bases else meta
    folder, points = base / "loose_crop", meta / points_name
    pairs = meta / f"{name}_template_pair_label.txt"
    # IJB-B's lists are found under either pair of names.
    galleries = [
        next((p for p in both if p.is_file()), both[0])
        for both in (
            [meta / f"{name}_1N_gallery_{letter}{n}.csv" for letter in "GS"] for n in (1, 2)
        )
    ]
    probes = meta / f"{name}_1N_probe_mixed.csv"
    identification = [*galleries, probes]
    lacking = [p for p in identification if not p.is_file()]
    missing = [p for p in (points, folder) if not p.exists()]
    if not pairs.is_file() and lacking:
        missing += [pairs, *lacking]
    if missing:
        found = [p for p in (meta / faces_name, points, folder, pairs, *identification)]
        raise UserError(
            f"suite {name} is incomplete under {root}: looked for "
            + ", ".join(f"{p}{'' if p in missing else ' (found)'}" for p in found)
        )
    notes = []
    if not pairs.is_file():
        notes.append(f"no 1:1 figures: there is no {pairs}")
    if lacking:
        notes.append("no 1:N figures: there is no " + ", no ".join(map(str, lacking)))
    return _Files(
        meta / faces_name,
        points,
        folder,
        pairs if pairs.is_file() else None,
        [] if lacking else identification,
    ), notes


def _reader(path: Path, columns: dict[str, str], header: bool = False) -> Any:
    """A pyarrow reader that parses a file in blocks, whatever separates its columns.

    With a header, ``columns`` are some of those that it names.
    """
    import pyarrow as pa
    from pyarrow import csv

    with path.open("rb") as file:
        first = file.readline()
    delimiter = next((d for d in ("\t", ",") if d.encode() in first), " ")
    return csv.open_csv(
        path,
        read_options=csv.ReadOptions(
            block_size=1 << 22, column_names=None if header else list(columns)
        ),
        parse_options=csv.ParseOptions(delimiter=delimiter),
        convert_options=csv.ConvertOptions(
            column_types={c: pa.type_for_alias(t) for c, t in columns.items()},
            include_columns=list(columns) if header else None,
        ),
    )


def _table(path: Path, columns: dict[str, str], header: bool = False) -> dict[str, Any]:
    """The columns of a file: strings as a list, numbers as arrays."""
    import pyarrow as pa

    try:
        table = _reader(path, columns, header).read_all()
    except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError) as error:
        wanted = " ".join(columns)
        raise UserError(f"{path} is damaged, its columns are {wanted}: {error}") from error
    for name in columns:
        if table[name].null_count:
            raise UserError(f"{path} is damaged: its column {name} has empty entries")
    return {
        c: table[c].to_pylist() if t == "string" else table[c].to_numpy()
        for c, t in columns.items()
    }


def _pairs(path: Path, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """The pairs of templates, block by block: the file may hold tens of millions."""
    import pyarrow as pa

    pairs, same = [], []
    try:
        for batch in _reader(path, {"t1": "int64", "t2": "int64", "same": "int64"}):
            if any(column.null_count for column in batch.columns):
                raise UserError(f"{path} is damaged: it has empty entries")
            t1, t2, label = (column.to_numpy() for column in batch.columns)
            if not np.isin(label, (0, 1)).all():
                raise UserError(f"{path} has a label that is neither 0 nor 1")
            pairs.append(np.stack([rows(t1, path), rows(t2, path)], axis=1).astype(np.int32))
            same.append(label == 1)
    except pa.ArrowInvalid as error:
        raise UserError(f"{path} is damaged, its columns are t1 t2 same: {error}") from error
    return np.concatenate(pairs), np.concatenate(same)


def _people(path: Path, rows: Any) -> tuple[np.ndarray, np.ndarray]:
    """A gallery's or the probes' templates: a line of the CSV is an image, a template has many."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = [column.strip() for column in file.readline().split(",")]
    wanted = [c for key in ("TEMPLATE_ID", "SUBJECT_ID") for c in header if c.upper() == key]
    if len(wanted) != 2:
        raise UserError(f"{path} has no columns TEMPLATE_ID and SUBJECT_ID in its first line")
    found = _table(path, dict.fromkeys(wanted, "int64"), header=True)
    both = np.unique(np.stack([found[c] for c in wanted], axis=1), axis=0)
    doubled = both[1:, 0] == both[:-1, 0]
    if doubled.any():
        raise UserError(f"{path} gives template {both[1:, 0][doubled][0]} to two people")
    return rows(both[:, 0], path), both[:, 1]
