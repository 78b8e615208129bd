"""The parts of a features file: what is computed, and the finished parts on disk.

The work is cut into parts of so many whole batches. Each part that is finished lies as a small
Parquet file beside the result, so that a run that was killed is continued where it was, and a part
has the same rows whoever computes it: this process, the next one, or a worker of a Ray cluster.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sphereface2.align import Face
from sphereface2.data.embedding_table import METADATA
from sphereface2.data.folder import ImageSource, is_image
from sphereface2.data.opening import open_source
from sphereface2.data.source import NoImagesError, Source
from sphereface2.errors import UserError
from sphereface2.files import atomic_write, lock, printable, writing
from sphereface2.images import read_image
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.quality import measure as quality
from sphereface2.version import __version__

FORMAT = "sphereface2-features"
DTYPES = {"float32": pa.float32(), "float16": pa.float16()}
_SKIPPED = b"skipped"  # key of a part's metadata: [[name, reason], …]
SIDE = 32
"""Side of a thumbnail, grey."""
COLUMNS = (
    pa.field("index", pa.int64()),
    pa.field("pixels", pa.binary(16)),
    pa.field("thumbnail", pa.binary(SIDE * SIDE)),
    pa.field("sharpness", pa.float32()),
    pa.field("brightness", pa.float32()),
    pa.field("contrast", pa.float32()),
)
"""Of `measures`: place in the set; digest of the pixels; grey values; figures."""
#: Batches a part, for crops (True) and for photographs, where finding faces takes most of the time.
_BATCHES = {True: 32, False: 8}


def open_images(path: str | Path) -> Source:
    """What `open_source` opens, or a folder of images, then without people.

    A folder that itself holds images is a folder of images: all those in it and below it.
    """
    path = Path(path)
    if path.is_dir() and any(is_image(entry) for entry in path.iterdir()):
        images = ImageSource(path)
        if any("/" in name for name in images.found.images):
            warnings.warn(
                f"{path} holds images beside folders of images: all are taken for images of "
                "nobody; where the folders are people, move the others out of it",
                stacklevel=2,
            )
        return images
    try:
        return open_source(path)
    except NoImagesError as error:
        raise UserError(
            f"{path} holds no images (.jpg, .png, …), in it or in folders below it, and no "
            "train.rec, .tar shards or list file"
        ) from error


@dataclass(frozen=True)
class Job:
    """What is computed, whoever computes it; it pickles."""

    path: Path  # of the set
    images: int  # number of images in it
    input: str  # its fingerprint
    model: str  # the embedder's fingerprint
    embedding_dim: int
    aligner: str | None  # what finds faces; None if the images are crops
    flip: bool  # as the next two and `faces`, of `embed_set`
    dtype: str
    batch_size: int
    measured: bool = False  # each row also holds the image's `measures`, for an audit
    faces: str = "largest"

    @classmethod
    def of(
        cls, path: Path, source: Source, embedder: FaceEmbedder, *, aligned: bool, **options: Any
    ) -> Job:
        """All of a set by a model; ``options`` are the type of numbers and what else a row has."""
        return cls(
            path=path,
            images=len(source),
            input=source.fingerprint(),
            model=embedder.fingerprint,
            embedding_dim=embedder.embedding_dim,
            aligner=None if aligned else embedder.aligner.name,
            flip=embedder.embedder.flip,
            batch_size=embedder.embedder.batch_size,
            **options,
        )

    @property
    def aligned(self) -> bool:
        """Whether the images are crops already."""
        return self.aligner is None

    @property
    def part_size(self) -> int:
        """Images in a part, the last one apart."""
        return self.batch_size * _BATCHES[self.aligned]

    @property
    def parts(self) -> range:
        """Numbers of all parts."""
        return range(-(-self.images // self.part_size))

    def rows(self, number: int) -> range:
        """Indices of the images of part ``number``."""
        start = number * self.part_size
        return range(start, min(start + self.part_size, self.images))

    def identity(self) -> dict[str, Any]:
        """All that a row depends on, JSON-able."""
        facts = {"format": FORMAT, "format_version": 1, "package_version": __version__}
        return facts | {name: value for name, value in vars(self).items() if name != "path"}

    def schema(self) -> pa.Schema:
        """The file's columns."""
        columns = [
            pa.field("name", pa.string(), nullable=False),
            pa.field("label", pa.int64()),
            pa.field("person", pa.string()),
            pa.field("embedding", pa.list_(DTYPES[self.dtype], self.embedding_dim)),
        ]
        if not self.aligned:
            columns += [
                pa.field("score", pa.float32()),
                pa.field("box", pa.list_(pa.float32(), 4)),
            ]
        return pa.schema([*columns, *(COLUMNS if self.measured else ())])

    def compute(
        self,
        embedder: FaceEmbedder,
        source: Source,
        number: int,
        *,
        progress: Callable[[int], None] | None = None,
    ) -> bytes:
        """Part ``number`` as a Parquet file."""
        indices = self.rows(number)
        faces: dict[int, list[Face | None]] = {}
        more: dict[int, list[np.ndarray]] = {}  # the crops of an image's other faces
        reasons: dict[int, str] = {}
        measured: dict[int, dict[str, Any]] = {}

        def read(index: int) -> np.ndarray:
            try:
                content = source.read(index)
                found: list[tuple[np.ndarray, Face | None]]
                if self.aligned:
                    found = [(read_image(content), None)]
                else:
                    every = self.faces == "all"
                    found = [*(embedder.crops(content) if every else [embedder.crop(content)])]
                crops, faces[index] = ([*part] for part in zip(*found, strict=True))
                more[index] = crops[1:]
                measured[index] = measures(index, *found[0]) if self.measured else {}
                return crops[0]
            except (OSError, UserError) as error:
                reasons[index] = str(error)
                raise

        embed, people = embedder.embedder.embed, source.class_names
        first = iter(embed(indices, read=read, unreadable=[], progress=progress))
        kept = [index for index in indices if index not in reasons]
        others = iter(embed([crop for index in kept for crop in more[index]]))
        rows = []
        for index in kept:
            label = None  # of several faces nobody knows whose it is
            if len(faces[index]) == 1 and len(source.labels):
                label = int(source.labels[index])
            for place, face in enumerate(faces[index]):
                row = {  # Parquet and CSV hold UTF-8 alone, which not all names are
                    "name": printable(source.name(index)),
                    "label": label,
                    "person": printable(people[label]) if people and label is not None else None,
                    "embedding": next(others if place else first).astype(self.dtype),
                }
                if face is not None:
                    row |= {"score": face.score, "box": face.box}
                rows.append(row | measured[index])
        skipped = [[printable(source.name(i)), printable(reasons[i])] for i in sorted(reasons)]
        schema = self.schema().with_metadata({_SKIPPED: json.dumps(skipped)})
        buffer = io.BytesIO()
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, buffer, use_dictionary=["person"])
        return buffer.getvalue()


