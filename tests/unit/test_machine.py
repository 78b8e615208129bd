"""What a process may use of its machine."""

from __future__ import annotations

import importlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sphereface2.machine import compute_threads, cores, free_memory, using_faiss
from sphereface2.training import config
from sphereface2.training.distributed import world


def test_files_that_a_container_has_read_are_memory_that_can_be_had(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:     8000 kB\n")
    assert free_memory(tmp_path) == 8_192_000
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for name, text in (
        ("memory.max", "5000000\n"),
        ("memory.current", "4900000\n"),
        ("memory.stat", "anon 900000\ninactive_file 3000000\n"),
    ):
        (group / name).write_text(text)
    assert free_memory(tmp_path) == 3_100_000
    (group / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == 8_192_000


def test_a_container_has_time_for_some_cores_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert cores(tmp_path) == 64
    group = tmp_path / "sys" / "fs" / "cgroup"
    (group / "cpu").mkdir(parents=True)
    for limit, expected in (("max 100000", 64), ("250000 100000", 3), ("9000000 100000", 64)):
        (group / "cpu.max").write_text(f"{limit}\n")
        assert cores(tmp_path) == expected
    (group / "cpu.max").unlink()
    (group / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    for quota, expected in ((-1, 64), (50_000, 1)):
        (group / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        assert cores(tmp_path) == expected


@pytest.mark.parametrize("wanted", ["", "0", "-1", "4,2", "many", "²"])
def test_a_number_of_threads_that_is_none_is_passed_over(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", wanted)
    assert compute_threads() == cores()


def test_a_process_takes_its_share_of_the_cores_or_fewer_threads_as_the_user_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = importlib.import_module("sphereface2.machine")
    monkeypatch.setattr(machine, "cores", lambda: 8)
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    try:
        with world("cpu"):
            assert torch.get_num_threads() == compute_threads(2) == 3
    finally:
        torch.set_num_threads(before)
    assert compute_threads(4) == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "9" * 30)
    assert compute_threads(4) == 2
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    for wanted, expected in (("1", 4), ("3", 3)):  # torchrun sets 1 unasked
        monkeypatch.setenv("OMP_NUM_THREADS", wanted)
        assert compute_threads(2) == expected


@pytest.mark.parametrize(
    ("usable", "words", "expected"),
    [
        (2, [], 2),
        (64, [], 8),
        (64, ["--training.batch_size", "16"], 1),
        (64, ["--training.accumulate", "4"], 2),
        (6, ["--training.batch_size", "256"], 4),  # of equal shares
        (6, ["--training.batch_size", "192"], 6),
    ],
)
def test_as_many_ranks_as_batch_normalisation_bears(
    usable: int, words: list[str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("sphereface2.training.fit")  # `fit` is its function, too
    monkeypatch.setattr(module, "cores", lambda: usable)
    settings = config.load(None, ["--training.device", "cpu", *words])
    assert module._count_ranks("auto", settings) == expected


def test_on_macos_faiss_has_one_thread_beside_another_openmp(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KMP_DUPLICATE_LIB_OK", "FALSE")
    with using_faiss(2) as faiss:
        assert faiss.omp_get_max_threads() == 2
        monkeypatch.setattr("sys.platform", "darwin")
        for threads in (None, 4):
            with using_faiss(threads) as same:
                assert same is faiss and faiss.omp_get_max_threads() == 1
        assert faiss.omp_get_max_threads() == 2
    assert os.environ["KMP_DUPLICATE_LIB_OK"] == "TRUE"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_is_used_again_without_page_faults():
    script = """
import resource, torch
from sphereface2.machine import keep_freed_memory
for keep in (False, True):
    if keep:
        keep_freed_memory()
    for count in (5, 20):  # at first the heap grows
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(count):
            torch.zeros(4096 * 25_000, dtype=torch.uint8).add_(1)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    print(faults)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, check=True, text=True
    )
    without, kept = map(int, done.stdout.split())
    assert kept < without / 10
