"""``sphereface2 embed``: a set of images as a file of embeddings."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sphereface2 import console
from sphereface2.align.unaligned import warn_if_unaligned
from sphereface2.data.source import Source
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError, check_choice, check_count, counted
from sphereface2.extras import require
from sphereface2.files import takes_paths, writing
from sphereface2.recognition.box import chosen
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.feature_parts import DTYPES, Job, Parts, metadata, open_images
from sphereface2.signals import STOPPED, Stopper

_ANSWER_SECONDS = 5.0


@takes_paths
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
) -> dict[str, Any]:
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

    Returns:
        The file's metadata; among them ``images``, ``embedded`` and ``skipped``, numbers of images
        in the set, of rows, and of images left out.

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
    write_table(out, job, embedder, images, engine=engine, device=device, address=ray_address)
    found = metadata(out)
    embedded, skipped = found["embedded"], found["skipped"]
    what = counted(embedded, "face") if faces == "all" else f"{embedded:,}"
    what += f" of {counted(job.images, 'image')} embedded"
    left_out = f"; {skipped:,} left out, see {out}.skipped.csv" if skipped else ""
    console.show(f"{what} in {out}{left_out}")
    return found


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
                done = compute_by_ray(
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


# -- a Ray Data pipeline, here or on a cluster -----------------------------------------------------


def compute_by_ray(
    job: Job,
    embedder: FaceEmbedder,
    numbers: Sequence[int],
    *,
    address: str | None,
    device: str | None,
    progress: Callable[[int], None] = lambda count: None,
) -> Iterator[tuple[int, bytes]]:
    """Yield (number, Parquet file) of each part as it is finished, in any order.

    The network travels to the workers; each opens the set itself, under the same path. There is
    one worker a GPU if the cluster has GPUs and ``device`` does not say cpu, else one a CPU core.
    Without ``address`` a Ray is started on this machine and stopped afterwards.

    Raises:
        UserError: Ray is missing or cannot be reached, or a worker does not see the same set.
    """
    if not numbers:
        return
    require("runs with --engine ray", "ray")
    import ray
    import ray.data

    # A user's images are private: no report of use is sent.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    own = not ray.is_initialized()
    if own and address is not None:
        _check_answers(address)
    try:
        if own:
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                include_dashboard=None if address else False,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(f"Ray cannot be reached at {address or 'this machine'}: {error}") from error
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        resources = ray.cluster_resources()
        gpus = 0 if device == "cpu" else int(resources.get("GPU", 0))
        workers = max(1, min(len(numbers), gpus or int(resources.get("CPU", 1))))
        parts = ray.data.from_items(
            [{"number": number} for number in numbers], override_num_blocks=len(numbers)
        ).map_batches(
            _Worker,
            fn_constructor_args=(job, ray.put(embedder.network), device),
            batch_size=1,
            batch_format="numpy",
            num_cpus=0 if gpus else 1,
            num_gpus=1 if gpus else 0,
            compute=ray.data.ActorPoolStrategy(size=workers),
        )
        for row in parts.iter_rows():
            if row["error"]:
                raise UserError(row["error"])
            number = int(row["number"])
            progress(len(job.rows(number)))
            yield number, row["part"]
    finally:
        if own:
            ray.shutdown()


def _check_answers(address: str) -> None:
    """UserError if nothing listens at HOST:PORT, which Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():  # "auto", for one
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"no Ray cluster answers at {address} ({reason}): give --ray-address the HOST:PORT of "
            "its head"
        ) from error


class _Worker:
    """Computes parts in a process of its own; everything is made for the first of them."""

    def __init__(self, job: Job, network: Any, device: str | None) -> None:
        self._job = job
        self._network = network
        self._device = device

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        # A mistake of the user travels as a row: Ray would wrap an exception up beyond finding.
        try:
            number = int(batch["number"][0])
            part, error = self._job.compute(*self._ready, number), ""
        except UserError as raised:
            part, error = b"", str(raised)
        return {"number": batch["number"], "part": [part], "error": [error]}

    @cached_property
    def _ready(self) -> tuple[FaceEmbedder, Source]:
        import ray

        images = open_images(self._job.path)
        if images.fingerprint() != self._job.input:
            raise UserError(
                f"a worker of the cluster finds different images under {self._job.path}: the set "
                "must lie on storage that all machines share"
            )
        embedder = FaceEmbedder(
            Embedder(
                ray.get(self._network),
                flip=self._job.flip,
                batch_size=self._job.batch_size,
                device=self._device or "auto",
                threads=1,
            )
        )
        if not self._job.aligned and embedder.aligner.name != self._job.aligner:
            raise UserError(
                f"a worker of the cluster finds faces with {embedder.aligner.name} and this "
                f"machine with {self._job.aligner}: install the same packages"
            )
        return embedder, images
