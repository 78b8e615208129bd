"""Which device to compute on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sphereface2.errors import UserError


def has_bf16(device: torch.device) -> bool:
    """Whether it multiplies bfloat16 numbers itself, and not by many times the work in float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of late versions
    return any(has for name, has in known.items() if name.endswith("bf16"))


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
        torch.zeros(1, device=device).item()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"the device {name!r} cannot be used here; use auto or cpu") from error
    return device


_inside = 0
_restore: Callable[[], None]
_lock = threading.Lock()


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Convolutions of float32 values in float32; torch's default on CUDA is TF32, of 10 bits.

    Nor does cuDNN try its algorithms, which pays only for batches of one size. The switches are the
    whole process's: they stay while any thread is inside, so a thread that trains meanwhile is
    slower and more exact.
    """
    global _inside, _restore
    with _lock:
        if not _inside:
            _restore = _switch()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _restore()


def _switch() -> Callable[[], None]:
    """Returns what undoes it."""
    cudnn: Any = torch.backends.cudnn
    try:
        before = [(cudnn, "benchmark", cudnn.benchmark), (cudnn, "allow_tf32", cudnn.allow_tf32)]
    except RuntimeError:  # the program uses torch's newer switches, and torch wants no mixture
        precision = cudnn.conv.fp32_precision
        before = [(cudnn, "benchmark", cudnn.benchmark), (cudnn.conv, "fp32_precision", precision)]
    for where, name, _ in before:
        setattr(where, name, "ieee" if name == "fp32_precision" else False)

    def restore() -> None:
        for where, name, value in before:
            setattr(where, name, value)

    return restore
