"""Checkpoints of a run: the model for everybody, the training state for resuming.

    RUN/checkpoints/step-00001200/model.safetensors   the backbone, loads without code execution
                                  config.json         its architecture and preprocessing
                                  progress.json       where the run stood
                                  run.json            its settings, its data, whom the classes are
                                  state/              torch.distributed.checkpoint of the rest
                                  manifest.json       sizes and SHA-256 of all of these
                    last -> step-00001200             to go on from
                    best -> step-00000900

A folder is written under a temporary name, its manifest last, and then renamed, so that a cut
leaves the previous one whole. It is written by a thread, from a copy, while training goes on.
"""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sphereface2.backbones import bundle
from sphereface2.errors import UserError
from sphereface2.files import atomic_write, point, pointed
from sphereface2.training.distributed import World
from sphereface2.training.manifest import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    PROGRESS,
    RUN,
    entries,
    problem_of,
    read_json,
    why_of,
)
from sphereface2.version import __version__

RISE = 2.0
"""A checkpoint whose smoothed loss is a greater multiple of its least value so far is not good."""


@dataclass
class Checkpoint:
    """A whole checkpoint, and what was found on the way to it."""

    folder: Path
    progress: dict[str, Any]
    """Of `Checkpointer.save`."""
    run: dict[str, Any]
    """Likewise; empty if an older version wrote it."""
    damaged: list[str] = field(default_factory=list)
    """A sentence for each newer checkpoint that is not whole."""
    newer: list[Path] = field(default_factory=list)
    """Newer checkpoints, damaged or left behind when ``last`` was set back."""


