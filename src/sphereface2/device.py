"""Which device to compute on."""

from __future__ import annotations

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
