"""Images to embeddings with a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from sphereface2.errors import UserError
from sphereface2.images import decode

Image = bytes | np.ndarray


def embed(
    net: nn.Module,
    images: Iterable[Any],
    *,
    read: Callable[[Any], np.ndarray] | None = None,
    readers: int = 1,
    batch_size: int = 128,
    flip: bool = True,
    device: str | torch.device | None = None,
    name: Callable[[int], str] | None = None,
    unreadable: list[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Embed images: float32 (N, d), rows of length 1.

    Images are decoded a batch at a time, so a lazy iterable costs the memory of a few batches. The
    network runs in float32 and in evaluation mode, which is undone afterwards.

    Args:
        net: a backbone, with its ``preprocessing``.
        images: encoded images (bytes) or decoded ones (uint8 RGB, (H, W, 3)), sizes may differ;
            with ``read``, whatever it takes.
        read: makes a decoded image of one of ``images``, in a thread of its own while the network
            is at work. Its UserError names the image itself.
        readers: threads that read.
        batch_size: images in one forward pass.
        flip: add the embedding of the mirror image before normalising (the flip test).
        device: where to run; by default where the network is.
        name: names image ``i`` in an error message.
        unreadable: without it an unreadable image is a UserError; with it the image's index is
            appended here and its row left out of the result.
        progress: called with the number of images done since the last call.

    Raises:
        UserError: an image cannot be decoded, or the network gives NaN or infinity.
    """
    first = next(net.parameters(), None)  # an exported network has none and takes any device
    place = torch.device(device or (first.device if first is not None else "cpu"))
    was_training = net.training
    net = net.to(place).eval()
    rows: list[np.ndarray] = []
    try:
        for taken, batch in _decoded(iter(images), batch_size, read, readers, name, unreadable):
            if batch:
                rows.append(_forward(net, batch, flip, place))
            if progress is not None:
                progress(taken)
    finally:
        net.train(was_training)
    if not rows:
        return np.zeros((0, int(getattr(net, "embedding_dim", 0))), np.float32)
    return np.concatenate(rows)


def or_nothing(read: Callable[[int], bytes], index: int) -> bytes:
    """Image ``index`` by a source's ``read``, or nothing, which `embed` counts as unreadable."""
    try:
        return read(index)
    except (OSError, UserError):
        return b""


@torch.inference_mode()
def _forward(
    net: nn.Module, batch: list[np.ndarray], flip: bool, place: torch.device
) -> np.ndarray:
    preprocess: Any = net.preprocessing
    if len({image.shape for image in batch}) == 1:
        pixels = torch.from_numpy(np.stack(batch)).to(place)
        inputs = preprocess(pixels.permute(0, 3, 1, 2))
    else:
        inputs = torch.cat(
            [preprocess(torch.from_numpy(i).to(place).permute(2, 0, 1)[None]) for i in batch]
        )
    with torch.autocast(place.type, enabled=False):
        embeddings = net(inputs).float()
        if flip:
            embeddings = embeddings + net(inputs.flip(3)).float()
    if not torch.isfinite(embeddings).all():
        raise UserError("the network gives NaN or infinite embeddings: its weights are unusable")
    return normalize(embeddings).cpu().numpy()


def _decoded(
    images: Iterator[Any],
    batch_size: int,
    read: Callable[[Any], np.ndarray] | None,
    readers: int,
    name: Callable[[int], str] | None,
    unreadable: list[int] | None,
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Batches of decoded images, each after the number of images that it was decoded from.

    The next batch is decoded while the network works on this one.
    """

    def as_pixels(image: Image) -> np.ndarray:
        return image if isinstance(image, np.ndarray) else decode(image)

    pool = ThreadPoolExecutor(readers)

    def submit(batch: list[Any]) -> list[Future[np.ndarray]]:
        return [pool.submit(read or as_pixels, image) for image in batch]

    def collect(start: int, futures: list[Future[np.ndarray]]) -> tuple[int, list[np.ndarray]]:
        batch = []
        for index, future in enumerate(futures, start):
            try:
                batch.append(future.result())
            except UserError as error:
                if unreadable is not None:
                    unreadable.append(index)
                elif read is not None:
                    raise
                else:
                    label = name(index) if name else f"image {index}"
                    raise UserError(f"{label} cannot be read: {error}") from error
        return len(futures), batch

    try:
        start, current = 0, submit(list(islice(images, batch_size)))
        while current:
            ahead = submit(list(islice(images, batch_size)))
            yield collect(start, current)
            start, current = start + len(current), ahead
    finally:
        pool.shutdown(cancel_futures=True)