class Checkpointer:
    """Writes and reads the checkpoints of one run folder.

    Every rank calls every method but `tidy` and `find`, which are rank 0's.
    """

    def __init__(self, run: Path, world: World) -> None:
        self.folder = run / "checkpoints"
        self.world = world
        self._beside = world.background or world
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._previous: str | None = None

    # -- reading -----------------------------------------------------------------------------

    def tidy(self) -> None:
        """Put in order what a kill, or a copy without symbolic links, has left."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".step-*.tmp"):
            final = self.folder / leftover.name.removeprefix(".").removesuffix(".tmp")
            if final.exists() or not (leftover / MANIFEST).exists() or problem_of(leftover):
                shutil.rmtree(leftover)
            else:
                leftover.rename(final)
                point(self.folder / "last", final.name)
        for unfinished in self.folder.glob(".*.tmp"):
            if unfinished.is_dir() and not unfinished.is_symlink():
                shutil.rmtree(unfinished)
            else:
                unfinished.unlink()
        for link in (self.folder / "last", self.folder / "best"):
            if link.is_dir() and not link.is_symlink():
                self._adopt(link)

    def _adopt(self, copied: Path) -> None:
        """Make a folder that was copied in the place of a link a link again."""
        if problem_of(copied):
            copied.rename(copied.with_name(f"set-aside-{copied.name}"))
            return
        final = self.folder / _name(json.loads((copied / PROGRESS).read_text())["step"])
        if final.exists() and not problem_of(final):
            shutil.rmtree(copied)
        else:
            shutil.rmtree(final, ignore_errors=True)
            copied.rename(final)
        point(copied, final.name)

    def find(self, wanted: Path | None = None) -> Checkpoint:
        """The checkpoint to go on from, verified: what ``last`` leads to, else the newest whole.

        Args:
            wanted: this one before ``last``.

        Raises:
            UserError: there is none, or none that is whole.
        """
        steps = sorted(self.folder.glob("step-*"), reverse=True)
        last = pointed(wanted or self.folder / "last")
        first = last.resolve().name if last is not None else "step-~"
        # Newer ones come last: they were left behind when ``last`` was set back.
        candidates = sorted(steps, key=lambda path: path.name > first)
        damaged: list[str] = []
        for path in candidates:
            if problem := problem_of(path):
                damaged.append(f"{path} is damaged: {problem}")
                continue
            return Checkpoint(
                path,
                read_json(path / PROGRESS),
                read_json(path / RUN) if (path / RUN).exists() else {},
                damaged,
                [other for other in steps if other.name > path.name],
            )
        run = self.folder.parent
        if damaged:
            raise UserError(
                f"{damaged[0]}; {run} holds no checkpoint that is whole: restore one from a copy, "
                "or start a new run"
            )
        raise UserError(f"{run} holds no checkpoint to resume from (no {self.folder / 'last'})")

    def go_on_from(self, found: Checkpoint, best: int | None) -> None:
        """Make ``found`` the last one, set newer ones aside, and restore a lost ``best``.

        Args:
            best: the step of the best checkpoint, if it is known.
        """
        for path in found.newer:
            aside = path.with_name(f"set-aside-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        point(self.folder / "last", found.folder.name)
        if best is not None and (self.folder / _name(best)).exists():
            point(self.folder / "best", _name(best))

    def last(self) -> Path | None:
        """The last checkpoint that is whole, if there is one."""
        found = pointed(self.folder / "last")
        return None if found is None else self.folder / found.resolve().name

    def last_good(self) -> Path | None:
        """The last checkpoint that was saved before the loss rose, if there is one."""
        last = self.last()
        steps = sorted(self.folder.glob("step-*"), reverse=True) if last else []
        return next((path for path in steps if last and path <= last and _is_good(path)), None)

    def has_best(self) -> bool:
        """Whether the best checkpoint is there and whole."""
        best = pointed(self.folder / "best")
        return best is not None and problem_of(best) is None

    def load(self, found: Checkpoint, state: dict[str, Any]) -> None:
        """Fill ``state``'s tensors in place, whatever the number of ranks that wrote them.

        Raises:
            UserError: what is stored does not fit.
        """
        self._previous = found.folder.name
        try:
            with _quiet():
                dcp.load(state, checkpoint_id=found.folder / "state", no_dist=self.world.size == 1)
        except (CheckpointException, RuntimeError, ValueError, KeyError, OSError) as error:
            raise UserError(
                f"{found.folder} does not fit the run's settings, or is damaged: {why_of(error)}"
            ) from error

    def keys(self, found: Checkpoint) -> set[str]:
        """The names of what the checkpoint's state holds."""
        reader = dcp.FileSystemReader(found.folder / "state")
        return set(reader.read_metadata().state_dict_metadata)

    # -- writing -----------------------------------------------------------------------------

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        state: dict[str, Any],
        progress: dict[str, Any],
        run: dict[str, Any] | None = None,
        about: dict[str, Any] | None = None,
        best: bool = False,
    ) -> None:
        """Copy what checkpoint ``step`` is to hold, and begin to write it.

        Once it is whole, ``last`` (and ``best``) lead to it, and all go but these, the one before
        and the last good one.

        Args:
            model: the network to ship (its moving average where one is kept).
            state: nested tensors for torch.distributed.checkpoint, this rank's view of them.
            progress: JSON-able position and statistics of the run.
            run: JSON-able facts that a resumption must find again.
            about: JSON-able facts to ship with the network, as metadata.

        Raises:
            UserError: an earlier checkpoint could not be written.
        """
        self.wait()
        texts = {PROGRESS: json.dumps(progress, indent=1), RUN: json.dumps(run or {}, indent=1)}
        extra = {"step": step, "run": self.folder.parent.name, **(about or {})}
        shipped = copy.deepcopy(model).cpu() if self.world.is_main else None
        self._writing = self._thread.submit(
            self._write, step, shipped, extra, _copied(state), texts, best
        )

    def wait(self) -> None:
        """Wait until the last checkpoint that was begun is whole.

        Raises:
            UserError: it cannot be written; the one before stays.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def close(self) -> None:
        """Let what was begun come to its end, and write no more."""
        self._thread.shutdown()

    def _write(
        self,
        step: int,
        model: nn.Module | None,
        extra: dict[str, Any],
        state: dict[str, Any],
        texts: dict[str, str],
        best: bool,
    ) -> None:
        """In the thread: ranks talk in a group of their own, and fail together."""
        temporary = self.folder / f".{_name(step)}.tmp"
        world = self._beside
        try:
            self._together(step, lambda: temporary.mkdir(parents=True) if world.is_main else None)

            def save_state() -> dict[str, Any]:
                with _quiet():
                    dcp.save(
                        state,
                        checkpoint_id=temporary / "state",
                        process_group=world.process_group,
                        no_dist=world.size == 1,
                    )
                # Each rank reads back what it wrote itself.
                return entries(temporary, f"state/__{world.rank}_*")

            written = self._together(step, save_state)

            def finish() -> None:
                if model is None:
                    return
                bundle.save(model, temporary, extra=extra)
                for name, text in texts.items():
                    atomic_write(temporary / name, text.encode())
                known = {name: entry for rank in written for name, entry in rank.items()}
                self._publish(temporary, step, known, best)

            self._together(step, finish)
        except UserError:
            if world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _together(self, step: int, do: Any) -> list[Any]:
        """What ``do`` gives on each rank; UserError on all of them if it fails on one."""
        result, failure = None, None
        try:
            result = do()
        except (CheckpointException, OSError, RuntimeError, UserError) as error:
            failure = why_of(error)
        for rank, (_, why) in enumerate(told := self._beside.gather((result, failure))):
            if why is not None:
                where = f" (rank {rank})" if self._beside.size > 1 else ""
                kept = pointed(self.folder / "last")
                raise UserError(
                    f"{self.folder / _name(step)} cannot be written{where}: {why}; "
                    + (f"{kept.resolve().name} is kept" if kept else "there is no older one")
                )
        return [one for one, _ in told]

    def _publish(self, temporary: Path, step: int, known: dict[str, Any], best: bool) -> None:
        """Write the manifest, give the folder its name, and drop what is not needed any more."""
        manifest = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "package_version": __version__,
            "files": known | entries(temporary, "**/*", known),
        }
        atomic_write(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        for folder in (temporary / "state", temporary):
            _sync(folder)
        final = self.folder / _name(step)
        if final.exists():  # from before ``last`` was set back, or to be replaced by the same
            old = self.folder / f".old-{final.name}.tmp"
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
            temporary.rename(final)
            shutil.rmtree(old)
        # The link first: if it leads nowhere the newest whole one is taken, while an older one
        # that it leads to is taken for what the user wants.
        last = self.folder / "last"
        before = pointed(last)
        if before is not None and before.resolve().name != final.name:
            self._previous = before.resolve().name
        point(last, final.name)
        if temporary.exists():
            temporary.rename(final)
        if best:
            point(self.folder / "best", final.name)
        _sync(self.folder)
        best_one = pointed(self.folder / "best")
        kept = {final.name, self._previous, best_one.resolve().name if best_one else None}
        good = self.last_good()
        for old in self.folder.glob("step-*"):
            if old.name not in kept and old != good:
                shutil.rmtree(old)


def has_checkpoints(run: Path) -> bool:
    """Whether a run folder holds any, whole or not."""
    folder = run / "checkpoints"
    whole = (*folder.glob("step-*"), *folder.glob(f".step-*.tmp/{MANIFEST}"))
    return bool(whole) or (folder / "last").is_dir()


def _is_good(folder: Path) -> bool:
    """Whether a checkpoint's loss was not far above the least before it, as in a divergence."""
    try:
        progress = read_json(folder / PROGRESS)
        lowest = progress.get("lowest_loss", math.inf)  # not in version 0.1.0; may be below 0
        return bool(progress["smoothed_loss"] - lowest <= (RISE - 1) * abs(lowest))
    except (OSError, KeyError, TypeError, ValueError):  # it is damaged
        return False