def measures(index: int, crop: np.ndarray, face: Face | None) -> dict[str, Any]:
    """The row of an image in `COLUMNS`.

    ``pixels`` is equal for images of equal size and pixels, however they are encoded;
    ``sharpness`` is that of `quality`; ``brightness`` and ``contrast`` are the mean and the
    standard deviation of the grey values, 0 to 255.

    Args:
        index: of the image in its set.
        crop: uint8 (H, W, 3) RGB.
        face: where it was found; None if the image was a crop.
    """
    grey = cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY)
    pixels = hashlib.blake2b(repr(crop.shape).encode(), digest_size=16)
    pixels.update(crop.tobytes())
    return {
        "index": index,
        "pixels": pixels.digest(),
        "thumbnail": cv2.resize(grey, (SIDE, SIDE), interpolation=cv2.INTER_AREA).tobytes(),
        "sharpness": quality(crop, face).sharpness,
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
    }


class Parts:
    """The finished parts of the file ``out`` that is being made, in a folder beside it."""

    def __init__(self, out: Path, job: Job) -> None:
        self.out = out
        self.job = job
        self.folder = out.with_name(f".{out.name}.parts")
        self._identity = self.folder / "identity.json"

    def finished(self) -> bool:
        """Whether the file is there; UserError if it is another's."""
        if not self.out.exists():
            return False
        self._check(metadata(self.out), self.out, "holds the features of")
        return True

    @contextmanager
    def open(self) -> Iterator[list[int]]:
        """The numbers of the parts still missing; nobody else may write while this is open."""
        with writing(self.out):
            self.folder.mkdir(exist_ok=True)
            file = (self.folder / "lock").open("w")
        with file:
            lock(file, f"another process is at work on {self.out}")
            if self._identity.exists():
                found = json.loads(self._identity.read_text(encoding="utf-8"))
                self._check(found, self.folder, "holds the unfinished work of")
            else:
                with writing(self.out):
                    atomic_write(self._identity, json.dumps(self.job.identity()).encode())
            yield [number for number in self.job.parts if not self._path(number).exists()]

    def _check(self, found: dict[str, Any], where: Path, what: str) -> None:
        other = [key for key, value in self.job.identity().items() if found.get(key) != value]
        if other:
            raise UserError(
                f"{where} {what} another run (other {', '.join(other)}): give another --out, or "
                "delete it"
            )

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.parquet"

    def write(self, number: int, content: bytes) -> None:
        """Store a finished part."""
        with writing(self.out):
            atomic_write(self._path(number), content)

    def merge(self) -> None:
        """Make the file and the list of what was left out; UserError if there is no embedding."""
        listed = self.out.with_name(f"{self.out.name}.skipped.csv")
        merged, skipped_file = self.folder / "merged", self.folder / "skipped"
        embedded = skipped = 0
        with skipped_file.open("w", newline="", encoding="utf-8") as file:
            rows = csv.writer(file)
            rows.writerow(["name", "reason"])
            for number in self.job.parts:
                part = pq.ParquetFile(self._path(number))
                embedded += part.metadata.num_rows
                left_out = json.loads(part.schema_arrow.metadata[_SKIPPED])
                skipped += len(left_out)
                rows.writerows(left_out)
        if skipped:
            skipped_file.replace(listed)
        else:
            listed.unlink(missing_ok=True)  # of an older file of this name
        if not embedded:
            self.remove()
            raise UserError(
                f"none of {self.job.images:,} images gave an embedding; {listed} lists the reasons"
            )
        described = self.job.identity() | {"embedded": embedded, "skipped": skipped}
        schema = self.job.schema().with_metadata({METADATA: json.dumps(described)})
        with pq.ParquetWriter(merged, schema, use_dictionary=["person"]) as writer:
            for number in self.job.parts:
                table = pq.read_table(self._path(number))
                if len(table):
                    writer.write_table(table.replace_schema_metadata(schema.metadata))
        with merged.open("rb") as written:
            os.fsync(written.fileno())
        merged.replace(self.out)

    def remove(self) -> None:
        """Delete the parts."""
        shutil.rmtree(self.folder, ignore_errors=True)


def metadata(path: Path) -> dict[str, Any]:
    """What a features file says about itself; empty if it is none."""
    try:
        return json.loads((pq.read_schema(path).metadata or {})[METADATA])
    except (OSError, pa.ArrowInvalid, KeyError, ValueError):
        return {}
