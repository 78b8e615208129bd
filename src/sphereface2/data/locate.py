"""What to train on when nothing is named: what ``$SPHEREFACE2_DATA`` names."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sphereface2.data.listfile import LIST_SUFFIXES
from sphereface2.data.opening import names_beside
from sphereface2.errors import UserError
from sphereface2.files import read_text
from sphereface2.images import SUFFIXES

ENVIRONMENT = "SPHEREFACE2_DATA"
#: A file that says what a fetched or drawn set is; drawn ones start with the word below.
ABOUT, DRAWN = "ABOUT.txt", "SYNTHETIC"


@dataclass(frozen=True)
class TrainingData:
    """A training set and the verification sets that go with it.

    Attributes:
        kind: whether the user named it or the environment variable does.
        train: where the training set is.
        pairs: ``.bin`` files that lie with it, lfw.bin first.
        names: the pairs.txt of the first of them, or None.
        note: what it is, in one line for the user.
        is_synthetic: whether its faces are drawn: figures then say nothing about real ones.
    """

    kind: Literal["given", "environment"]
    train: Path
    pairs: list[Path]
    names: Path | None
    note: str
    is_synthetic: bool


def locate(train: str = "auto") -> TrainingData:
    """The training set at ``train``, or with ``auto`` the one that ``$SPHEREFACE2_DATA`` names.

    The variable names a training set or a folder that holds one, and ``.bin`` files beside it.

    Raises:
        UserError: the variable is not set, or there is no training set where it points.
    """
    if train != "auto":
        told = about(Path(train))
        note = f"{train}: {told}" if told else train
        return TrainingData("given", Path(train), [], None, note, told.startswith(DRAWN))
    named = os.environ.get(ENVIRONMENT)
    if not named:
        raise UserError(
            f"no training data: give --data.train PATH or set ${ENVIRONMENT} to a training set (a "
            "folder with one folder a person, a list, train.rec or .tar shards); `sphereface2 data "
            "fetch lfw runs/data/lfw` fetches LFW (230 MB), and `sphereface2 data fetch drawn "
            "runs/data/drawn` draws faces that show that everything works"
        )
    folder = Path(named).expanduser()
    if not folder.exists():
        raise UserError(
            f"${ENVIRONMENT} is {folder}, which does not exist: set it to a training set, or give "
            "--data.train PATH"
        )
    found = folder if folder.is_file() else _training_set(folder)
    if found is None:
        raise UserError(
            f"{folder} (${ENVIRONMENT}) holds no training set: expected train.rec, .tar shards, a "
            "list file or one folder a person"
        )
    places = dict.fromkeys((folder if folder.is_dir() else folder.parent, found))
    bins = [path for place in places if place.is_dir() for path in sorted(place.glob("[!.]*.bin"))]
    pairs = sorted(bins, key=lambda path: (path.name != "lfw.bin", bins.index(path)))
    sets = ", ".join(path.name for path in pairs) or "no verification set"
    told = about(found)
    note = f"{found} (${ENVIRONMENT}), with {sets}{f': {told}' if told else ''}"
    names = names_beside(pairs[0]) if pairs else None
    return TrainingData("environment", found, pairs, names, note, told.startswith(DRAWN))


def find() -> TrainingData | None:
    """What the environment variable names; None where it is not set."""
    return locate() if os.environ.get(ENVIRONMENT) else None


def about(path: Path) -> str:
    """What the file beside the set at ``path`` says of it; empty where there is none."""
    file = (path if path.is_dir() else path.parent) / ABOUT
    return read_text(file).strip() if file.is_file() else ""


def write_about(folder: Path, text: str) -> None:
    """Write where `about` finds it what a set in ``folder`` is; nothing if ``text`` is empty."""
    if text:
        (folder / ABOUT).write_text(f"{text}\n", encoding="utf-8")


def _training_set(folder: Path) -> Path | None:
    """The training set that ``folder`` is or holds, by preference for packed formats."""
    if _is_packed(folder):
        return folder
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    packed = [path for path in inner if _is_packed(path)]
    if len(packed) > 1:
        raise UserError(
            f"{folder} holds {len(packed)} training sets "
            f"({', '.join(path.name for path in packed)}); name one of them in ${ENVIRONMENT}"
        )
    if packed:
        return packed[0]
    for suffix in sorted(LIST_SUFFIXES):
        if (folder / f"train{suffix}").exists():
            return folder / f"train{suffix}"
    if any(_has_images(path) for path in inner):
        return folder
    nested = [path for path in inner if any(_has_images(below) for below in path.iterdir())]
    return nested[0] if len(nested) == 1 else None


def _is_packed(folder: Path) -> bool:
    return any(path.suffix in (".rec", ".tar") for path in folder.glob("[!.]*"))


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in SUFFIXES for path in folder.iterdir())
