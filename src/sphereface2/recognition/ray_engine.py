"""The parts of a features file computed by a Ray Data pipeline, here or on a cluster."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from sphereface2.data.source import Source
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.extras import require
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.feature_parts import Job, open_images

_ANSWER_SECONDS = 5.0


def compute(
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
            options: dict[str, Any] = {} if address else {"include_dashboard": False}
            ray.init(
                address=address or "local",
                log_to_driver=False,
                logging_level=logging.ERROR,
                **options,
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
