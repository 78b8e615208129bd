"""CUDA graphs: the kernels of a function, recorded once and then started together.

A host needs 5 to 50 µs to start a kernel, and a small network's kernels take less. A recorded
graph of hundreds is started in the time of one.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor

from sphereface2.device import sent
from sphereface2.errors import UserError

T = TypeVar("T")

WARM_UP = 3
"""Calls before the recording, in which libraries choose their kernels and states are made."""


class Graphed(Generic[T]):
    """A function of tensors that is recorded at the fourth call and replayed from then on.

    Every call has the function's effect once: the first three run it, beside the current stream as
    recording demands, and the recording itself computes nothing. What the function reads must be
    its arguments, or tensors that stay where they are; numbers of Python are those of the
    recording for ever. It must not wait for the device. Random numbers of the device's own
    generator go on as without a graph.

    Args:
        function: of tensors; what it returns is overwritten by the next call.
        device: where it computes.
        what: what messages call it.
    """

    def __init__(self, function: Callable[..., T], device: torch.device, what: str) -> None:
        self.function, self.device, self.what = function, device, what
        self.calls = 0
        self._inputs: tuple[Tensor, ...] = ()
        self._output: T
        self._replay: Callable[[], None] | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *inputs: Tensor) -> T:
        """Call the function; tensors of other shapes than the first call's are not recorded.

        Args:
            inputs: on any device; those in pinned memory are not waited for.
        """
        if not self._inputs:
            self._inputs = tuple(torch.empty_like(one, device=self.device) for one in inputs)
        shapes = [(one.shape, one.dtype) for one in self._inputs]
        if shapes != [(one.shape, one.dtype) for one in inputs]:
            return self.function(*(sent(one, self.device) for one in inputs))
        for kept, one in zip(self._inputs, inputs, strict=True):
            kept.copy_(one, non_blocking=True)
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._beside()
        if self._replay is None:
            try:
                self._replay = self._record()
            except RuntimeError as error:
                raise UserError(
                    f"{self.what} cannot be recorded as a CUDA graph: set training.cuda_graph to "
                    f"false ({str(error).splitlines()[0]})"
                ) from error
        self._replay()
        return self._output

    def _beside(self) -> T:
        """Run the function in a stream of its own, between what comes before and after."""
        if self._stream is None:
            return self.function(*self._inputs)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            output = self.function(*self._inputs)
        current.wait_stream(self._stream)
        return output

    def _record(self) -> Callable[[], None]:
        """Record the function; returns what replays it into `_output`."""
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # another graph that is dropped meanwhile would spoil this one
        collects = gc.isenabled()
        gc.disable()
        current = torch.cuda.current_stream(self.device)
        try:
            # Other threads may allocate meanwhile, as that which pins the loader's batches does.
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._output = self.function(*self._inputs)
        finally:
            torch.cuda.set_stream(current)  # where a recording fails, torch does not
            if collects:
                gc.enable()
        return graph.replay
