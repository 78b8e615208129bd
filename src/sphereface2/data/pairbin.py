"""InsightFace's ``.bin``: a pickle of ``(images, verdicts)``, two images and a verdict a pair."""

from __future__ import annotations

import pickle
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from sphereface2.data import unpickle
from sphereface2.data.pairlist import read_people
from sphereface2.data.pairs import Image, PairSet, consecutive_folds, content
from sphereface2.errors import UserError
from sphereface2.files import atomic_write

_VERDICTS: Final = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def read(path: Path, names: Path | None = None) -> PairSet:
    """Read a ``.bin``; nothing in it is run.

    Images are encoded bytes, as bytes, bytearrays or uint8 arrays (n,), (n, 1) or (1, n), or pixels
    (H, W, 3) and (H, W); verdicts are truth values, or numbers and words that stand for them. Both
    may be lists or arrays.

    Args:
        path: the file.
        names: the ``pairs.txt`` in whose order it was written, which says who the people are.

    Raises:
        UserError: the file holds more than data, or something else, or disagrees with ``names``.
    """
    try:
        stored = unpickle.loads(path.read_bytes())
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is not a plain verification set and was not read: it holds {error}"
        ) from error
    except Exception as error:  # a damaged pickle can fail in any operation of the machine
        raise UserError(f"{path} is damaged: {type(error).__name__}: {error!s:.100}") from error
    if not (isinstance(stored, list) and len(stored) == 2):
        raise UserError(f"{path} is not a verification set: expected (images, same or not)")
    images, verdicts = stored
    if not all(isinstance(p, list) or (isinstance(p, np.ndarray) and p.ndim) for p in stored):
        raise UserError(f"{path} is not a verification set: expected two lists")
    if len(images) != 2 * len(verdicts) or len(verdicts) == 0:
        raise UserError(
            f"{path} has {len(images)} images for {len(verdicts)} pairs: expected two a pair"
        )
    flat = verdicts.ravel().tolist() if isinstance(verdicts, np.ndarray) else verdicts
    decided = [_verdict(verdict) for verdict in flat]
    if len(flat) != len(verdicts) or None in decided:
        wrong = decided.index(None) if None in decided else 0
        raise UserError(f"{path}: the verdict of pair {wrong} is neither true nor false")
    same = np.array(decided, bool)
    who, folds = read_people(names, path, same) if names is not None else (None, None)

    distinct, index = _distinct(path, images, who)
    people = class_names = None
    if who is not None:
        people = np.empty(len(distinct), np.int64)
        named, people[index] = np.unique(who, return_inverse=True)
        class_names = named.tolist()
    return PairSet(
        name=path.stem,
        images=distinct,
        pairs=index.reshape(-1, 2),
        same=same,
        folds=consecutive_folds(len(same)) if folds is None else folds,
        people=people,
        class_names=class_names,
    )


def _distinct(
    path: Path, images: Sequence[Any], who: list[str] | None
) -> tuple[list[Image], np.ndarray]:
    """The images, each once for a person, and the place of each of the 2P among them."""
    seen: dict[Hashable, int] = {}
    distinct: list[Image] = []
    index = np.empty(len(images), np.int64)
    for i, item in enumerate(images):
        image = _image(item)
        if image is None:
            raise UserError(
                f"{path}: image {i % 2} of pair {i // 2} is neither bytes nor a uint8 array of an "
                "image"
            )
        key = (who[i] if who else None, content(image))
        if key not in seen:
            seen[key] = len(distinct)
            distinct.append(image)
        index[i] = seen[key]
    return distinct, index


def write(path: Path, images: Sequence[bytes | np.ndarray], same: Sequence[bool]) -> None:
    """Write a ``.bin`` of 2P images and P verdicts; an image given twice is stored once."""
    atomic_write(path, pickle.dumps((list(images), list(same)), protocol=4))


def _verdict(value: Any) -> bool | None:
    if isinstance(value, bytes | str):
        text = value.decode("latin1") if isinstance(value, bytes) else value
        return _VERDICTS.get(text.strip().lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None


def _image(item: Any) -> Image | None:
    if isinstance(item, bytes | bytearray):
        return bytes(item)
    if isinstance(item, np.ndarray) and item.dtype == np.uint8:
        if item.ndim == 1 or (item.ndim == 2 and 1 in item.shape):  # encoded, as an encoder gives
            return item.tobytes()
        if item.ndim == 3 and item.shape[2] == 1:
            item = item[..., 0]
        if item.ndim == 2:
            return np.repeat(item[..., None], 3, axis=2)
        if item.ndim == 3 and item.shape[2] == 3:
            return np.ascontiguousarray(item)
    return None
