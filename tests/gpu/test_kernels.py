"""The Triton kernels against the eager equations: compiled on CUDA, interpreted on the CPU."""

import dataclasses
import itertools
import os
import subprocess
import sys

import pytest
import torch

from sphereface2.heads.base import renormalise_
from sphereface2.heads.terms import block_terms_
from sphereface2.margins import BinaryMargin, Own

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def kernels(device, monkeypatch):
    """The module of the terms. Triton reads when it is imported whether it interprets.

    The interpreter takes as long for few columns as for many: two tiles a program there, not four.
    """
    if (device.type == "cpu") != INTERPRETED:
        pytest.skip("compiled on CUDA; interpreted on the CPU by the test below")
    module = pytest.importorskip("sphereface2.heads.kernels", exc_type=ImportError)
    if INTERPRETED:
        monkeypatch.setattr(module, "SPLIT", type(module.SPLIT)(2 * module.TILE.value))
    return module


@pytest.fixture
def row_kernels(kernels):
    return pytest.importorskip("sphereface2.heads.row_kernels")


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
        + ["-p", "no:hypothesispytest", "-m", "not gpu", __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout or "[100%]" in done.stdout


NUMBERS = {"float32": "*fp32", "bfloat16": "*bf16"}
SHAPE = {"ROWS": 4, "WIDTH": 512}
TERMS = [
    ("_block_terms", {"cos_ptr": cos}, {"KIND": kind, "SLOPE": slope, "POWER": power} | more)
    for cos, kind, slope, power, more in [
        ("float32", "C", False, 3, {"SKIPS": False, "GIVEN": False}),
        ("float32", "M", True, 0, {"SKIPS": True, "GIVEN": False}),
        ("bfloat16", "C", False, 3, {"SKIPS": False, "GIVEN": True}),
        ("bfloat16", "A", True, 1, {"SKIPS": True, "GIVEN": True}),
    ]
]
ROWS = [
    (
        "_unit_rows",
        {"weight_ptr": w, "into_ptr": into},
        {"INDEXED": i, "COPY": c, "STORE": s} | SHAPE,
    )
    for w, into, i, c, s in [
        ("float32", "float32", False, False, True),
        ("float32", "bfloat16", False, True, False),
        ("bfloat16", "bfloat16", False, True, False),
        ("bfloat16", "float32", True, True, False),
    ]
]
STEPS = [
    (
        "_step_rows",
        {"weight_ptr": w, "velocity_ptr": v, "gradient_ptr": g},
        {"INDEXED": some, "SKIPS": some, "MOMENTUM": momentum, "NESTEROV": some, "ROUNDS": rounds}
        | SHAPE,
    )
    for w, v, g, some, momentum, rounds in [
        ("float32", "float32", "float32", False, True, False),
        ("float32", "float32", "bfloat16", False, True, False),
        ("float32", "bfloat16", "bfloat16", True, True, True),
        ("bfloat16", "bfloat16", "bfloat16", False, True, True),
        ("bfloat16", "bfloat16", "float32", True, False, True),
    ]
]
POINTERS = {
    "places_ptr": "*i64",
    "rows_ptr": "*i64",
    "seed_ptr": "*i64",
    "skip_ptr": "*i1",
    "rate_ptr": "*fp32",
}
INTEGERS = ("samples", "columns", "start", "splits", "count", "dim")


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel does not compile")
@pytest.mark.parametrize(
    ("name", "types", "constants"),
    [*TERMS, *ROWS, *STEPS],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_it_compiles_for_hopper_with_wide_accesses(name, types, constants):
    """Without a GPU: the compiler refuses more than the interpreter does."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sphereface2.heads import kernels, row_kernels

    kernel = getattr(kernels, name, None) or getattr(row_kernels, name)
    names = kernel.arg_names
    known = {n: "*fp32" for n in names if n.endswith("_ptr")} | POINTERS
    known |= dict.fromkeys(INTEGERS, "i32") | {n: NUMBERS[kind] for n, kind in types.items()}
    known |= dict.fromkeys(constants, "constexpr")
    # As for tensors from torch's allocator, a width and a block of multiples of 16.
    aligned = [n for n in names if n.endswith("_ptr") or n in INTEGERS]
    source = ASTSource(
        fn=kernel,
        signature={n: known.get(n, "fp32") for n in names},
        constexprs=constants,
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "ld.global.v4.b32" in code or "ld.global.v2.b64" in code
    assert "st.global.v4.b32" in code or "st.global.v2.b64" in code


def eager(margin, cos, bias, own, weight=1.0, skip=None):
    """The equations in float64 on the CPU."""
    own = dataclasses.replace(own, places=own.places.cpu())
    if skip is not None:
        skip = skip.cpu()
    cos = cos.detach().double().cpu()
    return block_terms_(margin, cos, bias.double().cpu(), own, weight, skip=skip)


def near(found, expected, tolerance):
    found = found.double().cpu()
    assert torch.isfinite(found).all()
    return (found - expected).norm() <= tolerance * expected.norm()


MARGINS = [
    {"margin_type": kind, "detach": detach, "t": t, "m": m, "r": r}
    for (kind, m), detach, (t, r) in itertools.product(
        [("C", 0.4), ("A", 0.5), ("M", 1.7)],
        ["all", "margin"],
        [(3.0, 40.0), (1.0, 64.0), (2.5, 10.0)],
    )
]


@pytest.mark.parametrize(
    "settings", MARGINS, ids=lambda settings: "-".join(map(str, settings.values()))
)
def test_every_margin_equals_float64(device, kernels, settings):
    torch.manual_seed(0)
    margin = BinaryMargin(**settings)
    bias = torch.tensor(-7.3, device=device)
    for columns, weight in ((kernels.SPLIT.value + 404, 1.0), (37, 2.5)):
        cos = torch.rand(5, columns, device=device) * 2 - 1
        cos[0, :2] = torch.tensor([1.0, -1.0])
        # A block in the middle of a sequence, which lacks the fourth sample's class.
        places = torch.tensor([0, 1, columns - 1, -400, 3], device=device) + 300
        own = Own(places, 300, columns)
        skip = None
        if margin.detach == "margin":
            skip = torch.rand(columns, device=device) < 0.2
            skip[own.columns] = False
        expected = eager(margin, cos, bias, own, weight, skip)
        found = kernels.block_terms_(margin, cos, bias, own, weight, skip=skip)
        assert found.dcos.data_ptr() == cos.data_ptr()
        assert near(found.dcos, expected.dcos, 5e-6)
        # acos is steep at a cosine of 1, where float32 has few digits left.
        at_own, expected_own = (
            torch.gather(dcos.cpu(), 1, own.columns.cpu()[:, None]).double()
            for dcos in (found.dcos, expected.dcos)
        )
        assert near(at_own, expected_own, 1e-4)
        assert near(found.loss, expected.loss, 1e-5)
        assert near(found.dbias, expected.dbias, 1e-5)


def test_bfloat16_cosines_and_own_classes_always_present(device, kernels):
    torch.manual_seed(0)
    margin = BinaryMargin()
    columns = kernels.SPLIT.value + 1
    cos = (0.2 * torch.randn(9, columns, device=device)).bfloat16()
    own = Own(torch.randint(columns, (9,), device=device))
    bias = torch.tensor(2.0, device=device)
    expected = eager(margin, cos, bias, own)
    found = kernels.block_terms_(margin, cos, bias, own)
    assert found.dcos.dtype == torch.bfloat16
    assert near(found.dcos, expected.dcos, 4e-3)
    assert near(found.loss, expected.loss, 1e-5) and near(found.dbias, expected.dbias, 1e-5)


def test_tiny_losses_add_up_and_large_logits_do_not_overflow(device, kernels):
    margin = BinaryMargin(r=64.0, t=1.0, m=0.0)
    cos = torch.full((2, 3000), -0.4, device=device)
    cos[1] = 1.0
    own = Own(torch.zeros(2, dtype=torch.int64, device=device))
    bias = torch.tensor(0.0, device=device)
    expected = eager(margin, cos, bias, own)
    found = kernels.block_terms_(margin, cos, bias, own)
    for ours, theirs in zip(found, expected, strict=True):
        for row in (0, 1):  # one is 1e11 times the other
            assert near(ours[row], theirs[row], 1e-5)


def test_sums_add_up_over_blocks_with_exact_own_cosines(device, kernels):
    """As a pass in bfloat16 does it: the own class's cosine is given with all its digits."""
    torch.manual_seed(0)
    margin = BinaryMargin(margin_type="A", detach="margin")
    columns, block = 2 * kernels.SPLIT.value + 808, kernels.SPLIT.value + 904
    cos = (0.2 * torch.randn(7, columns, device=device)).bfloat16()
    own_cos = 0.7 + 0.1 * torch.rand(7, device=device)
    labels = torch.randint(columns, (7,), device=device)
    bias = torch.tensor(-3.0, device=device)
    exact = cos.double()
    exact.scatter_(1, labels[:, None], own_cos.double()[:, None])
    expected = eager(margin, exact, bias, Own(labels))
    sums = kernels.partial_sums(7, block, device)
    parts = []
    for start in (0, block):
        part = cos[:, start : start + block].contiguous()
        own = Own(labels, start, part.shape[1])
        kernels.add_block_terms_(
            margin, part, bias, own, 1.0, skip=None, own_cos=own_cos, sums=sums
        )
        parts.append(part)
    loss, dbias = sums.sum(2)
    assert near(loss, expected.loss, 1e-5) and near(dbias, expected.dbias, 1e-5)
    assert near(torch.cat(parts, 1), expected.dcos, 4e-3)


@pytest.mark.parametrize("dim", [512, 40])
def test_rows_at_unit_length(device, row_kernels, dim):
    torch.manual_seed(0)
    weight = torch.randn(23, dim, device=device)
    weight[3] = 0
    expected = renormalise_(weight.clone())
    rows = torch.tensor([20, 3, 7], device=device)
    into = torch.full((3, dim), torch.nan, device=device, dtype=torch.bfloat16)
    row_kernels.unit_rows(weight, rows, into, store=False)
    assert near(into, expected[rows].double().cpu(), 8e-3)  # the interpreter cuts digits off
    row_kernels.unit_rows(weight, slice(0, 20), None, store=True)
    assert near(weight[:20], expected[:20].double().cpu(), 1e-6)
    assert not near(weight[20:], expected[20:].double().cpu(), 1e-1)
    once = weight[:20].clone()
    row_kernels.unit_rows(weight, slice(0, 20), None, store=True)
    assert torch.equal(weight[:20], once)  # evaluation changes nothing


SETTINGS = [
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    {"momentum": 0.9, "weight_decay": 0.0, "nesterov": False},
    {"momentum": 0.0, "weight_decay": 0.1, "nesterov": False},
]


def stepped(row_kernels, weight, velocity, gradient, rows, skip, seed, settings):
    """W and momentum after a step by the kernel, and after the eager one in float64."""
    exact = weight.double().cpu(), velocity.double().cpu()
    kept = rows if isinstance(rows, slice) else rows[~skip].cpu()
    step = gradient.double().cpu() if skip is None else gradient[~skip].double().cpu()
    unit = torch.nn.functional.normalize(exact[0][kept])
    step = step + settings["weight_decay"] * unit
    if settings["momentum"]:
        exact[1][kept] = settings["momentum"] * exact[1][kept] + step
        ahead = step + settings["momentum"] * exact[1][kept]
        step = ahead if settings["nesterov"] else exact[1][kept]
    exact[0][kept] = unit - 0.3 * step
    moving = velocity if settings["momentum"] else None
    rate = torch.full((), 0.3, device=weight.device)
    row_kernels.step_rows_(weight, moving, gradient, rows, skip, seed, rate, **settings)
    return exact


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dim", [512, 40])
def test_a_step_equals_float64(device, row_kernels, settings, dim):
    torch.manual_seed(0)
    weight, velocity = (torch.randn(23, dim, device=device) for _ in range(2))
    cases = [
        (slice(4, 21), None, torch.randn(17, dim, device=device)),
        # Row 5 is named twice and once skipped.
        (
            torch.tensor([5, 0, 22, 5], device=device),
            torch.tensor([False, False, True, True], device=device),
            torch.randn(4, dim, device=device).bfloat16(),
        ),
    ]
    for rows, skip, gradient in cases:
        exact = stepped(row_kernels, weight, velocity, gradient, rows, skip, None, settings)
        assert near(weight, exact[0], 1e-6) and near(velocity, exact[1], 1e-6)


def test_a_steps_rounding_is_right_on_average(device, row_kernels):
    torch.manual_seed(0)
    rows, dim = 600, 64
    one = [torch.randn(1, dim, device=device) for _ in range(3)]
    weight, velocity, gradient = (x.bfloat16().repeat(rows, 1) for x in one)
    before = weight.clone()
    seed = torch.tensor([2**40 + 7], device=device)
    exact = stepped(
        row_kernels, weight, velocity, gradient, slice(0, rows), None, seed, SETTINGS[1]
    )
    noises = []
    for found, expected in zip((weight, velocity), exact, strict=True):
        found = found.double().cpu()
        spacing = 2.0 ** (expected.abs().log2().floor() - 7)
        assert ((found - expected).abs() < 1.01 * spacing).all()  # a neighbour
        error = (found - expected) / spacing
        assert (error.mean(0).abs() < 5 * 0.5 / rows**0.5).all()
        noises.append((error > 0).double().flatten())
        assert error.std(0).max() > 0.3
    # Rows, and W and its momentum, are rounded independently; another seed rounds otherwise.
    assert len(weight.unique(dim=0)) > rows / 2
    up = torch.stack(noises)
    assert torch.corrcoef(up - up.view(2, rows, dim).mean(1).repeat(1, rows))[0, 1].abs() < 0.03
    for same, value in ((True, seed), (False, seed + 1)):
        again, moving = before.clone(), one[1].bfloat16().repeat(rows, 1)
        stepped(row_kernels, again, moving, gradient, slice(0, rows), None, value, SETTINGS[1])
        assert torch.equal(again, weight) == same
