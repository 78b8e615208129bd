"""Which device to compute on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from sphereface2.errors import UserError


def resolve(name: str | None = None, local_rank: int = 0) -> torch.device:
    """The device called ``name``; ``None`` or ``auto`` is CUDA, else MPS, else the CPU.

    Args:
        name: what torch calls it: cpu, cuda, cuda:1, mps.
        local_rank: the GPU that plain ``cuda`` means, a process's place on its machine.

    Raises:
        UserError: the device is unknown or not present.
    """
    if name is None or name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        elif torch.backends.mps.is_available():
            name = "mps"
        else:
            name = "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", local_rank)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"the device {name!r} cannot be used here; use auto or cpu") from error
    return device


_inside = 0
_restore: Callable[[], None]
_lock = threading.Lock()


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions of float32 values in float32; torch's default on CUDA is TF32, of 10 bits.

    The switch is the whole process's: it stays while any thread is inside, so a thread that trains
    meanwhile is slower and more exact.
    """
    global _inside, _restore
    with _lock:
        if not _inside:
            _restore = _forbid_tf32()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _restore()


def _forbid_tf32() -> Callable[[], None]:
    """Returns what undoes it."""
    cudnn = torch.backends.cudnn
    try:
        before = cudnn.allow_tf32
    except RuntimeError:  # the program uses the newer switches, and torch wants no mixture
        precision, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "ieee"
        return lambda: setattr(cudnn.conv, "fp32_precision", precision)
    cudnn.allow_tf32 = False
    return lambda: setattr(cudnn, "allow_tf32", before)
