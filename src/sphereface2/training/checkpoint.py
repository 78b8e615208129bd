"""Checkpoints of a run: the model for everybody, the training state for resuming.

    RUN/checkpoints/step-00001200/model.safetensors   the backbone, loads without code execution
                                  config.json         its architecture and preprocessing
                                  progress.json       where the run stood
                                  state/              torch.distributed.checkpoint of the rest
                    last -> step-00001200             replaced in one step, once the folder is whole
                    best -> step-00000900

A folder is written under a temporary name and renamed, so a cut leaves the previous one whole.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from sphereface2.backbones import bundle
from sphereface2.errors import UserError
from sphereface2.files import atomic_symlink, atomic_write
from sphereface2.training.distributed import World


class Checkpointer:
    """Writes and reads the checkpoints of one run folder; every rank calls every method."""

    def __init__(self, run: Path, world: World) -> None:
        self.folder = run / "checkpoints"
        self.world = world
        if world.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(".step-*.tmp"):
                shutil.rmtree(leftover)
        world.barrier()

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        state: dict[str, Any],
        progress: dict[str, Any],
        about: dict[str, Any] | None = None,
        best: bool = False,
    ) -> Path:
        """Write checkpoint ``step``, point ``last`` (and ``best``) at it, drop the unreferenced.

        Args:
            model: the network to ship (its moving average where one is kept).
            state: nested tensors for torch.distributed.checkpoint, this rank's view of them.
            progress: JSON-able position and statistics of the run.
            about: JSON-able facts to ship with the network, as metadata.
        """
        final = self.folder / f"step-{step:08d}"
        if not final.exists():
            temporary = self.folder / f".step-{step:08d}.tmp"
            if self.world.is_main:
                temporary.mkdir()
            self.world.barrier()
            with _quiet():
                dcp.save(state, checkpoint_id=temporary / "state", no_dist=self.world.size == 1)
            if self.world.is_main:
                extra = {"step": step, "run": self.folder.parent.name, **(about or {})}
                bundle.save(model, temporary, extra=extra)
                atomic_write(temporary / "progress.json", json.dumps(progress, indent=1).encode())
                temporary.rename(final)
        elif self.world.is_main:
            atomic_write(final / "progress.json", json.dumps(progress, indent=1).encode())
        if self.world.is_main:
            atomic_symlink(self.folder / "last", final.name)
            if best:
                atomic_symlink(self.folder / "best", final.name)
            kept = {link.resolve().name for link in self._links()}
            for old in self.folder.glob("step-*"):
                if old.name not in kept:
                    shutil.rmtree(old)
        self.world.barrier()
        return final

    def last_progress(self) -> dict[str, Any]:
        """``progress.json`` of the last checkpoint; UserError where there is none."""
        path = self.folder / "last" / "progress.json"
        try:
            progress: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise UserError(
                f"{self.folder.parent} holds no checkpoint to resume from (no {path})"
            ) from error
        return progress

    def load(self, state: dict[str, Any]) -> None:
        """Fill ``state``'s tensors in place from the last checkpoint, whatever its rank count."""
        source = self.folder / "last" / "state"
        with _quiet():
            dcp.load(state, checkpoint_id=source, no_dist=self.world.size == 1)

    def has_rng_of(self, rank: int) -> bool:
        """Whether the last checkpoint was written by a run that had this rank."""
        reader = dcp.FileSystemReader(self.folder / "last" / "state")
        return f"rng.{rank}.cpu" in reader.read_metadata().state_dict_metadata

    def _links(self) -> list[Path]:
        return [link for name in ("last", "best") if (link := self.folder / name).is_symlink()]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch says at every checkpoint of a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def training_state(
    backbone: nn.Module, head: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> dict[str, Any]:
    """Parameters, buffers and optimiser state, keyed by name so that rank counts may change."""
    both = nn.ModuleDict({"backbone": backbone, "head": head})
    return {
        "backbone": backbone.state_dict(),
        "head": head.state_dict(),
        "optimizer": get_optimizer_state_dict(both, optimizers),
    }


def restore_training_state(
    state: dict[str, Any],
    backbone: nn.Module,
    head: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Inverse of ``training_state`` after ``Checkpointer.load`` filled it."""
    both = nn.ModuleDict({"backbone": backbone, "head": head})
    backbone.load_state_dict(state["backbone"])
    head.load_state_dict(state["head"])
    set_optimizer_state_dict(both, optimizers, state["optimizer"])


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Torch's generators, as tensors (augmentation derives its own from the step)."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Inverse of ``rng_state``."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
