"""Which device to compute on."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sphereface2.errors import UserError


def faster_in_bf16(device: torch.device) -> bool:
    """Whether networks train faster there in bfloat16 than in float32.

    On a CPU that has instructions for it a convolution is timed, in some 0.2 s: on a Xeon whose AMX
    is switched off, those of AVX512-BF16 take 1.7 times as long as float32's.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # of late versions
    has = any(has for name, has in known.items() if name.endswith("bf16"))
    return has and convolution_seconds(torch.bfloat16) < convolution_seconds(torch.float32)


def convolution_seconds(dtype: torch.dtype, *, rounds: int = 6) -> float:
    """What 3×3 filters of 64 channels take one CPU thread, forwards and backwards: the least round.

    The others' threads and the first round, which prepares it, do not count.
    """
    images, filters = (
        torch.ones(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
        for shape in ((16, 64, 20, 20), (64, 64, 3, 3))
    )
    images.requires_grad_(), filters.requires_grad_()
    threads, least = torch.get_num_threads(), math.inf
    torch.set_num_threads(1)  # as several wait for each other where other work has their cores
    try:
        for _ in range(rounds):
            start = time.perf_counter()
            made = torch.nn.functional.conv2d(images, filters, padding=1)
            torch.autograd.grad(made, [images, filters], torch.ones_like(made))
            least = min(least, time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)
    return least


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


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device, whose host waits for the copy except with CUDA.

    MPS would still be reading memory that is freed or written again meanwhile (pytorch issue
    189690).
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


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
