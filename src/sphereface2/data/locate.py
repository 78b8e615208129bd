"""What to train on when nothing is named: the first data set found, and said aloud."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2

from sphereface2.data import synthetic
from sphereface2.data.recordio import RecordIOWriter
from sphereface2.data.sources import LIST_SUFFIXES
from sphereface2.errors import UserError
from sphereface2.files import atomic_folder
from sphereface2.images import SUFFIXES

ENVIRONMENT = "SPHEREFACE2_DATA"
_SYNTHETIC_PEOPLE, _SYNTHETIC_IMAGES, _SYNTHETIC_PAIRS = 1000, 20, 100


@dataclass(frozen=True)
class TrainingData:
    """A training set and the verification sets that go with it.

    ``kind`` says how it was found, ``note`` says so in one line for the user; ``pairs`` are
    ``.bin`` files and ``names`` is the pairs.txt of the first of them, where there is one.
    Figures measured on ``is_synthetic`` data say nothing about real faces.
    """

    kind: Literal["given", "environment", "shared", "lfw", "synthetic"]
    train: Path
    pairs: list[Path]
    names: Path | None
    note: str
    is_synthetic: bool

    @staticmethod
    def names_for(pairs: Path) -> Path | None:
        """The list that names the people of ``X.bin``: ``X_pairs.txt`` beside it, if it exists."""
        names = pairs.with_name(f"{pairs.stem}_pairs.txt")
        return names if pairs.suffix == ".bin" and names.exists() else None


def locate(*, cache: str | Path | None = None, network: bool = True) -> TrainingData:
    """Find training data; the first of these wins.

    1. The folder that ``$SPHEREFACE2_DATA`` names: a training set, or a folder that holds one,
       and ``.bin`` files beside it. A UserError if there is none: what was asked for is not
       silently replaced.
    2. ``../shared/data`` beside the repository of the working directory.
    3. LFW, fetched by scikit-learn, if ``network``. To keep training and test people apart it is
       trained on everybody outside View 1's test pairs and tested on those 1,000 pairs; the
       figure is not the usual one over View 2's 6,000 pairs, whose people are nearly all of LFW.
    4. Synthetic faces, drawn here.

    What is fetched or drawn is kept under ``cache`` (default ``runs/data`` in the repository).
    """
    present = find()
    if present is not None:
        return present
    cache = Path(cache) if cache is not None else _repository() / "runs" / "data"
    reason = "the network was not tried"
    if network or (cache / "lfw").exists():
        try:
            return _lfw(cache)
        except _UnavailableError as error:
            reason = str(error)
    return _synthetic(cache, reason)


def find() -> TrainingData | None:
    """What lies on this machine: the first two places of ``locate``, or None."""
    named = os.environ.get(ENVIRONMENT)
    if named:
        return _found(Path(named).expanduser(), "environment", f"${ENVIRONMENT}")
    shared = _repository().parent / "shared" / "data"
    if shared.is_dir() and _training_set(shared) is not None:
        return _found(shared, "shared", "found beside the repository")
    return None


def _repository() -> Path:
    """The folder of the repository around the working directory; else the working directory."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / ".git").exists():
            return folder
    return here


# -- folders -----------------------------------------------------------------------------------


def _found(folder: Path, kind: Literal["environment", "shared"], how: str) -> TrainingData:
    if not folder.exists():
        raise UserError(f"${ENVIRONMENT} is {folder}, which does not exist")
    train = folder if folder.is_file() else _training_set(folder)
    if train is None:
        raise UserError(
            f"{folder} ({how}) holds no training set: expected train.rec, .tar shards, a list "
            "file or one folder a person"
        )
    places = dict.fromkeys((folder if folder.is_dir() else folder.parent, train))
    found = [path for place in places if place.is_dir() for path in sorted(place.glob("*.bin"))]
    pairs = sorted(found, key=lambda path: (path.name != "lfw.bin", found.index(path)))
    names = TrainingData.names_for(pairs[0]) if pairs else None
    sets = ", ".join(path.name for path in pairs) or "no verification set"
    return TrainingData(kind, train, pairs, names, f"{train} ({how}), with {sets}", False)


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
    nested = [
        path for path in inner if any(_has_images(below) for below in path.iterdir())
    ]  # fmt: skip
    return nested[0] if len(nested) == 1 else None


def _is_packed(folder: Path) -> bool:
    return any(path.suffix in (".rec", ".tar") for path in folder.iterdir())


def _has_images(folder: Path) -> bool:
    return folder.is_dir() and any(path.suffix.lower() in SUFFIXES for path in folder.iterdir())


# -- LFW ---------------------------------------------------------------------------------------


class _UnavailableError(Exception):
    """LFW cannot be had; the message says why."""


#: Rows and columns of the 250×250 funneled pictures that hold about what an aligned crop holds.
_CROP = slice(46, 192), slice(52, 198)
_FETCH = """
import socket, sys
socket.setdefaulttimeout(5)
from sklearn.datasets import fetch_lfw_people
fetch_lfw_people(data_home=sys.argv[1], min_faces_per_person=500, n_retries=1, delay=0.1)
"""


