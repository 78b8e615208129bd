"""The losses of a run, kept on the device until somebody asks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

SMOOTHING = 0.05
"""Weight of a new loss in the smoothed one."""


class Losses(NamedTuple):
    """What a `LossWatch` has seen; NaN before the first step.

    Attributes:
        loss: of the last step, or of the step that went wrong.
        norm: its gradient's norm.
        first: loss of the first step.
        smoothed: exponential moving average of the losses.
        wrong_step: number of the first step that went wrong, from 1; 0: none.
        lowest: the smoothed loss's least value.
    """

    loss: float = math.nan
    norm: float = math.nan
    first: float = math.nan
    smoothed: float = math.nan
    wrong_step: int = 0
    lowest: float = math.nan


class LossWatch:
    """Decides on the device whether a step went wrong, and lets nothing pass from then on.

    A step is wrong if its loss or its gradient's norm is not finite, or if the smoothed loss
    exceeds a multiple of the first. The host reads what happened when it likes, not at each step.

    Args:
        device: where losses come from.
        max_ratio: the multiple, > 1.
        check_norm: whether the norm must be finite; with a gradient scaler it need not be.
    """

    def __init__(self, device: torch.device, max_ratio: float, *, check_norm: bool = True) -> None:
        self.max_ratio, self.check_norm = max_ratio, check_norm
        self._state = torch.tensor(Losses(), dtype=torch.float32, device=device)

    def resume(self, first: float, smoothed: float, lowest: float = math.nan) -> None:
        """Go on from what a checkpoint tells."""
        told = Losses(first=first, smoothed=smoothed, lowest=lowest)
        self._state.copy_(torch.tensor(told))

    def observe(self, loss: Tensor, norm: Tensor, step: int | Tensor) -> Tensor:
        """Take in a step before its update.

        Args:
            loss: () mean loss over all ranks.
            norm: () norm of the gradient over all ranks.
            step: its number, from 1; may be () on the device.

        Returns:
            () bool on the device: whether this step or one before it went wrong.
        """
        loss, norm = loss.float(), norm.float()
        _, _, first, smoothed, wrong_step, lowest = self._state.unbind()
        first = torch.where(first.isnan(), loss, first)
        smoothed = torch.where(smoothed.isnan(), loss, smoothed.lerp(loss, SMOOTHING))
        lowest = torch.fmin(lowest, smoothed)
        fine = loss.isfinite() & (smoothed <= self.max_ratio * first.abs())
        if self.check_norm:
            fine &= norm.isfinite()
        wrong = (~fine).float() * step
        seen = torch.stack([loss, norm, first, smoothed, wrong, lowest])
        # In place: a graph that was recorded finds it there.
        self._state.copy_(torch.where(wrong_step > 0, self._state, seen))
        return self._state[4] > 0

    def read(self) -> Losses:
        """What was seen; waits for the device."""
        seen = Losses(*self._state.tolist())
        return seen._replace(wrong_step=int(seen.wrong_step))
