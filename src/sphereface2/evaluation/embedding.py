"""Images to embeddings with a trained network."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from sphereface2.embedder import Embedder
from sphereface2.errors import UserError

Image = bytes | np.ndarray


def embed(
    net: Any,
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
    """`Embedder.embed` of a network; to be replaced by an Embedder where it is called."""
    with Embedder(net, flip=flip, batch_size=batch_size, device=device, threads=readers) as one:
        return one.embed(images, read=read, name=name, unreadable=unreadable, progress=progress)


def or_nothing(read: Callable[[int], bytes], index: int) -> bytes:
    """Image ``index`` by a source's ``read``, or nothing, which `embed` counts as unreadable."""
    try:
        return read(index)
    except (OSError, UserError):
        return b""