def _lfw(cache: Path) -> TrainingData:
    target = cache / "lfw"
    if not target.exists():
        home = _fetch_lfw(cache / "scikit_learn")
        people, images = pack_lfw(
            home / "lfw_funneled", home / "pairsDevTest.txt", target
        )  # fmt: skip
        print(f"LFW: packed {images} images of {people} people in {target}", file=sys.stderr)
    pairs = target / "lfw_view1.bin"
    note = (
        f"LFW ({target}), trained on the people outside View 1's test pairs; lfw_view1 is those "
        "1,000 pairs, not the usual 6,000 of View 2"
    )
    return TrainingData("lfw", target, [pairs], TrainingData.names_for(pairs), note, False)


def _fetch_lfw(home: Path, patience: float = 15.0) -> Path:
    """scikit-learn's copy of LFW under ``home``, downloaded unless it is there.

    A process of its own does it, because a resolver that does not answer can only be killed. If
    the first small file is not there after ``patience`` seconds, there is no network.
    """
    lfw = home / "lfw_home"
    home.mkdir(parents=True, exist_ok=True)
    print("no data set found: trying to fetch LFW (about 230 MB)…", file=sys.stderr)
    child = subprocess.Popen(
        [sys.executable, "-c", _FETCH, str(home)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + patience
    try:
        while child.poll() is None:
            if not (lfw / "pairsDevTrain.txt").exists() and time.monotonic() > deadline:
                raise _UnavailableError(
                    f"LFW could not be fetched: no answer after {patience:.0f} s"
                )
            time.sleep(0.1)
    finally:
        child.kill()
        _, complaint = child.communicate()
    if child.returncode != 0:
        last = (complaint.strip().splitlines() or ["no reason given"])[-1]
        raise _UnavailableError(f"LFW could not be fetched: {last}")
    return lfw


def pack_lfw(images: Path, test_pairs: Path, target: Path) -> tuple[int, int]:
    """Crop and pack LFW into ``target`` so that nobody tested is trained on.

    ``images`` is scikit-learn's folder of person folders, ``test_pairs`` is pairsDevTest.txt: a
    count n, then n matched and n mismatched pairs. Everybody named in it is left out of the
    training set; its pairs become ``lfw_view1.bin`` in ten folds of n/10 matched and n/10
    mismatched pairs, with ``lfw_view1_pairs.txt``. Returns people and images of the training set.
    """
    lines = test_pairs.read_text().splitlines()
    count = int(lines[0])
    pairs = [line.split("\t") for line in lines[1:] if line.strip()]
    matched, mismatched = pairs[:count], pairs[count:]
    if len(matched) != count or len(mismatched) != count or count < 10:
        raise UserError(f"{test_pairs} is not LFW's list: expected {count} + {count} pairs")
    tested = {pair[0] for pair in pairs} | {pair[2] for pair in mismatched}
    folds, per_fold = 10, count // 10

    def crop(person: str, file: Path | None = None, number: str = "") -> bytes:
        path = file or images / person / f"{person}_{int(number):04d}.jpg"
        picture = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if picture is None:
            raise UserError(f"{path} cannot be read; delete {images} so that it is fetched again")
        face = cv2.resize(picture[_CROP], (112, 112), interpolation=cv2.INTER_AREA)
        return cv2.imencode(".jpg", face, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()

    with atomic_folder(target) as temporary:
        label = total = 0
        with RecordIOWriter(temporary) as writer:
            for folder in sorted(path for path in images.iterdir() if path.is_dir()):
                files = sorted(folder.glob("*.jpg"))
                if folder.name in tested or not files:
                    continue
                for file in files:
                    writer.add(label, crop(folder.name, file))
                label, total = label + 1, total + len(files)
        faces: list[bytes] = []
        verdicts: list[bool] = []
        names = [f"{folds}\t{per_fold}"]
        for fold in range(folds):
            part = slice(fold * per_fold, (fold + 1) * per_fold)
            for name, a, b in matched[part]:
                faces += [crop(name, number=a), crop(name, number=b)]
            for name, a, other, b in mismatched[part]:
                faces += [crop(name, number=a), crop(other, number=b)]
            verdicts += [True] * per_fold + [False] * per_fold
            names += ["\t".join(pair) for pair in matched[part] + mismatched[part]]
        (temporary / "lfw_view1.bin").write_bytes(pickle.dumps((faces, verdicts), protocol=4))
        (temporary / "lfw_view1_pairs.txt").write_text("\n".join(names) + "\n")
    return label, total


# -- synthetic ---------------------------------------------------------------------------------


def _synthetic(cache: Path, reason: str) -> TrainingData:
    target = cache / f"synthetic-{_SYNTHETIC_PEOPLE}x{_SYNTHETIC_IMAGES}"
    if not target.exists():
        print(
            f"no real faces found ({reason}): drawing {_SYNTHETIC_PEOPLE * _SYNTHETIC_IMAGES} "
            f"SYNTHETIC ones in {target}",
            file=sys.stderr,
        )
        synthetic.write(
            target,
            people=_SYNTHETIC_PEOPLE,
            images_per_person=_SYNTHETIC_IMAGES,
            pairs_per_fold=_SYNTHETIC_PAIRS,
        )
    pairs = target / "synthetic.bin"
    note = (
        f"SYNTHETIC drawn faces ({target}), because {reason}: these figures say that the pipeline "
        f"works and nothing about real faces; set ${ENVIRONMENT} to train on yours"
    )
    return TrainingData("synthetic", target, [pairs], TrainingData.names_for(pairs), note, True)
