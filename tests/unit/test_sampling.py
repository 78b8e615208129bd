"""Sampled negatives: right on average, own classes always there, other rows left alone."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sphereface2 import heads
from sphereface2.heads.sampling import uniform

DIM, PEOPLE = 6, 24


def batch(size=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, DIM, generator=generator, dtype=torch.float64)
    return x, torch.randint(PEOPLE, (size,), generator=generator)


def build(**options):
    torch.manual_seed(0)
    head = heads.SphereFace2(DIM, PEOPLE, r=8, **options).double()
    with torch.no_grad():
        head.weight.copy_(torch.nn.functional.normalize(head.weight))
    return head


def outcome(head, x, labels):
    x = x.clone().requires_grad_()
    loss = head(x, labels)
    return [loss.detach(), *torch.autograd.grad(loss, [x, *head.parameters()])]


@given(
    labels=st.lists(st.integers(-3, 25), min_size=1, max_size=9),
    rows=st.integers(1, 22),
    share=st.floats(0.01, 1),
    chunk=st.integers(1, 9),
)
def test_a_plan_visits_own_classes_and_a_weighted_share_of_the_others(labels, rows, share, chunk):
    own = {label for label in labels if 0 <= label < rows}
    count = max(1, round(share * rows))
    visited, weights, found, drawn = [], {}, [], []
    for block in uniform(torch.tensor(labels), rows, share, chunk):
        assert 1 <= len(block) <= chunk
        counts = ~block.skip
        kept = block.rows[counts].tolist()
        visited += kept
        weights |= dict.fromkeys(kept, block.weight)
        drawn += block.rows.tolist()
        for sample, column in enumerate(block.own.columns.tolist()):
            if block.own.present[sample]:
                assert counts[column]
                assert block.rows[column] == labels[sample]
                found.append(sample)
    assert len(visited) == len(set(visited))
    assert set(visited) <= set(range(rows))
    assert own <= set(visited)
    assert sorted(found) == [sample for sample, label in enumerate(labels) if label in own]
    assert len(drawn) == len(labels) + count
    assert len(set(drawn[len(labels) :])) == count
    assert set(visited) == own | set(drawn[len(labels) :])
    assert all(weights[row] == (1 if row in own else rows / count) for row in visited)


@pytest.mark.parametrize(("share", "rows"), [(0.15, 20), (0.3, 23), (0.9, 7)])
def test_every_row_is_drawn_with_the_probability_its_weight_tells(share, rows):
    """Inclusion probability times weight is 1: the sum over the others is right on average."""
    torch.manual_seed(0)
    draws, nobody = 4_000, torch.tensor([-1])
    times = torch.zeros(rows)
    for _ in range(draws):
        own, *blocks = uniform(nobody, rows, share, rows)
        assert own.skip.all()
        (block,) = blocks
        times[block.rows] += 1
    chance = 1 / block.weight
    error = (times / draws - chance).abs()
    assert (error < 5 * (chance * (1 - chance) / draws) ** 0.5).all()


@pytest.mark.parametrize("bias", ["learned", "per_class"])
@pytest.mark.parametrize(("kind", "detach"), [("C", "all"), ("C", "margin"), ("A", "all")])
def test_loss_and_gradients_are_unbiased(kind, detach, bias):
    options = {"margin_type": kind, "detach": detach, "bias": bias}
    x, labels = batch()
    expected = outcome(build(**options), x, labels)
    head = build(**options, negatives="uniform", negative_share=0.4)
    draws = 1500
    sums = [torch.zeros_like(part) for part in expected]
    squares = [torch.zeros_like(part) for part in expected]
    for _ in range(draws):
        for total, square, part in zip(sums, squares, outcome(head, x, labels), strict=True):
            total += part
            square += part**2
    for total, square, right in zip(sums, squares, expected, strict=True):
        mean = total / draws
        error = ((square / draws - mean**2).clamp_min(0) / draws).sqrt()
        # 5 standard errors; some entries are never sampled and then exact.
        assert ((mean - right).abs() <= 5 * error + 1e-9 * right.abs().max()).all()
        assert error.max() > 0


def test_all_of_them_is_the_exact_loss():
    x, labels = batch()
    for negatives in ("uniform", "hard"):
        head = build(negatives=negatives, negative_share=1.0, chunk_size=5)
        if negatives == "hard":
            # The index answers with approximations; visiting all its lists makes it exact.
            head.hard_negatives.share = len(x)
            head(x, labels)
            head.hard_negatives.index.nprobe = head.hard_negatives.index.nlist
        for found, right in zip(outcome(head, x, labels), outcome(build(), x, labels), strict=True):
            torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def test_evaluation_visits_everybody():
    x, labels = batch()
    head = build(negatives="uniform", negative_share=0.1).eval()
    with torch.no_grad():
        torch.testing.assert_close(head(x, labels), build()(x, labels))


def test_a_fused_step_touches_sampled_rows_only():
    head = build(negatives="uniform", negative_share=0.3)
    optimizer = heads.FusedSGD(head, lr=0.1, weight_decay=0.01)
    momentum = optimizer.state[head.weight]["momentum_buffer"]
    momentum.normal_()
    x, labels = batch()
    before, velocity = head.weight.detach().clone(), momentum.clone()
    head(x, labels)
    moved = (head.weight.detach() != before).any(1)
    assert torch.equal(moved, (momentum != velocity).any(1))
    assert moved[labels].all()
    drawn = round(0.3 * PEOPLE)
    assert drawn <= moved.sum() <= drawn + len(labels.unique())


def test_hard_negatives_are_the_nearest_and_lower_the_loss():
    torch.manual_seed(0)
    people, dim, size = 4000, 32, 16
    centres = torch.randn(40, dim)
    head = heads.SphereFace2(dim, people, negatives="hard", negative_share=0.05)
    with torch.no_grad():  # prototypes in clusters, as those of people who look alike
        near = centres[torch.arange(people) % 40] + 0.3 * torch.randn(people, dim)
        head.weight.copy_(torch.nn.functional.normalize(near))
    labels = torch.randint(people, (size,))
    x = head.weight.detach()[labels] + 0.1 * torch.randn(size, dim)
    visited = torch.cat([block.rows for block in head._plan(head.chunk(x), x, labels)])
    assert set(labels.tolist()) <= set(visited.tolist())
    assert len(visited) <= round(0.05 * people) + size
    cos = torch.nn.functional.normalize(x) @ head.weight.detach().T
    each = round(0.05 * people / size)
    nearest = cos.topk(each, 1).indices
    assert torch.isin(nearest, visited).float().mean() > 0.8
    exact = heads.SphereFace2(dim, people)
    exact.load_state_dict(head.state_dict())
    found = head(x, labels)
    assert 0.1 * exact(x, labels) < found < exact(x, labels)
    assert torch.equal(copy.deepcopy(head)(x, labels), found)
