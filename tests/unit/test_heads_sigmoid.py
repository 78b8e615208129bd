"""UCE, the sigmoid loss and SFace against transcriptions of their equations in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from sphereface2 import heads

F64 = torch.float64
DIM, PEOPLE, BATCH = 6, 9, 5
FORMS = {"dense": {}, "streaming": {"streaming": True, "chunk_size": 4}}


def make(name, form, **options):
    torch.manual_seed(3)
    head = heads.build(name, DIM, PEOPLE, **options, **FORMS[form]).double()
    x = (2 * torch.randn(BATCH, DIM, dtype=F64)).requires_grad_()
    w = F.normalize(head.weight.detach(), dim=1).requires_grad_()
    labels = torch.randint(PEOPLE, (BATCH,))
    return head, x, w, labels, F.normalize(x, dim=1) @ w.T, F.one_hot(labels, PEOPLE).bool()


def assert_equal(head, x, w, labels, expected, **others):
    """Values, and gradients by embeddings, prototypes and the head's ``others``."""
    loss = head(x, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    parameters = [getattr(head, name) for name in others]
    found = torch.autograd.grad(loss, [x, head.weight, *parameters])
    wanted = torch.autograd.grad(expected, [x, w, *others.values()])
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("l", [1.0, 0.1])
def test_uce_is_its_published_equation(form, l):  # noqa: E741
    s, m = 20.0, 0.3
    head, x, w, labels, cos, own = make("uce", form, s=s, m=m, l=l)
    ours = head.bias.detach().clone().requires_grad_()
    b = -ours - s * m / 2
    assert b.item() == pytest.approx(math.log(10 * PEOPLE * l), rel=1e-6)
    positive = F.softplus(-(s * (cos[own] - m) - b))
    negative = F.softplus(s * cos - b).masked_fill(own, 0).sum(1)
    expected = (positive + l * negative).mean()
    assert_equal(head, x, w, labels, expected, bias=ours)


def test_uce_with_sampled_negatives_weighs_them_by_their_share():
    assert heads.build("uce", 8, 50).margin.lam == 0.5
    sampled = heads.build("uce", 8, 50, negatives="uniform", negative_share=0.25)
    assert sampled.margin.lam == pytest.approx(1 / 1.25)
    assert sampled.loss_weight == pytest.approx(64 * 1.25)


@pytest.mark.parametrize("form", FORMS)
def test_the_sigmoid_loss_learns_scale_and_bias(form):
    head, x, w, labels, cos, own = make("siglip", form, s=7.0)
    assert head.bias.item() == -10
    t, b = (p.detach().clone().requires_grad_() for p in (head.log_scale, head.bias))
    logits = cos * t.exp() + b
    expected = F.binary_cross_entropy_with_logits(logits, own.double(), reduction="sum") / BATCH
    assert_equal(head, x, w, labels, expected, log_scale=t, bias=b)


@pytest.mark.parametrize("form", FORMS)
def test_sface_is_its_published_equation(form):
    s, k, a, b = 30.0, 5.0, 0.9, 1.3
    head, x, w, labels, cos, own = make("sface", form, s=s, k=k, a=a, b=b)
    with torch.no_grad():
        theta = cos.acos()
        intra = s / (1 + torch.exp(-k * (theta - a)))
        inter = s / (1 + torch.exp(k * (theta - b)))
    expected = torch.where(own, -intra, inter).mul(cos).sum(1).mean()
    assert_equal(head, x, w, labels, expected)


def test_a_bias_starts_where_it_is_told():
    log = heads.build("sphereface2", 4, 100, bias_start="log_classes", lam=0.5)
    zero = torch.zeros(())
    assert (log.margin.negative_logit(zero) + log.bias).item() == pytest.approx(-math.log(1000))
    assert heads.build("sphereface2", 4, 100, bias_start=-3).bias.item() == -3
    with pytest.raises(ValueError, match=r"bias_start must be .*'balanced'.*got 'none'"):
        heads.build("sphereface2", 4, 100, bias_start="none")
    with pytest.raises(ValueError, match="bias_start must be a number finite, got nan"):
        heads.build("sphereface2", 4, 100, bias_start=math.nan)
