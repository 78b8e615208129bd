"""The fused step against torch's own optimiser, and its rounding against probability."""

import io

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from sphereface2 import heads
from sphereface2.heads.fused import stochastic_round

RATES = [0.1, 0.1, 0.02, 0.3, 0.05]


def batches(classes=53, dim=8, batch=6):
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(batch, dim, generator=generator),
            torch.randint(classes, (batch,), generator=generator),
        )
        for _ in RATES
    ]


def head(**options):
    torch.manual_seed(0)
    return heads.SphereFace2(8, 53, streaming=True, chunk_size=10, r=8, **options)


def train(head, optimizer):
    embedding_gradients = []
    for rate, (x, labels) in zip(RATES, batches(), strict=True):
        optimizer.param_groups[0]["lr"] = rate
        x = x.requires_grad_()
        head(x, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        embedding_gradients.append(x.grad)
    return embedding_gradients


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.9, "weight_decay": 5e-4},
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
        {"momentum": 0.0, "weight_decay": 0.01},
    ],
)
@pytest.mark.parametrize("kind", ["C", "A", "M"])
def test_equals_torch_sgd_to_the_last_bit(settings, kind):
    plain, fused = head(margin_type=kind), head(margin_type=kind)
    expected = train(plain, torch.optim.SGD([plain.weight], lr=1.0, **settings))
    optimizer = heads.FusedSGD(fused, lr=1.0, **settings)
    found = train(fused, optimizer)
    assert torch.equal(fused.weight, plain.weight)
    assert fused.weight.grad is None
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_stochastic_rounding_is_exact_on_average_and_at_bfloat16_numbers():
    torch.manual_seed(0)
    values = torch.tensor([1.0, -2.5, 0.0, 1 + 2**-9, -3.14159, 1e-30, 7e30])
    exact = values.to(torch.bfloat16).float() == values
    many = values.repeat(200_000, 1)
    noise = torch.randint(65536, many.shape, dtype=torch.int32)
    rounded = stochastic_round(many.clone(), noise).double()
    assert torch.equal(rounded[:, exact], many[:, exact].double())
    step = (values.abs() * 2**-7).double().clamp_min(1e-40)  # at least one bfloat16 spacing
    error = (rounded.mean(0) - values.double()).abs() / step
    assert (error < 5 / 200_000**0.5).all()
    assert ((rounded - many).abs() <= step).all()


def test_bfloat16_momentum_follows_float32():
    exact, rounded = head(), head()
    train(exact, heads.FusedSGD(exact, lr=1.0))
    optimizer = heads.FusedSGD(rounded, lr=1.0, momentum_dtype="bfloat16")
    train(rounded, optimizer)
    assert optimizer.state[rounded.weight]["momentum_buffer"].dtype == torch.bfloat16
    difference = (rounded.weight - exact.weight).norm() / (exact.weight - head().weight).norm()
    assert 0 < difference < 0.02


def test_bfloat16_weights_learn_steps_far_below_their_spacing():
    """Many steps of 1/20 of a spacing: rounding to nearest would stand still."""
    torch.manual_seed(0)
    coarse = heads.SphereFace2(8, 53, streaming=True, weight_dtype="bfloat16", r=8)
    fine = heads.SphereFace2(8, 53, streaming=True, r=8)
    with torch.no_grad():
        fine.weight.copy_(coarse.weight)
    start = torch.nn.functional.normalize(fine.weight.detach().clone())
    for one in (coarse, fine):
        heads.FusedSGD(one, lr=2e-5, momentum=0.0)
    x, labels = batches()[0]
    for _ in range(400):
        for one in (coarse, fine):
            one(x.requires_grad_(), labels)
    moved = torch.nn.functional.normalize(fine.weight.detach()) - start
    found = torch.nn.functional.normalize(coarse.weight.detach().float()) - start
    assert moved.abs().max() < 0.05
    own = labels.unique()
    cosine = torch.nn.functional.cosine_similarity(found[own].flatten(), moved[own].flatten(), 0)
    assert cosine > 0.9


def test_no_step_without_training_or_without_gradients():
    one = head()
    heads.FusedSGD(one, lr=1.0)
    x, labels = batches()[0]
    one(x, labels)  # takes a step
    one.eval()
    one(x, labels)  # renormalises
    before = one.weight.detach().clone()
    one(x.requires_grad_(), labels).backward()
    one.train()
    with torch.no_grad():
        one(x, labels)
    assert torch.equal(one.weight, before)


def test_state_survives_storage_with_its_type():
    one, two = (head() for _ in range(2))
    first = heads.FusedSGD(one, lr=1.0, momentum_dtype="bfloat16")
    train(one, first)
    stored = io.BytesIO()
    torch.save(first.state_dict(), stored)
    stored.seek(0)
    second = heads.FusedSGD(two, lr=0.5, momentum_dtype="bfloat16")
    second.load_state_dict(torch.load(stored))
    momentum = second.state[two.weight]["momentum_buffer"]
    assert momentum.dtype == torch.bfloat16
    assert torch.equal(momentum, first.state[one.weight]["momentum_buffer"])
    assert second.param_groups[0]["lr"] == RATES[-1]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_checkpoint_before_the_first_step_leaves_no_gradient(momentum):
    fused = head()
    get_optimizer_state_dict(fused, heads.FusedSGD(fused, lr=1.0, momentum=momentum))
    assert fused.weight.grad is None


def test_what_cannot_be_is_said():
    with pytest.raises(ValueError, match="streaming=True"):
        heads.FusedSGD(heads.SphereFace2(4, 5), lr=0.1)
    with pytest.raises(ValueError, match="CosFace needs its loss before its gradient"):
        heads.FusedSGD(heads.CosFace(4, 5, streaming=True), lr=0.1)
    with pytest.raises(ValueError, match="momentum must be a number ≥ 0 and < 1, got 1"):
        heads.FusedSGD(head(), lr=0.1, momentum=1)
    with pytest.raises(ValueError, match="nesterov"):
        heads.FusedSGD(head(), lr=0.1, momentum=0, nesterov=True)
