"""What a run tells: a live progress bar, JSON lines, TensorBoard, its environment."""

from __future__ import annotations

import json
import os
import platform
import sys
import threading
import time
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sphereface2.console import A_LINE, duration, say
from sphereface2.files import atomic_write, writing
from sphereface2.machine import cores
from sphereface2.training.validation import shown


def environment() -> dict[str, Any]:
    """Versions and hardware that a result depends on."""
    packages = ["sphereface2", "torch", "numpy", "opencv-python-headless"]
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cores": cores(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(0) if cuda else None,
        "packages": {name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


class RunLog:
    """Log of one run; on ranks other than 0 every call does nothing.

    ``metrics.jsonl`` has one object a line with ``step``; on resuming, lines past the checkpoint's
    step are dropped, so that no step is written twice.

    Args:
        folder: the run's.
        main: whether this is rank 0.
        total_steps: of the run.
        start_step: of the checkpoint that the run goes on from.
        pending: whether that step's validation is still to come.
    """

    def __init__(
        self,
        folder: Path,
        *,
        main: bool,
        total_steps: int,
        start_step: int = 0,
        pending: bool = False,
    ) -> None:
        self.main = main
        self.console = Console(quiet=not main)
        self._progress: Progress | None = None
        self._total, self._start = total_steps, start_step
        self._due = time.monotonic()
        if not main:
            return
        self._path = path = folder / "metrics.jsonl"
        kept = _lines_up_to(path, start_step, pending) if start_step and path.exists() else []
        with writing(path):
            atomic_write(path, "".join(line + "\n" for line in kept).encode())
            self._file = path.open("a")
        self._board = _board(folder / "tensorboard", start_step)

    def __enter__(self) -> Self:
        if self.main and sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("loss {task.fields[loss]} · {task.fields[rate]} images/s"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task(
                "training", total=self._total, completed=self._start, loss="–", rate="–"
            )
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self.main:
            with writing(self._path) if error is None else suppress(OSError):
                self._file.close()
                if self._board is not None:
                    self._board.close()

    def advance(self, step: int) -> None:
        """Move the bar to ``step``."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def train(self, step: int, epoch: float, values: dict[str, float]) -> None:
        """Log a training step: ``values`` as the trainer makes them."""
        if not self.main:
            return
        self._write("train", step, epoch, values)
        loss, rate = values["loss"], values["images_per_second"]
        if self._progress is not None:
            self._progress.update(self._task, loss=f"{loss:.3f}", rate=f"{rate:,.0f}")
        elif time.monotonic() >= self._due or step == self._total:
            self._due = time.monotonic() + A_LINE
            left = (self._total - step) * values["seconds_per_step"]
            self.say(
                f"step {step}/{self._total} · epoch {epoch:.2f} · loss {loss:.3f} · "
                f"{rate:,.0f} images/s · {duration(left)} left"
            )

    def validation(self, step: int, epoch: float, seconds: float, values: dict[str, float]) -> None:
        """Log a validation's figures (shares in [0, 1]) and print them on one line.

        ``seconds`` were spent inside training steps until then, over all resumptions.
        """
        if not self.main:
            return
        self._write("validation", step, epoch, {"seconds": seconds, **values})
        figures = " · ".join(f"{shown(name)} {100 * value:.2f} %" for name, value in values.items())
        if figures:  # a run without held-out people or pairs has none
            self.say(f"epoch {epoch:.2f}: {figures}")

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        say(self.console, text)

    def _write(self, kind: str, step: int, epoch: float, values: dict[str, float]) -> None:
        record = {"kind": kind, "step": step, "epoch": round(epoch, 4), **values}
        with writing(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            if self._board is not None:
                for name, value in values.items():
                    self._board.add_scalar(f"{kind}/{name}", value, step)


def _board(folder: Path, start_step: int) -> Any:
    """TensorBoard's writer of events; None where the package tensorboard is not installed."""
    if find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    def quiet(failure: threading.ExceptHookArgs) -> None:
        # Of TensorBoard's thread, whose failure the next write raises here.
        if failure.exc_type is None or not issubclass(failure.exc_type, OSError):
            threading.__excepthook__(failure)

    threading.excepthook = quiet
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)


def _lines_up_to(path: Path, step: int, pending: bool) -> list[str]:
    """Whole lines of steps up to ``step``; what a kill cut short, or is none of ours, is dropped.

    With ``pending`` the validation of ``step`` itself goes too.
    """
    kept = []
    for line in path.read_text(errors="replace").split("\n")[:-1]:
        try:
            record = json.loads(line)
            at, validation = record["step"], record["kind"] == "validation"
            if at < step or (at == step and not (pending and validation)):
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept
