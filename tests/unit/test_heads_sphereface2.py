"""SphereFace2 against float64 transcriptions of the specification and the identities it states."""

import importlib.util
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sphereface2 import heads
from sphereface2.heads import terms
from sphereface2.heads.one_vs_all import OneVersusAll
from sphereface2.margins import BinaryMargin

F64 = torch.float64
KINDS = [(kind, detach) for kind in "CAM" for detach in ("all", "margin")]


def published_loss(x, w, bias, labels, *, margin_type, lam, r, m, t, detach, loss_weight):
    """The authors' form: BCE-with-logits over a one-hot matrix, weighted, mean over B×C.

    `w` must have unit rows. Plain autograd in the tensors' own precision.
    """

    def g(z):
        return 2 * ((z + 1) / 2) ** t - 1

    classes = len(w)
    cos = F.normalize(x, dim=1) @ w.T
    one_hot = F.one_hot(labels, classes).to(x.dtype)
    if margin_type == "C":
        target = g(cos) - m * (2 * one_hot - 1)
    else:
        theta = cos.clamp(-1 + 1e-5, 1 - 1e-5).acos()
        theta = theta + m if margin_type == "A" else theta * m
        moved = g(theta.clamp(1e-5, 3.14159).cos())
        target = torch.where(one_hot.bool(), moved, g(cos))
    through = cos if detach == "all" else g(cos)
    logits = r * (through + (target - through).detach()) + bias
    weight = loss_weight * classes / r * (lam * one_hot + (1 - lam) * (1 - one_hot))
    return F.binary_cross_entropy_with_logits(logits, one_hot, weight=weight)


def make(classes=7, dim=5, batch=4, dtype=F64, seed=0, **settings):
    torch.manual_seed(seed)
    head = heads.SphereFace2(dim, classes, **settings).to(dtype)
    x = torch.randn(batch, dim, dtype=dtype, requires_grad=True)
    return head, x, torch.randint(classes, (batch,))


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@given(
    kind=st.sampled_from("CAM"),
    detach=st.sampled_from(["all", "margin"]),
    bias=st.sampled_from(["learned", "per_class"]),
    batch=st.integers(1, 6),
    classes=st.integers(2, 20),
    dim=st.integers(2, 9),
    lam=st.floats(0.05, 0.95),
    r=st.floats(0.5, 64),
    m=st.floats(0, 1.2),
    t=st.one_of(st.sampled_from([1.0, 3.0]), st.floats(1, 6)),
    loss_weight=st.floats(0.1, 50),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_value_and_gradients_are_the_published_ones(
    kind, detach, bias, batch, classes, dim, lam, r, m, t, loss_weight, seed
):
    options = dict(margin_type=kind, lam=lam, r=r, m=m, t=t, detach=detach, loss_weight=loss_weight)
    head, x, labels = make(classes, dim, batch, seed=seed, bias=bias, **options)
    loss = head(x, labels)
    w = F.normalize(head.weight.detach(), dim=1).requires_grad_()
    b = head.bias.detach().clone().requires_grad_()
    expected = published_loss(x, w, b, labels, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(
        gradients(loss, x, head.weight, head.bias), gradients(expected, x, w, b), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("kind", "detach"), KINDS)
def test_float32_at_the_size_of_a_training_step(kind, detach):
    head, x, labels = make(2000, 64, 32, torch.float32, margin_type=kind, detach=detach)
    loss = head(x, labels)
    x64 = x.detach().to(F64).requires_grad_()
    w64 = F.normalize(head.weight.detach().to(F64), dim=1).requires_grad_()
    b64 = head.bias.detach().to(F64).requires_grad_()
    expected = published_loss(
        x64, w64, b64, labels,
        margin_type=kind, detach=detach, lam=0.7, r=40, m=0.4, t=3, loss_weight=50,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected.float(), rtol=1e-5, atol=0)
    ours = gradients(loss, x, head.weight, head.bias)
    for mine, theirs in zip(ours, gradients(expected, x64, w64, b64), strict=True):
        scale = theirs.abs().max().item()
        torch.testing.assert_close(mine, theirs.float(), rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.parametrize("bias_shape", [(), (6,)])
def test_margin_c_with_the_papers_gradient_passes_gradcheck(bias_shape):
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=F64) * 0.4
    w = torch.randn(6, 4, dtype=F64) * 0.4  # |cos| < 1 without rows being unit: all entries free
    bias = torch.randn(bias_shape, dtype=F64)
    labels = torch.tensor([0, 5, 2])
    margin = BinaryMargin("C", r=4.0, t=3.0, detach="margin")
    assert ((x @ w.T).abs() < 1).all()
    torch.autograd.gradcheck(
        lambda *inputs: OneVersusAll.apply(*inputs, labels, margin),
        [tensor.requires_grad_() for tensor in (x, w, bias)],
    )


@pytest.mark.parametrize("kind", ["C", "A", "M"])
def test_embedding_gradient_passes_gradcheck_where_it_is_the_true_one(kind):
    """Through normalisation too; A and M without margin, whose offset then vanishes."""
    m = {"C": 0.4, "A": 0.0, "M": 1.0}[kind]
    head, x, labels = make(margin_type=kind, m=m, r=4.0, detach="margin")
    torch.autograd.gradcheck(lambda x: head(x, labels), (x,))


def test_switched_off_it_is_plain_binary_cross_entropy():
    r = 8.0
    head, x, labels = make(lam=0.5, r=r, m=0.0, t=1.0, loss_weight=1.0)
    head.bias.data.fill_(-0.7)
    loss = head(x, labels)
    cos = F.normalize(x, dim=1) @ F.normalize(head.weight, dim=1).T
    one_hot = F.one_hot(labels, 7).to(F64)
    plain = F.binary_cross_entropy_with_logits(r * cos + head.bias, one_hot, reduction="sum")
    expected = plain / len(x) / (2 * r)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, x)[0], gradients(expected, x)[0])

    vanilla = heads.build("bce", 5, 7, r=r).to(F64)
    vanilla.load_state_dict(head.state_dict())
    torch.testing.assert_close(vanilla(x, labels), plain / len(x))


def test_every_principle_can_be_switched_off():
    head, x, labels = make(lam=0.5, r=1.0, m=0.0, t=1.0, bias="zero")
    assert list(dict(head.named_parameters())) == ["weight"]
    assert head.bias == 0
    gradients(head(x, labels), x, head.weight)


@pytest.mark.parametrize(("kind", "detach"), KINDS)
def test_swapping_two_classes_permutes_the_gradient(kind, detach):
    head, x, labels = make(margin_type=kind, detach=detach)
    swap = torch.tensor([0, 4, 2, 3, 1, 5, 6])
    other, _, _ = make(margin_type=kind, detach=detach)
    other.weight.data = head.weight.data[swap].clone()
    loss, swapped = head(x, labels), other(x, swap[labels])
    torch.testing.assert_close(loss, swapped)
    before = gradients(loss, x, head.weight, head.bias)
    after = gradients(swapped, x, other.weight, other.bias)
    torch.testing.assert_close(before[0], after[0])
    torch.testing.assert_close(before[1][swap], after[1])
    torch.testing.assert_close(before[2], after[2])


@pytest.mark.parametrize(("kind", "detach"), KINDS)
def test_only_the_direction_of_an_embedding_matters(kind, detach):
    head, x, labels = make(margin_type=kind, detach=detach)
    loss = head(x, labels)
    (gradient,) = gradients(loss, x)
    assert (gradient * x).sum(1).abs().max() < 1e-12 * gradient.norm()
    scales = torch.tensor([[1e-9], [0.1], [7.0], [1e30]], dtype=F64)
    torch.testing.assert_close(head(x * scales, labels), loss)


@pytest.mark.parametrize("bias", ["learned", "fixed", "zero", "per_class"])
def test_bias_modes(bias):
    head, x, labels = make(bias=bias)
    start = 0.0 if bias == "zero" else BinaryMargin().initial_bias(7)
    torch.testing.assert_close(head.bias.detach(), torch.full_like(head.bias, start))
    assert head.bias.shape == ((7,) if bias == "per_class" else ())
    assert ("bias" in dict(head.named_parameters())) == (bias in ("learned", "per_class"))
    assert "bias" in head.state_dict()
    assert head(x, labels).isfinite()


def test_gradients_balance_at_the_start_even_for_ten_million_classes():
    """A zero embedding has cosine 0 with everyone: the bias must then have no gradient."""
    classes = 10_000_000
    head = heads.SphereFace2(1, classes, r=128.0, m=1.0, loss_weight=1.0)
    x = torch.zeros(2, 1, requires_grad=True)
    loss = head(x, torch.tensor([0, classes - 1]))
    assert loss.isfinite()
    loss.backward()
    positive = head.margin.positive(torch.zeros(1), head.bias.detach()).dbias.abs().item()
    assert positive > 0
    assert abs(head.bias.grad.item()) < 1e-4 * positive


