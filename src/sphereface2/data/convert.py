"""``sphereface2 data convert``: the same images in another layout, as they are or smaller."""

from __future__ import annotations

import io
import os
import tarfile
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import cv2
import numpy as np

from sphereface2 import console
from sphereface2.data import pairbin
from sphereface2.data.folder import check_outside
from sphereface2.data.listfile import LIST_SUFFIXES
from sphereface2.data.locate import about, write_about
from sphereface2.data.opening import load_pairs, open_source
from sphereface2.data.pairs import consecutive_folds
from sphereface2.data.recordio import RecordIOWriter
from sphereface2.data.source import Source, write_names
from sphereface2.errors import UserError, check_choice, check_number, counted
from sphereface2.files import (
    MOST_BYTES,
    atomic_folder,
    check_folder,
    one_name,
    printable,
    takes_paths,
)
from sphereface2.images import decode, encode_image

#: Suffixes of the files of a set, which a user may take for what is made.
_OF_FILES = LIST_SUFFIXES | {".rec", ".idx", ".tar", ".bin"}
_SHARD_IMAGES = 10_000
_CHUNK = 512  # images that the threads work on together


@dataclass
class Conversion:
    """What was copied; ``unreadable`` names the images that were left out."""

    target: Path
    images: int = 0
    people: int = 0
    unreadable: list[str] = field(default_factory=list)


_FORMATS = ("jpg", "webp", "png")


@dataclass(frozen=True)
class Encoding:
    """How images are encoded anew.

    Equal images give equal bytes (of one version of OpenCV).

    Args:
        format: "webp", "jpg" or "png".
        quality: of WebP and JPEG, 1 to 100.
        size: the longest side in pixels; larger images are scaled down, smaller ones stay. None:
            every image keeps its size.

    Raises:
        UserError: a value out of its range.
    """

    format: str = "webp"
    quality: int = 75
    size: int | None = None

    def __post_init__(self) -> None:
        check_choice("--encode", self.format, _FORMATS)
        check_number("--quality", self.quality, least=1, most=100)
        if self.size is not None:
            check_number("--size", self.size, least=8)

    def __call__(self, image: np.ndarray) -> bytes:
        """A uint8 (H, W, 3) RGB image as a file's bytes."""
        height, width = image.shape[:2]
        if self.size is not None and max(height, width) > self.size:
            factor = self.size / max(height, width)
            smaller = (max(1, round(width * factor)), max(1, round(height * factor)))
            image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
        return encode_image(image, f".{self.format}", self.quality)


class _Add(Protocol):
    def __call__(self, label: int, position: int, image: bytes) -> None:
        """Append image number ``position`` of person ``label``."""


@takes_paths
def convert(
    source: Path,
    target: Path,
    /,
    *,
    to: str,
    encode: str | None = None,
    quality: int | None = None,
    size: int | None = None,
) -> Conversion:
    """Convert a data set between formats, or make a smaller copy of it.

    ``to`` is ``folder`` (``person/000000.jpg``), ``list`` (the same under ``images/``, and
    ``train.txt``), ``recordio`` (``train.rec train.idx property``) or ``webdataset`` (shards of
    10,000). Images go over by ascending label and in their order within a person; labels stay what
    they are, except in a folder, whose people are numbered in the order of their names. Names of
    people become folder names, and ``names.txt`` in the formats that have none.
    Each image is decoded once as a check: one that is missing or damaged is left out and reported.
    With ``bin``, ``source`` is a verification set and ``target`` a file in InsightFace's layout;
    its pairs stand in the order of their folds, and an unreadable image is an error.

    Bytes are copied as they are unless ``encode`` or ``size`` is given. ``target`` appears only
    when it is complete.

    Args:
        source: Folder, list, RecordIO file or WebDataset; or a verification set.
        target: Folder to create; a file with `--to bin`.
        to: "folder", "list", "recordio" or "webdataset"; "bin" for a verification set.
        encode: Encode the images anew as "webp", "jpg" or "png".
        quality: Quality of WebP and JPEG that are encoded anew, 1 to 100; default: 75.
        size: Scale the longest side down to this many pixels; as WebP unless `--encode` is given.

    Raises:
        UserError: an unknown format, ``target`` exists or no image can be read.
    """
    anew = encode is not None or size is not None
    if quality is not None and (not anew or encode == "png"):
        raise UserError(
            "--quality is that of images encoded anew as WebP or JPEG: give --encode webp or "
            "--encode jpg with it"
        )
    quality = 75 if quality is None else quality
    encoding = Encoding(encode or "webp", quality, size) if anew else None
    target = Path(target)
    check_target(target, to, "bin")
    if to == "bin":
        return _convert_pairs(source, target, encoding)
    opened = open_source(source)
    check_outside(target, opened)
    done = write_source(opened, target, to, encoding, told=about(source))
    console.show(
        f"{counted(done.images, 'image')} of {counted(done.people, 'person')} in {target}",
        *console.named("unreadable and left out", done.unreadable),
    )
    return done


