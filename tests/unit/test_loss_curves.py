"""Recorded losses of tiny runs: a change of numerics beyond rounding fails.

python tests/unit/test_loss_curves.py    # records them anew, after a change that is meant
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sphereface2 import heads
from sphereface2.data.dataset import Batch
from sphereface2.training import config, sections
from sphereface2.training.distributed import World
from sphereface2.training.step import TrainingStep

RECORDED = Path(__file__).parents[1] / "assets" / "loss_curves.json"
PEOPLE, DIM, BATCH = 23, 8, 12


def numbers(generator: np.random.Generator, *shape: int) -> torch.Tensor:
    """Normal numbers that do not depend on torch's version."""
    return torch.from_numpy(generator.standard_normal(shape))


def head_cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every head, and of SphereFace2 every margin, gradient mode, bias and way to compute it."""
    for name in sorted(heads.available()):
        yield name, {"name": name}
        if "streaming" in heads.parameters(name):
            yield f"{name} streaming", {"name": name, "streaming": True, "chunk_size": 5}
    for margin, m in (("C", 0.3), ("A", 0.4), ("M", 1.5)):
        for detach in ("all", "margin"):
            options = {"name": "sphereface2", "margin_type": margin, "detach": detach, "m": m}
            label = f"sphereface2 {margin} {detach}"
            yield label, options
            yield f"{label} streaming", {**options, "streaming": True, "chunk_size": 5}
            yield f"{label} fused", {**options, "streaming": True, "chunk_size": 5, "fused": True}
    for bias in ("fixed", "zero", "per_class"):
        yield f"sphereface2 bias {bias}", {"name": "sphereface2", "bias": bias}


HEADS = dict(head_cases())


def head_curve(options: dict[str, Any]) -> list[float]:
    """Losses of 12 steps of SGD on a linear layer and a head, in float64."""
    options = dict(options)
    fused = options.pop("fused", False)
    generator = np.random.default_rng(0)
    head = heads.build(options.pop("name"), DIM, PEOPLE, **options).double()
    layer = torch.nn.Linear(6, DIM, bias=False).double()
    head.weight.data = numbers(generator, PEOPLE, DIM)
    layer.weight.data = numbers(generator, DIM, 6)
    rest = [p for p in head.parameters() if not fused or p is not head.weight]
    if fused:
        heads.FusedSGD(head, lr=0.05, momentum=0.9, weight_decay=1e-3)
    sgd = torch.optim.SGD([*layer.parameters(), *rest], lr=0.05, momentum=0.9, weight_decay=1e-3)
    losses = []
    for _ in range(12):
        x = numbers(generator, BATCH, 6)
        labels = torch.from_numpy(generator.integers(PEOPLE, size=BATCH))
        loss = head(layer(x), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return losses


TRAINERS = {
    "sgd": {"training.lr": 0.1, "training.weight_decay": 0.01},
    "nesterov": {"training.nesterov": True, "training.schedule": "step"},
    "adamw": {"training.optimizer": "adamw", "training.lr": 1e-3, "training.accumulate": 2},
    "bf16": {"training.autocast": "bf16", "training.clip_norm": None},
    "fused": {
        "training.fused_head": True,
        "training.clip_norm": None,
        "training.clip_embedding_norm": 0.01,
        "head.streaming": True,
        "training.head_lr_multiplier": 4.0,
    },
    "cosface": {"head": {"name": "cosface"}, "training.clip_norm": 0.5},
}


def training_curve(settings: dict[str, Any]) -> list[float]:
    """Losses and gradient norms of eight steps of the training loop, in float32."""
    tree: dict[str, Any] = {
        "backbone": {"name": "sfnet4", "width": 0.125, "input_size": 32, "batch_norm": True},
        "training": {"batch_size": BATCH, "threads": 1, "epochs": 8, "device": "cpu"},
    }
    for key, value in settings.items():
        sections.assign(tree, key, value)
    run_config = config.from_dict(tree)
    accumulate = run_config.training.accumulate
    step = TrainingStep(run_config, World(0, 1, 0, 1, torch.device("cpu")), PEOPLE)
    generator = np.random.default_rng(1)
    for parameter in (*step.network.parameters(), *step.head.parameters()):
        if parameter.ndim > 1:
            drawn = numbers(generator, *parameter.shape)
            parameter.data.copy_(drawn / parameter[0].numel() ** 0.5)
    step.forward.train()
    values = []
    for _ in range(8):
        batches = []
        for _ in range(accumulate):
            images = generator.integers(256, size=(BATCH // accumulate, 3, 32, 32), dtype=np.uint8)
            labels = generator.integers(PEOPLE, size=BATCH // accumulate)
            places = torch.arange(len(labels))
            batches.append(Batch(torch.from_numpy(images), torch.from_numpy(labels), [], places))
        values += [float(value) for value in step(batches)]
    return values


@pytest.mark.parametrize("case", HEADS)
def test_heads_lose_as_recorded(case: str) -> None:
    expected = json.loads(RECORDED.read_text())["heads"][case]
    assert head_curve(HEADS[case]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("case", TRAINERS)
def test_the_training_loop_loses_as_recorded(case: str) -> None:
    expected = json.loads(RECORDED.read_text())["training"][case]
    tolerance, steps = 5e-4, len(expected)
    if case == "bf16":  # whose rounding differs between processors and grows from step to step
        tolerance, steps = 2e-2, len(expected) // 2
    found = training_curve(TRAINERS[case])
    assert len(found) == len(expected)
    assert found[:steps] == pytest.approx(expected[:steps], rel=tolerance)


def record() -> None:
    curves = {
        "heads": {case: head_curve(options) for case, options in HEADS.items()},
        "training": {case: training_curve(settings) for case, settings in TRAINERS.items()},
    }
    RECORDED.write_text(json.dumps(curves, indent=0).replace(",\n", ", ") + "\n")


if __name__ == "__main__":
    record()
