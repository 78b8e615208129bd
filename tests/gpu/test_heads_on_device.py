"""Every head, form and precision on the device against float64 on the CPU.

The float64 oracle is the dense form, which the unit tests hold to independent implementations.
"""

import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sphereface2 import heads
from sphereface2.heads import terms

DIM, PEOPLE, BATCH = 64, 700, 48
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SGD = {"momentum": 0.9, "weight_decay": 5e-4}
RATE = 0.3
SCALER = 128.0  # as a gradient scaler has it: float16 loses small gradients otherwise

VARIANTS = [(name, {}) for name in heads.available() if name != "sphereface2"]
VARIANTS += [
    ("sphereface2", {"margin_type": kind, "detach": detach, "m": 1.4 if kind == "M" else 0.4})
    for kind, detach in itertools.product("CAM", ["all", "margin"])
]
VARIANTS += [("sphereface2", {"bias": "per_class"})]
FORMS = {
    "dense": {},
    "streaming": {"streaming": True, "chunk_size": 128},
    "fused": {"streaming": True, "chunk_size": 128},
    "sampled": {"negatives": "uniform", "negative_share": 1.0, "chunk_size": 128},
}


def supports(name, form):
    known = heads.parameters(name)
    if form == "fused":
        return "process_group" in known
    return all(keyword in known for keyword in FORMS[form])


CASES = [
    pytest.param(name, options, form, id="-".join([name, *map(str, options.values()), form]))
    for name, options in VARIANTS
    for form in FORMS
    if supports(name, form)
]


def pair(name, options, form, device):
    """The float64 oracle on the CPU, and the same head in ``form`` on the device."""
    torch.manual_seed(0)
    oracle = heads.build(name, DIM, PEOPLE, **options).double()
    ours = heads.build(name, DIM, PEOPLE, **options, **FORMS[form])
    ours.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in oracle.state_dict().items()}
    )
    return oracle, ours.to(device)


def batch(dtype):
    x = 3 * torch.randn(BATCH, DIM)
    return x.to(dtype), torch.randint(PEOPLE, (BATCH,))


def backward(head, x, labels):
    """Loss and the gradient by the embeddings, through a scaler's factor.

    The forward pass of a half-precision batch runs under autocast, as in training.
    """
    x = x.detach().requires_grad_()
    half = x.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(x.device.type, x.dtype if half else None, enabled=half):
        loss = head(x, labels)
    (loss * SCALER).backward()
    return loss.detach(), x.grad / SCALER


def assert_near(found, expected, tolerance):
    assert torch.isfinite(found).all()
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    error = (found - expected).norm() / expected.norm().clamp_min(1e-30)
    assert error < tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "options", "form"), CASES)
def test_loss_and_gradients_equal_float64(device, name, options, form, precision):
    dtype = PRECISIONS[precision]
    oracle, ours = pair(name, options, form, device)
    if form == "fused":
        fused = heads.FusedSGD(ours, lr=RATE, **SGD)
        plain = torch.optim.SGD([oracle.weight], lr=RATE, **SGD)
    start = torch.nn.functional.normalize(oracle.weight.detach().clone())
    for _ in range(2):  # running statistics and momentum take part in the second step
        x, labels = batch(dtype)
        loss, gradient = backward(oracle, x.double(), labels)
        found_loss, found_gradient = backward(ours, x.to(device), labels.to(device))
        assert found_loss.dtype == torch.float32
        assert_near(found_loss, loss, 1e-4)
        assert found_gradient.dtype == dtype
        assert_near(found_gradient, gradient, 1e-4 if dtype == torch.float32 else 5e-3)
        if form == "fused":
            oracle.weight.grad /= SCALER
            plain.step(), fused.step()
            assert ours.weight.grad is None
        else:
            assert_near(ours.weight.grad / SCALER, oracle.weight.grad / SCALER, 1e-4)
        for parameter, expected in zip(ours.parameters(), oracle.parameters(), strict=True):
            if parameter is not ours.weight:
                assert_near(parameter.grad, expected.grad, 1e-4)
        ours.zero_grad(), oracle.zero_grad()
    if form == "fused":
        assert_near(ours.weight.detach().double().cpu() - start, oracle.weight - start, 1e-4)