def check_target(target: Path, to: str, *more: str) -> None:
    """UserError unless ``to`` is a format, or one of ``more``, and ``target`` can be made."""
    if to not in (*_WRITERS, *more):
        raise UserError(f"cannot convert to {to!r}; choose one of {', '.join([*_WRITERS, *more])}")
    if target.exists():
        raise UserError(
            f"{target} exists already; name a new {'file' if to == 'bin' else 'folder'}"
        )
    if to == "bin":
        return check_folder(target.parent)
    if target.suffix.lower() in _OF_FILES:
        raise UserError(
            f"{target} is a file's name, and --to {to} makes a folder: name it "
            f"{target.with_suffix('')}"
        )
    return check_folder(target)


def write_source(
    source: Source,
    target: Path,
    to: str,
    encoding: Encoding | None = None,
    *,
    told: str = "",
) -> Conversion:
    """Write a set to the new folder ``target``, which appears when it is complete.

    Args:
        source: the set.
        target: must not exist.
        to: as of `convert`, but not "bin".
        encoding: of images that are encoded anew.
        told: what is `locate.about` the set, such as that its faces are drawn.

    Raises:
        UserError: no image can be read.
    """
    done = Conversion(target)
    with atomic_folder(target) as temporary:
        with _WRITERS[to](temporary, _folder_names(source, to)) as add:
            _copy(source, add, done, to, encoding)
        if done.images == 0:
            raise UserError(f"none of the {len(source)} images can be read")
        if to != "folder":
            write_names(temporary, source.class_names)
        write_about(temporary, told)
    return done


def _copy(
    source: Source,
    add: _Add,
    done: Conversion,
    to: str,
    encoding: Encoding | None,
) -> None:
    def checked(index: int) -> bytes | None:
        try:
            data = source.read(index)
            image = decode(data)
        except (UserError, OSError):
            return None
        return data if encoding is None else encoding(image)

    last, position = -1, 0
    order = np.argsort(source.labels, kind="stable")
    with console.bars(counted=True) as bar, ThreadPoolExecutor() as pool:
        task = bar.add_task(f"converting to {to}", total=len(source))
        for start in range(0, len(order), _CHUNK):
            indices = order[start : start + _CHUNK].tolist()
            found = pool.map(checked, indices)
            for index, data in zip(indices, found, strict=True):
                bar.advance(task)
                if data is None:
                    done.unreadable.append(source.name(index))
                    continue
                label = int(source.labels[index])
                if label != last:
                    done.people += 1
                    last, position = label, 0
                add(label, position, data)
                position += 1
                done.images += 1


def _convert_pairs(source: str | Path, target: Path, encoding: Encoding | None) -> Conversion:
    """The verification set at ``source`` as InsightFace's ``.bin``."""
    pairs = load_pairs(source)

    def read(index: int) -> bytes | np.ndarray:
        image = pairs.images[index]
        try:
            pixels = decode(image) if isinstance(image, bytes) else image
            return image if encoding is None else encoding(pixels)
        except UserError as error:
            raise UserError(f"{pairs.image_name(index)} cannot be read: {error}") from error

    with console.bars(counted=True) as bar, ThreadPoolExecutor() as pool:
        task = bar.add_task("converting to bin", total=len(pairs.images))
        images = []
        for image in pool.map(read, range(len(pairs.images))):
            images.append(image)
            bar.advance(task)
    # The folds of a .bin are its consecutive blocks.
    order = np.argsort(pairs.folds, kind="stable")
    if not np.array_equal(pairs.folds[order], consecutive_folds(len(pairs))):
        warnings.warn(
            f"{source} has {len(np.unique(pairs.folds))} folds of its own, and {target} will be "
            "read in ten of equal length",
            stacklevel=3,
        )
    # An image that serves several pairs is one object here, which a pickle holds once.
    bins = [images[index] for index in pairs.pairs[order].ravel().tolist()]
    target.parent.mkdir(parents=True, exist_ok=True)
    pairbin.write(target, bins, pairs.same[order].tolist())
    people = 0 if pairs.people is None else len(np.unique(pairs.people))
    console.show(f"{counted(len(pairs), 'pair')} of {counted(len(images), 'image')} in {target}")
    return Conversion(target, len(images), people)


