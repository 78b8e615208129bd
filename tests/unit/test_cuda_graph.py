"""A recorded step on the CPU: operations are kept with their arguments and done again.

As in a CUDA graph, a number of Python or a tensor made anew by the host stays what it was in the
recording, and whoever asks for a tensor's value is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sphereface2.cuda_graph import WARM_UP, Graphed
from sphereface2.data.dataset import Batch, FaceDataset
from sphereface2.data.sampler import BatchKey
from sphereface2.data.transforms import Augmentation
from sphereface2.errors import UserError
from sphereface2.training import config, sections
from sphereface2.training import step as stepping
from sphereface2.training.config import TeacherConfig
from sphereface2.training.distributed import World
from sphereface2.training.optim import set_learning_rate
from sphereface2.training.step import TrainingStep
from sphereface2.training.teacher import Teacher

PEOPLE, BATCH, STEPS = 12, 6, 9


class Recorder(TorchDispatchMode):
    """Keeps every operation, and does all of them again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, ...]] = []
        self.replays = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # On the CPU alone a head asks whether the gradient from above is 1.
        reads = "_local_scalar_dense" in str(operation) and args[0].dtype != torch.bool
        if reads or "nonzero" in str(operation):
            raise RuntimeError(f"the host waits for {operation}")
        results = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, results))
        return results

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:  # unlike a graph's, this recording has had its effect
            return
        for operation, args, kwargs, results in self.operations:
            again = operation(*args, **kwargs)
            for old, new in zip(tree_leaves(results), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    recorders: list[Recorder] = []

    def record(self: Graphed[Any]) -> Callable[[], None]:
        recorders.append(Recorder())
        with recorders[-1]:
            self._output = self.function(*self._inputs)
        return recorders[-1].replay

    monkeypatch.setattr(Graphed, "_record", record)
    monkeypatch.setattr(stepping, "GRAPHED", ["cpu"])
    return recorders


def settings(**changes: Any) -> config.RunConfig:
    tree: dict[str, Any] = {
        "backbone": {
            "name": "sfnet4",
            "width": 0.125,
            "input_size": 32,
            "embedding_dim": 8,
            "batch_norm": True,
            "dropout": 0.1,
        },
        "head": {"loss_weight": 5.0},
        "training": {"batch_size": BATCH, "threads": 1, "lr": 0.02},
    }
    for key, value in changes.items():
        sections.assign(tree, key.replace("__", "."), value)
    return config.from_dict(tree)


def training_step(**changes: Any) -> TrainingStep:
    teacher = None
    if changes.pop("teacher", False):
        rows = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        teacher = Teacher(rows, np.arange(40) % PEOPLE, 8, TeacherConfig())
    place = World(0, 1, 0, 1, torch.device("cpu"))
    step = TrainingStep(settings(**changes), place, PEOPLE, teacher)
    step.begin(BATCH)
    return step


def batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    return Batch(
        torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8, generator=generator),
        torch.randint(PEOPLE, (BATCH,), generator=generator),
        [],
        torch.randint(40, (BATCH,), generator=generator),
    )


def trained(step: TrainingStep, steps: int = STEPS) -> list[float]:
    torch.manual_seed(7)
    losses = []
    for number in range(1, steps + 1):
        set_learning_rate(step.optimizers, 1 / number)
        losses.append(step([batch(number)], number)[0].item())
    return losses


