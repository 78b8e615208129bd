"""Where training images come from: one protocol over folders, lists, RecordIO and tar shards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from sphereface2.errors import UserError

LIST_SUFFIXES = frozenset({".txt", ".lst", ".csv", ".tsv"})
_TRAIN_LISTS = frozenset(f"train{suffix}" for suffix in LIST_SUFFIXES)


@runtime_checkable
class Source(Protocol):
    """A labelled set of encoded images with random access.

    A source pickles (workers reopen its files) and its order is stable: image ``i`` is the same
    image in every process and every run, as long as the files are.
    """

    #: int64 (N,): the person of each image, in ``[0, num_classes)``.
    labels: np.ndarray
    #: One more than the largest label a head must know.
    num_classes: int
    #: The name of each person, where the format has one.
    class_names: list[str] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """The encoded bytes of image ``index``; OSError or UserError if they cannot be had."""
        ...

    def name(self, index: int) -> str:
        """What to call image ``index`` in a message."""
        ...

    def fingerprint(self) -> str:
        """sha256 over what identifies the set (names, labels, sizes), cheap to compute."""
        ...


def open_source(path: str | Path) -> Source:
    """Open the training set at ``path``, recognised by what lies there.

    ``path`` is a folder with ``train.rec``, a ``.rec`` file, a folder of tar shards or one
    ``.tar``, a list file (``.txt .lst .csv .tsv``: ``path label`` lines), a folder with one as
    ``train.txt``, or a folder of person folders. Raises UserError, naming the path, for anything
    else.
    """
    from sphereface2.data.folder import FolderSource
    from sphereface2.data.listfile import ListSource
    from sphereface2.data.recordio import RecordIOSource
    from sphereface2.data.webdataset import WebDatasetSource

    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a data set that does")
    if path.is_dir():
        if (path / "train.rec").exists():
            return RecordIOSource(path)
        entries = sorted(path.iterdir())
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
        raise UserError(
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
    raise UserError(
        f"{path} is not a training set: expected a folder, a .rec, .tar or list file "
        f"({' '.join(sorted(LIST_SUFFIXES))})"
    )


class Split(NamedTuple):
    """Image indices of a source, int64, ascending; no person is in two of them."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split_people(
    source: Source,
    validation_people: int,
    seed: int,
    *,
    test_people: int = 0,
    max_images: int | None = None,
) -> Split:
    """Set whole people aside for validation and for test.

    They are drawn among those with two images or more (a person with one image makes no genuine
    pair). The draw depends on the source's labels, the numbers and ``seed`` alone; who is a
    validation person does not depend on ``test_people``.

    With ``max_images``, the images of people set aside that have more of them than that are in none
    of the three parts: the others' places, and the people trained on, stay as they are.

    Raises:
        UserError: more people asked for than there are, or nobody left to train on.
    """
    labels = np.asarray(source.labels)
    counts = np.bincount(labels, minlength=source.num_classes)
    eligible = np.flatnonzero(counts >= 2)
    present = int((counts > 0).sum())
    aside = validation_people + test_people
    if min(validation_people, test_people) < 0:
        raise UserError(f"people set aside must be 0 or more, not {validation_people, test_people}")
    if aside > len(eligible) or (aside and aside >= present):
        raise UserError(
            f"cannot set {aside} people aside for validation and test: the set has {present} "
            f"people, {len(eligible)} of them with two images or more"
        )
    rng = np.random.default_rng(seed)
    role = np.zeros(source.num_classes, np.int8)
    asked_for = {1: validation_people, 2: test_people}
    role[rng.choice(eligible, size=validation_people, replace=False)] = 1
    role[rng.choice(eligible[role[eligible] == 0], size=test_people, replace=False)] = 2
    if max_images is not None:
        role[(role > 0) & (counts > max_images)] = -1
        if any(asked and not (role == which).any() for which, asked in asked_for.items()):
            raise UserError(
                f"nobody set aside has {max_images} images or fewer; allow more (max_images)"
            )
    of_image = role[labels]
    return Split(*(np.flatnonzero(of_image == which) for which in range(3)))


def check_labels(labels: Sequence[float] | np.ndarray, where: str | Path) -> np.ndarray:
    """Labels as int64 (N,); UserError naming the first that is no whole number in [0, 2^31)."""
    values = np.asarray(labels, dtype=np.float64)
    bad = np.flatnonzero(~((values >= 0) & (values < 2**31) & (values == np.floor(values))))
    if len(bad):
        raise UserError(
            f"{where}: label {values[bad[0]]:g} of image {int(bad[0])} is not a whole number in "
            "[0, 2^31)"
        )
    return values.astype(np.int64)


def read_names(folder: Path, num_classes: int) -> list[str] | None:
    """The people's names from ``names.txt``, one a line, if it lies in ``folder`` and fits."""
    path = folder / "names.txt"
    if not path.is_file():
        return None
    names = path.read_text(encoding="utf-8").splitlines()
    return names if len(names) == num_classes else None
