"""The softmax family against pytorch-metric-learning and float64 transcriptions of the papers."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning import losses as pml

from sphereface2 import heads
from sphereface2.heads import adaptive_margins
from sphereface2.heads.divergence import posteriors

F64 = torch.float64


def make(name, batch=6, dim=5, classes=7, seed=0, **options):
    torch.manual_seed(seed)
    head = heads.build(name, dim, classes, **options).to(F64)
    labels = torch.randint(classes, (batch,))
    x = torch.randn(batch, dim, dtype=F64) * 3
    # Every region of the angle: some embeddings near their prototype, some opposite.
    x[: batch // 3] += 20 * head.weight.detach()[labels[: batch // 3]]
    x[batch // 3 : batch // 2] -= 20 * head.weight.detach()[labels[batch // 3 : batch // 2]]
    return head, x.requires_grad_(), labels


def unit_copy(head):
    return F.normalize(head.weight.detach(), dim=1).requires_grad_()


def tangent(gradient, w):
    """The part of the rows' gradient that a normalisation inside the graph lets through."""
    return gradient - (gradient * w).sum(1, keepdim=True) * w


def compare(head, x, labels, expected, w, *, tangential=False, rtol=1e-8):
    loss = head(x, labels)
    torch.testing.assert_close(loss, expected, rtol=rtol, atol=1e-10)
    ours = torch.autograd.grad(loss, (x, head.weight))
    theirs = torch.autograd.grad(expected, (x, w))
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-8)
    rows = [tangent(g, w.detach()) if tangential else g for g in (ours[1], theirs[1])]
    torch.testing.assert_close(*rows, rtol=1e-6, atol=1e-8)


DEGREES = math.degrees(0.4)
PEERS = [
    ("arcface", {"s": 30.0, "m": 0.4}, pml.ArcFaceLoss, {"scale": 30.0, "margin": DEGREES}),
    ("arcface", {"s": 64.0, "m": 0.0}, pml.ArcFaceLoss, {"scale": 64.0, "margin": 0.0}),
    ("cosface", {"s": 30.0, "m": 0.35}, pml.CosFaceLoss, {"scale": 30.0, "margin": 0.35}),
    ("normface", {"s": 20.0}, pml.NormalizedSoftmaxLoss, {"temperature": 1 / 20.0}),
    ("cocoloss", {"s": 20.0}, pml.NormalizedSoftmaxLoss, {"temperature": 1 / 20.0}),
    *[
        (
            "sphereface",
            {"m": m, "lambda_base": 0.0, "lambda_min": 0.0},
            pml.SphereFaceLoss,
            {"scale": 1, "margin": m},
        )
        for m in (1, 2, 3, 4)
    ],
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "peer", "peer_options"), PEERS)
@pytest.mark.parametrize("seed", range(3))
def test_parity_with_pytorch_metric_learning(name, options, peer, peer_options, seed):
    head, x, labels = make(name, batch=12, seed=seed, **options)
    theirs = peer(num_classes=7, embedding_size=5, **peer_options)
    w = unit_copy(head)
    theirs.W = torch.nn.Parameter(w.detach().T.clone())
    # NormalizedSoftmaxLoss leaves the embeddings as they are.
    given_x = F.normalize(x, dim=1) if peer is pml.NormalizedSoftmaxLoss else x
    expected = theirs(given_x, labels)
    loss = head(x, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(head.get_logits(x), theirs.get_logits(given_x))
    ours = torch.autograd.grad(loss, (x, head.weight))
    gradient_x, gradient_w = torch.autograd.grad(expected, (x, theirs.W))
    torch.testing.assert_close(ours[0], gradient_x, rtol=1e-5, atol=1e-7)
    rows = [tangent(g, w.detach()) for g in (ours[1], gradient_w.T)]
    torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-7)


def own_and_others(x, w, labels, own, others):
    """Mean cross-entropy, written out: `own` and `others` map cosines (B, C) to logits."""
    cos = F.normalize(x, dim=1) @ w.T
    mask = F.one_hot(labels, len(w)).bool()
    logits = torch.where(mask, own(cos), others(cos))
    return (logits.exp().sum(1).log() - logits[mask]).mean()


