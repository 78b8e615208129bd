import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphereface2.margins import BinaryMargin, Own, similarity, similarity_slope

margins = st.builds(
    BinaryMargin,
    margin_type=st.sampled_from("CAM"),
    lam=st.floats(0.01, 0.99),
    r=st.floats(0.5, 128),
    m=st.floats(0, 1.5),
    t=st.one_of(st.just(1.0), st.just(3.0), st.floats(1, 8)),
    detach=st.sampled_from(["all", "margin"]),
)
cosines = st.floats(-1, 1)


def scalar_g(z, t):
    return 2 * ((z + 1) / 2) ** t - 1


def scalar_logits(margin, cos, bias):
    """The specification's table for one cosine, as the positive and as a negative."""
    r, m, t = margin.r, margin.m, margin.t
    if margin.margin_type == "C":
        return r * (scalar_g(cos, t) - m) + bias, r * (scalar_g(cos, t) + m) + bias
    theta = math.acos(min(max(cos, -1 + 1e-5), 1 - 1e-5))
    theta = theta + m if margin.margin_type == "A" else min(m, math.pi / theta) * theta
    theta = min(max(theta, 1e-5), 3.14159)
    return r * scalar_g(math.cos(theta), t) + bias, r * scalar_g(cos, t) + bias


def log_sigmoid(z):
    return -math.log1p(math.exp(-z)) if z > 0 else z - math.log1p(math.exp(z))


@given(margins, cosines, st.floats(-60, 60))
@settings(max_examples=300, deadline=None)
def test_terms_are_those_of_the_specification(margin, cos, bias):
    b = torch.tensor(bias, dtype=torch.float64)
    cos_tensor = torch.tensor([cos], dtype=torch.float64)
    positive = margin.positive(cos_tensor, b)
    negative = margin.negatives_(cos_tensor.clone()[:, None], b)
    p, n = scalar_logits(margin, cos, bias)
    lam, r = margin.lam, margin.r
    # A logit of some hundreds carries an absolute rounding error of 1e-13.
    close = {"rel": 1e-9, "abs": 1e-11}
    assert positive.loss.item() == pytest.approx(-lam / r * log_sigmoid(p), **close)
    assert negative.loss.item() == pytest.approx(-(1 - lam) / r * log_sigmoid(-n), **close)

    slope = 1.0
    if margin.detach == "margin":
        slope = margin.t * ((cos + 1) / 2) ** (margin.t - 1)
    pull, push = -lam * math.exp(log_sigmoid(-p)), (1 - lam) * math.exp(log_sigmoid(n))
    assert positive.dbias.item() == pytest.approx(pull / r, **close)
    assert negative.dbias.item() == pytest.approx(push / r, **close)
    assert positive.dcos.item() == pytest.approx(pull * slope, **close)
    assert negative.dcos.item() == pytest.approx(push * slope, **close)


