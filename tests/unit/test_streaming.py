"""The block-wise heads against their dense forms, which other tests hold to independent oracles."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sphereface2 import heads
from sphereface2.heads.blocks import all_rows
from sphereface2.heads.streaming import ONCE

F64 = torch.float64
STREAMING = [name for name in heads.available() if "streaming" in heads.parameters(name)]


def pair(name, dim, classes, chunk, dtype, **options):
    """The dense and the streaming head with the same parameters."""
    dense = heads.build(name, dim, classes, **options).to(dtype)
    streamed = heads.build(name, dim, classes, streaming=True, chunk_size=chunk, **options)
    streamed.to(dtype).load_state_dict(dense.state_dict())
    return dense, streamed


def outcome(head, x, labels, autocast=None):
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        loss = head(x, labels)
    return [loss.detach(), *torch.autograd.grad(loss, [x, *head.parameters()])]


def assert_equal_to(tolerance, found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        scale = theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("option", [{"chunk_size": 3}, {"weight_dtype": "bfloat16"}])
def test_an_option_of_streaming_implies_it(option):
    assert heads.build("sphereface2", 4, 9, **option).streaming
    assert not heads.build("sphereface2", 4, 9).streaming


@given(
    kind=st.sampled_from("CAM"),
    detach=st.sampled_from(["all", "margin"]),
    bias=st.sampled_from(["learned", "per_class", "fixed"]),
    batch=st.integers(1, 9),
    classes=st.integers(2, 40),
    chunk=st.integers(1, 45),
    r=st.floats(1, 64),
    m=st.floats(0, 1),
    t=st.sampled_from([1.0, 2.5, 3.0]),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=150, deadline=None)
def test_sphereface2_in_blocks_equals_the_dense_form(
    kind, detach, bias, batch, classes, chunk, r, m, t, seed
):
    torch.manual_seed(seed)
    options = dict(margin_type=kind, detach=detach, bias=bias, r=r, m=m, t=t)
    dense, streamed = pair("sphereface2", 6, classes, chunk, F64, **options)
    x, labels = torch.randn(batch, 6, dtype=F64), torch.randint(classes, (batch,))
    assert_equal_to(1e-10, outcome(streamed, x, labels), outcome(dense, x, labels))


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("chunk", [1, 16, 1000])
def test_every_head_in_blocks_equals_its_dense_form(name, chunk):
    torch.manual_seed(0)
    dense, streamed = pair(name, 12, 101, chunk, F64)
    for _ in range(3):  # heads with running statistics: several batches
        x, labels = 3 * torch.randn(8, 12, dtype=F64), torch.randint(101, (8,))
        assert_equal_to(1e-10, outcome(streamed, x, labels), outcome(dense, x, labels))
    batches = [(torch.randn(8, 12, dtype=F64), torch.randint(101, (8,))) for _ in range(3)]
    for head in (dense, streamed):  # all before a backward pass, so that the statistics move on
        sum(head(*one) for one in batches).backward()
    gradients = ([p.grad for p in head.parameters()] for head in (streamed, dense))
    assert_equal_to(1e-10, *gradients)
    for key, value in dense.state_dict().items():
        torch.testing.assert_close(streamed.state_dict()[key], value)


def test_a_learned_scale_gets_its_gradient_through_blocks():
    torch.manual_seed(0)
    dense, streamed = pair("normface", 12, 50, 7, F64, learn_scale=True)
    x, labels = torch.randn(8, 12, dtype=F64), torch.randint(50, (8,))
    assert len(list(streamed.parameters())) == 2
    assert_equal_to(1e-10, outcome(streamed, x, labels), outcome(dense, x, labels))


@pytest.mark.parametrize("name", ["sphereface2", "cosface", "q_margin"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_float32_and_autocast_at_the_size_of_a_training_step(name, autocast):
    torch.manual_seed(0)
    dense, streamed = pair(name, 64, 3000, 512, torch.float32)
    x, labels = torch.randn(64, 64), torch.randint(3000, (64,))
    if autocast:
        x = x.to(autocast)
    found, expected = (outcome(head, x, labels, autocast) for head in (streamed, dense))
    assert found[0].dtype == torch.float32
    assert_equal_to(1e-5 if autocast is None else 1e-2, found[:2], expected[:2])
    assert_equal_to(1e-5, found[2:], expected[2:])


@pytest.mark.parametrize("name", ["sphereface2", "cosface"])
def test_accumulation_and_a_scalers_factor(name):
    torch.manual_seed(0)
    dense, streamed = pair(name, 8, 30, 7, F64)
    batches = [(torch.randn(5, 8, dtype=F64), torch.randint(30, (5,))) for _ in range(3)]
    for head in (dense, streamed):
        for x, labels in batches:
            (head(x, labels) * 1024 / len(batches)).backward()
    for ours, theirs in zip(streamed.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", ["sphereface2", "cosface"])
def test_under_no_grad_the_value_alone(name):
    dense, streamed = pair(name, 8, 30, 7, F64)
    x, labels = torch.randn(5, 8, dtype=F64), torch.randint(30, (5,))
    with torch.no_grad():
        loss = streamed(x, labels)
        torch.testing.assert_close(loss, dense(x, labels))
    assert not loss.requires_grad


def test_frozen_prototypes_and_frozen_embeddings():
    dense, streamed = pair("sphereface2", 8, 30, 7, F64)
    x, labels = torch.randn(5, 8, dtype=F64), torch.randint(30, (5,))
    for head in (dense, streamed):
        head.weight.requires_grad_(False)
        head.bias.requires_grad_(False)
    ours, theirs = (x.clone().requires_grad_() for _ in range(2))
    streamed(ours, labels).backward()
    dense(theirs, labels).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert streamed.weight.grad is None
    streamed.weight.requires_grad_()
    streamed(x, labels).backward()
    assert streamed.weight.grad is not None


def test_behind_a_compiled_backbone():
    torch.manual_seed(0)
    network = torch.nn.Linear(8, 6)
    compiled = torch.compile(network, backend="aot_eager")
    dense, streamed = pair("sphereface2", 6, 30, 7, torch.float32)
    x, labels = torch.randn(5, 8), torch.randint(30, (5,))
    streamed(compiled(x), labels).backward()
    found = network.weight.grad.clone()
    network.zero_grad()
    dense(network(x), labels).backward()
    torch.testing.assert_close(found, network.weight.grad)


def test_a_compiled_head_that_counts_batches_gives_its_loss():
    dense, compiled = (heads.build("sphereface", 8, 5) for _ in range(2))
    compiled.load_state_dict(dense.state_dict())
    compiled.trust_batches = True
    call = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    x, labels = torch.randn(6, 8), torch.randint(5, (6,))
    loss = call(x, labels)
    loss.backward()
    torch.testing.assert_close(loss, dense(x, labels))
    assert compiled.batches == dense.batches == 1


def test_a_second_backward_is_a_clear_error():
    _, streamed = pair("sphereface2", 6, 30, 7, F64)
    x, labels = torch.randn(5, 6, dtype=F64, requires_grad=True), torch.randint(30, (5,))
    loss = streamed(x, labels)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(streamed(x, labels), x, create_graph=True)
    assert "once only" in ONCE


@pytest.mark.parametrize(("name", "kept"), [("sphereface2", 2), ("cosface", 4)])
def test_no_tensor_grows_with_batch_times_classes(name, kept):
    """The largest tensor that any operation makes is W's gradient or a block's cosines."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.shape != (5000, 4):
                    self.size = max(self.size, tensor.untyped_storage().nbytes() // 4)
            return result

    head = heads.build(name, 4, 5000, streaming=True, chunk_size=64)
    head.weight.requires_grad_(False)
    x, labels = torch.randn(32, 4, requires_grad=True), torch.randint(5000, (32,))
    gc.collect()
    with Largest() as largest:
        head(x, labels).backward()
    assert largest.size <= max(32 * 64, 5000 * 4)


@given(
    labels=st.lists(st.integers(-5, 25), min_size=1, max_size=12),
    rows=st.integers(1, 20),
    chunk=st.integers(1, 22),
)
def test_blocks_cover_all_rows_and_know_every_own_class(labels, rows, chunk):
    tensor = torch.tensor(labels)
    seen, own = [], set()
    for block in all_rows(tensor, rows, chunk):
        numbers = list(range(rows))[block.rows]
        assert 1 <= len(block) == len(numbers) <= chunk
        seen += numbers
        columns, present = (block.own.columns.tolist(), block.own.present.tolist())
        assert set(columns) <= set(range(len(numbers)))
        own |= {(s, numbers[c]) for s, c in enumerate(columns) if present[s]}
    assert seen == list(range(rows))
    assert own == {(s, label) for s, label in enumerate(labels) if 0 <= label < rows}


def test_heads_say_what_they_do_not_support():
    with pytest.raises(ValueError, match="the head softmax has no parameter 'streaming'"):
        heads.build("softmax", 4, 5, streaming=True)
    with pytest.raises(ValueError, match="CosFace does not support negatives"):
        heads.CosFace(4, 5, negatives="uniform")
    with pytest.raises(ValueError, match="chunk_size must be an integer ≥ 1, got 0"):
        heads.SphereFace2(4, 5, streaming=True, chunk_size=0)
    with pytest.raises(ValueError, match="negative_share must be a number > 0 and ≤ 1, got 2"):
        heads.SphereFace2(4, 5, negatives="uniform", negative_share=2)
    with pytest.raises(ValueError, match="negatives must be one of 'all', 'uniform', 'hard'"):
        heads.SphereFace2(4, 5, negatives="soft")
