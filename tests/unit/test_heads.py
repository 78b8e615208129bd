"""What every head must do: registry, checks of a batch, robustness, learning."""

import inspect
from functools import partial

import pytest
import torch

from sphereface2 import heads
from sphereface2.registry import Registry

NAMES = heads.available()


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def batch(size=6, dim=8, classes=5, seed=0):
    torch.manual_seed(seed)
    return torch.randn(size, dim), torch.randint(classes, (size,))


def test_the_family_is_complete():
    assert set(NAMES) == {
        "adaface", "arcface", "bce", "circle", "cocoloss", "combined", "cosface",
        "curricularface", "normface", "q_margin", "sface", "siglip", "softmax", "sphereface",
        "sphereface2", "sphereface_r", "uce",
    }  # fmt: skip


def test_build_takes_what_parameters_names(name):
    head = heads.build(name, embedding_dim=8, num_classes=5)
    assert isinstance(head, heads.Head)
    assert head.weight.shape == (5, 8)
    signature = inspect.signature(type(head)).parameters
    assert list(signature)[:2] == ["embedding_dim", "num_classes"]
    own = [k for k in signature if signature[k].kind is inspect.Parameter.KEYWORD_ONLY]
    scaling = [option for option in heads.parameters(name) if option not in own]
    assert own + scaling == heads.parameters(name)
    assert set(scaling) == head.scaling <= set(heads.Scaling.__annotations__)
    heads.build(name, 8, 5, **{option: signature[option].default for option in own})
    # The docstring states the source or equation, and every parameter.
    for option in signature:
        assert option in type(head).__doc__


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"no head 'arc_face' \(did you mean 'arcface'\?\)"):
        heads.build("arc_face", 8, 5)
    with pytest.raises(ValueError, match=r"did you mean 'sphereface2'"):
        heads.parameters("spherface2")
    with pytest.raises(ValueError, match=r"no parameter 'lambda' .*available: margin_type, lam"):
        heads.build("sphereface2", 8, 5, **{"lambda": 0.7})
    with pytest.raises(ValueError, match=r"'margintype' \(did you mean 'margin_type'\?\)"):
        heads.build("sphereface2", 8, 5, margintype="A")


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="head 'cosface' is registered already"):
        heads.register("cosface")(heads.Head)
    heads.register("cosface")(heads.CosFace)  # a definition that is run again is no other
    # What has no name of its own is another.
    registry = Registry("head")
    registry.register("mine")(partial(heads.CosFace, scale=8.0))
    with pytest.raises(ValueError, match="head 'mine' is registered already"):
        registry.register("mine")(partial(heads.ArcFace, scale=8.0))


@pytest.mark.parametrize(
    ("dim", "classes", "message"),
    [
        (8, 1, "num_classes must be an integer ≥ 2, got 1"),
        (8, 0, "num_classes must be an integer ≥ 2, got 0"),
        (0, 5, "embedding_dim must be an integer ≥ 1, got 0"),
        (8.0, 5, r"embedding_dim must be an integer ≥ 1, got 8\.0$"),
        (8, torch.tensor(5), r"got tensor\(5\): give int\(…\) of it"),
    ],
)
def test_bad_sizes(name, dim, classes, message):
    with pytest.raises(ValueError, match=message):
        heads.build(name, dim, classes)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sphereface2", {"loss_weight": 0}, "loss_weight must be a number > 0, got 0"),
        ("sphereface2", {"bias": "none"}, "bias must be one of 'learned', 'fixed', 'zero'"),
        ("sphereface2", {"lam": 1}, "lam must be a number > 0 and < 1, got 1"),
        ("cosface", {"s": 0}, "s must be a number > 0, got 0"),
        ("arcface", {"m": 2}, r"m must be a number ≥ 0 and ≤ 1\.5708, got 2"),
        ("combined", {"m1": 0.5}, r"m1 must be a number ≥ 1, got 0\.5"),
        ("sphereface", {"m": 1.5}, r"m must be an integer ≥ 1, got 1\.5"),
        ("sphereface_r", {"form": "v3"}, "form must be one of 'v0', 'v1', 'v2', got 'v3'"),
        ("adaface", {"momentum": 0}, "momentum must be a number > 0 and ≤ 1, got 0"),
        ("circle", {"m": -1}, "m must be a number ≥ 0 and ≤ 1, got -1"),
        ("q_margin", {"alpha": 1}, "alpha must be a number > 1 and ≤ 2, got 1"),
        ("q_margin", {"s": 64, "m": 1.0, "alpha": 2}, r"\(alpha - 1\)·s·m must be a number ≤ 30"),
        ("bce", {"r": -1}, "r must be a number > 0, got -1"),
        ("bce", {"r": torch.tensor(2.0)}, r"got tensor\(2.\): give float\(…\) of it"),
    ],
)
def test_bad_settings_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        heads.build(name, 8, 5, **options)