def acos(cos):
    return cos.clamp(-1 + 1e-14, 1 - 1e-14).acos()


def test_softmax_is_a_linear_classifier():
    head, x, labels = make("softmax")
    head.bias.data.normal_()
    w = head.weight.detach().clone().requires_grad_()
    expected = F.cross_entropy(x @ w.T + head.bias, labels)
    compare(head, x, labels, expected, w)
    assert torch.equal(head.weight, w)
    torch.testing.assert_close(head.get_logits(x), x @ w.T + head.bias)


@pytest.mark.parametrize(
    ("m1", "m2", "m3"), [(1.0, 0.3, 0.2), (1.3, 0.0, 0.0), (1.2, 0.4, 0.1), (1.0, 0.0, 0.4)]
)
def test_combined_margin(m1, m2, m3):
    head, x, labels = make("combined", s=16.0, m1=m1, m2=m2, m3=m3, batch=12)

    def own(cos):
        angle = m1 * acos(cos) + m2
        below = angle <= math.pi
        return 16 * (torch.where(below, angle.cos(), -angle.cos() - 2) - m3)

    w = unit_copy(head)
    compare(head, x, labels, own_and_others(x, w, labels, own, lambda cos: 16 * cos), w)


def test_combined_margin_contains_arcface_and_cosface():
    for other, options in (
        ("arcface", {"m2": 0.4, "m3": 0.0}),
        ("cosface", {"m2": 0.0, "m3": 0.4}),
    ):
        head, x, labels = make("combined", **options)
        # Where θ + m > π ArcFace and the combined margin differ by design.
        x = torch.randn_like(x) + 8 * head.weight.detach()[labels]
        rival = heads.build(other, 5, 7, m=0.4).to(F64)
        rival.load_state_dict(head.state_dict())
        torch.testing.assert_close(head(x, labels), rival(x, labels), rtol=1e-9, atol=0)


@pytest.mark.parametrize("form", ["v0", "v1", "v2"])
@pytest.mark.parametrize("m", [1.0, 1.5, 4.0])
def test_sphereface_r(form, m):
    head, x, labels = make("sphereface_r", form=form, s=12.0, m=m, batch=12)

    def own(cos):
        angle = m * acos(cos.detach())
        if form == "v0":
            k = (angle / math.pi).floor()
            moved = (-1) ** k * angle.cos() - 2 * k
        elif form == "v1":
            moved = angle.clamp(max=math.pi).cos()
        else:
            moved = cos.detach()
        return 12 * (cos + moved - cos.detach())

    def others(cos):
        moved = (acos(cos.detach()) / m).cos() if form == "v2" else cos.detach()
        return 12 * (cos + moved - cos.detach())

    w = unit_copy(head)
    compare(head, x, labels, own_and_others(x, w, labels, own, others), w)


def test_sphereface_anneals():
    options = {"lambda_base": 10.0, "lambda_min": 2.0, "gamma": 0.5, "power": 1.5, "m": 3}
    head, x, labels = make("sphereface", **options)
    for batch in range(1, 6):
        lam = max(2.0, 10 * (1 + 0.5 * batch) ** -1.5)

        def own(cos, lam=lam):
            angle = 3 * acos(cos)
            k = (angle.detach() / math.pi).floor()
            return (
                x.norm(dim=1, keepdim=True)
                * (lam * cos + (-1) ** k * angle.cos() - 2 * k)
                / (1 + lam)
            )

        w = unit_copy(head)
        expected = own_and_others(x, w, labels, own, lambda cos: x.norm(dim=1, keepdim=True) * cos)
        head.batches.fill_(batch - 1)
        compare(head, x, labels, expected, w)
        assert head.batches == batch
    assert lam == 2.0  # the floor was reached


