"""The Triton kernel against the eager equations: compiled on CUDA, interpreted on the CPU."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from sphereface2.heads.terms import block_terms_
from sphereface2.margins import BinaryMargin, Own

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def kernels(device):
    """The module with the kernel. Triton reads when it is imported whether it interprets."""
    if (device.type == "cpu") != INTERPRETED:
        pytest.skip("compiled on CUDA; interpreted on the CPU by the test below")
    return pytest.importorskip("sphereface2.heads.kernels", exc_type=ImportError)


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_the_kernel_in_tritons_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:xdist", "-p", "no:cacheprovider"]
        + ["-m", "not gpu", "-q", __file__],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout or "[100%]" in done.stdout


@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel does not compile")
@pytest.mark.parametrize(("kind", "slope", "power"), [("C", False, 3), ("M", True, 0)])
def test_it_compiles_for_hopper_with_wide_accesses(kind, slope, power):
    """Without a GPU: the compiler refuses more than the interpreter does."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sphereface2.heads.kernels import _block_terms

    constants = {"KIND": kind, "SLOPE": slope, "POWER": power, "ALWAYS": False}
    types = {"cos_ptr": "*fp32", "own_ptr": "*i64", "present_ptr": "*i1", "bias_ptr": "*fp32"}
    types |= {"sums_ptr": "*fp32", "columns": "i32", **dict.fromkeys(constants, "constexpr")}
    names = _block_terms.arg_names
    source = ASTSource(
        fn=_block_terms,
        signature={name: types.get(name, "fp32") for name in names},
        constexprs=constants,
        # As for tensors from torch's allocator and a block of a multiple of 16 classes.
        attrs={
            (names.index(name),): [["tt.divisibility", 16]]
            for name in ("cos_ptr", "sums_ptr", "columns")
        },
    )
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    assert "ld.global.v4.b32" in code
    assert "st.global.v4.b32" in code


def eager(margin, cos, bias, own, weight=1.0):
    """The equations in float64 on the CPU."""
    own = Own(own.columns.cpu(), None if own.present is None else own.present.cpu())
    return block_terms_(margin, cos.detach().double().cpu(), bias.double().cpu(), own, weight)


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
    for columns, weight in ((4500, 1.0), (37, 2.5)):
        cos = torch.rand(5, columns, device=device) * 2 - 1
        cos[0, :2] = torch.tensor([1.0, -1.0])
        own = Own(
            torch.tensor([0, 1, columns - 1, columns // 2, 3], device=device),
            torch.tensor([True, True, True, False, True], device=device),
        )
        expected = eager(margin, cos, bias, own, weight)
        found = kernels.block_terms_(margin, cos, bias, own, weight)
        assert found.dcos.data_ptr() == cos.data_ptr()
        assert near(found.dcos, expected.dcos, 5e-6)
        # acos is steep at a cosine of 1, where float32 has few digits left.
        assert near(own.take(found.dcos), own.take(expected.dcos), 1e-4)
        assert near(found.loss, expected.loss, 1e-5)
        assert near(found.dbias, expected.dbias, 1e-5)


def test_bfloat16_cosines_and_own_classes_always_present(device, kernels):
    torch.manual_seed(0)
    margin = BinaryMargin()
    cos = (0.2 * torch.randn(9, 4097, device=device)).bfloat16()
    own = Own(torch.randint(4097, (9,), device=device))
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
