"""The loss between samples against its equation, written out sample by sample in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from sphereface2.errors import UserError
from sphereface2.heads import SampleToSample, SampleToSampleConfig, sample_to_sample

DIM, PEOPLE = 6, 9
CONFIG = SampleToSampleConfig(weight=0.7, s=12.0, m=0.15)


def batches(count, samples=5):
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        x = 3 * torch.randn(samples, DIM, generator=generator, dtype=torch.float64)
        # A person twice in a batch.
        labels = torch.randint(PEOPLE, (samples,), generator=generator)
        labels[-1] = labels[0]
        yield x.requires_grad_(), labels


@pytest.mark.parametrize("chunk", [100, 4])
def test_it_is_its_published_equation(chunk, monkeypatch):
    monkeypatch.setattr(sample_to_sample, "default_chunk", lambda *_: chunk)
    between = SampleToSample(DIM, PEOPLE, CONFIG).double()
    memory: dict[int, torch.Tensor] = {}
    threshold = None
    left_out = 0
    for x, labels in batches(6):
        if memory:
            unit = F.normalize(x, dim=1)
            sums, terms = [], []
            if threshold is None:
                for sample, label in zip(unit.detach(), labels.tolist(), strict=True):
                    others = [s for person, s in memory.items() if person != label]
                    sums.append(sum(math.exp(CONFIG.s * float(sample @ other)) for other in others))
                start = sum(map(math.log, sums)) / len(sums)
                threshold = torch.tensor(start, dtype=torch.float64, requires_grad=True)
                between.start(x, labels)
            for sample, label in zip(unit, labels.tolist(), strict=True):
                left_out += label not in memory
                for person, seen in memory.items():
                    z = CONFIG.s * (sample @ seen)
                    z = CONFIG.s * CONFIG.m - z + threshold if person == label else z - threshold
                    terms.append(F.softplus(z))
            expected = CONFIG.weight * sum(terms) / len(labels)
            loss = between(x, labels)
            torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
            ours = torch.autograd.grad(loss, [x, between.bias])
            theirs = torch.autograd.grad(expected, [x, threshold])
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(ours[1], -theirs[1], rtol=1e-6, atol=1e-9)
        between.remember(x, labels)
        for sample, label in zip(x.detach(), labels.tolist(), strict=True):
            memory[label] = F.normalize(sample, dim=0)
    assert left_out and 1 < len(memory) < PEOPLE
    nobody = torch.zeros(DIM, dtype=torch.float64)
    rows = torch.stack([memory.get(person, nobody) for person in range(PEOPLE)])
    torch.testing.assert_close(between.memory, rows)


def test_its_state_goes_on():
    first, second = (SampleToSample(DIM, PEOPLE, CONFIG).double() for _ in range(2))
    x, labels = next(batches(1))
    first.remember(x, labels)
    first.start(x, labels)
    second.load_state_dict(first.state_dict())
    first.start(x + 1, labels)
    second.start(x + 1, labels)  # it has started
    torch.testing.assert_close(second(x + 1, labels), first(x + 1, labels), rtol=0, atol=0)


def test_who_meets_nobody_else_does_not_start_the_bias_at_infinity():
    between, alone = (SampleToSample(DIM, 2, CONFIG).double() for _ in range(2))
    x, labels = torch.eye(DIM, dtype=torch.float64)[:2], torch.tensor([0, 0])
    for loss in (between, alone):
        loss.remember(x[:1], labels[:1])
    between.start(x, torch.tensor([0, 1]))  # the second meets the first, at a cosine of 0
    assert between.bias.item() == pytest.approx(-CONFIG.s * CONFIG.m / 2, abs=1e-6)
    alone.start(x, labels)
    assert not alone.started
    alone.remember(x[1:], torch.tensor([1]))
    assert torch.isfinite(alone(x, labels))
    alone.start(x[:1], labels[:1])  # at a cosine of 0, too
    torch.testing.assert_close(alone.bias, between.bias)


def test_a_batch_that_is_not_finite_is_not_remembered():
    between = SampleToSample(DIM, PEOPLE, CONFIG).double()
    first, second = batches(2)
    between.remember(*first)
    before = between.memory.clone()
    between.remember(second[0] * math.nan, second[1])
    assert torch.equal(between.memory, before)


def test_a_start_from_opposite_faces_is_exact_in_float32():
    """exp(s·cos - s) would be 0 there."""
    between = SampleToSample(DIM, PEOPLE, SampleToSampleConfig(weight=1.0, s=64.0, m=0.0))
    x = torch.eye(DIM)[:1]
    between.remember(-x, torch.tensor([1]))
    between.start(x, torch.tensor([0]))
    assert between.bias.item() == 64.0


@pytest.mark.parametrize("call", ["forward", "start", "remember"])
def test_what_does_not_fit_is_named(call):
    between = SampleToSample(DIM, PEOPLE, CONFIG)
    x = torch.randn(3, DIM)
    for labels, message in [
        (torch.tensor([0, 1, PEOPLE]), "label 9 is outside 0 … 8"),
        (torch.tensor([0, -1, 1]), "label -1 is outside"),
        (torch.tensor([0, 1]), "labels must have shape"),
        (torch.ones(3), "labels must be integers"),
    ]:
        with pytest.raises(UserError, match=message):
            getattr(between, call)(x, labels)
    getattr(between, call)(x, torch.arange(3, dtype=torch.int32))
    with pytest.raises(UserError, match="weight must be a number > 0, got 0"):
        SampleToSample(DIM, PEOPLE, SampleToSampleConfig())
    with pytest.raises(UserError, match="num_classes must be an integer ≥ 2"):
        SampleToSample(DIM, 1, CONFIG)