FUSED = {
    "training__fused_head": True,
    "training__clip_norm": None,
    "training__clip_embedding_norm": 1.0,
    "head__streaming": True,
}
CASES: dict[str, dict[str, Any]] = {
    "sgd": {"training__nesterov": True},
    "no momentum": {"training__momentum": 0.0},
    "muon, teacher": {"training__optimizer": "muon", "teacher": True},
    "muon, bf16": {"training__optimizer": "muon", "training__autocast": "bf16"},
    "streaming": {"head__streaming": True, "head__chunk_size": 5, "head__bias": "per_class"},
    "sampled": {"head__negatives": "uniform", "head__negative_share": 0.3},
    "fused": FUSED,
    "sphereface": {"head": {"name": "sphereface"}},
    "adaface": {"head": {"name": "adaface", "s": 8.0}},
}


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_are_the_steps(case: str, recorded: list[Recorder]) -> None:
    eager = training_step(**CASES[case])
    graphed = training_step(**CASES[case], training__cuda_graph=True)
    expected, found = trained(eager), trained(graphed)
    assert [one.replays for one in recorded] == [STEPS - WARM_UP]
    assert len(recorded[0].operations) > 100
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    for name, module in eager.modules.items():
        for key, value in module.state_dict().items():
            ours = graphed.modules[name].state_dict()[key]
            torch.testing.assert_close(ours, value, rtol=1e-3, atol=1e-4, msg=f"{name} {key}")
    for ours, theirs in zip(graphed.watch.read(), eager.watch.read(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    rates = [group["lr"] for one in graphed.optimizers for group in one.param_groups]
    assert all(isinstance(rate, float) for rate in rates)


def test_a_loss_between_samples_begins_in_a_step_that_is_not_replayed(
    recorded: list[Recorder],
) -> None:
    changes = {"sample_to_sample__weight": 0.3, "sample_to_sample__s": 8.0}
    eager, graphed = training_step(**changes), training_step(**changes, training__cuda_graph=True)
    eager.samples_from = graphed.samples_from = WARM_UP + 3
    np.testing.assert_allclose(trained(graphed), trained(eager), rtol=1e-4)
    assert [one.replays for one in recorded] == [STEPS - WARM_UP - 1]
    assert eager.samples is not None and graphed.samples is not None
    before = -8.0 * 0.1 / 2  # what a bias without people would start at
    assert eager.samples.bias.item() < before - 1
    for key, value in eager.samples.state_dict().items():
        ours = graphed.samples.state_dict()[key]
        torch.testing.assert_close(ours, value, rtol=1e-3, atol=1e-4, msg=key)


def test_what_goes_wrong_in_a_replayed_step_is_told_with_its_number(
    recorded: list[Recorder],
) -> None:
    step = training_step(training__cuda_graph=True)
    trained(step, WARM_UP + 2)
    with torch.no_grad():
        next(step.network.parameters()).fill_(math.inf)
    for number in (WARM_UP + 3, WARM_UP + 4):
        step([batch(number)], number)
    assert step.watch.read().wrong_step == WARM_UP + 3


def test_another_size_of_batch_is_not_replayed(recorded: list[Recorder]) -> None:
    step = training_step(training__cuda_graph=True)
    trained(step, WARM_UP + 2)
    whole = batch(1)
    half = Batch(whole.images[:3], whole.labels[:3], [], whole.positions[:3])
    before = step.head.weight.detach().clone()
    step([half], 6)
    assert recorded[0].replays == 2
    assert not torch.equal(step.head.weight, before)


@pytest.mark.usefixtures("recorded")
def test_a_host_that_waits_is_refused_in_a_sentence() -> None:
    step = training_step(training__cuda_graph=True)
    trained(step, WARM_UP)
    step.head.register_forward_hook(lambda _module, _inputs, loss: loss * loss.item())
    with pytest.raises(UserError, match=r"step cannot be recorded .*training\.cuda_graph"):
        step([batch(4)], 4)


class Thirty:
    """Thirty images' names, without images."""

    name = staticmethod(str)

    def __len__(self) -> int:
        return 30


def test_recorded_batches_are_the_batches(recorded: list[Recorder]) -> None:
    rng = np.random.default_rng(0)
    augmentation = Augmentation(
        24,
        affine=0.5,
        crop=0.5,
        low_resolution=0.4,
        light=0.3,
        photometric=0.5,
        jpeg=0.4,
        erase=0.5,
    )
    pixels = torch.from_numpy(rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8))
    source = Thirty()
    found = []
    for graphed in (False, True):
        dataset = FaceDataset(source, np.arange(30), np.arange(30), augmentation=augmentation)
        dataset.max_unreadable = 0.1
        dataset.pixels, dataset.readable = pixels, np.arange(30) != 4
        if graphed:
            dataset.record()
        keys = [BatchKey(0, n, [(5 * n + i) % 30 for i in range(6)], 0) for n in range(WARM_UP + 4)]
        found.append(
            [
                batch._replace(images=batch.images.clone())
                for batch in map(dataset.__getitem__, keys)
            ]
        )
    assert [one.replays for one in recorded] == [4]
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert ours.unreadable == theirs.unreadable


@pytest.mark.parametrize(
    "wrong",
    [
        {"training__autocast": "fp16"},
        {"training__optimizer": "adamw"},
        {"training__accumulate": 2},
        {"head__negatives": "hard"},
        {"head": {"name": "q_margin", "streaming": True}},
    ],
)
def test_what_cannot_be_recorded_is_refused(wrong: dict[str, Any]) -> None:
    (key,) = wrong
    named = key.removeprefix("head__").removeprefix("training__")
    with pytest.raises(UserError, match=rf"{named}.* must .*cuda_graph"):
        settings(**wrong, training__cuda_graph=True)


def test_other_devices_are_refused() -> None:
    with pytest.raises(UserError, match=r"one CUDA device, and this is cpu with 1 rank"):
        training_step(training__cuda_graph=True)