def test_adaface():
    head, x, labels = make("adaface", s=16.0, m=0.4, h=0.333, momentum=0.3)
    mean, std = 20.0, 100.0
    for _ in range(3):
        norms = x.detach().norm(dim=1).clamp(1e-3, 100)
        mean = 0.7 * mean + 0.3 * norms.mean().item()
        std = 0.7 * std + 0.3 * norms.std().item()
        quality = (0.333 * (norms - mean) / (std + 1e-3)).clamp(-1, 1)[:, None]

        def own(cos, quality=quality):
            theta = (acos(cos) - 0.4 * quality).clamp(1e-3, math.pi - 1e-3)
            return 16 * (theta.cos() - 0.4 - 0.4 * quality)

        w = unit_copy(head)
        expected = own_and_others(x, w, labels, own, lambda cos: 16 * cos)
        compare(head, x, labels, expected, w)
        x = (x.detach() * 3).requires_grad_()
    assert head.mean.item() == pytest.approx(mean)
    assert head.std.item() == pytest.approx(std)


def test_sums_over_ranks_keep_a_deviation_that_is_small_beside_the_mean(monkeypatch):
    monkeypatch.setattr(adaptive_margins.dist, "all_reduce", lambda _: None)
    lengths = 20 + 1e-3 * torch.randn(64, generator=torch.Generator().manual_seed(0))
    _, found = adaptive_margins._moments_of_ranks(lengths)
    torch.testing.assert_close(found, lengths.double().std())


def test_adaface_without_concentration_is_cosface():
    head, x, labels = make("adaface", h=0.0, m=0.35)
    rival = heads.CosFace(5, 7, m=0.35).to(F64)
    rival.weight.data = head.weight.data.clone()
    x = torch.randn_like(x)  # angles away from 0 and π, where AdaFace clips
    torch.testing.assert_close(head(x, labels), rival(x, labels))


def test_curricularface():
    head, x, labels = make("curricularface", s=16.0, m=0.5, momentum=0.2)
    t = 0.0
    for _ in range(4):
        w = unit_copy(head)
        cos_y = (F.normalize(x, dim=1) * w[labels]).sum(1, keepdim=True)
        t = 0.8 * t + 0.2 * cos_y.mean().item()
        bar = (acos(cos_y) + 0.5).cos()

        def own(cos):
            moved = (acos(cos) + 0.5).cos()
            return 16 * torch.where(acos(cos) + 0.5 < math.pi, moved, cos - 0.5 * math.sin(0.5))

        def others(cos, bar=bar, t=t):
            return 16 * torch.where(cos > bar, cos * (t + cos), cos)

        compare(head, x, labels, own_and_others(x, w, labels, own, others), w)
        x = (x.detach() + 4 * w.detach()[labels]).requires_grad_()
    assert t > 0.1
    assert head.t.item() == pytest.approx(t)


def test_circle_loss_is_the_papers_form():
    """log(1 + Σ_i exp(γ·α_i·(s_i - Δ_n))·exp(-γ·α_y·(s_y - Δ_p))), the paper's class-level form."""
    head, x, labels = make("circle", s=16.0, m=0.25, batch=12)
    w = unit_copy(head)
    cos = F.normalize(x, dim=1) @ w.T
    total = 0
    for row, label in zip(cos, labels, strict=True):
        s_y = row[label]
        others = torch.cat([row[:label], row[label + 1 :]])
        a_y = F.relu(1.25 - s_y).detach()
        a_i = F.relu(others + 0.25).detach()
        ratio = (16 * a_i * (others - 0.25)).exp().sum() * (-16 * a_y * (s_y - 0.75)).exp()
        total = total + torch.log1p(ratio)
    compare(head, x, labels, total / len(labels), w)


