"""Schedules, parameter groups, the moving average."""

import math

import pytest
import torch
from torch import nn

from sphereface2.training.config import TrainingConfig
from sphereface2.training.optim import (
    MovingAverage,
    build_optimizers,
    learning_rate_factor,
    set_learning_rate,
)


def test_schedules_at_chosen_points() -> None:
    cosine = TrainingConfig(schedule="cosine", warmup=0.1)
    assert learning_rate_factor(cosine, 0, 100) == pytest.approx(0.1)
    assert learning_rate_factor(cosine, 50, 100) == pytest.approx(0.5)
    assert learning_rate_factor(cosine, 99, 100) == pytest.approx(
        (1 + math.cos(math.pi * 0.99)) / 2
    )
    steps = TrainingConfig(schedule="step", warmup=0, milestones=[0.5, 0.78], gamma=0.1)
    factors = [learning_rate_factor(steps, step, 100) for step in (0, 49, 50, 77, 78, 99)]
    assert factors == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    polynomial = TrainingConfig(schedule="polynomial", warmup=0, power=2)
    assert learning_rate_factor(polynomial, 75, 100) == pytest.approx(0.0625)


def test_groups_hold_their_own_rates_and_decays() -> None:
    backbone = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    head = nn.Linear(4, 5)
    config = TrainingConfig(lr=0.1, head_lr_multiplier=10, weight_decay=1e-3, head_weight_decay=0.0)
    (optimizer,) = optimizers = build_optimizers(config, backbone, head)
    set_learning_rate(optimizers, 0.5)
    found = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert found[id(backbone[0].weight)] == pytest.approx((0.05, 1e-3))
    assert found[id(backbone[0].bias)] == pytest.approx((0.05, 0.0))
    assert found[id(backbone[1].weight)] == pytest.approx((0.05, 0.0))
    assert found[id(head.weight)] == pytest.approx((0.5, 0.0))
    assert len(found) == 6


def test_moving_average_is_the_weighted_sum_of_what_it_saw() -> None:
    network = nn.Linear(2, 2).double()
    average = MovingAverage(network, 0.9)
    expected = network.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    for step in range(30):
        with torch.no_grad():
            network.weight.copy_(torch.randn(2, 2, generator=generator, dtype=torch.float64))
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network.weight.detach()
        average.update(network, step)
    torch.testing.assert_close(average.average["weight"], expected)
