"""Muon: momentum whose update is orthogonalised, for the filters of a convolutional network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Coefficients of the odd quintic aX + b(XXᵀ)X + c(XXᵀ)²X, which drives singular values to about 1.
QUINTIC = (3.4445, -4.775, 2.0315)


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

    Each parameter (m, ...) is a matrix m × rest. Since its length is set to √m before each step,
    the length of an orthogonal one, ``lr`` is the relative length of a step, and weight decay has
    no part to play. That fits filters whose scale a normalisation layer undoes.

    Args:
        params: parameters of two or more dimensions.
        lr: length of a step relative to the filter's, above 0.
        momentum: μ, in [0, 1).
        steps: Newton–Schulz iterations.
        half: whether they are made of bfloat16 numbers, in which singular values end near 1 as
            well. That takes a tenth of the time on a GPU, 0.6 on a CPU that has such products.

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
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.steps, self.half = steps, half
        # From the start: torch.distributed.checkpoint would make a state by a step of rate 0, and
        # even that sets a filter's length.
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step. Filters of one shape are orthogonalised together."""
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
            for shape, parameters in by_shape.items():
                updates = self._momentum(parameters, group["momentum"])
                stacked = torch.stack([update.reshape(shape[0], -1) for update in updates])
                if self.half:
                    stacked = stacked.bfloat16()
                # The rate may be a tensor, for a step that is recorded.
                steps = orthogonalize(stacked, self.steps).to(parameters[0].dtype) * group["lr"]
                lengths = torch.stack(list(torch._foreach_norm(tuple(parameters))))
                scales = math.sqrt(shape[0]) / lengths
                for parameter, scale, step in zip(parameters, scales, steps, strict=True):
                    parameter.mul_(scale).sub_(step.view(shape))

    def _momentum(self, parameters: list[nn.Parameter], momentum: float) -> Sequence[Tensor]:
        """Nesterov's look-ahead gradients, after the buffers took the gradients in."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        return torch._foreach_add(gradients, buffers, alpha=momentum)