def q_margin_loss(logits, labels, alpha, log_q):
    """max_p [⟨p, z⟩ - D(p ‖ q)] + D(e_y ‖ q) - z_y, p by bisection and with its derivative."""
    y = F.one_hot(labels, logits.shape[1]).to(F64)
    q = (y * log_q).exp()

    def distribution(tau):
        return q * (1 + (alpha - 1) * (logits - tau[:, None])).clamp_min(0) ** (1 / (alpha - 1))

    def divergence(p):
        u = p / q
        return (q * (u**alpha - 1 - alpha * (u - 1)) / (alpha * (alpha - 1))).sum(1)

    with torch.no_grad():
        low, high = logits.amin(1) - 1e3, logits.amax(1) + 1e3
        for _ in range(200):
            tau = (low + high) / 2
            above = distribution(tau).sum(1) > 1
            low, high = torch.where(above, tau, low), torch.where(above, high, tau)
    tau.requires_grad_()
    slope = torch.autograd.grad(distribution(tau).sum(), tau)[0]
    tau = tau.detach()
    p = distribution(tau - (distribution(tau).sum(1) - 1) / slope)  # τ's own derivative by z
    assert torch.allclose(p.sum(1), torch.ones((), dtype=F64), rtol=1e-9)
    return ((p - y) * logits).sum(1) - divergence(p) + divergence(y), p


@pytest.mark.parametrize("form", [{}, {"streaming": True, "chunk_size": 3}])
@pytest.mark.parametrize(
    ("alpha", "s", "m"), [(1.25, 20.0, 0.2), (1.1, 40.0, 0.0), (1.5, 10.0, 0.3), (1.9, 2.0, 0.1)]
)
def test_q_margin_is_its_published_equation(form, alpha, s, m, monkeypatch):
    monkeypatch.setattr("sphereface2.heads.divergence.CANDIDATES", 1)  # too few at first
    head, x, labels = make("q_margin", batch=12, alpha=alpha, s=s, m=m, **form)
    w = unit_copy(head)
    losses, p = q_margin_loss(s * F.normalize(x, dim=1) @ w.T, labels, alpha, -s * m)
    assert (p == 0).any()
    assert (p > 0).sum(1).max() > 2
    compare(head, x, labels, losses.mean(), w)


@pytest.mark.parametrize("form", [{}, {"streaming": True}])
def test_q_margin_refuses_a_gradient_of_the_gradient_rather_than_miss_its_posteriors(form):
    head, x, labels = make("q_margin", **form)
    with pytest.raises(RuntimeError, match="differentiated once only"):
        torch.autograd.grad(head(x, labels), x, create_graph=True)


def test_q_margin_becomes_cosface_and_the_sparsemax():
    head, x, labels = make("q_margin", batch=12, alpha=1 + 1e-7, s=8.0, m=0.3)
    rival = heads.CosFace(5, 7, s=8.0, m=0.3).to(F64)
    rival.load_state_dict(head.state_dict())
    torch.testing.assert_close(head(x, labels), rival(x, labels), rtol=1e-5, atol=0)
    head, x, labels = make("q_margin", batch=12, alpha=2, s=4.0, m=0.0)
    w = unit_copy(head)
    logits = 4 * F.normalize(x, dim=1) @ w.T
    falling = logits.sort(dim=1, descending=True).values
    sizes = torch.arange(1, 8)
    size = (1 + sizes * falling > falling.cumsum(1)).sum(1)
    tau = (torch.where(sizes <= size[:, None], falling, 0).sum(1) - 1) / size
    squares = torch.where(logits > tau[:, None], logits**2 - tau[:, None] ** 2, 0).sum(1)
    expected = squares / 2 + 0.5 - logits.gather(1, labels[:, None])[:, 0]
    compare(head, x, labels, expected.mean(), w)


def test_q_margin_loses_nothing_beyond_its_margin():
    head = heads.build("q_margin", 2, 3, s=10.0, m=0.2, alpha=1.5)
    gap = math.exp(0.5 * 10 * 0.2) / 0.5  # of z_y to the largest of the others
    logits = torch.tensor([[gap + 0.01, 0.0, -9.0], [gap - 0.2, 0.0, -9.0]], requires_grad=True)
    labels = torch.tensor([0, 0])
    losses = [head.divergence(row[None], labels[:1], "sum") for row in logits]
    assert losses[0].item() == pytest.approx(0, abs=1e-5)
    assert losses[1].item() > 1e-4
    sum(losses).backward()
    assert torch.equal(logits.grad[:, 2], torch.zeros(2))
    assert logits.grad[0].abs().max() < 1e-5 < logits.grad[1, 1]


