"""Muon: momentum whose update is orthogonalised, for the filters of a convolutional network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from sphereface2.errors import UserError, check_count, check_number

#: Coefficients of the odd quintic aX + b(XXᵀ)X + c(XXᵀ)²X, which drives singular values to about 1.
QUINTIC = (3.4445, -4.775, 2.0315)
#: A filter shorter than this, such as one that starts at 0, is not brought to its length.
SHORTEST = 1e-12


def orthogonalize(matrices: Tensor, steps: int = 4) -> Tensor:
    """Replace the singular values of each matrix by about 1 (Newton–Schulz iteration).

    Args:
        matrices: (..., m, n), any scale.
        steps: iterations of the quintic; 4 bring singular values above 1e-2 of the Frobenius norm
            into about [0.3, 1.3].

    Returns:
        (..., m, n).

    Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.

    Examples:
        >>> values = torch.linalg.svdvals(orthogonalize(torch.diag(torch.tensor([5.0, 4.0, 3.0]))))
        >>> bool((values > 0.6).all() and (values < 1.3).all())
        True
    """
    a, b, c = QUINTIC
    transposed = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.reshape(-1, *matrices.shape[-2:])
    x = x.mT if transposed else x
    norm = torch.linalg.matrix_norm(x, keepdim=True)
    x = x / norm.clamp_min(torch.finfo(x.dtype).tiny)
    # Each step multiplies X by a polynomial in XXᵀ. They all commute, so that their product is made
    # of the small Gram matrices, and the long X takes part at the beginning and the end alone.
    gram = x @ x.mT
    product: Tensor | None = None
    for left in reversed(range(steps)):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if left:
            gram = factor @ gram @ factor
    x = x if product is None else product @ x
    return (x.mT if transposed else x).view_as(matrices)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: W ← √m·W/‖W‖ − lr · orthogonalize(g + μ·v), v ← μ·v + g.

    Each parameter (m, ...) is a matrix m × rest; of one that is sharded over ranks
    (``fully_shard``) every rank orthogonalises the whole. Since its length is set to √m before each
    step, the length of an orthogonal one, ``lr`` is the relative length of a step, and weight decay
    has no part to play. That fits filters whose scale a normalisation layer undoes.

    Args:
        params: parameters of two or more dimensions.
        lr: length of a step relative to the filter's, above 0.
        momentum: μ, in [0, 1).
        steps: Newton–Schulz iterations, 1 or more.
        half: whether they are made of bfloat16 numbers, in which singular values end near 1 as
            well. That takes a tenth of the time on a GPU, 0.6 on a CPU that has such products.
            Neither this nor ``steps`` is part of a state dict.

    Raises:
        UserError: a value out of its range, or a parameter of fewer than two dimensions.

    Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.05,
        *,
        momentum: float = 0.9,
        steps: int = 4,
        half: bool = False,
    ) -> None:
        check_number("lr", lr, above=0)
        check_number("momentum", momentum, least=0, below=1)
        check_count("steps", steps, 1)
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.steps, self.half = steps, half

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        # From the start: torch.distributed.checkpoint would make a state by a step of rate 0, and
        # even that sets a filter's length.
        for parameter in self.param_groups[-1]["params"]:
            if parameter.ndim < 2:
                self.param_groups.pop()  # who catches the error goes on without the group
                raise UserError(
                    "Muon takes parameters of two or more dimensions, got one of shape "
                    f"{tuple(parameter.shape)}: give biases and scales to another optimiser"
                )
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"steps": self.steps, "half": self.half}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step. Filters of one shape are orthogonalised together."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = self._momentum(parameters, group["momentum"])
                stacked = torch.stack([_whole(update).reshape(shape[0], -1) for update in updates])
                if self.half:
                    stacked = stacked.bfloat16()
                # The rate may be a tensor, for a step that is recorded.
                steps = orthogonalize(stacked, self.steps).to(parameters[0].dtype) * group["lr"]
                norms = torch._foreach_norm(tuple(parameters))
                lengths = torch.stack([_whole(norm) for norm in norms])
                scales = math.sqrt(shape[0]) / lengths.clamp_min(SHORTEST)
                for parameter, scale, step in zip(parameters, scales, steps, strict=True):
                    parameter.mul_(scale).sub_(_split_as(parameter, step.view(shape)))
        return loss

    def _momentum(self, parameters: list[nn.Parameter], momentum: float) -> Sequence[Tensor]:
        """Nesterov's look-ahead gradients, after the buffers took the gradients in."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        return torch._foreach_add(gradients, buffers, alpha=momentum)


def _whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or all of one that is sharded over ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _split_as(parameter: Tensor, whole: Tensor) -> Tensor:
    """``whole``, which every rank has, sharded as the parameter is."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
