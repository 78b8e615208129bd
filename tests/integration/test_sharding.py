"""Sharded heads in real processes over gloo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from killing import CONTEXT
from sharded_worker import work


def run(ranks: int, task: str, folder: Path, argument: str = "-") -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    log = folder / f"{task}.log"
    given = (ranks, store.port, log, task, str(folder / argument))
    processes = [CONTEXT.Process(target=work, args=(rank, *given)) for rank in range(ranks)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(240)
        assert [process.exitcode for process in processes] == [0] * ranks, log.read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_the_dense_head_over_20_steps_with_uneven_batches(
    ranks: int, tmp_path: Path
) -> None:
    run(ranks, "equality", tmp_path)


def test_ranks_whose_heads_differ_say_how(tmp_path: Path) -> None:
    run(3, "disagreement", tmp_path)


def test_bytes_moved_do_not_depend_on_the_number_of_classes(tmp_path: Path) -> None:
    run(3, "bytes", tmp_path, "bytes.json")
    counts = json.loads((tmp_path / "bytes.json").read_text())
    assert counts["100"] == counts["1000"]
    samples, dim, double = 3 * 5, 8, 8
    assert counts["100"] == {
        # Embeddings with a label each, and how many samples each rank has.
        "all_gather": samples * (dim + 1) * double + 3 * 8,
        # Gradients by the embeddings with a loss each.
        "reduce_scatter": samples * (dim + 1) * double,
        "all_reduce": double,  # the shared bias
    }


def test_checkpoints_are_resumed_on_any_number_of_ranks(tmp_path: Path) -> None:
    run(4, "write", tmp_path, "state")
    expected = torch.load(tmp_path / "state.4.pt")
    for ranks in (1, 3):
        run(ranks, "resume", tmp_path, "state")
        found = torch.load(tmp_path / f"state.{ranks}.pt")
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_dense_heads_within_torchs_wrappers_equal_one_that_sees_everybody(tmp_path: Path) -> None:
    run(2, "wrapped", tmp_path)


def test_the_documented_loop_runs(tmp_path: Path) -> None:
    run(2, "documented", tmp_path, "documented")
