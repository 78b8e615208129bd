"""Backbones: architecture, parameter counts, options, errors."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch import nn

from sphereface2 import backbones
from sphereface2.backbones.activation import PReLU, _ChannelsLastPReLU
from sphereface2.errors import UserError


def count(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def build_on_meta(name: str, **kwargs: object) -> backbones.Backbone:
    with torch.device("meta"):  # shapes without memory or initialisation
        return backbones.build(name, **kwargs)


def noise(net: backbones.Backbone, batch: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(
        0, 256, (batch, 3, *net.input_size), dtype=torch.uint8, generator=generator
    )
    return net.preprocessing(images)


# --- parameter counts -----------------------------------------------------------------------
# Derived layer by layer from the published architectures, with no code of the package: a 3×3
# convolution i -> o has 9io parameters (+ o with a bias), batch normalisation 2c, PReLU c.


def sfnet_formula(units: tuple[int, ...], batch_norm: bool, prelu: bool, side: int = 112) -> int:
    extra = (2 if batch_norm else 1) + (1 if prelu else 0)  # norm or bias, slopes: per channel
    total, inputs = 0, 3
    for outputs, repeats in zip((64, 128, 256, 512), units, strict=True):
        total += 9 * inputs * outputs + extra * outputs
        total += 2 * repeats * (9 * outputs * outputs + extra * outputs)
        inputs = outputs
    total += 512 * (side // 16) ** 2 * 512 + 512
    return total + (2 * 512 if batch_norm else 0)


SFNET_UNITS = {
    "sfnet4": (0, 0, 0, 0),
    "sfnet10": (0, 1, 2, 0),
    "sfnet20": (1, 2, 4, 1),
    "sfnet36": (2, 4, 8, 2),
    "sfnet64": (3, 8, 16, 3),
}


@pytest.mark.parametrize("name", SFNET_UNITS)
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("activation", ["prelu", "relu"])
def test_sfnet_parameter_counts(name: str, batch_norm: bool, activation: str) -> None:
    net = build_on_meta(name, batch_norm=batch_norm, activation=activation)
    assert count(net) == sfnet_formula(SFNET_UNITS[name], batch_norm, activation == "prelu")
    convolutions = sum(isinstance(module, nn.Conv2d) for module in net.modules())
    assert convolutions == {"sfnet4": 4, "sfnet10": 10, "sfnet20": 20, "sfnet36": 36}.get(name, 64)


def iresnet_formula(units: tuple[int, ...]) -> int:
    total = 9 * 3 * 64 + 3 * 64  # stem: convolution, norm (2c) and PReLU (c)
    inputs = 64
    for channels, repeats in zip((64, 128, 256, 512), units, strict=True):
        # first unit: norm of the input, two convolutions, two norms and PReLU, projected shortcut
        total += 2 * inputs + 9 * inputs * channels + 9 * channels**2 + 5 * channels
        total += inputs * channels + 2 * channels
        total += (repeats - 1) * (18 * channels**2 + 7 * channels)
        inputs = channels
    total += 2 * 512  # last norm
    total += 512 * 7 * 7 * 512 + 512  # linear layer
    return total + 2 * 512  # BatchNorm1d, its frozen weight included


# Totals of arcface_torch's r18, r34, r50, r100, r200 and mbf at 112×112 and 512-d: each was
# instantiated once from the published architecture and compared key by key.
INSIGHTFACE = {
    "iresnet18": ((2, 2, 2, 2), 24_025_600),
    "iresnet34": ((3, 4, 6, 3), 34_139_328),
    "iresnet50": ((3, 4, 14, 3), 43_590_848),
    "iresnet100": ((3, 13, 30, 3), 65_156_160),
    "iresnet200": ((6, 26, 60, 6), 118_833_920),
}


@pytest.mark.parametrize("name", INSIGHTFACE)
def test_iresnet_parameter_counts_equal_insightface(name: str) -> None:
    units, total = INSIGHTFACE[name]
    assert iresnet_formula(units) == total
    assert count(build_on_meta(name)) == total


def test_iresnet_carries_insightface_names() -> None:
    shapes = {
        key: tuple(value.shape) for key, value in build_on_meta("iresnet50").state_dict().items()
    }
    assert shapes["conv1.weight"] == (64, 3, 3, 3)
    assert shapes["layer1.0.downsample.0.weight"] == (64, 64, 1, 1)
    assert shapes["layer3.13.bn3.running_var"] == (256,)
    assert shapes["layer4.2.prelu.weight"] == (512,)
    assert shapes["fc.weight"] == (512, 25088)
    assert shapes["features.running_mean"] == (512,)


def test_mobilefacenet_parameter_count_equals_insightface() -> None:
    def conv(inputs: int, outputs: int, kernel: int, groups: int, prelu: bool = True) -> int:
        return inputs // groups * outputs * kernel**2 + (3 if prelu else 2) * outputs

    def bottleneck(inputs: int, hidden: int, outputs: int) -> int:
        return (
            conv(inputs, hidden, 1, 1)
            + conv(hidden, hidden, 3, hidden)
            + conv(hidden, outputs, 1, 1, prelu=False)
        )

    total = (
        conv(3, 128, 3, 1)
        + conv(128, 128, 3, 64)
        + 5 * bottleneck(128, 128, 128)  # one of stride 2, four repeated
        + bottleneck(128, 256, 256)
        + 6 * bottleneck(256, 256, 256)
        + bottleneck(256, 512, 256)
        + 2 * bottleneck(256, 256, 256)
        + conv(256, 512, 1, 1)
        + conv(512, 512, 7, 512, prelu=False)
        + 512 * 512
        + 2 * 512
    )
    assert count(build_on_meta("mobilefacenet")) == total == 2_059_520


# --- what the networks compute --------------------------------------------------------------


@pytest.mark.parametrize("activation", ["prelu", "relu"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_sfnet_forward_is_the_published_function(activation: str, batch_norm: bool) -> None:
    """The whole of SFNet-10, restated with functional calls from the state dict alone."""
    torch.manual_seed(0)
    net = backbones.build(
        "sfnet10",
        activation=activation,
        batch_norm=batch_norm,
        width=0.125,
        input_size=(32, 48),
        embedding_dim=7,
    ).double()
    for name, tensor in net.state_dict().items():  # break every symmetry of the initial values
        if tensor.is_floating_point():
            tensor.add_(torch.rand_like(tensor) * (1.0 if "running_var" in name else 0.1))
    state = net.eval().state_dict()
    x = noise(net).double()

    def conv_norm(x: torch.Tensor, conv: str, norm: str, stride: int = 1) -> torch.Tensor:
        bias = state.get(conv + ".bias")
        x = torch.nn.functional.conv2d(x, state[conv + ".weight"], bias, stride, 1)
        if batch_norm:
            mean, var, gain, shift = (
                state[f"{norm}.{part}"].view(1, -1, 1, 1)
                for part in ("running_mean", "running_var", "weight", "bias")
            )
            x = (x - mean) / (var + 1e-5).sqrt() * gain + shift
        return x

    def act(x: torch.Tensor, key: str) -> torch.Tensor:
        slope = state[key + ".weight"].view(1, -1, 1, 1) if activation == "prelu" else 0.0
        return torch.where(x > 0, x, slope * x)

    y = x
    for stage, repeats in enumerate((0, 1, 2, 0)):
        first = f"stages.{stage}.0."
        y = act(conv_norm(y, first + "conv", first + "norm", 2), first + "act")
        for unit in range(1, repeats + 1):
            prefix = f"stages.{stage}.{unit}."
            branch = act(conv_norm(y, prefix + "conv1", prefix + "norm1"), prefix + "act1")
            branch = conv_norm(branch, prefix + "conv2", prefix + "norm2")
            # SphereFace's PReLU network activates inside the branch, the ReLU one after the sum.
            if activation == "prelu":
                y = y + act(branch, prefix + "act2")
            else:
                y = act(y + branch, prefix + "act2")
    y = y.flatten(1) @ state["fc.weight"].T + state["fc.bias"]
    if batch_norm:
        y = (y - state["norm.running_mean"]) / (state["norm.running_var"] + 1e-5).sqrt()
        y = y * state["norm.weight"] + state["norm.bias"]
    torch.testing.assert_close(net(x), y, rtol=1e-9, atol=1e-9)


# --- PReLU: torch's own module is the oracle ------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (1, 1, 1, 1), (3, 8, 1, 7)])
def test_fast_prelu_gradients_by_finite_differences(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=torch.float64).to(memory_format=torch.channels_last)
    slope = torch.randn(shape[1], dtype=torch.float64)  # negative slopes too
    arguments = (x.requires_grad_(), slope.requires_grad_())
    assert torch.autograd.gradcheck(_ChannelsLastPReLU.apply, arguments)
    assert torch.autograd.gradgradcheck(_ChannelsLastPReLU.apply, arguments)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_fast_prelu_equals_torch(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 7).to(dtype).to(memory_format=torch.channels_last)
    x[0, :, 0, 0] = 0.0  # the kink: both give the slope's side
    weights = torch.randn(4, 6, 5, 7)
    results = []
    for module in (PReLU(6), nn.PReLU(6)):
        with torch.no_grad():
            module.weight.copy_(torch.linspace(-0.5, 1.5, 6))
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = module(leaf)
        (y.float() * weights).sum().backward()
        assert y.is_contiguous(memory_format=torch.channels_last)
        results.append((y.detach(), leaf.grad, module.weight.grad))
    for ours, oracle in zip(*results, strict=True):
        assert ours.dtype == oracle.dtype
        torch.testing.assert_close(ours, oracle, rtol=tolerance, atol=tolerance)


def test_prelu_networks_train_alike_in_both_memory_formats() -> None:
    """channels-last takes the fast PReLU, contiguous memory torch's: the same gradients."""
    gradients = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        net = backbones.build("sfnet10", batch_norm=True, width=0.125, input_size=32).double()
        net = net.to(memory_format=memory_format)
        x = noise(net, batch=4).double().to(memory_format=memory_format)
        (net(x) * torch.linspace(-1, 1, 512)).sum().backward()
        gradients.append({key: value.grad for key, value in net.named_parameters()})
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][key], gradient, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_final_batch_norm_starts_at_a_tenth() -> None:
    norm = backbones.build("sfnet4", batch_norm=True, width=0.125, input_size=32).norm
    assert torch.equal(norm.weight, torch.full((512,), 0.1))