def _name(step: int) -> str:
    return f"step-{step:08d}"


def _sync(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where the system can."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        with suppress(OSError):
            os.fsync(handle)
        os.close(handle)


def _copied(value: Any) -> Any:
    """The same nested value with its tensors copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_copied(one) for one in value)
    return copy.deepcopy(value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says at every checkpoint of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def training_state(
    modules: dict[str, nn.Module], optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Parameters, buffers and optimiser state, keyed by name so that rank counts may change."""
    state: dict[str, Any] = {name: module.state_dict() for name, module in modules.items()}
    return {**state, "optimizer": get_optimizer_state_dict(nn.ModuleDict(modules), optimizers)}


def restore_training_state(
    state: dict[str, Any],
    modules: dict[str, nn.Module],
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Inverse of ``training_state`` after ``Checkpointer.load`` filled it.

    The optimisers keep the settings they were built with: only their tensors and counts return.
    """
    for name, module in modules.items():
        module.load_state_dict(state[name])
    settings = [
        [{key: value for key, value in group.items() if key != "params"} for group in one]
        for one in (optimizer.param_groups for optimizer in optimizers)
    ]
    # Not strict: SGD without momentum has no state beside Muon's. `load` has missed none.
    relaxed = StateDictOptions(strict=False)
    both = nn.ModuleDict(modules)
    set_optimizer_state_dict(both, optimizers, state["optimizer"], options=relaxed)
    for optimizer, groups in zip(optimizers, settings, strict=True):
        for group, kept in zip(optimizer.param_groups, groups, strict=True):
            group.update(kept)


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Torch's generators, as tensors (augmentation derives its own from the step)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Inverse of ``rng_state``."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type], device)
