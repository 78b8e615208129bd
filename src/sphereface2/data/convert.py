"""``sphereface2 data convert``: the same images in another layout, byte for byte."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from sphereface2.data.recordio import RecordIOWriter
from sphereface2.data.sources import Source, open_source
from sphereface2.data.transforms import decode
from sphereface2.errors import UserError
from sphereface2.files import atomic_folder

_SHARD_IMAGES = 10_000
_NAMED_IN_REPORT = 20


@dataclass
class Conversion:
    """What was copied; ``unreadable`` names the images that were left out."""

    target: Path
    images: int = 0
    people: int = 0
    unreadable: list[str] = field(default_factory=list)


class _Add(Protocol):
    def __call__(self, label: int, position: int, image: bytes) -> None:
        """Append image number ``position`` of person ``label``."""


def convert(source: str | Path, target: str | Path, *, to: str) -> Conversion:
    """Copy the data set at ``source`` into the new folder ``target`` in the format ``to``.

    ``to`` is ``folder`` (``person/000000.jpg``), ``list`` (the same under ``images/``, and
    ``train.txt``), ``recordio`` (``train.rec train.idx property``) or ``webdataset`` (shards of
    10,000). Images go over as encoded, by ascending label and in their order within a person;
    labels stay what they are. Names of people become folder names, and ``names.txt`` in the
    formats that have none. Each image is decoded once as a check: one that is missing or damaged
    is left out and reported. ``target`` appears only when it is complete.

    Raises UserError if ``to`` is unknown, ``target`` exists or no image can be read.
    """
    target = Path(target)
    if to not in _WRITERS:
        raise UserError(f"cannot convert to {to!r}; choose one of {', '.join(_WRITERS)}")
    if target.exists():
        raise UserError(f"{target} exists already; name a new folder")
    opened = open_source(source)
    done = Conversion(target)
    console = Console(stderr=True)
    with atomic_folder(target) as temporary:
        size = _first_size(opened)
        with _WRITERS[to](temporary, _folder_names(opened), size) as add:
            _copy(opened, add, done, to, console)
        if done.images == 0:
            raise UserError(f"none of the {len(opened)} images of {source} can be read")
        if opened.class_names is not None and to != "folder":
            names = temporary / "names.txt"
            names.write_text("\n".join(opened.class_names) + "\n", encoding="utf-8")
    console.print(f"{done.images:,} images of {done.people:,} people in {target}")
    if done.unreadable:
        console.print(f"[yellow]{len(done.unreadable):,} unreadable images left out:[/yellow]")
        for name in done.unreadable[:_NAMED_IN_REPORT]:
            console.print(f"  {name}", markup=False, highlight=False)
        if len(done.unreadable) > _NAMED_IN_REPORT:
            console.print(f"  … and {len(done.unreadable) - _NAMED_IN_REPORT:,} more")
    return done


def _copy(source: Source, add: _Add, done: Conversion, to: str, console: Console) -> None:
    last, position = -1, 0
    with progress_bar(console) as bar:
        task = bar.add_task(f"converting to {to}", total=len(source))
        for index in np.argsort(source.labels, kind="stable").tolist():
            bar.advance(task)
            try:
                data = source.read(index)
                decode(data)
            except (UserError, OSError):
                done.unreadable.append(source.name(index))
                continue
            label = int(source.labels[index])
            if label != last:
                done.people += 1
                last, position = label, 0
            add(label, position, data)
            position += 1
            done.images += 1


def progress_bar(console: Console) -> Progress:
    """A bar with count and time left; nothing where the output is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _first_size(source: Source) -> tuple[int, int]:
    """Height and width of the first readable image."""
    for index in range(len(source)):
        try:
            height, width = decode(source.read(index)).shape[:2]
        except (UserError, OSError):
            continue
        return height, width
    return 0, 0


def _folder_names(source: Source) -> list[str]:
    """A folder name for each label: the person's name where it can be one, else the number.

    Numbers are padded, so that reading the folders in order of name restores the labels.
    """
    digits = len(str(source.num_classes - 1))
    numbers = [f"{label:0{digits}d}" for label in range(source.num_classes)]
    names = source.class_names
    # Names may come from a file: none may lead out of the target or hide.
    usable = names is not None and len(set(names)) == len(names) == source.num_classes
    if names is None or not usable or any(_is_unsafe(name) for name in names):
        return numbers
    return names


def _is_unsafe(name: str) -> bool:
    return not name or name.startswith(".") or any(c in name for c in "/\\\0\n\t")


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


@contextmanager
def _folder(root: Path, names: list[str], size: tuple[int, int]) -> Iterator[_Add]:
    def add(label: int, position: int, image: bytes) -> None:
        folder = root / names[label]
        folder.mkdir(exist_ok=True)
        (folder / f"{position:06d}.{extension_of(image)}").write_bytes(image)

    yield add


@contextmanager
def _list(root: Path, names: list[str], size: tuple[int, int]) -> Iterator[_Add]:
    with (root / "train.txt").open("w", encoding="utf-8") as lines:

        def add(label: int, position: int, image: bytes) -> None:
            folder = root / "images" / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{position:06d}.{extension_of(image)}"
            file.write_bytes(image)
            lines.write(f"{file.relative_to(root).as_posix()}\t{label}\n")

        yield add


@contextmanager
def _recordio(root: Path, names: list[str], size: tuple[int, int]) -> Iterator[_Add]:
    with RecordIOWriter(root, size) as writer:

        def add(label: int, position: int, image: bytes) -> None:
            writer.add(label, image)

        yield add


@contextmanager
def _webdataset(root: Path, names: list[str], size: tuple[int, int]) -> Iterator[_Add]:
    shard: tarfile.TarFile | None = None
    count = 0

    def member(name: str, data: bytes) -> None:
        assert shard is not None
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(data), 0o644
        shard.addfile(info, io.BytesIO(data))

    def add(label: int, position: int, image: bytes) -> None:
        nonlocal shard, count
        if count % _SHARD_IMAGES == 0:
            if shard is not None:
                shard.close()
            path = root / f"shard-{count // _SHARD_IMAGES:06d}.tar"
            shard = tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        member(f"{count:09d}.{extension_of(image)}", image)
        member(f"{count:09d}.cls", str(label).encode())
        count += 1

    try:
        yield add
    finally:
        if shard is not None:
            shard.close()


_WRITERS = {"folder": _folder, "list": _list, "recordio": _recordio, "webdataset": _webdataset}
