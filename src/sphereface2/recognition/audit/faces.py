"""A set's images as an audit sees them: embedded, measured, kept in a table beside the report."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from sphereface2.align.unaligned import warn_if_unaligned
from sphereface2.data.folder import check_outside
from sphereface2.data.source import Source
from sphereface2.files import check_folder, owned, printable
from sphereface2.recognition.box import chosen
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.feature_parts import SIDE, Job, open_images
from sphereface2.recognition.features import write_table

TABLE = "embeddings.parquet"


@dataclass(frozen=True)
class Faces:
    """The N images of a set that could be embedded."""

    source: Source
    index: np.ndarray  # int64 (N,), place of each in the set
    rows: np.ndarray  # float32 (N, d), of length 1
    thumbnails: np.ndarray  # uint8 (N, SIDE * SIDE)
    pixels: np.ndarray  # bytes (N,), digests
    sharpness: np.ndarray  # float32 (N,), as the next two, of `measures`
    brightness: np.ndarray
    contrast: np.ndarray
    left_out: list[tuple[int, str, str]]  # index, name and reason of the others

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,), of each image, as the set numbers them; 0 where it has none."""
        labels = np.asarray(self.source.labels)
        return labels[self.index] if len(labels) else np.zeros(len(self.index), np.int64)

    def whose(self, row: int | np.integer) -> str:
        """What the set calls the person of an image; empty where it has no labels."""
        labels = self.source.labels
        return self.person(int(labels[self.index[row]])) if len(labels) else ""

    def person(self, label: int) -> str:
        """What the set calls a label."""
        names = self.source.class_names
        return printable(names[label]) if names else str(label)


@contextmanager
def examined(
    source: Path,
    out: Path,
    write: Path | None,
    *,
    model: str | None,
    device: str | None,
    batch_size: int,
    align: bool,
) -> Iterator[tuple[FaceEmbedder, Faces]]:
    """A model and what it sees of a set, or what an earlier call left of that in ``out``.

    Meanwhile ``out`` is this process's alone. It and ``write`` lie outside the set.

    Raises:
        UserError: no such set or model, or ``out`` holds the table of others.
    """
    path = source.resolve()
    opened = open_images(path)
    for place in filter(None, (out, write)):
        check_outside(place, opened)
        check_folder(place)
    embedder = FaceEmbedder.from_pretrained(chosen(model), device=device, batch_size=batch_size)
    with owned(out):
        if not align:
            warn_if_unaligned(str(path), opened.read, np.arange(len(opened)))
        job = Job.of(path, opened, embedder, aligned=not align, dtype="float16", measured=True)
        write_table(out / TABLE, job, embedder, opened)
        yield embedder, _read(out / TABLE, opened)


def _read(path: Path, source: Source) -> Faces:
    file = pq.ParquetFile(path)
    count = file.metadata.num_rows
    dim = file.schema_arrow.field("embedding").type.list_size
    rows = np.empty((count, dim), np.float32)
    thumbnails = np.empty((count, SIDE * SIDE), np.uint8)
    pixels = np.empty(count, "S16")
    start = 0
    large = ["embedding", "pixels", "thumbnail"]
    for batch in file.iter_batches(65536, columns=large):  # of which two copies fit in memory
        part = slice(start, start + len(batch))
        values = batch.column("embedding").flatten().to_numpy(zero_copy_only=False)
        rows[part] = values.reshape(-1, dim)
        grey = b"".join(batch.column("thumbnail").to_pylist())
        thumbnails[part] = np.frombuffer(grey, np.uint8).reshape(-1, SIDE * SIDE)
        pixels[part] = batch.column("pixels").to_pylist()
        start += len(batch)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    small = file.read(columns=["index", "sharpness", "brightness", "contrast"])
    numbers = {name: small.column(name).to_numpy() for name in small.column_names}
    missing = np.setdiff1d(np.arange(len(source)), numbers["index"]).tolist()
    names, reasons = [printable(source.name(i)) for i in missing], {}
    listed = path.with_name(f"{path.name}.skipped.csv")
    if listed.exists():
        with listed.open(newline="", encoding="utf-8") as rows_:
            reasons = {row["name"]: row["reason"] for row in csv.DictReader(rows_)}
    return Faces(
        source=source,
        rows=rows,
        thumbnails=thumbnails,
        pixels=pixels,
        left_out=[
            (i, name, reasons.get(name, "left out")) for i, name in zip(missing, names, strict=True)
        ],
        **numbers,
    )
