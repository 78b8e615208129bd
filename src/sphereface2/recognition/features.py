"""``sphereface2 embed``: a set of images as a file of embeddings."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sphereface2 import console
from sphereface2.align.unaligned import warn_if_unaligned
from sphereface2.data.source import Source
from sphereface2.errors import UserError, check_choice, check_count
from sphereface2.files import writing
from sphereface2.recognition import ray_engine
from sphereface2.recognition.box import chosen
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.feature_parts import DTYPES, Job, Parts, metadata, open_images
from sphereface2.signals import STOPPED, Stopper


@dataclass(frozen=True)
class FeaturesReport:
    """What `embed_set` did.

    Attributes:
        out: the file.
        images: images in the set.
        embedded: rows of the file.
        skipped: images left out.
        seconds: time it took.
    """

    out: Path
    images: int
    embedded: int
    skipped: int
    seconds: float


def embed_set(
    checkpoint: str | Path,
    source: Path | None = None,
    /,
    *,
    out: Path,
    aligned: bool = False,
    dtype: str = "float32",
    batch_size: int = 64,
    flip: bool = True,
    faces: Literal["largest", "all"] = "largest",
    device: str | None = None,
    engine: str = "local",
    ray_address: str | None = None,
) -> FeaturesReport:
    """Write the embeddings of a set of images to a Parquet file.

    Columns, in the order of the set: ``name``; ``label`` (int64) and ``person``, null where the
    set does not tell; ``embedding``, a list of fixed length, of length 1; and unless ``aligned``,
    ``score`` and ``box`` (left, top, right, bottom) of the face. Of several faces of an image
    the largest and most central comes first, and ``label`` and ``person`` are null. The file's
    metadata hold the model's fingerprint and all settings. Images that cannot be read or show no
    face are left out and listed, with the reason, in ``OUT.skipped.csv``.

    A run that was killed is continued by the same command and ends in the same file.

    Args:
        checkpoint: A run, a model folder, an exported .onnx file, or the id of a model on the hub;
            where only the set is given, the model that comes with the package.
        source: Folder, list, RecordIO file or WebDataset; a folder needs no folders of people.
        out: Parquet file to write, ``NAME.parquet``.
        aligned: The images are face crops by the template already.
        dtype: Type of the stored embeddings, "float32" or "float16".
        batch_size: Number of images in one forward pass.
        flip: Add the embedding of the mirror image.
        faces: Embed the largest and most central face of a photograph, or all.
        device: Where to compute: cpu, cuda, mps; by default the best there is.
        engine: "local", or "ray" for a Ray Data pipeline.
        ray_address: Address of a Ray cluster, which must see the set under the same path; by
            default a cluster of its own on this machine.

    Raises:
        UserError: a wrong option, no such model or set, a file of another run in the way, or not
            one image that could be embedded.
    """
    check_choice("--dtype", dtype, tuple(DTYPES))
    check_choice("--engine", engine, ("local", "ray"))
    check_count("--batch-size", batch_size, 1)
    if faces == "all" and aligned:
        raise UserError(
            "--faces all looks for faces in photographs, and --aligned images are crops"
        )
    if ray_address is not None and engine != "ray":
        raise UserError("--ray-address goes with --engine ray")
    out = Path(out)
    if out.suffix.lower() != ".parquet":
        raise UserError(f"--out writes Parquet: name it {out.with_suffix('.parquet').name}")
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"{out} cannot be written: give --out a file in a folder that exists")
    path = Path(checkpoint if source is None else source).resolve()
    embedder = FaceEmbedder.from_pretrained(
        chosen(None) if source is None else checkpoint,
        device="cpu" if engine == "ray" else device,  # where Ray's workers each have their own
        flip=flip,
        batch_size=batch_size,
    )
    images = open_images(path)  # after the model: a wrong one is named before a long walk
    job = Job.of(path, images, embedder, aligned=aligned, dtype=dtype, faces=faces)
    if aligned:
        warn_if_unaligned(str(path), images.read, range(len(images)), remedy="leave out --aligned")
    start = time.perf_counter()
    write_table(out, job, embedder, images, engine=engine, device=device, address=ray_address)
    found = metadata(out)
    seconds = time.perf_counter() - start
    report = FeaturesReport(out, job.images, found["embedded"], found["skipped"], seconds)
    left_out = f"; {report.skipped:,} left out, see {out}.skipped.csv" if report.skipped else ""
    what = f"{report.embedded:,} {'faces ' if faces == 'all' else ''}of {report.images:,} images"
    console.show(f"{what} embedded in {out}{left_out}")
    return report


def write_table(
    out: Path,
    job: Job,
    embedder: FaceEmbedder,
    images: Source,
    *,
    engine: str = "local",
    device: str | None = None,
    address: str | None = None,
) -> None:
    """Write the table of ``job`` unless it is there; what an earlier process left is continued.

    Raises:
        UserError: the file, or the unfinished work beside it, is of another job.
    """
    parts = Parts(out, job)
    if not parts.finished():
        with Stopper(STOPPED), parts.open() as missing, console.bars(counted=True) as bars:
            advance = console.advance(bars, "embedding", job.images)
            advance(job.images - sum(len(job.rows(number)) for number in missing))
            if engine == "ray":
                done = ray_engine.compute(
                    job, embedder, missing, address=address, device=device, progress=advance
                )
            else:
                done = (
                    (number, job.compute(embedder, images, number, progress=advance))
                    for number in missing
                )
            for number, content in done:
                parts.write(number, content)
            with writing(out):
                parts.merge()
    parts.remove()