@given(margins, st.integers(1, 5), st.integers(2, 12), st.data())
@settings(max_examples=60, deadline=None)
def test_blocks_of_classes_add_up(margin, batch, classes, data):
    """L over classes split into shards is the sum of the shards' own sums."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    cos = torch.rand(batch, classes, generator=generator, dtype=torch.float64) * 2 - 1
    labels = torch.randint(classes, (batch,), generator=generator)
    bias = torch.tensor(-3.0, dtype=torch.float64)
    whole = margin.negatives_(cos.clone(), bias, Own(labels))
    cuts = sorted({0, classes, *data.draw(st.lists(st.integers(0, classes), max_size=3))})
    loss, dbias, dcos = 0, 0, []
    for start, end in itertools.pairwise(cuts):
        if start == end:
            continue
        own = Own(labels, start, end - start)
        part = margin.negatives_(cos[:, start:end].clone(), bias, own)
        loss, dbias = loss + part.loss, dbias + part.dbias
        dcos.append(part.dcos)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(dbias, whole.dbias, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.cat(dcos, 1), whole.dcos, rtol=1e-12, atol=0)


@pytest.mark.parametrize("t", [1, 2, 3, 3.7])
def test_similarity_maps_the_interval_onto_itself(t):
    z = torch.linspace(-1, 1, 2001, dtype=torch.float64, requires_grad=True)
    g = similarity(z, t)
    assert g[0] == -1
    assert g[-1] == 1
    assert (g.diff() > 0).all()
    (slope,) = torch.autograd.grad(g.sum(), z)
    torch.testing.assert_close(similarity_slope(z, t)[1:], slope[1:], rtol=1e-12, atol=1e-12)


def test_a_cosine_rounded_below_minus_one_is_harmless():
    cos = torch.tensor([-1 - 1e-7, 1 + 1e-7])
    for kind, t in itertools.product("CAM", (1.0, 2.5, 3.0)):
        for detach in ("all", "margin"):
            margin = BinaryMargin(kind, t=t, detach=detach)
            terms = [*margin.positive(cos, torch.zeros(()))]
            terms += margin.negatives_(cos.clone()[:, None], torch.zeros(()))
            assert all(term.isfinite().all() for term in terms)


@given(
    st.sampled_from("CAM"),
    st.floats(1e-6, 1 - 1e-6),
    st.floats(0.1, 1e5),
    st.floats(0, 4),
    st.floats(1, 2000),
    st.integers(2, 10**8),
)
@settings(max_examples=500, deadline=None)
def test_initial_bias_balances_the_gradients(kind, lam, r, m, t, classes):
    margin = BinaryMargin(kind, lam, r, m, t)
    b = margin.initial_bias(classes)
    assert math.isfinite(b)
    a_y, a_i = scalar_logits(margin, 0.0, 0.0)
    pull = math.log(lam) + log_sigmoid(-(a_y + b))
    push = math.log1p(-lam) + math.log(classes - 1) + log_sigmoid(a_i + b)
    # What one rounding of the largest intermediate value (of size r·(1+m)) does to a logarithm.
    assert pull == pytest.approx(push, rel=1e-12, abs=1e-11 + 1e-15 * 8 * r * (1 + m))


@pytest.mark.parametrize("classes", [2, 3, 10, 8500, 10_000_000])
@pytest.mark.parametrize("lam", [0.3, 0.5, 0.7, 0.9])
def test_initial_bias_is_the_published_formula(classes, lam):
    r, m, t = 4.0, 0.4, 3.0  # mild enough for the formula as written
    z = lam / ((1 - lam) * (classes - 1))
    a_y, a_i = r * (2 * 0.5**t - 1 - m), r * (2 * 0.5**t - 1 + m)
    root = math.sqrt((1 - z) ** 2 + 4 * z * math.exp(a_y - a_i))
    expected = math.log(2 * z) - a_i - math.log(1 - z + root)
    assert BinaryMargin("C", lam, r, m, t).initial_bias(classes) == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("margin_type", "B", "margin_type must be one of 'C', 'A', 'M', got 'B'"),
        ("detach", "none", "detach must be one of 'all', 'margin', got 'none'"),
        ("lam", 0, "lam must be a number > 0 and < 1, got 0"),
        ("lam", 1.0, "lam must be a number > 0 and < 1, got 1.0"),
        ("r", 0, "r must be a number > 0, got 0"),
        ("r", math.inf, "r must be a number > 0, got inf"),
        ("m", -0.1, "m must be a number ≥ 0, got -0.1"),
        ("t", 0.99, "t must be a number ≥ 1, got 0.99"),
        ("t", math.nan, "t must be a number ≥ 1, got nan"),
        ("r", "40", "r must be a number > 0, got '40'"),
        ("m", True, "m must be a number ≥ 0, got True"),
    ],
)
def test_bad_settings_are_named(setting, value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BinaryMargin(**{setting: value})


def test_one_class_is_an_error():
    with pytest.raises(ValueError, match="num_classes must be at least 2, got 1"):
        BinaryMargin().initial_bias(1)
