"""``sphereface2 data fetch``: a training set where there is none, LFW or drawn faces."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

import cv2

from sphereface2 import console
from sphereface2.data import pairbin, synthetic
from sphereface2.data.locate import DRAWN, write_about
from sphereface2.data.recordio import RecordIOWriter
from sphereface2.errors import UserError, counted
from sphereface2.files import atomic_folder, check_folder, read_text, takes_paths
from sphereface2.images import encode_image, read_image

_PEOPLE, _IMAGES, _PAIRS = 1000, 20, 100

#: Rows and columns of the 250×250 funneled images that hold about what an aligned crop holds.
_CROP = slice(46, 192), slice(52, 198)
_FETCH = """
import socket, sys
socket.setdefaulttimeout(5)
from sklearn.datasets import fetch_lfw_people
fetch_lfw_people(data_home=sys.argv[1], min_faces_per_person=500, n_retries=1, delay=0.1)
"""


@takes_paths
def fetch(what: Literal["lfw", "drawn"], target: Path, /, *, seed: int | None = None) -> Path:
    """Fetch or draw a training set and the verification set that goes with it.

    LFW is fetched by scikit-learn, about 230 MB, which stay beside the set. Nobody tested is
    trained on: the training set is everybody outside View 1's test pairs, and the verification set
    is those 1,000 pairs; figures are not the usual ones over View 2's 6,000 pairs.

    Args:
        what: "lfw", photographs of real people, or "drawn", drawings that show that a pipeline
            works and nothing about real faces.
        target: The new folder of the set.
        seed: Of the drawn faces; default: 0.

    Returns:
        ``target``.

    Raises:
        UserError: ``target`` exists, ``seed`` is given for LFW, LFW cannot be had, or there is no
            such set.
    """
    if target.exists():
        raise UserError(f"{target} exists already; name a new folder")
    if seed is not None and what != "drawn":
        raise UserError(f"--seed is that of drawn faces: fetch {what} without it")
    check_folder(target)
    if what == "lfw":
        home = _download_lfw(target.parent / "scikit_learn")
        people, images = pack_lfw(home / "lfw_funneled", home / "pairsDevTest.txt", target)
        console.show(f"LFW: {counted(images, 'image')} of {counted(people, 'person')} in {target}")
    elif what == "drawn":
        synthetic.write(
            target,
            people=_PEOPLE,
            images_per_person=_IMAGES,
            seed=seed or 0,
            pairs_per_fold=_PAIRS,
        )
        console.show(f"{_PEOPLE * _IMAGES:,} {DRAWN} images of {_PEOPLE:,} people in {target}")
    else:
        raise UserError(f"cannot fetch {what!r}; choose lfw or drawn")
    return target


def _download_lfw(home: Path, patience: float = 15.0) -> Path:
    """scikit-learn's copy of LFW under ``home``, downloaded unless it is there.

    A process of its own does it, because a resolver that does not answer can only be killed. If
    the first small file is not there after ``patience`` seconds, there is no network.
    """
    lfw = home / "lfw_home"
    made = [folder for folder in (home, *home.parents) if not folder.exists()]
    home.mkdir(parents=True, exist_ok=True)
    console.note("fetching LFW (about 230 MB)…")
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
                raise _no_lfw(f"no answer after {patience:.0f} s")
            time.sleep(0.1)
    finally:
        child.kill()
        _, complaint = child.communicate()
        for folder in (lfw, home, *made[1:]):
            with suppress(OSError):  # it holds what was fetched
                folder.rmdir()
    if child.returncode != 0:
        last = (complaint.strip().splitlines() or ["no reason given"])[-1]
        raise _no_lfw(last)
    return lfw


def _no_lfw(why: str) -> UserError:
    return UserError(
        f"LFW could not be fetched: {why}; try again with a network, or fetch drawn faces, which "
        "need none"
    )


def pack_lfw(images: Path, test_pairs: Path, target: Path) -> tuple[int, int]:
    """Crop and pack LFW into ``target`` so that nobody tested is trained on.

    Args:
        images: scikit-learn's folder of person folders.
        test_pairs: pairsDevTest.txt: a count n, then n genuine and n impostor pairs. Everybody
            named in it is left out of the training set; its pairs become ``lfw_view1.bin`` in ten
            folds of n/10 genuine and n/10 impostor pairs, with ``lfw_view1_pairs.txt``.
        target: the new folder.

    Returns:
        People and images of the training set.
    """
    lines = read_text(test_pairs).splitlines()
    count = int(lines[0]) if lines and lines[0].isdecimal() else 0
    pairs = [line.split("\t") for line in lines[1:] if line.strip()]
    genuine, impostor = pairs[:count], pairs[count:]
    if len(genuine) != count or len(impostor) != count or count < 10:
        raise UserError(f"{test_pairs} is not LFW's list: expected {count} + {count} pairs")
    tested = {pair[0] for pair in pairs} | {pair[2] for pair in impostor}
    folds, per_fold = 10, count // 10

    def crop(person: str, file: Path | None = None, number: str = "") -> bytes:
        image = read_image(file or images / person / f"{person}_{int(number):04d}.jpg")
        face = cv2.resize(image[_CROP], (synthetic.SIZE,) * 2, interpolation=cv2.INTER_AREA)
        return encode_image(face, ".jpg", 95)

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
            for name, a, b in genuine[part]:
                faces += [crop(name, number=a), crop(name, number=b)]
            for name, a, other, b in impostor[part]:
                faces += [crop(name, number=a), crop(other, number=b)]
            verdicts += [True] * per_fold + [False] * per_fold
            names += ["\t".join(pair) for pair in genuine[part] + impostor[part]]
        pairbin.write(temporary / "lfw_view1.bin", faces, verdicts)
        (temporary / "lfw_view1_pairs.txt").write_text("\n".join(names) + "\n", encoding="utf-8")
        write_about(
            temporary,
            "LFW without the people of View 1's test pairs; lfw_view1 is those 1,000 pairs, not "
            "the usual 6,000 of View 2",
        )
    return label, total