@pytest.mark.parametrize(("kind", "detach"), KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_extreme_inputs_give_finite_values(kind, detach, dtype):
    """cos = ±1, a zero embedding, the largest r and m, the largest and smallest floats."""
    head = heads.SphereFace2(4, 3, margin_type=kind, detach=detach, r=128.0, m=1.0)
    head.weight.data = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    rows = [[1, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0], [tiny] * 4, [huge] * 4]
    for label in range(3):
        x = torch.tensor(rows, dtype=dtype, requires_grad=True)
        labels = torch.full((5,), label)
        loss = head(x, labels)
        head.zero_grad()
        loss.backward()
        assert loss.dtype == (F64 if dtype == F64 else torch.float32)
        assert loss.isfinite()
        assert loss > 0
        # The gradient at an embedding of length 1e-4 is of size 1e4, too much for float16.
        for gradient in (head.weight.grad, head.bias.grad, x.grad[[0, 1, 2, 4]]):
            assert gradient.isfinite().all()
        assert (x.grad[2] == 0).all()


def test_a_lone_hard_positive_does_not_drown_the_negatives():
    """Own-class terms are left out of the sum, not subtracted: tiny sums keep their digits."""
    head = heads.SphereFace2(2, 3, r=128.0, m=1.0, t=1.0, lam=0.5, loss_weight=1.0, bias="zero")
    head.weight.data = torch.tensor([[1.0, 0], [-1.0, 0], [-1.0, 0]])
    head.bias.fill_(-20.0)
    loss = head(torch.tensor([[1.0, 0]]), torch.tensor([0]))
    # p = 128·(1-1) - 20, n = 128·(-1+1) - 20
    expected = 0.5 / 128 * (math.log1p(math.exp(20)) + 2 * math.log1p(math.exp(-20)))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_inside(dtype):
    head, x, labels = make(50, 16, 8, torch.float32)
    low = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        loss = head(low, labels)
        loss.backward()  # also inside autocast
    same = low.detach().float().requires_grad_()
    expected = head(same, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, expected)
    weight_gradient = head.weight.grad.clone()
    assert torch.equal(weight_gradient, gradients(expected, head.weight)[0])
    assert low.grad.dtype == dtype
    # The embedding's gradient is rounded once, on its way out.
    expected = gradients(head(same, labels), same)[0]
    torch.testing.assert_close(low.grad, expected.to(dtype))


def test_rows_are_renormalised_in_place_before_every_forward():
    head, x, labels = make()
    with torch.no_grad():
        head.weight.mul_(3)
    pointer = head.weight.data_ptr()
    head(x, labels)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(7, dtype=F64))
    assert head.weight.data_ptr() == pointer
    once = head.weight.detach().clone()
    head(x, labels)
    assert torch.equal(head.weight, once)


def test_two_forward_passes_before_their_backward_passes():
    head, x, labels = make(2000, 512, dtype=torch.float32)
    expected = gradients(head(x, labels), head.weight)[0]
    first, second = head(x, labels), head(x, labels)
    (first + second).backward()
    torch.testing.assert_close(head.weight.grad, 2 * expected)


def test_gradients_accumulate_over_micro_batches_and_scaled_losses():
    head, x, labels = make(batch=6)
    expected = gradients(head(x, labels), head.weight, head.bias)
    for some in (slice(0, 2), slice(2, 6)):
        share = len(labels[some]) / 6
        (head(x[some], labels[some]) * share * 1024).backward()
    torch.testing.assert_close(head.weight.grad / 1024, expected[0])
    torch.testing.assert_close(head.bias.grad / 1024, expected[1])


def test_evaluation_without_gradient_and_frozen_parts():
    head, x, labels = make()
    expected = head(x, labels)
    with torch.no_grad():
        assert torch.equal(head(x, labels), expected)
    head.weight.requires_grad_(False)
    head.bias.requires_grad_(False)
    assert gradients(head(x, labels), x)[0].isfinite().all()


def test_a_gradient_of_the_gradient_is_refused_rather_than_wrong():
    head, x, labels = make()
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(head(x, labels), x, create_graph=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_no_kernel_where_triton_finds_no_compiler_for_its_launchers(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.warns(UserWarning, match="install gcc or clang"):
        assert not terms.has_kernel.__wrapped__()
    monkeypatch.setenv("CC", "/opt/bin/cc")
    assert terms.has_kernel.__wrapped__()