@pytest.mark.parametrize("name", ["sphereface2", "cosface"])
def test_tiny_batch_of_one_and_a_single_block(device, name):
    for form in ("dense", "streaming"):
        oracle, ours = pair(name, {}, form, device)
        x, labels = torch.randn(1, DIM), torch.tensor([PEOPLE - 1])
        loss, gradient = backward(oracle, x.double(), labels)
        found_loss, found_gradient = backward(ours, x.to(device), labels.to(device))
        assert_near(found_loss, loss, 1e-4)
        assert_near(found_gradient, gradient, 1e-4)


def test_the_loss_between_samples_equals_float64(device):
    """With people of whom nobody was seen, and one twice in a batch."""
    config = heads.SampleToSampleConfig(weight=0.5, s=12.0)
    with device:
        ours = heads.SampleToSample(DIM, 300, config)
    exact = heads.SampleToSample(DIM, 300, config).double()
    generator = torch.Generator().manual_seed(0)
    for step in range(3):
        x = torch.randn(64, DIM, generator=generator).double().requires_grad_()
        labels = torch.randint(300, (64,), generator=generator)
        moved = x.detach().float().to(device).requires_grad_()
        if step:
            ours.start(moved, labels.to(device))
            exact.start(x, labels)
            losses = ours(moved, labels.to(device)), exact(x, labels)
            torch.testing.assert_close(losses[0].cpu().double(), losses[1], rtol=1e-4, atol=0)
            for loss in losses:
                loss.backward()
            torch.testing.assert_close(moved.grad.cpu().double(), x.grad, rtol=1e-3, atol=1e-6)
        ours.remember(moved, labels.to(device))
        exact.remember(x, labels)
    torch.testing.assert_close(ours.memory.cpu().double(), exact.memory, rtol=1e-5, atol=1e-6)


def test_sampled_negatives_are_unbiased(device):
    oracle, ours = pair("sphereface2", {"r": 4.0}, "sampled", device)
    ours.negative_share = 0.3
    x, labels = torch.randn(BATCH, DIM), torch.randint(PEOPLE, (BATCH,))
    expected, _ = backward(oracle, x.double(), labels)
    placed, place = x.to(device), labels.to(device)
    with torch.no_grad():
        drawn = torch.stack([ours(placed, place) for _ in range(200)]).double().cpu()
    assert drawn.std() > 0
    assert abs(drawn.mean() - expected) < 5 * drawn.std() / len(drawn) ** 0.5


def test_bfloat16_prototypes_and_momentum_follow_float64(device):
    oracle, _ = pair("sphereface2", {}, "fused", device)
    torch.manual_seed(0)
    ours = heads.build("sphereface2", DIM, PEOPLE, weight_dtype="bfloat16", **FORMS["fused"])
    with torch.no_grad():
        ours.weight.copy_(oracle.weight)
        oracle.weight.copy_(ours.weight)
    ours.to(device)
    start = torch.nn.functional.normalize(oracle.weight.detach().clone())
    fused = heads.FusedSGD(ours, lr=RATE, momentum_dtype="bfloat16", **SGD)
    plain = torch.optim.SGD([oracle.weight], lr=RATE, **SGD)
    for _ in range(3):
        x, labels = batch(torch.float32)
        oracle.zero_grad()
        backward(oracle, x.double(), labels)
        oracle.weight.grad /= SCALER
        plain.step()
        backward(ours, x.to(device), labels.to(device))
        fused.step()
    assert ours.weight.dtype == torch.bfloat16
    assert_near(ours.weight, oracle.weight, 1e-2)
    moved = (ours.weight.detach().double().cpu() - start).flatten()
    expected = (oracle.weight.detach() - start).flatten()
    assert torch.cosine_similarity(moved, expected, 0) > 0.95


@pytest.mark.parametrize("kind", ["C", "A", "M"])
@pytest.mark.parametrize("detach", ["all", "margin"])
def test_at_the_size_of_training(cuda, kind, detach):
    """More blocks than one at the default size, the last one ragged; the oracle on the device."""
    torch.manual_seed(0)
    people = 150_003
    with cuda:
        oracle = heads.SphereFace2(256, people, margin_type=kind, detach=detach).double()
        ours = heads.SphereFace2(256, people, margin_type=kind, detach=detach, streaming=True)
        ours.load_state_dict({k: v.float() for k, v in oracle.state_dict().items()})
        x, labels = torch.randn(512, 256), torch.randint(people, (512,))
    assert ours.chunk(x) < people
    for found, expected in zip(
        backward(ours, x, labels), backward(oracle, x.double(), labels), strict=True
    ):
        assert_near(found, expected, 1e-4)
    assert_near(ours.weight.grad, oracle.weight.grad, 1e-4)


