"""Pictures to embeddings for many requests at once.

Decoding and detection run in a pool of threads, the network in the batcher's. Every picture that is
accepted counts until its request is answered, and there is a bound on their number: what comes
beyond it is refused at once instead of queuing for longer than anybody waits.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import cv2
import numpy as np

from sphereface2.align import Face, NoFaceError, read_photo
from sphereface2.errors import UserError
from sphereface2.recognition.embedder import FaceEmbedder
from sphereface2.recognition.service.batching import Batcher
from sphereface2.recognition.service.errors import Refusal
from sphereface2.recognition.service.metrics import Metrics

MAX_ALIGNED_SIDE = 1024


@dataclass(frozen=True)
class Seen:
    """A picture's aligned face, uint8 RGB (H, W, 3), and where it was found."""

    crop: np.ndarray
    face: Face | None

    def png(self) -> str:
        """The crop as a data: address."""
        return "data:image/png;base64," + base64.b64encode(encode(self.crop, ".png")).decode()


class Recogniser:
    """An embedder behind queues."""

    def __init__(
        self,
        embedder: FaceEmbedder,
        metrics: Metrics,
        *,
        max_batch: int,
        max_wait: float,
        max_queue: int,
        max_pixels: int,
        threads: int,
    ) -> None:
        """Start the threads; see ``app.Settings`` for the numbers."""
        self.embedder = embedder
        self.max_queue = max_queue
        self.max_pixels = max_pixels
        self._accepted = 0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="pictures")
        self.batcher = Batcher(
            lambda crops: embedder.embed(crops, aligned=True, batch_size=max_batch),
            max_batch=max_batch,
            max_wait=max_wait,
            on_the_way=lambda: self._accepted,
            observe=metrics.batch,
        )
        metrics.watch("sphereface2_pictures", "Pictures in work.", lambda: self._accepted)
        metrics.watch(
            "sphereface2_queue", "Faces before the network.", lambda: self.batcher.waiting
        )

    def warm_up(self) -> None:
        """Load the detector and run the network once, so that the first request is as fast."""
        grey = np.full((112, 112, 3), 128, np.uint8)
        self.embedder.embed([grey], aligned=True)
        self.embedder.aligner.detect(grey)

    async def embed(
        self, pictures: Sequence[bytes], *, aligned: bool
    ) -> tuple[list[Seen], np.ndarray]:
        """The faces of encoded pictures and their embeddings (N, d).

        Raises:
            Refusal: 503 when there is too much to do; 415 or 422 for a picture that is none or
                shows no face.
        """
        with self._admitted(len(pictures)):
            seen = await asyncio.gather(
                *(
                    self._see(number, data, aligned, len(pictures))
                    for number, data in enumerate(pictures, 1)
                )
            )
            rows = await asyncio.gather(
                *(asyncio.wrap_future(self.batcher.submit(one.crop)) for one in seen)
            )
        return list(seen), np.stack(rows)

    def close(self) -> None:
        """Finish what is queued."""
        self._pool.shutdown()
        self.batcher.close()

    @contextmanager
    def _admitted(self, count: int) -> Iterator[None]:
        if self._accepted + count > self.max_queue:
            raise Refusal(
                503, "overloaded", "the server is busy: try again in a second", retry_after=1
            )
        self._accepted += count
        try:
            yield
        finally:
            self._accepted -= count

    async def _see(self, number: int, data: bytes, aligned: bool, count: int) -> Seen:
        which = f"picture {number}" if count > 1 else "the picture"
        if sniff(data) is None:
            raise Refusal(415, "not_a_picture", f"{which} is no JPEG, PNG or WebP file")
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._pool, self._look, data, aligned)
        except NoFaceError:
            raise Refusal(
                422,
                "no_face",
                f"no face was found in {which}: give one with a clear, upright, larger face",
            ) from None
        except UserError as error:
            raise Refusal(422, "unreadable", f"{which} cannot be used: {error}") from None

    def _look(self, data: bytes, aligned: bool) -> Seen:
        photo = read_photo(data, max_pixels=self.max_pixels)
        if not aligned:
            return Seen(*self.embedder.crop(photo))
        if max(photo.shape) > MAX_ALIGNED_SIDE:
            raise UserError(
                f"an aligned crop has at most {MAX_ALIGNED_SIDE} pixels a side, and this one is "
                f"{photo.shape[1]}×{photo.shape[0]}"
            )
        return Seen(photo, None)


def sniff(data: bytes) -> str | None:
    """jpeg, png or webp by the first bytes; nothing for all else, whatever it is declared as."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def encode(crop: np.ndarray, suffix: str) -> bytes:
    """A crop (H, W, 3) RGB as a file's bytes."""
    done, data = cv2.imencode(suffix, cv2.cvtColor(crop, cv2.COLOR_RGB2BGR))
    if not done:
        raise RuntimeError(f"a crop of {crop.shape} could not be encoded")
    return data.tobytes()
