"""Opening a set on disk, recognised by what lies there."""

from __future__ import annotations

from pathlib import Path

from sphereface2.data import pairbin, pairlist
from sphereface2.data.folder import FolderSource
from sphereface2.data.listfile import LIST_SUFFIXES, ListSource
from sphereface2.data.pairs import PairSet
from sphereface2.data.recordio import RecordIOSource
from sphereface2.data.source import NoImagesError, Source
from sphereface2.data.webdataset import WebDatasetSource
from sphereface2.errors import UserError
from sphereface2.images import SUFFIXES

_TRAIN_LISTS = frozenset(f"train{suffix}" for suffix in LIST_SUFFIXES)


def open_source(path: str | Path) -> Source:
    """Open the training set at ``path``, recognised by what lies there.

    ``path`` is a folder with ``train.rec``, a ``.rec`` file, a folder of tar shards or one
    ``.tar``, a list file (``.txt .lst .csv .tsv``), a folder with one as ``train.txt``, or a folder
    of person folders.

    Raises:
        UserError: ``path`` does not exist or is something else, or the set is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a data set that does")
    if path.is_dir():
        if (path / "train.rec").exists():
            return RecordIOSource(path)
        # Not hidden ones: macOS writes ._train.rec beside train.rec on disks of other systems.
        entries = sorted(path.glob("[!.]*"))
        if any(entry.suffix == ".tar" for entry in entries):
            return WebDatasetSource(path)
        records = [entry for entry in entries if entry.suffix == ".rec"]
        if len(records) == 1:
            return RecordIOSource(records[0])
        if len(records) > 1:
            raise UserError(f"{path} holds {len(records)} .rec files; name the one to read")
        lists = [entry for entry in entries if entry.name in _TRAIN_LISTS]
        if len(lists) == 1:
            return ListSource(lists[0])
        if any(entry.is_dir() for entry in entries):
            return FolderSource(path)
        lists = [entry for entry in entries if entry.suffix.lower() in LIST_SUFFIXES]
        if len(lists) == 1:
            return ListSource(lists[0])
        raise NoImagesError(
            f"{path} holds no data set: expected train.rec, .tar shards, a list file "
            "or one folder a person"
        )
    suffix = path.suffix.lower()
    if suffix == ".rec":
        return RecordIOSource(path)
    if suffix == ".tar":
        return WebDatasetSource(path)
    if suffix in LIST_SUFFIXES:
        return ListSource(path)
    hint = ""
    if is_bin(path):
        hint = "; a .bin holds pairs, for --pairs of evaluate and calibrate"
    elif suffix in SUFFIXES:
        hint = "; give the folder that holds the image"
    raise UserError(
        f"{path} is not a set of images: expected a folder, a .rec, .tar or list file "
        f"({' '.join(sorted(LIST_SUFFIXES))}){hint}"
    )


def load_pairs(
    path: str | Path, *, images: str | Path | None = None, names: str | Path | None = None
) -> PairSet:
    """Read a verification set.

    Args:
        path: an InsightFace ``.bin``, an LFW ``pairs.txt``, a list of ``label path path`` or ``path
            path label`` lines (1 = one person), or one of ``image label`` lines, two a pair.
        images: the folder that holds the images of a text list; by default the list's own folder.
        names: for a ``.bin``, the ``pairs.txt`` in whose order it was written: it says who the
            people are, so that intervals can be bootstrapped over people.

    Raises:
        UserError: the file is missing, damaged, of no known layout, or names missing images.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(
            f"{path} is a folder, and a verification set is a file: a .bin, a pairs.txt or a list "
            "of pairs; every pair of a folder of people is --all-pairs"
        )
    if not path.is_file():
        raise UserError(
            f"there is no verification set {path}: give a .bin, a pairs.txt or a list of pairs"
        )
    with path.open("rb") as file:
        head = file.read(2)
    if is_bin(path) or head[:1] == b"\x80":
        if images is not None:
            raise UserError(f"{path} holds its own images: leave out the image folder")
        return pairbin.read(path, Path(names) if names is not None else None)
    if names is not None:
        raise UserError(
            f"names of people can be given for a .bin file only, but {path} is a text list"
        )
    return pairlist.read(path, Path(images) if images is not None else path.parent)


def is_bin(pairs: Path) -> bool:
    """Whether a verification set is named as one that packs its images is, ``X.bin``."""
    return pairs.suffix.lower() == ".bin"


def names_beside(pairs: Path) -> Path | None:
    """The list that names the people of ``X.bin``: ``X_pairs.txt`` beside it, if it exists."""
    names = pairs.with_name(f"{pairs.stem}_pairs.txt")
    return names if is_bin(pairs) and names.exists() else None
