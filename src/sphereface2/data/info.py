"""``sphereface2 data info``: what a data set holds, and what is wrong with it."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sphereface2 import console
from sphereface2.data.folder import FolderSource
from sphereface2.data.opening import is_bin, load_pairs, names_beside, open_source
from sphereface2.errors import UserError
from sphereface2.files import printable
from sphereface2.images import decode

_BINS = (1, 2, 3, 4, 5, 10, 20, 50, 100, 200, 500)
_BAR = 40
_NAMED = 10


@dataclass
class Info:
    """The findings.

    ``duplicates`` counts images whose bytes equal an earlier image's. ``people`` is None for a
    ``X.bin`` without the ``X_pairs.txt`` that names them; its ``images`` are the two of every pair
    as stored. ``person_sizes`` maps a number of images to how many people have that many;
    ``unread`` counts by suffix the files of a folder that are no images or cannot be read here.
    """

    path: str
    format: str
    images: int = 0
    people: int | None = None
    pairs: int | None = None
    genuine: int | None = None
    unreadable: int = 0
    unreadable_names: list[str] = field(default_factory=list)
    duplicates: int = 0
    duplicate_names: list[str] = field(default_factory=list)
    person_sizes: dict[int, int] = field(default_factory=dict)
    image_sizes: dict[str, int] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the histogram's keys become text in ascending order."""
        sizes = {str(size): self.person_sizes[size] for size in sorted(self.person_sizes)}
        return {**vars(self), "person_sizes": sizes}


def info(path: Path, /, *, as_json: bool = False) -> Info:
    """Count the images, people, unreadable files and duplicates of a data set.

    Every image is read. As JSON the keys are the fields of ``Info``.

    Args:
        path: Folder, list, RecordIO file, WebDataset or verification set (`.bin`).
        as_json: Print JSON instead of tables.

    Raises:
        UserError: there is no data set.
    """
    path = Path(path)
    found = _pairs_info(path) if is_bin(path) else _source_info(path)
    console.tell(as_json, found.to_dict(), *_parts(found))
    return found


def _source_info(path: Path) -> Info:
    with warnings.catch_warnings(record=True) as caught:
        source = open_source(path)
    kind = type(source).__name__.removesuffix("Source").lower()
    found = Info(str(path), kind, images=len(source))
    found.notes = [str(warning.message) for warning in caught]
    if isinstance(source, FolderSource):
        found.unread = dict(source.found.unread.most_common())
    counts = np.bincount(source.labels)
    found.people = int((counts > 0).sum())
    found.person_sizes = {int(n): int(c) for n, c in Counter(counts[counts > 0].tolist()).items()}

    def images() -> Iterator[tuple[str, bytes | None]]:
        for index in range(len(source)):
            try:
                data = source.read(index)
            except (UserError, OSError):
                data = None
            yield printable(source.name(index)), data

    _examine(found, images())
    return found


def _pairs_info(path: Path) -> Info:
    notes = []
    try:
        pair_set = load_pairs(path, names=names_beside(path))
    except UserError as error:
        pair_set = load_pairs(path)
        notes.append(f"who is in it is not known: {error}")
    found = Info(str(path), "bin", images=2 * len(pair_set), pairs=len(pair_set), notes=notes)
    if pair_set.people is not None:
        found.people = len(np.unique(pair_set.people))
    found.genuine = int(pair_set.same.sum())

    def images() -> Iterator[tuple[str, bytes | None]]:
        for pair, members in enumerate(pair_set.pairs.tolist()):
            for side, index in enumerate(members):
                image = pair_set.images[index]
                data = image if isinstance(image, bytes) else _raw(image)
                yield f"image {side} of pair {pair}", data

    _examine(found, images())
    return found


def _raw(image: np.ndarray) -> bytes:
    """A decoded image of a .bin as bytes that decode: a PPM, header and pixels."""
    height, width = image.shape[:2]
    return b"P6 %d %d 255\n" % (width, height) + image.tobytes()


def _examine(found: Info, images: Iterator[tuple[str, bytes | None]]) -> None:
    """Decode and hash each image once."""
    sizes: Counter[str] = Counter()
    size_of: dict[bytes, str | None] = {}
    with console.bars(counted=True) as bar:
        task = bar.add_task("reading", total=found.images)
        for name, data in images:
            bar.advance(task)
            size: str | None = None
            if data is not None:
                key = hashlib.blake2b(data, digest_size=16).digest()
                if key in size_of:
                    size = size_of[key]
                    # Empty or damaged copies are unreadable, and of no interest as duplicates.
                    if size is not None:
                        found.duplicates += 1
                        found.duplicate_names.append(name)
                else:
                    size = size_of[key] = _size(data)
            if size is None:
                found.unreadable += 1
                found.unreadable_names.append(name)
            else:
                sizes[size] += 1
    found.image_sizes = dict(sizes.most_common())


def _size(data: bytes) -> str | None:
    """``WIDTHxHEIGHT``, or None if the image does not decode."""
    try:
        height, width = decode(data).shape[:2]
    except UserError:
        return None
    return f"{width}x{height}"


def _parts(found: Info) -> list[Table | str]:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_row("path", console.cell(found.path))
    table.add_row("format", found.format)
    table.add_row("images", f"{found.images:,}")
    if found.people is None:
        table.add_row("people", "unknown: no list of the pairs beside the .bin names them")
    else:
        table.add_row("people", f"{found.people:,}")
    if found.pairs is not None:
        table.add_row("pairs", f"{found.pairs:,}, {found.genuine:,} of them one person")
    table.add_row("image sizes", _listed(found.image_sizes))
    for title, count, names in (
        ("unreadable", found.unreadable, found.unreadable_names),
        ("duplicates", found.duplicates, found.duplicate_names),
    ):
        more = f", … {count - _NAMED:,} more" if count > _NAMED else ""
        text = f": {', '.join(names[:_NAMED])}{more}" if names else ""
        colour = "yellow" if count else "green"
        table.add_row(title, f"[{colour}]{count:,}[/{colour}]" + console.cell(text))
    parts: list[Table | str] = [table, *found.notes]
    if found.person_sizes:
        parts += ["", "images a person"]
        for title, people in _histogram(found.person_sizes):
            bar = "█" * max(round(_BAR * people / max(1, found.people or 1)), 1 if people else 0)
            parts.append(f"{title:>9}  {bar} {people:,}")
    return parts


def _listed(sizes: dict[str, int]) -> str:
    text = [f"{size} ({count:,})" for size, count in list(sizes.items())[:5]]
    return ", ".join(text) + (f", {len(sizes) - 5} more" if len(sizes) > 5 else "")


def _histogram(person_sizes: dict[int, int]) -> list[tuple[str, int]]:
    """People by ranges of images a person, from the first to the last range that occurs."""
    edges = np.searchsorted(_BINS, list(person_sizes))
    counts: Counter[int] = Counter()
    for edge, people in zip(edges.tolist(), person_sizes.values(), strict=True):
        counts[edge] += people
    rows = []
    for edge in range(min(counts), max(counts) + 1):
        low = _BINS[edge - 1] + 1 if edge else 1
        if edge == len(_BINS):
            title = f"{low} or more"
        else:
            title = str(low) if low == _BINS[edge] else f"{low}–{_BINS[edge]}"
        rows.append((title, counts[edge]))
    return rows
