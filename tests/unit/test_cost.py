"""The cost model of the heads against counts and measurements, by the code of its benchmark."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cost_model
import head_cost as cost
import sharded

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("setup", cost_model.SETUPS.values(), ids=lambda setup: setup.name)
def test_operations_and_traffic_are_those_that_are_counted(setup: cost_model.Setup) -> None:
    shape, chunk = (30_000, 64, 64), 1024
    flops, traffic = cost_model.counted(setup, *shape, chunk)
    told = setup.cost(*shape, **({"chunk": chunk} if setup.scaling else {}))
    assert flops == pytest.approx(told.flops, rel=1e-3)
    # What the formulas leave out is small: a sample's own class, sums over blocks, the drawing.
    assert 1 <= traffic / told.traffic < 1.2


@pytest.mark.parametrize(
    ("name", "shape"),
    [("SphereFace2 fused", (60_000, 512, 64)), ("CosFace dense", (120_000, 64, 256))],
)
def test_memory_is_that_of_a_fresh_process(name: str, shape: tuple[int, int, int]) -> None:
    setup, chunk = cost_model.SETUPS[name], 2048
    told = setup.cost(*shape, **({"chunk": chunk} if setup.scaling else {}))
    measured = cost_model.measured_memory(setup, *shape, chunk)
    # W, its gradient and the logits: a single one of the large tensors is 123 MB. The rest is
    # the libraries' scratch memory and what the allocator does not give back.
    assert -40e6 < measured - told.memory < 115e6


def test_messages_are_those_of_real_ranks_and_results_those_of_the_dense_head() -> None:
    people, dim, batch, ranks = 501, 16, 12, 3
    found = sharded.measure(ranks, people, dim, batch, 1)
    assert [line["head"] for line in found] == ["SphereFace2", "CosFace"]
    for line in found:
        told = sharded.model(line["head"], people, dim, batch, ranks).messages
        assert sorted(map(tuple, line["messages"])) == sorted((m.kind, m.size) for m in told)
        assert line["difference"] < 1e-5


def test_the_cost_of_ranks() -> None:
    alone = cost.sphereface2(1_000_000, 512, 1024)
    shared = cost.sphereface2(1_000_000, 512, 1024, ranks=8)
    assert (alone.messages, alone.sent) == ((), 0)
    assert shared.weights == alone.weights / 8
    assert shared.flops == alone.flops / 8
    # Seven eighths of everybody's embeddings and labels, and of everybody's gradients and losses.
    assert shared.sent == pytest.approx(7 / 8 * 4 * 1024 * (514 + 513), rel=1e-4)
    copies = cost.replicated(cost.softmax(1_000_000, 512, 128, form="dense"), 8)
    assert copies.sent == 2 * 7 / 8 * 1_000_000 * 512 * 4


def test_the_page_holds_what_the_benchmark_prints() -> None:
    page = (ROOT / "docs/scaling.md").read_text()
    plain = re.sub(r"\s+", " ", page)
    for line in cost_model.tables().splitlines():
        assert re.sub(r"\s+", " ", line).strip() in plain