@pytest.mark.parametrize(
    ("embeddings", "labels", "message"),
    [
        (torch.zeros(2, 8), torch.tensor([0, 5]), "label 5 is outside 0 … 4"),
        (torch.zeros(2, 8), torch.tensor([-1, 9]), "label -1 is outside 0 … 4"),
        (torch.zeros(2, 8), torch.tensor([0]), r"labels must have shape \(2,\).* got \(1,\)"),
        (torch.zeros(2, 8), torch.tensor([[0], [1]]), r"labels must have shape \(2,\)"),
        (torch.zeros(2, 8), torch.tensor([0.0, 1.0]), "labels must be integers"),
        (torch.zeros(2, 8), [0, 1], "must be tensors, got Tensor and list"),
        (torch.zeros(2, 8), torch.zeros(2).long().to("meta"), "device of the embeddings, cpu"),
        (torch.zeros(2, 8), torch.tensor([True, False]), "labels must be integers"),
        (torch.zeros(2, 7), torch.tensor([0, 1]), r"shape \(B, 8\), got \(2, 7\)"),
        (torch.zeros(8), torch.tensor([0]), r"shape \(B, 8\), got \(8,\)"),
        (torch.zeros(2, 8).int(), torch.tensor([0, 1]), "must be floating point"),
        (torch.zeros(0, 8), torch.zeros(0).long(), "the batch is empty"),
    ],
)
def test_bad_batches_are_named(name, embeddings, labels, message):
    with pytest.raises(ValueError, match=message):
        heads.build(name, 8, 5)(embeddings, labels)


def test_trainers_that_pass_the_tuples_of_a_miner(name):
    head, (x, labels) = heads.build(name, 8, 5).eval(), batch()
    assert torch.equal(head(x, labels, None), head(x, labels))
    with pytest.raises(ValueError, match="takes no tuples of a miner"):
        head(x, labels, (labels, labels, labels))


