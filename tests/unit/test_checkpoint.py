"""Checkpoints: whole or absent, whatever happens while one is written."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.errors import UserError
from sphereface2.training.checkpoint import Checkpointer
from sphereface2.training.distributed import World

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def network() -> torch.nn.Module:
    return backbones.build("sfnet4", width=0.125, input_size=64, embedding_dim=8)


def save(folder: Path, step: int, best: bool = False, **progress: float) -> None:
    state = {"value": torch.full((4,), float(step))}
    checkpointer = Checkpointer(folder, ALONE)
    checkpointer.tidy()
    told = {"step": step, **progress}
    checkpointer.save(step, model=network(), state=state, progress=told, best=best)
    checkpointer.close()
    checkpointer.wait()


def stored(folder: Path) -> tuple[float, int]:
    state = {"value": torch.zeros(4)}
    checkpointer = Checkpointer(folder, ALONE)
    checkpointer.tidy()
    found = checkpointer.find()
    checkpointer.load(found, state)
    return state["value"][0].item(), found.progress["step"]


def _die_at(folder: Path, moment: str) -> None:
    """Write checkpoint 2 and be killed on the way."""
    torch.set_num_threads(1)
    owner, name = {
        "before the state": (dcp, "save"),
        "before the network": (bundle, "save"),
        "before it has its name": (Path, "rename"),
    }[moment]

    def die(*_args: object, **_options: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, die)
    save(folder, 2)


@pytest.mark.parametrize(
    "moment", ["before the state", "before the network", "before it has its name"]
)
def test_killed_while_writing_the_previous_one_stays_whole(tmp_path: Path, moment: str) -> None:
    save(tmp_path, 1)
    process = multiprocessing.get_context("spawn").Process(target=_die_at, args=(tmp_path, moment))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "checkpoints").glob(".step-*.tmp")), "it was killed before it began"
    assert stored(tmp_path) == (1, 1)
    bundle.load(tmp_path)
    # The next start sweeps the half-written folder away and goes on.
    assert not list((tmp_path / "checkpoints").glob(".step-*.tmp"))
    save(tmp_path, 2)
    assert stored(tmp_path) == (2, 2)


def _die_in_point(folder: Path) -> None:
    """Write checkpoint 2 and be killed while ``last`` is made to lead to it."""
    torch.set_num_threads(1)
    replace = Path.replace

    def die(path: Path, target: Path) -> Path:
        if target.name == "last":
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(path, target)

    Path.replace = die  # type: ignore[method-assign]
    save(folder, 2)


def test_killed_before_last_leads_to_it_the_newest_one_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    process = multiprocessing.get_context("spawn").Process(target=_die_in_point, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(list((tmp_path / "checkpoints").glob(".*.tmp"))) == 2
    assert stored(tmp_path) == (2, 2)
    assert not list((tmp_path / "checkpoints").glob(".*.tmp"))


def test_last_the_one_before_and_best_are_kept_and_the_others_go(tmp_path: Path) -> None:
    for step, best in ((1, False), (2, True), (3, False), (4, False), (5, False)):
        save(tmp_path, step, best)
    folder = tmp_path / "checkpoints"
    kept = sorted(path.name for path in folder.glob("step-*"))
    assert kept == ["step-00000002", "step-00000004", "step-00000005"]
    assert (folder / "best").resolve().name == "step-00000002"
    assert stored(tmp_path) == (5, 5)


def test_the_last_one_from_before_the_loss_rose_is_kept(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, ALONE)
    assert checkpointer.last_good() is None
    for step, smoothed in enumerate((4.0, 1.0, 1.9, 2.1, 3.0, 8.0), 1):
        save(tmp_path, step, smoothed_loss=smoothed, lowest_loss=min(smoothed, 1 + 3 * (step < 2)))
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept == ["step-00000003", "step-00000005", "step-00000006"]
    good = checkpointer.last_good()
    assert good is not None and good.name == "step-00000003"
    save(tmp_path, 7, smoothed_loss=1.5, lowest_loss=1)  # the loss has come down again
    assert sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*")) == [
        "step-00000006", "step-00000007",
    ]  # fmt: skip


def test_a_loss_below_zero_may_be_good_too(tmp_path: Path) -> None:
    for step, smoothed in enumerate((-10.0, -40.0, -5.0, 30.0), 1):  # as SFace's are
        save(
            tmp_path, step, smoothed_loss=smoothed, lowest_loss=min(smoothed, 30 * (step < 2) - 40)
        )
    good = Checkpointer(tmp_path, ALONE).last_good()
    assert good is not None and good.name == "step-00000003"


def test_nothing_to_resume_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint to resume from"):
        Checkpointer(tmp_path, ALONE).find()
