"""Optimiser, learning-rate schedule and the weights' moving average."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from sphereface2.heads import FusedSGD, Head
from sphereface2.heads.sharding import local
from sphereface2.training.config import TrainingConfig
from sphereface2.training.muon import Muon


def learning_rate_factor(config: TrainingConfig, step: int, total_steps: int) -> float:
    """Factor on the base rate at ``step`` in [0, total_steps): warm-up, then the schedule.

    The warm-up is linear over the first ``warmup`` share of the run; ``cosine`` falls to 0 as
    (1 + cos(pi s)) / 2, ``polynomial`` as (1 - s) ** power, ``step`` by ``gamma`` at each
    milestone, where s in [0, 1) is the share of the whole run that is done.
    """
    share = step / total_steps
    warmup_steps = round(config.warmup * total_steps)
    ramp = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    if config.schedule == "cosine":
        return ramp * 0.5 * (1 + math.cos(math.pi * share))
    if config.schedule == "polynomial":
        return ramp * (1 - share) ** config.power
    passed = sum(share >= milestone for milestone in config.milestones)
    return ramp * config.gamma**passed


def belongs(name: str, part: str) -> bool:
    """Whether a parameter or module of that dotted name is ``part`` or within it.

    Example:
        >>> belongs("stages.1.conv.weight", "stages.1"), belongs("stages.10.conv", "stages.1")
        (True, False)
    """
    return f"{name}.".startswith(f"{part}.")


def _by_factor(
    named: dict[str, nn.Parameter], factors: dict[str, float]
) -> list[tuple[float, list[nn.Parameter]]]:
    """The parameters of each factor on the rate, 1 first."""
    found: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in named.items():
        parts = [part for part in factors if belongs(name, part)]
        factor = factors[max(parts, key=len)] if parts else 1.0
        found.setdefault(factor, []).append(parameter)
    return list(found.items())


def build_optimizers(
    config: TrainingConfig,
    backbone: nn.Module,
    head: Head,
    teacher: nn.Module | None = None,
    samples: nn.Module | None = None,
) -> list[torch.optim.Optimizer]:
    """SGD or AdamW with one parameter group a kind; Muon for filters and a fused head's own after.

    Weight decay spares vectors and scalars (normalisation, activation slopes, biases): they are
    no filter whose scale the decay could hold. The prototypes have a rate and decay of their own.
    A teacher's map is trained like the backbone, the bias of a loss between samples like a head's.
    What is frozen has no part in it: a resumption gives it no state back, and the checkpoint after
    would lack what the next resumption looks for.
    """
    body = _trained(backbone)
    if teacher is not None:
        body |= {f"teacher.{name}": p for name, p in _trained(teacher).items()}
    groups: list[tuple[list[nn.Parameter], float, float]] = []
    filters: list[dict[str, Any]] = []
    for factor, parameters in _by_factor(body, config.lr_factors):
        decayed = [p for p in parameters if p.ndim > 1]
        if config.optimizer == "muon":
            taken = (2, 4) if config.muon_linear else (4,)
            chosen = [p for p in decayed if p.ndim in taken]
            decayed = [p for p in decayed if p.ndim not in taken]
            if chosen:
                filters.append({"params": chosen, "base_lr": config.muon_lr * factor})
        groups.append((decayed, factor, config.weight_decay))
        groups.append(([p for p in parameters if p.ndim <= 1], factor, 0.0))
    of_head = _trained(head).values()
    prototypes = [p for p in of_head if p.ndim > 1]
    head_rest = [p for p in of_head if p.ndim <= 1]
    head_rest += [] if samples is None else samples.parameters()
    muon = partial(Muon, momentum=config.momentum, half=config.autocast == "bf16")
    orthogonal = [muon(filters, config.muon_lr)] if filters else []
    head_rate = config.head_lr_multiplier
    decay = config.head_weight_decay
    head_decay = config.weight_decay if decay is None else decay
    fused: list[torch.optim.Optimizer] = []
    if config.fused_head:
        prototypes = [p for p in prototypes if p is not head.weight]
        fused = [_fused(config, head, head_decay)]
    groups += [(prototypes, head_rate, head_decay), (head_rest, head_rate, 0.0)]
    settings = [
        {"params": params, "lr": config.lr * rate, "base_lr": config.lr * rate, "weight_decay": wd}
        for params, rate, wd in groups
        if params
    ]
    if config.optimizer == "adamw":
        return [_begun(torch.optim.AdamW(settings, lr=config.lr))]
    sgd = torch.optim.SGD(
        settings,
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=config.cuda_graph or None,  # that alone takes a rate from the device
    )
    return [_begun(sgd), *orthogonal, *fused]


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _begun(optimizer: torch.optim.AdamW | torch.optim.SGD) -> torch.optim.Optimizer:
    """The optimiser with the state that parameters else get with their first gradient.

    A loss may begin later, or weigh nothing: a checkpoint holds the state of all parameters anyhow.
    """
    averages = ("exp_avg", "exp_avg_sq")
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if isinstance(optimizer, torch.optim.AdamW):
                state["step"] = torch.tensor(0.0)
                state |= {name: torch.zeros_like(parameter) for name in averages}
            elif group["momentum"]:
                state["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _fused(config: TrainingConfig, head: Head, decay: float) -> FusedSGD:
    rate = config.lr * config.head_lr_multiplier
    fused = FusedSGD(
        head,
        rate,
        momentum=config.momentum,
        weight_decay=decay,
        nesterov=config.nesterov,
        momentum_dtype=config.fused_momentum,
    )
    fused.param_groups[0]["base_lr"] = rate
    return fused


def set_learning_rate(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Set every group's rate to ``factor`` times its base rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


class MovingAverage:
    """Exponential moving average of a network's parameters and floating-point buffers.

    average <- decay * average + (1 - decay) * value after every step, with the decay held at
    (1 + step) / (10 + step) at first so that the random start is forgotten.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.average = {k: v.detach().clone() for k, v in network.state_dict().items()}

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Fold in the network's values after optimiser step ``step`` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        floating: list[tuple[torch.Tensor, torch.Tensor]] = []
        counts: list[tuple[torch.Tensor, torch.Tensor]] = []
        for key, value in network.state_dict().items():
            kind = floating if value.is_floating_point() else counts
            kind.append((self.average[key], value))
        averages, values = zip(*floating, strict=True)
        torch._foreach_lerp_(averages, values, 1 - decay)
        if counts:
            averages, values = zip(*counts, strict=True)
            torch._foreach_copy_(averages, values)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> torch.Tensor:
    """Clip by the global norm and return the norm before clipping (scalar).

    Sharded parameters count with the shards of all ranks.
    """
    parameters = [p for p in parameters if p.grad is not None]
    plain = [p for p in parameters if not isinstance(p.grad, DTensor)]
    sharded = [p.grad for p in parameters if isinstance(p.grad, DTensor)]
    norm = nn.utils.get_total_norm([p.grad for p in plain if p.grad is not None])
    for gradient in sharded:
        part = torch.linalg.vector_norm(gradient)
        assert isinstance(part, DTensor)
        norm = torch.hypot(norm, part.full_tensor())
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(plain, max_norm, norm)
        for gradient in sharded:
            local(gradient).mul_((max_norm / (norm + 1e-6)).clamp(max=1))
    return norm


def drop_gradients(parameters: Iterable[nn.Parameter], drop: torch.Tensor) -> None:
    """Set all gradients to 0 if ``drop``, a () bool on their device, is true."""
    if drop.device.type == "cpu" and not drop:  # there the question waits for nobody
        return
    for parameter in parameters:
        if parameter.grad is not None:
            local(parameter.grad).masked_fill_(drop, 0)