def test_extreme_inputs_give_finite_values(name):
    """cos = ±1 in both roles, a zero embedding, half precision, a batch of one."""
    head = heads.build(name, 4, 3)
    head.weight.data = torch.tensor([[1.0, 0, 0, 0], [-1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    rows = [[1.0, 0, 0, 0], [-1, 0, 0, 0], [0, 0, 0, 0], [300, 1, 2, 3]]
    for dtype in (torch.float16, torch.float32, torch.float64):
        for label in range(3):
            for some in (slice(0, 4), slice(0, 1), slice(2, 3)):
                x = torch.tensor(rows[some], dtype=dtype, requires_grad=True)
                head.zero_grad()
                loss = head(x, torch.full((len(x),), label))
                loss.backward()
                assert loss.dtype == torch.promote_types(dtype, torch.float32)
                assert loss.isfinite()
                assert x.grad.isfinite().all()
                assert all(p.grad.isfinite().all() for p in head.parameters())


def test_autocast_does_not_reach_inside(name):
    head = heads.build(name, 8, 5).eval()
    x, labels = batch()
    x = x.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = head(x, labels)
    assert torch.equal(inside, head(x.float(), labels))


def test_low_precision_prototypes_are_computed_with_in_float32(name):
    head = heads.build(name, 8, 5).to(torch.bfloat16).eval()
    x, labels = batch()
    loss = head(x.bfloat16(), labels)
    assert loss.dtype == torch.float32
    loss.backward()
    assert head.weight.grad.dtype == torch.bfloat16
    other = heads.build(name, 8, 5).eval()
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(x.bfloat16(), labels), loss, rtol=2e-2, atol=0)


def test_swapping_two_classes_permutes_the_gradient(name):
    head, other = (heads.build(name, 8, 5).double().eval() for _ in range(2))
    x, labels = batch()
    x = x.double().requires_grad_()
    swap = torch.tensor([3, 1, 2, 0, 4])
    other.weight.data = head.weight.data[swap].clone()
    loss, swapped = head(x, labels), other(x, swap[labels])
    torch.testing.assert_close(loss, swapped)
    torch.testing.assert_close(
        torch.autograd.grad(loss, head.weight)[0][swap],
        torch.autograd.grad(swapped, other.weight)[0],
    )


def test_state_survives_a_round_trip(name):
    head = heads.build(name, 8, 5)
    x, labels = batch()
    for _ in range(3):
        head(x, labels)
    other = heads.build(name, 8, 5)
    other.load_state_dict(head.state_dict())
    assert torch.equal(head.eval()(x, labels), other.eval()(x, labels))


def test_two_forward_passes_before_a_backward_pass(name):
    """Neither the renormalisation nor running statistics disturb a graph still in use."""
    head = heads.build(name, 8, 5)
    (head(*batch()) + head(*batch(seed=1))).backward()
    assert head.weight.grad.isfinite().all()


def test_an_evaluation_leaves_running_statistics_alone(name):
    head = heads.build(name, 8, 5).eval()
    before = {key: value.clone() for key, value in head.named_buffers()}
    head(*batch())
    for key, value in head.named_buffers():
        assert torch.equal(value, before[key])


def test_learns_to_separate(name):
    """Free embeddings and prototypes: after some steps each is nearest to its own prototype."""
    torch.manual_seed(1)
    # A-softmax at full strength and sigmoids of scale 1 need longer than this.
    options = {"sphereface": {"m": 1, "lambda_min": 0.0}, "bce": {"r": 8.0}}
    head = heads.build(name, 8, 5, **options.get(name, {}))
    labels = torch.arange(5).repeat(4)
    x = torch.nn.Parameter(torch.randn(20, 8))
    optimizer = torch.optim.SGD([x, *head.parameters()], lr=0.05, momentum=0.9)
    first = None
    for _ in range(150):
        loss = head(x, labels)
        first = first or loss.item()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([x, *head.parameters()], 1.0)
        optimizer.step()
    assert head(x, labels).item() < first
    cos = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(head.weight).T
    assert (cos.argmax(1) == labels).all()


@pytest.mark.parametrize("name", ["sphereface2", "siglip", "sface", "sphereface", "cosface"])
def test_gradients_by_cosine_are_those_of_the_prototypes(name: str) -> None:
    embeddings, labels = batch(size=4, dim=6, classes=9)
    head = heads.build(name, embedding_dim=6, num_classes=9).double().eval()
    embeddings = 3 * embeddings.double()
    found = head.cosine_gradients(embeddings, labels)
    assert found is not None and found.shape == (4, 9)
    for row, x, label in zip(found, embeddings, labels, strict=True):
        (gradient,) = torch.autograd.grad(head(x[None], label[None]), head.weight)
        # A row of W gets the derivative by its cosine times the unit embedding.
        torch.testing.assert_close(row, gradient @ torch.nn.functional.normalize(x, dim=0))


def test_a_batch_that_is_not_finite_leaves_nothing_behind(name):
    """Mixed precision skips such a step, and a running mean must not keep it."""
    head = heads.build(name, embedding_dim=8, num_classes=5)
    x, labels = batch()
    head(x, labels)
    before = {key: value.clone() for key, value in head.named_buffers()}
    head(x * float("nan"), labels)
    for key, value in head.named_buffers():
        assert value.dtype == torch.int64 or torch.equal(value, before[key]), key
    assert head(x, labels).isfinite()