@pytest.mark.parametrize("name", backbones.available())
def test_every_backbone_yields_embeddings_and_gradients(name: str) -> None:
    torch.manual_seed(0)
    net = backbones.build(name, input_size=(64, 48), embedding_dim=24, width=0.125)
    x = noise(net, batch=3)
    embeddings = net(x)
    assert embeddings.shape == (3, 24)
    assert net.embedding_dim == 24
    (embeddings * torch.randn_like(embeddings)).sum().backward()
    for key, parameter in net.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
    rebuilt = backbones.build(net.config["name"], **json.loads(json.dumps(net.config["kwargs"])))
    rebuilt.load_state_dict(net.state_dict())
    assert rebuilt.preprocessing == net.preprocessing
    assert torch.equal(rebuilt.eval()(x), net.eval()(x))


@pytest.mark.parametrize("size", [64, 80, 96, 112, 128, 160, 224, (112, 96)])
@pytest.mark.parametrize("name", ["sfnet4", "iresnet18", "mobilefacenet"])
def test_input_sizes(name: str, size: int | tuple[int, int]) -> None:
    net = backbones.build(name, input_size=size, embedding_dim=16, width=0.125).eval()
    assert net(noise(net, batch=1)).shape == (1, 16)


@pytest.mark.parametrize("name", ["sfnet20", "sfnet64"])
@pytest.mark.parametrize("activation", ["prelu", "relu"])
def test_sfnet_without_batch_norm_keeps_its_signal(name: str, activation: str) -> None:
    """Neither vanishing nor exploding: embeddings depend on the image and gradients reach the
    first convolution."""
    torch.manual_seed(0)
    net = backbones.build(name, activation=activation, input_size=64)
    embeddings = net(noise(net, batch=4))
    spread = (embeddings - embeddings.mean(0)).norm(dim=1) / embeddings.norm(dim=1)
    assert 1e-3 < embeddings.std() < 1e3
    assert spread.min() > 0.05
    embeddings.norm(dim=1).sum().backward()
    first, last = net.stages[0][0].conv.weight, net.stages[3][-1].conv2.weight
    ratio = (first.grad.norm() / first.norm()) / (last.grad.norm() / last.norm())
    assert 1e-3 < ratio < 1e3


