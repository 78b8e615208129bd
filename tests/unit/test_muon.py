"""Muon against an independent computation in NumPy, and what it must not touch."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch

from sphereface2 import backbones, heads
from sphereface2.errors import UserError
from sphereface2.training.config import TrainingConfig
from sphereface2.training.muon import Muon, orthogonalize
from sphereface2.training.optim import build_optimizers


def newton_schulz(matrix: np.ndarray, steps: int) -> np.ndarray:
    """By the singular values: the quintic acts on each of them."""
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(steps):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return (u * s) @ v


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (40, 2, 3, 3), (5, 5, 1, 1)])
def test_steps_are_those_of_the_formula(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    start = rng.normal(size=shape)
    others = [torch.nn.Parameter(torch.tensor(rng.normal(size=shape))) for _ in range(2)]
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = Muon([parameter, *others], lr=0.05, momentum=0.9)
    value, buffer = start, np.zeros(shape)
    for _ in range(3):
        gradient = rng.normal(size=shape)
        for one in (parameter, *others):
            one.grad = torch.tensor(gradient)
        optimizer.step()
        buffer = 0.9 * buffer + gradient
        update = newton_schulz((gradient + 0.9 * buffer).reshape(shape[0], -1), 4)
        value = value * np.sqrt(shape[0]) / np.sqrt((value**2).sum())
        value = value - 0.05 * update.reshape(shape)
        np.testing.assert_allclose(parameter.detach().numpy(), value, atol=1e-9)


def test_a_copy_steps_as_the_original() -> None:
    layer, gradient = torch.nn.Linear(6, 4), torch.randn(4, 6)
    optimizer = Muon([layer.weight], steps=3)
    for copied in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
        ours, theirs = copied((optimizer, layer.weight)), (optimizer, layer.weight)
        for one, weight in (ours, theirs):
            weight.grad = gradient.clone()
            one.step()
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=0)


def test_filters_that_start_at_zero_move_and_vectors_are_refused() -> None:
    torch.manual_seed(0)
    network = backbones.build("sfnet10", width=0.125, input_size=32, residual_scale=0.0)
    filters = [p for p in network.parameters() if p.ndim > 1]
    optimizer = Muon(filters[:1])
    optimizer.add_param_group({"params": filters[1:]})
    for _ in range(2):
        optimizer.step(lambda: network(torch.randn(2, 3, 32, 32)).square().sum().backward())
    assert all(p.isfinite().all() and p.any() for p in filters)
    with pytest.raises(UserError, match=r"two or more dimensions, got one of shape \(8,\)"):
        Muon(network.parameters())
    with pytest.raises(UserError, match="two or more dimensions"):
        optimizer.add_param_group(
            {"params": [torch.nn.Parameter(torch.ones(3, 3)), network.fc.bias]}
        )
    assert len(optimizer.param_groups) == 2 and len(optimizer.state) == len(filters)
    for wrong in ({"lr": -0.1}, {"momentum": 1.0}, {"steps": 0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Muon(filters, **wrong)


def test_the_scale_of_a_gradient_does_not_matter() -> None:
    gradient = torch.randn(3, 16, 40, generator=torch.Generator().manual_seed(0))
    for scale in (1e-6, 1e6):
        torch.testing.assert_close(
            orthogonalize(scale * gradient), orthogonalize(gradient), rtol=1e-2, atol=1e-3
        )
    assert orthogonalize(torch.zeros(4, 4)).eq(0).all()


def test_half_precision_keeps_the_direction() -> None:
    gradient = torch.randn(2, 48, 300, generator=torch.Generator().manual_seed(0))
    steps: list[torch.Tensor] = []
    for half in (False, True):
        parameter = torch.nn.Parameter(torch.ones_like(gradient[0]))
        parameter.grad = gradient[0].clone()
        Muon([parameter], lr=1.0, half=half).step()
        steps.append((math.sqrt(48 / parameter.numel()) - parameter.detach()).flatten())
    assert torch.cosine_similarity(*steps, dim=0) > 0.999
    assert not torch.equal(*steps)


@pytest.mark.parametrize(("fused", "linear"), [(False, False), (True, False), (False, True)])
def test_filters_are_taken_and_the_rate_follows_the_schedule(fused: bool, linear: bool) -> None:
    network = backbones.build("sfnet4", width=0.125, input_size=32, batch_norm=True)
    head = heads.build("sphereface2", embedding_dim=512, num_classes=7, streaming=fused)
    config = TrainingConfig(
        optimizer="muon",
        muon_lr=0.03,
        muon_linear=linear,
        fused_head=fused,
        clip_norm=None,
        lr=0.2,
        autocast="bf16" if linear else "off",
    )
    optimizers = build_optimizers(config, network, head)
    (muon,) = [one for one in optimizers if isinstance(one, Muon)]
    taken = {id(p) for group in muon.param_groups for p in group["params"]}
    assert taken == {id(p) for p in network.parameters() if p.ndim == 4 or (linear and p.ndim == 2)}
    assert muon.param_groups[0]["base_lr"] == 0.03
    assert muon.half == linear
    everything = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    owned = {id(p) for p in [*network.parameters(), *head.parameters()]}
    assert sorted(map(id, everything)) == sorted(owned)