def _folder_names(source: Source, to: str) -> list[str]:
    """A folder name for each label: the person's name where it can be one, else the number.

    Numbers are padded, so that reading the folders in order of name restores the labels.
    """
    digits = len(str(source.num_classes - 1))
    numbers = [f"{label:0{digits}d}" for label in range(source.num_classes)]
    names = source.class_names
    if names is None:
        return numbers
    # Names may come from a file: none may lead out of the target or hide. Many file systems take
    # names for one that differ in capitals only.
    different = {one_name(name).casefold() for name in names}
    if not len(different) == len(names) == source.num_classes or any(
        is_unsafe(name) for name in names
    ):
        return numbers
    if to == "list" and any(printable(name) != name for name in names):  # which is UTF-8
        return numbers
    return names


def is_unsafe(name: str) -> bool:
    """Whether a name can be no folder's."""
    if len(os.fsencode(name)) > MOST_BYTES:
        return True
    return not name or name.startswith(".") or any(c in "/\\" or c < " " for c in name)


def extension_of(data: bytes) -> str:
    """The file extension that belongs to encoded image bytes, by their first bytes."""
    for magic, extension in (
        (b"\xff\xd8", "jpg"),
        (b"\x89PNG", "png"),
        (b"BM", "bmp"),
        (b"II*\0", "tif"),
        (b"MM\0*", "tif"),
        (b"P6", "ppm"),
        (b"GIF8", "gif"),
    ):
        if data.startswith(magic):
            return extension
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return "webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else "jpg"


# -- one writer a format -------------------------------------------------------------------------


def _file(folder: Path, position: int, image: bytes) -> str:
    """Write an image into a person's folder; returns its name."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{position:06d}.{extension_of(image)}"
    (folder / name).write_bytes(image)
    return name


@contextmanager
def _folder(root: Path, names: list[str]) -> Iterator[_Add]:
    def add(label: int, position: int, image: bytes) -> None:
        _file(root / names[label], position, image)

    yield add


@contextmanager
def _list(root: Path, names: list[str]) -> Iterator[_Add]:
    with (root / "train.txt").open("w", encoding="utf-8") as lines:

        def add(label: int, position: int, image: bytes) -> None:
            name = _file(root / "images" / names[label], position, image)
            lines.write(f"images/{names[label]}/{name}\t{label}\n")

        yield add


@contextmanager
def _recordio(root: Path, names: list[str]) -> Iterator[_Add]:
    with RecordIOWriter(root) as writer:
        first = True

        def add(label: int, position: int, image: bytes) -> None:
            nonlocal first
            if first:
                height, width, _ = decode(image).shape
                writer.size, first = (height, width), False
            writer.add(label, image)

        yield add


@contextmanager
def _webdataset(root: Path, names: list[str]) -> Iterator[_Add]:
    shard: tarfile.TarFile | None = None
    count = 0
    with ExitStack() as shards:

        def add(label: int, position: int, image: bytes) -> None:
            nonlocal count, shard
            if count % _SHARD_IMAGES == 0:
                shards.close()  # the one before
                path = root / f"shard-{count // _SHARD_IMAGES:06d}.tar"
                shard = shards.enter_context(tarfile.open(path, "w", format=tarfile.USTAR_FORMAT))
            assert shard is not None
            for end, data in ((extension_of(image), image), ("cls", str(label).encode())):
                info = tarfile.TarInfo(f"{count:09d}.{end}")
                info.size, info.mode = len(data), 0o644
                shard.addfile(info, io.BytesIO(data))
            count += 1

        yield add


_WRITERS = {"folder": _folder, "list": _list, "recordio": _recordio, "webdataset": _webdataset}