@pytest.mark.parametrize("alpha", [1.01, 1.25, 1.5, 2.0])
def test_posteriors_sum_to_one_over_many_people(alpha):
    torch.manual_seed(0)
    for s in (0.0, 1.0, 64.0):
        logits = s * torch.randn(2, 20_000).mul(0.2).clamp(-1, 1)
        p = posteriors(logits[:, 0], logits[:, 1:], alpha, log_q=-s * 0.1)
        torch.testing.assert_close(p.own + p.others.sum(1), torch.ones(2))
        exact = posteriors(logits[:, 0].double(), logits[:, 1:].double(), alpha, log_q=-s * 0.1)
        torch.testing.assert_close(p.others.double(), exact.others, rtol=0, atol=1e-4)
        assert not p.others[logits[:, 1:] <= p.threshold[:, None]].any()
        assert (p.others > 0).float().mean() <= (1 if s < 64 or alpha < 1.1 else 0.3)


@pytest.mark.parametrize("classes", [2, 10, 10_000])
def test_the_scale_of_cocoloss_reaches_its_bound(classes):
    """The best arrangement with all negatives opposite costs ε = 1e-4."""
    head = heads.CocoLoss(2, classes).to(F64)
    head.weight.data = torch.tensor([[-1.0, 0]], dtype=F64).repeat(classes, 1)
    head.weight.data[1] = torch.tensor([1.0, 0])
    loss = head(torch.tensor([[1.0, 0]], dtype=F64), torch.tensor([1]))
    assert loss.item() == pytest.approx(1e-4, rel=1e-9)


def test_normface_learns_its_scale():
    head, x, labels = make("normface", s=20.0, learn_scale=True)
    assert dict(head.named_parameters()).keys() == {"weight", "scale"}
    w = unit_copy(head)
    scale = torch.tensor(20.0, dtype=F64, requires_grad=True)
    expected = own_and_others(x, w, labels, lambda cos: scale * cos, lambda cos: scale * cos)
    gradient = torch.autograd.grad(head(x, labels), head.scale)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, scale)[0])


@given(
    name=st.sampled_from(
        ["softmax", "normface", "cosface", "arcface", "combined", "sphereface", "q_margin"]
    ),
    batch=st.integers(1, 4),
    dim=st.integers(2, 5),
    classes=st.integers(2, 6),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=40, deadline=None)
def test_embedding_gradient_passes_gradcheck(name, batch, dim, classes, seed):
    """The heads without detached parts: their gradient is the true one."""
    torch.manual_seed(seed)
    options = {} if name in ("softmax", "sphereface") else {"s": 4.0}
    head = heads.build(name, dim, classes, **options).to(F64).eval()
    x = torch.randn(batch, dim, dtype=F64)
    labels = torch.randint(classes, (batch,))
    cos = F.normalize(x, dim=1) @ F.normalize(head.weight.detach(), dim=1).T
    theta = cos.gather(1, labels[:, None]).clamp(-1, 1).acos()
    # Kinks of the margins: θ near 0 or π, ArcFace's θ + m = π, combined's, ψ's period π/4.
    kinks = torch.tensor([0, math.pi, math.pi - 0.5, math.pi - 0.3])
    if ((theta - kinks).abs() < 1e-2).any():
        return
    torch.autograd.gradcheck(lambda x: head(x, labels), (x.requires_grad_(),), atol=1e-4)


def test_margins_make_the_task_harder():
    """At equal scale a margin can only raise the loss, and more margin raises it more."""
    for name, values in (
        ("cosface", (0.0, 0.2, 0.4)),
        ("arcface", (0.0, 0.3, 0.6)),
        ("q_margin", (0.0, 0.2, 0.4)),
        ("sphereface_r", (1.0, 1.3, 1.7)),
    ):
        found = []
        for m in values:
            head, x, labels = make(name, s=16.0, m=m)
            found.append(head(x, labels).item())
        assert found == sorted(found)
        assert found[0] < found[-1]
