"""Loader processes: what goes wrong in them is one sentence."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections import namedtuple
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from sphereface2.data.dataset import FaceDataset
from sphereface2.data.sampler import BatchSampler
from sphereface2.data.transforms import Augmentation
from sphereface2.errors import UserError
from sphereface2.signals import in_worker, starting_workers
from sphereface2.training.distributed import World
from sphereface2.training.loading import EveryEpoch, build_loader, loaded, lost_workers

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


class Nothing:
    """A set of eight images, none of which can be read."""

    labels = np.arange(8) // 2
    num_classes = 4
    class_names = None

    def __len__(self) -> int:
        return 8

    def read(self, index: int) -> bytes:
        raise OSError(f"no image {index}")

    def name(self, index: int) -> str:
        return f"image {index}"

    def fingerprint(self) -> str:
        return ""


def parts() -> tuple[FaceDataset, EveryEpoch]:
    dataset = FaceDataset(Nothing(), augmentation=Augmentation(size=16), max_unreadable=1)
    return dataset, EveryEpoch(BatchSampler(dataset.labels, 4), 2)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_arrives_as_its_sentence(workers: int) -> None:
    with pytest.raises(UserError) as caught:
        list(loaded(build_loader(*parts(), ALONE, workers)))
    assert str(caught.value).startswith("no image of a batch can be read (image ")
    assert "Traceback" not in str(caught.value)


def test_a_loader_process_that_is_ended_is_told_wherever_the_main_thread_is() -> None:
    loader = build_loader(*parts(), ALONE, 1)
    batches: Any = iter(loader)
    message = r"ended from outside.*lower data\.workers \(1\)"
    with pytest.raises(UserError, match=message), lost_workers(loader):
        kill_and_wait(batches._workers[0].pid)


def kill_and_wait(pid: int) -> None:
    """As in the middle of a step: torch's handler of SIGCHLD ends the wait."""
    os.kill(pid, signal.SIGKILL)
    time.sleep(30)


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="no signal masks")
def test_a_signal_to_a_worker_that_is_still_starting_does_not_end_it() -> None:
    with starting_workers():
        process = multiprocessing.get_context("spawn").Process(target=in_worker)
        process.start()
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)  # as a Ctrl-C while it imports
    process.join(60)
    assert process.exitcode == 0
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_too_little_shared_memory_is_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(64e6, 63.99e6, 9000))
    with pytest.raises(UserError, match=r"data\.workers = 1: loader processes need 0 MB of shared"):
        build_loader(*parts(), ALONE, 1)
    build_loader(*parts(), ALONE, 0)


def test_one_epoch_follows_another_from_any_place() -> None:
    sampler = BatchSampler(np.arange(12), 4)
    whole = EveryEpoch(sampler, 2)  # of three batches: two make a step
    keys = [(key.epoch, key.step, *key.indices) for key in islice(whole, 7)]
    assert [key[:2] for key in keys] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    expected = np.random.default_rng((0, 1)).permutation(12)[4:8]
    assert keys[3][2:] == tuple(expected)
    whole.consumed = 3
    assert [(key.epoch, key.step, *key.indices) for key in islice(whole, 4)] == keys[3:]