BF16 = [
    pytest.param("sphereface2", {**options, "compute": "bf16"}, form)
    for options in ({}, {"margin_type": "A", "detach": "margin"})
    for form in ("streaming", "fused", "sampled")
]


@pytest.mark.parametrize("weight_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "options", "form"), BF16)
def test_bf16_products_cost_three_digits(device, name, options, form, weight_dtype):
    """Relative errors against float64: of the loss below 1e-3, of all gradients below 1e-2."""
    torch.manual_seed(0)
    people = 3000
    options = dict(options, weight_dtype=weight_dtype)
    ours = heads.build(name, DIM, people, **options, **FORMS[form])
    del options["compute"], options["weight_dtype"]
    oracle = heads.build(name, DIM, people, **options).double()
    with torch.no_grad():
        oracle.weight.copy_(ours.weight)
    unit = torch.nn.functional.normalize(oracle.weight.detach().clone())
    ours.to(device)
    labels = torch.randint(people, (BATCH,))
    # Embeddings of a network that has learned: own cosines of about 0.7 are where digits count.
    x = unit[labels] + 0.12 * torch.randn(BATCH, DIM, dtype=torch.float64)
    if form == "fused":
        momentum = "full" if weight_dtype == "float32" else "bfloat16"
        fused = heads.FusedSGD(ours, lr=RATE, momentum_dtype=momentum, **SGD)
    loss, gradient = backward(oracle, x, labels)
    found_loss, found_gradient = backward(ours, x.float().to(device), labels.to(device))
    assert_near(found_loss, loss, 1e-3)
    assert_near(found_gradient, gradient, 1e-2)
    assert_near(ours.bias.grad, oracle.bias.grad, 2e-3)
    if form == "fused":
        expected = oracle.weight.grad / SCALER + SGD["weight_decay"] * unit
        assert_near(fused.state[ours.weight]["momentum_buffer"], expected, 1e-2)
    else:
        assert_near(ours.weight.grad, oracle.weight.grad, 1e-2)


WAITLESS = [
    case
    for case in CASES + BF16
    for name, options, form in (case.values,)
    if not heads.build(name, 2, 2, **options, **FORMS[form]).asks_host
]
# Rows of a sample that count for nothing are skipped by the kernels; without them, taken out.
EAGERLY_WAITLESS = [case for case in WAITLESS if case.values[2] != "sampled"]


@pytest.mark.parametrize(("name", "options", "form"), WAITLESS)
def test_no_head_waits_for_the_device(cuda, name, options, form):
    head = heads.build(name, 64, 700, **options, **FORMS[form]).to(cuda)
    head.trust_batches = True
    if form == "fused":
        heads.FusedSGD(head, 0.1)
    x = torch.randn(48, 64, device=cuda, requires_grad=True)
    labels = torch.randint(700, (48,), device=cuda)
    for mode in ("default", "error"):  # the first step may load kernels
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            head(x, labels).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Waiting(TorchDispatchMode):
    """Raises where the host would wait for a device that is only imagined."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        moved = {torch.ops.aten._to_copy.default: 0, torch.ops.aten.copy_.default: 1}
        if function in moved:
            places = args[moved[function]].device.type, result.device.type
            waits = not kwargs.get("non_blocking", args[2:] == (True,))
            if "cpu" in places and "cuda" in places and waits:
                raise AssertionError(f"a copy from {places[0]} to {places[1]} waits")
        return result


@pytest.mark.parametrize(("name", "options", "form"), EAGERLY_WAITLESS)
def test_no_head_would_wait_for_an_imagined_gpu(monkeypatch, name, options, form):
    """Without a GPU: fake CUDA tensors have no values that the host could read."""
    monkeypatch.setattr(terms, "has_kernel", lambda: False)
    monkeypatch.setattr(heads.SphereFace2, "_bias_start", lambda head, start: -10.0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            head = heads.build(name, 64, 700, **options, **FORMS[form])
            head.trust_batches = True
            if form == "fused":
                heads.FusedSGD(head, 0.1)
            x = torch.randn(48, 64, requires_grad=True)
            labels = torch.randint(700, (48,))
        with Waiting():
            assert head(x, labels).device.type == "cuda"
        head.trust_batches = False
        with pytest.raises(DataDependentOutputException):  # labels are checked: the test can fail
            head(x, labels)
