"""Terms and step in the epilogues of products: compiled on CUDA, interpreted on the CPU.

`test_kernels` starts the interpreter.
"""

import os

import pytest
import torch

from sphereface2 import heads
from sphereface2.heads import streaming, terms
from sphereface2.heads.blocks import Block, GradientProduct
from sphereface2.heads.terms import block_terms_
from sphereface2.margins import BinaryMargin, Own

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def kernels(device, monkeypatch):
    """The module; in the interpreter with small tiles, as that takes a second for a few."""
    if (device.type == "cpu") != INTERPRETED:
        pytest.skip("compiled on CUDA; interpreted on the CPU")
    module = pytest.importorskip("sphereface2.heads.product_kernels", exc_type=ImportError)
    if INTERPRETED:
        monkeypatch.setattr(module, "TERMS_TILES", (module.Tiles(16, 32, 32, 4, 2),))
        monkeypatch.setattr(module, "STEP_TILES", (module.Tiles(32, 32, 32, 4, 2),))
        for user in (streaming, terms):
            monkeypatch.setattr(user, "fits_kernels", lambda *tensors: True)
        mend_the_interpreter(monkeypatch)
    return module


def mend_the_interpreter(monkeypatch):
    """It multiplies the bits of bfloat16 numbers as integers."""
    import numpy as np
    from triton.runtime import interpreter

    def wide(x):
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def dot(self, a, b, d, *precision):
        return interpreter.TensorHandle(wide(a) @ wide(b) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def near(found, expected, tolerance):
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    assert torch.isfinite(found).all()
    error = (found - expected).norm() / expected.norm()
    assert error <= tolerance, f"relative error {error:.2e}, allowed {tolerance:.0e}"
    return True


@pytest.mark.parametrize(
    ("kind", "detach", "t", "r"),
    [("C", "all", 3.0, 40.0), ("A", "margin", 2.5, 10.0), ("M", "margin", 2.0, 64.0)]
    + [("C", "all", 1.0, 1.0)],
)
def test_terms_equal_float64(device, kernels, kind, detach, t, r):
    """Shapes that no tile divides, a class of two samples, and two classes that are elsewhere."""
    torch.manual_seed(0)
    samples, columns, dim, start = (18, 41, 40, 300) if INTERPRETED else (301, 1003, 200, 300)
    margin = BinaryMargin(kind, r=r, m=1.7 if kind == "M" else 0.4, t=t, detach=detach)
    bias = torch.tensor(0.0 if r == 1 else -5.3, device=device)
    rows = torch.randn(columns, dim, device=device).bfloat16()
    rows[3] = 0
    places = torch.randint(columns, (samples,), device=device) + start
    places[:4] = torch.tensor([columns - 1, columns - 1, -400, columns]) + start
    own = Own(places, start, columns)
    x = torch.nn.functional.normalize(torch.randn(samples, dim, device=device)).bfloat16()
    inverse = 1 / rows.float().norm(dim=1).clamp_min(1e-12)
    cos = x.double().cpu() @ (rows.double() * inverse[:, None].double()).cpu().T
    kept = Own(places.cpu(), start, columns)
    own_cos = kept.take(cos)
    expected = block_terms_(margin, cos.clone(), bias.double().cpu(), kept, 2.5)
    pull = margin.positive(own_cos, bias.double().cpu())
    sums = kernels.partial_sums(samples, columns + 70, device)
    sums[:, :, 0] = 1.0  # what an earlier block left
    into = torch.full((samples, -(-columns // 16) * 16), torch.nan, device=device).bfloat16()
    into = into[:, :columns]
    pulls = pull.dcos.float().to(device)
    kernels.terms_of_product(
        margin, x, rows, inverse, bias, Block(slice(0, columns), own, 2.5), pulls, sums, into
    )
    loss, dbias = sums.sum(2).double().cpu() - 1
    # Derivatives are rounded to 8 bits; the interpreter cuts digits off instead.
    found = into.double().cpu() / inverse.double().cpu()
    assert near(found, expected.dcos, 8e-3 if INTERPRETED else 4e-3)
    assert near(loss + kept.mask(pull.loss), expected.loss, 1e-5)
    assert near(dbias + kept.mask(pull.dbias), expected.dbias, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_a_step_is_that_of_a_gradient_made_before(device, kernels, dtype, momentum):
    """To the last bit, noise of rounding included, as sums of small integers are exact."""
    from sphereface2.heads.row_kernels import step_rows_

    torch.manual_seed(0)
    samples, people, dim, rows = 21, 50, 64, slice(4, 41)
    weight = torch.randint(2, (people, dim), device=device).mul(0.25).sub(0.125).to(dtype)
    velocity = torch.randn(people, dim, device=device).to(dtype) if momentum else None
    dcos = torch.randint(-3, 4, (samples, 48), device=device).bfloat16()[:, :37]
    x = torch.randint(-3, 4, (samples, dim), device=device).bfloat16()
    inverse = torch.ones(37, device=device)  # exactly: 64 · (1/8)² = 1
    seed = torch.tensor([2**40 + 7], device=device)
    rate = torch.tensor(0.3, device=device)
    settings = {"momentum": momentum, "weight_decay": 0.1, "nesterov": momentum > 0}
    results = []
    for step, gradient in (
        (kernels.step_with_product_, GradientProduct(dcos, x, 0.25, inverse)),
        (step_rows_, 0.25 * (dcos.float().T @ x.float())),
    ):
        moved = weight.clone(), None if velocity is None else velocity.clone()
        step(*moved, gradient, rows, None, seed, rate, **settings)
        results.append(moved)
        assert not torch.equal(moved[0][rows], weight[rows])
        assert torch.equal(moved[0][41:], weight[41:]) and torch.equal(moved[0][:4], weight[:4])
    for ours, theirs in zip(*results, strict=True):
        if ours is not None and INTERPRETED:
            assert torch.equal(ours, theirs)
        elif ours is not None:  # a compiler may contract products and sums in one and not the other
            assert near(ours, theirs, 1e-6 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize(
    ("options", "weight_dtype"),
    [({}, "bfloat16"), ({"margin_type": "A", "detach": "margin"}, "float32")],
)
def test_a_pass_equals_float64(device, kernels, options, weight_dtype):
    """Two steps over two blocks, of which the second has no sample's own class."""
    torch.manual_seed(0)
    people, dim, samples, chunk = (41, 40, 9, 30) if INTERPRETED else (3001, 200, 301, 1900)
    scaling = {"compute": "bf16", "weight_dtype": weight_dtype, "chunk_size": chunk}
    ours = heads.SphereFace2(dim, people, **options, **scaling)
    oracle = heads.SphereFace2(dim, people, **options).double()
    with torch.no_grad():
        oracle.weight.copy_(ours.weight)
    ours.to(device).epilogues = True
    momentum = "full" if weight_dtype == "float32" else "bfloat16"
    sgd = {"lr": 0.3, "momentum": 0.9, "weight_decay": 5e-4}
    fused = heads.FusedSGD(ours, momentum_dtype=momentum, **sgd)
    plain = torch.optim.SGD([oracle.weight], **sgd)
    for tolerance in (1e-2, 2e-2):  # the first step's rounding is in the second's prototypes
        unit = torch.nn.functional.normalize(oracle.weight.detach())
        labels = torch.randint(chunk, (samples,))
        labels[1] = labels[0]
        exact = unit[labels] + 0.12 * torch.randn(samples, dim, dtype=torch.float64)
        x = exact.float().to(device).requires_grad_()
        exact.requires_grad_()
        loss, expected = ours(x, labels.to(device)), oracle(exact, labels)
        loss.backward(), expected.backward()
        plain.step()
        assert near(loss, expected, 1e-2 if INTERPRETED else 1e-3)
        assert near(x.grad, exact.grad, tolerance)
        assert near(ours.bias.grad, oracle.bias.grad, 5e-3)
        for of, optimizer in ((ours, fused), (oracle, plain)):
            of.found = optimizer.state[of.weight]["momentum_buffer"]
        assert near(ours.found, oracle.found, tolerance)
        assert near(ours.weight, oracle.weight, tolerance)
        ours.zero_grad(), oracle.zero_grad()


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="an interpreted kernel does not compile")
def test_they_compile_for_hopper_without_spilling():
    """Without a GPU: matrix instructions and the copy engine, two programs a multiprocessor."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sphereface2.heads import product_kernels

    for name, rows, pointers, constants, operands in (
        (
            "_terms_of_product",
            product_kernels.TERMS_TILES[0],
            {"into_ptr": "*bf16", "places_ptr": "*i64"},
            {"DIM": 512, "SLOPE": False, "POWER": 3, "WIDTH": 64},
            {"x_desc": "rows, depth", "rows_desc": "columns, depth"},
        ),
        (
            "_step_with_product",
            product_kernels.STEP_TILES[0],
            {"weight_ptr": "*bf16", "velocity_ptr": "*bf16", "seed_ptr": "*i64"},
            {"MOMENTUM": True, "NESTEROV": False, "ROUNDS": True, "WIDTH": 512},
            {"dcos_desc": "depth, rows", "x_desc": "depth, columns"},
        ),
    ):
        kernel = getattr(product_kernels, name)
        names = kernel.arg_names
        constants |= {"ROWS": rows.rows, "COLUMNS": rows.columns, "DEPTH": rows.depth}
        types = {n: "*fp32" for n in names if n.endswith("_ptr")} | pointers
        types |= dict.fromkeys(("samples", "columns", "stride", "start", "parts"), "i32")
        types |= dict.fromkeys(("count", "dim"), "i32") | dict.fromkeys(constants, "constexpr")
        for operand, sides in operands.items():
            block = [getattr(rows, side) for side in sides.split(", ")]
            types[operand] = f"tensordesc<bf16{block}>"
        aligned = [n for n in names if n.endswith("_ptr") or n in ("stride", "dim")]
        source = ASTSource(
            fn=kernel,
            signature={n: types.get(n, "fp32") for n in names},
            constexprs=constants,
            attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
        )
        options = {"num_warps": rows.warps, "num_stages": rows.stages, "maxnreg": rows.registers}
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
        code = compiled.asm["ptx"]
        assert "wgmma.mma_async" in code and "cp.async.bulk.tensor" in code
        assert "st.global.v4.b32" in code
        assert compiled.metadata.shared <= 113 * 1024
