"""WebDataset shards: tar files of ``key.jpg`` with ``key.cls`` or ``key.json``."""

from __future__ import annotations

import json
import tarfile
import warnings
from array import array
from pathlib import Path

import numpy as np

from sphereface2.data.source import OpenFile, check_labels, read_names
from sphereface2.errors import UserError
from sphereface2.files import digest
from sphereface2.images import SUFFIXES

_LABEL_KEYS = ("label", "cls", "class", "identity")


class WebDatasetSource:
    """One ``.tar`` or a folder of them, with random access through an index of the members.

    A sample is the members that share a path up to the first dot of the file name: an image and
    its label, either ``.cls`` (a whole number) or ``.json`` (a number, or an object with one of
    ``label cls class identity``). The tar headers are read once, when the source is opened. Samples
    without an image that can be read here, and a file without tar's mark of its end, which may have
    been cut, are warned of.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        shards = sorted(self.path.glob("[!.]*.tar")) if self.path.is_dir() else [self.path]
        if not shards:
            raise UserError(f"{self.path} holds no .tar shards")
        self._shards = [OpenFile(shard) for shard in shards]
        self._keys: list[str] = []
        where, labels = array("q"), array("d")
        for number, shard in enumerate(shards):
            for key, place, label in _samples(shard):
                self._keys.append(key)
                where.extend((number, *place))
                labels.append(label)
        if not where:
            raise UserError(f"{self.path} holds no image with a .cls or .json label")
        self._where = np.array(where).reshape(-1, 3)
        self.labels = check_labels(np.array(labels), self.path)
        self.num_classes = int(self.labels.max()) + 1
        self.class_names = read_names(
            self.path if self.path.is_dir() else self.path.parent, self.num_classes
        )

    def __len__(self) -> int:
        return len(self._keys)

    def read(self, index: int) -> bytes:
        shard, offset, size = self._where[index].tolist()
        return self._shards[shard].read(offset, size)

    def name(self, index: int) -> str:
        return f"{self._shards[int(self._where[index, 0])].path.name}:{self._keys[index]}"

    def fingerprint(self) -> str:
        return digest("webdataset", "\0".join(self._keys), self._where, self.labels)


def _samples(shard: Path) -> list[tuple[str, tuple[int, int], float]]:
    """(key, (offset, size) of the image, label) of each whole sample of a shard, in order."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, float] = {}
    places: dict[str, tuple[int, int]] = {}
    try:
        file = OpenFile(shard)
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined]  # a kilobyte and more each
                if member.islnk():  # tar stores a file of two names once
                    place = places.get(member.linkname, (0, 0))
                elif member.isfile():
                    place = member.offset_data, member.size
                else:
                    continue
                places[member.name] = place
                folder, _, file_name = member.name.rpartition("/")
                stem, _, extension = file_name.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                if f".{extension.lower()}" in SUFFIXES:
                    if key in images:
                        raise UserError(f"{shard}: sample {key} has two images")
                    images[key] = place
                elif extension in ("cls", "json"):
                    label = _label(extension, file.read(*place), f"{shard}: {member.name}")
                    if label is not None and labels.setdefault(key, label) != label:
                        raise UserError(f"{shard}: sample {key} has two labels")
            _check_end(shard, file, archive.offset)
    except tarfile.TarError as error:
        raise UserError(f"{shard} is not a complete tar file: {error}") from None
    bare = [key for key in labels if key not in images]
    if bare:
        warnings.warn(
            f"{shard}: {len(bare):,} labels have no image that can be read, {bare[0]} first",
            stacklevel=4,
        )
    unlabelled = [key for key in images if key not in labels]
    if unlabelled:
        raise UserError(
            f"{shard}: {len(unlabelled)} images have no label (.cls, or .json with one of "
            f"{', '.join(_LABEL_KEYS)}), {unlabelled[0]} first"
        )
    return [(key, place, labels[key]) for key, place in images.items()]


def _check_end(shard: Path, file: OpenFile, offset: int) -> None:
    """Whether only zeros are behind the last member: tarfile ends at whatever is no member."""
    rest = file.read(offset, min(shard.stat().st_size - offset, 1 << 20))
    if rest.strip(b"\0"):
        raise UserError(
            f"{shard} is damaged, or several tar files in one: what lies behind byte {offset:,} is "
            "no member of it; pack it again"
        )
    if not rest:
        warnings.warn(
            f"{shard} lacks tar's mark of its end: if it was cut, images are missing", stacklevel=5
        )


def _label(extension: str, data: bytes, where: str) -> float | None:
    try:
        value = data.decode() if extension == "cls" else json.loads(data)
        if isinstance(value, dict):
            value = next((value[key] for key in _LABEL_KEYS if key in value), None)
        return None if value is None else float(value)
    except (ValueError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{where} has a label that is not a whole number") from None
