"""Images to embeddings for many requests at once.

Decoding and detection run in a pool of threads, the network in the batcher's. Every image that is
accepted counts until nothing of its request is at work any more, and there is a bound on their
number: a request beyond it is refused at once instead of queuing for longer than anybody waits.
"""

from __future__ import annotations

import asyncio
import base64
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from sphereface2.align import Face, warp
from sphereface2.errors import UserError
from sphereface2.images import encode_image, read_image
from sphereface2.machine import compute_threads
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.service.batching import Batcher
from sphereface2.recognition.service.errors import Refusal
from sphereface2.recognition.service.metrics import Metrics
from sphereface2.recognition.service.settings import Settings

MAX_ALIGNED_SIDE = 1024
# The first bytes of JPEG, PNG and WebP.
_MAGIC = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|RIFF.{4}WEBP", re.DOTALL)
_BATCHES_AT_ONCE = 4  # more would be smaller ones
_TRIALS = 8
_WORTH_IT = 0.7  # of the share's time
Result = TypeVar("Result")
Which = Literal["one", "largest", "all"]
"""The faces of an image to take: "one" refuses an image with several."""


@dataclass(frozen=True)
class Seen:
    """A face: its aligned crop, uint8 RGB (H, W, 3), where it was found, its embedding (d,)."""

    crop: np.ndarray
    face: Face | None
    embedding: np.ndarray

    def png(self) -> str:
        """The crop as a data: address."""
        return "data:image/png;base64," + base64.b64encode(encode_image(self.crop, ".png")).decode()


class Recogniser:
    """An embedder behind queues."""

    def __init__(self, embedder: FaceEmbedder, metrics: Metrics, settings: Settings) -> None:
        """Start the threads."""
        self.embedder, self._settings = embedder, settings
        self._accepted = self._arriving = 0
        self._cores = self._alone = compute_threads()
        workers = min(self._cores, _BATCHES_AT_ONCE) if embedder.device == "cpu" else 1
        self._share = self._cores // workers
        self._pool = ThreadPoolExecutor(self._cores, thread_name_prefix="images")
        self.batcher = Batcher(
            self._forward,
            max_batch=settings.max_batch,
            max_wait=settings.max_wait_ms / 1000,
            on_the_way=lambda: self._arriving,
            workers=workers,
            observe=metrics.batch,
        )
        metrics.watch("sphereface2_images", "Images in work.", lambda: self._accepted)
        metrics.watch(
            "sphereface2_queue", "Faces before the network.", lambda: self.batcher.waiting
        )

    def _forward(self, crops: list[np.ndarray], batches: int) -> np.ndarray:
        threads = self._alone if batches == 1 else self._share
        return self.embedder.embedder.forward(crops, threads=threads)

    def warm_up(self) -> None:
        """Load the detector and run the network, so that the first request is as fast.

        On all cores, which wait for each other after every layer, a small network takes as long for
        a face as on a batch's share of them, or longer: the better number is found here.
        """
        grey = np.full((112, 112, 3), 128, np.uint8)
        seconds = {}
        for threads in (self._cores, self._share):
            self._alone = threads
            times = []
            for _ in range(_TRIALS):
                started = time.perf_counter()
                self.batcher.submit(grey).result()
                times.append(time.perf_counter() - started)
            seconds[threads] = min(times)
        if seconds[self._cores] < _WORTH_IT * seconds[self._share]:
            self._alone = self._cores
        self.embedder.aligner.detect(grey)

    async def embed(
        self, images: Sequence[bytes], *, aligned: bool, which: Which = "largest"
    ) -> list[list[Seen]]:
        """The faces of each encoded image with their embeddings, the largest first.

        Raises:
            Refusal: 503 when there is too much to do; 415 or 422 for an image that cannot be read,
                shows no face or, where ``which`` is "one", several.
        """
        names = ["the image"]
        if len(images) > 1:
            names = [f"image {number}" for number in range(1, len(images) + 1)]
        for name, data in zip(names, images, strict=True):
            if not _MAGIC.match(data):  # whatever it is declared as
                raise Refusal(415, "not_an_image", f"{name} is no JPEG, PNG or WebP file")
        with self._admitted(len(images)):
            self._arriving += len(images)
            try:
                found = await _all(
                    [
                        self._pool.submit(self._look, name, data, aligned, which)
                        for name, data in zip(names, images, strict=True)
                    ]
                )
            finally:
                self._arriving -= len(images)
            rows = iter(
                await _all([self.batcher.submit(crop) for faces in found for crop, _ in faces])
            )
        return [[Seen(crop, face, next(rows)) for crop, face in faces] for faces in found]

    def close(self) -> None:
        """End the threads: images in work are finished, those that wait are dropped."""
        self._pool.shutdown(cancel_futures=True)
        self.batcher.close()

    @contextmanager
    def _admitted(self, count: int) -> Iterator[None]:
        if self._accepted + count > self._settings.max_queue:
            raise Refusal(
                503, "overloaded", "the server is busy: try again in a second", retry_after=1
            )
        self._accepted += count
        try:
            yield
        finally:
            self._accepted -= count

    def _look(
        self, name: str, data: bytes, aligned: bool, which: Which
    ) -> list[tuple[np.ndarray, Face | None]]:
        """The aligned faces of an encoded image."""
        try:
            pixels = read_image(data, max_pixels=self._settings.max_pixels)
            if not aligned:
                faces = self.embedder.aligner.detect(pixels, thorough=which == "all")
        except UserError as error:
            raise Refusal(422, "unreadable", f"{name} cannot be used: {error}") from None
        if aligned:
            if max(pixels.shape) > MAX_ALIGNED_SIDE:
                raise Refusal(
                    422,
                    "unreadable",
                    f"{name} cannot be used: an aligned crop has at most {MAX_ALIGNED_SIDE} pixels "
                    f"a side, and this one is {pixels.shape[1]}×{pixels.shape[0]}",
                )
            return [(pixels, None)]
        if not faces:
            raise Refusal(
                422,
                "no_face",
                f"no face was found in {name}: give one with a clear, upright, larger face",
            )
        if which == "one" and len(faces) > 1:
            raise Refusal(
                422,
                "several_faces",
                f"{name} shows {len(faces)} faces: give one with a single face, or faces=largest "
                "to take the largest",
            )
        taken = faces if which == "all" else faces[:1]
        size = self.embedder.aligner.size
        return [(warp(pixels, face.landmarks, size), face) for face in taken]


async def _all(futures: Sequence[Future[Result]]) -> list[Result]:
    """The results, or the first failure once nothing of it is at work: what waits is dropped."""
    waiting = [asyncio.wrap_future(future) for future in futures]
    try:
        _, pending = await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
    finally:
        for future in futures:
            future.cancel()  # of no effect on what is done or has begun
    if pending:
        await asyncio.wait(pending)
    failures = [None if one.cancelled() else one.exception() for one in waiting]
    for failure in failures:
        if failure is not None:
            raise failure
    return [one.result() for one in waiting]
