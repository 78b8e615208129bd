"""Sharded heads in real processes over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("sharded_worker.py")


def torchrun(ranks: int, task: str, argument: str | Path = "-") -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(ranks), str(WORKER), task, str(argument)),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("ranks", [1, 2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_equals_the_dense_head_over_20_steps_with_uneven_batches(ranks: int) -> None:
    torchrun(ranks, "equality")


def test_bytes_moved_do_not_depend_on_the_number_of_classes(tmp_path: Path) -> None:
    torchrun(3, "bytes", tmp_path / "bytes.json")
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
    torchrun(4, "write", tmp_path / "state")
    expected = torch.load(tmp_path / "state.4.pt")
    for ranks in (1, 3):
        torchrun(ranks, "resume", tmp_path / "state")
        found = torch.load(tmp_path / f"state.{ranks}.pt")
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