def test_residual_scale_zero_starts_as_the_identity() -> None:
    torch.manual_seed(0)
    deep = backbones.build(
        "sfnet20", batch_norm=True, residual_scale=0.0, width=0.125, input_size=32
    )
    unit = deep.stages[2][1]
    x = torch.rand(2, 32, 4, 4)
    assert torch.equal(unit(x), x)


def test_dropout_and_width() -> None:
    torch.manual_seed(0)
    net = backbones.build("sfnet4", dropout=0.5, width=0.25, input_size=32)
    x = noise(net)
    assert net.fc.in_features == 128 * 2 * 2
    assert not torch.equal(net(x), net(x))
    assert torch.equal(net.eval()(x), net(x))


def test_one_step_of_training_lowers_the_loss_without_batch_norm() -> None:
    torch.manual_seed(0)
    net = backbones.build("sfnet20", width=0.25, input_size=64, embedding_dim=16)
    x, target = noise(net, batch=16), torch.randn(16, 16)
    optimiser = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = (1 - torch.cosine_similarity(net(x), target)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses


# --- errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("sfnet2O", {}, r"no backbone 'sfnet2O' \(did you mean 'sfnet20'\?\)"),
        ("sfnet20", {"widht": 0.5}, r"no parameter 'widht' \(did you mean 'width'\?\)"),
        ("iresnet50", {"batch_norm": True}, "no parameter 'batch_norm'"),
        ("sfnet20", {"input_size": 100}, r"divisible by 16 .* got \(100, 100\)"),
        ("sfnet20", {"input_size": (112, 112, 3)}, "input_size must be"),
        ("sfnet20", {"input_size": 0}, "input_size must be"),
        ("sfnet20", {"embedding_dim": 0}, "embedding_dim must be an integer ≥ 1, got 0"),
        ("sfnet20", {"embedding_dim": 1.5}, "embedding_dim must be an integer ≥ 1"),
        ("sfnet20", {"width": -1}, "width must be a number > 0, got -1"),
        ("sfnet20", {"dropout": 1.0}, "dropout must be a number ≥ 0 and < 1"),
        (
            "sfnet20",
            {"activation": "gelu"},
            "activation must be one of 'prelu', 'relu', got 'g",
        ),
        ("sfnet20", {"activation": nn.ReLU}, "stored as JSON"),
        ("sfnet20", {"std": (1, 0, 1)}, "std must be positive"),
        ("sfnet20", {"std": 0}, "std must be three numbers"),
        ("sfnet20", {"mean": (1, 2)}, "mean must be three numbers"),
        ("sfnet20", {"mean": 127.5}, "mean must be three numbers"),
        ("sfnet20", {"colour_order": "GRB"}, "colour_order must be one of 'RGB', 'BGR', got 'GRB'"),
        (
            "sfnet20",
            {"activation": "relu", "after_sum": False, "residual_scale": 0},
            "never learns",
        ),
    ],
)
def test_bad_arguments(name: str, kwargs: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbones.build(name, **kwargs)


def test_wrong_input_says_what_is_expected() -> None:
    net = backbones.build("sfnet4", input_size=(32, 48), width=0.125)
    with pytest.raises(UserError, match=r"\(B, 3, 32, 48\), got \(2, 3, 48, 32\)"):
        net(torch.zeros(2, 3, 48, 32))
    with pytest.raises(UserError, match=r"net.preprocessing\(images\) first"):
        net(torch.zeros(2, 3, 32, 48, dtype=torch.uint8))


# --- timm -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timm/resnet18", "resnet18", "timm/vit_tiny_patch16_224"])
def test_timm_models(name: str) -> None:
    pytest.importorskip("timm")
    net = backbones.build(name, embedding_dim=32, input_size=(64, 48)).eval()
    assert net(noise(net)).shape == (2, 32)
    assert net.config["name"] == name
    assert "pretrained" not in net.config["kwargs"]


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("timm/resnet19", {}, r"timm has no model 'resnet19' \(did you mean 'resnet1"),
        ("timm/resnet18", {"no_such": 1}, "timm cannot build resnet18.*no_such"),
        ("timm/resnet18", {"checkpoint_path": "weights.pth"}, "'checkpoint_path'"),
        ("timm/hf-hub:somebody/model", {}, "timm has no model"),
    ],
)
def test_timm_errors(name: str, kwargs: dict, message: str) -> None:
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=message):
        backbones.build(name, **kwargs)


def test_timm_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'sphereface2\[timm\]'"):
        backbones.build("timm/resnet18")
    with pytest.raises(UserError, match="there is no backbone 'resnet18'"):
        backbones.build("resnet18")
    assert backbones.build("sfnet4", input_size=16, width=0.125)
