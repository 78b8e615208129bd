"""Runs the cells of a study that are not done yet, several at a time, each in a process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sphereface2.data.locate import locate
from sphereface2.data.opening import open_source
from sphereface2.errors import UserError
from sphereface2.files import atomic_write, lock
from sphereface2.signals import PARENT, STOPPED, Stopper
from sphereface2.study import design
from sphereface2.study.design import Cell, Study
from sphereface2.study.stored import CellResult, read_result
from sphereface2.training import config as configuration

FAILURE = "failed.txt"
CELLS = Path("runs/study")
"""Where studies keep their runs by default."""


def run_study(path: Path, /, *, cells: Path = CELLS, jobs: int = 1) -> None:
    """Train the runs of a study that are not finished yet.

    Trials come first, then the grid and the sweeps. A run has a folder ``cells/KEY``, whatever
    study it is part of. One with ``cell.json`` is done, one that was interrupted goes on from its
    last checkpoint, and one that was not judged on a verification set that is asked for now is
    judged on it from there. A run that fails (whose loss diverges, say) is noted in ``failed.txt``
    with the end of its log, and the others go on; the next call tries it again.

    Args:
        path: YAML file of the study, as in `configs/study/`.
        cells: Folder of the runs, shared by all studies.
        jobs: Number of runs at a time; they share the CPU cores.

    Raises:
        UserError: a bad definition, ``cells`` holds cells of other data, or cells failed.
    """
    study = design.load(path)
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    cells.mkdir(parents=True, exist_ok=True)
    with Stopper(STOPPED), _locked(cells, study.name):
        runner = _Runner(study, cells, jobs)
        # Trials are chosen by the validation people alone.
        failed = runner.run("trials", design.trials(study), pairs=())
        grid = design.grid(study, choose(study, cells))
        failed += runner.run("cells", grid, pairs=study.pairs)
    if failed:
        raise UserError(
            f"{len(failed)} cells failed (the others are done); see {FAILURE} in "
            f"{', '.join(str(cells / key) for key in failed[:3])}"
        )


def choose(study: Study, cells: Path) -> dict[str, dict[str, Any]]:
    """Each tuned arm's best trial by TAR on the validation people; ``{}`` for untuned arms.

    Trials that failed are passed over.

    Raises:
        UserError: an arm none of whose trials is done.
    """
    chosen = best_trials(study, cells)
    missing = [name for name in study.arms if name not in chosen]
    if missing:
        raise UserError(
            f"no trial of {', '.join(missing)} is done in {cells}; "
            "run `sphereface2 study run` first"
        )
    return chosen


def best_trials(study: Study, cells: Path) -> dict[str, dict[str, Any]]:
    """As `choose`, without the arms none of whose trials is done."""
    chosen: dict[str, dict[str, Any]] = {
        name: {} for name, arm in study.arms.items() if not arm.trials
    }
    best: dict[str, float] = {}
    for cell in design.trials(study):
        result = read(cells, cell)
        if result is None:
            continue
        figure = validation_tar(study, result)
        if figure > best.get(cell.arm, -1.0):
            best[cell.arm], chosen[cell.arm] = figure, cell.changed
    return chosen


def validation_tar(study: Study, result: CellResult) -> float:
    """The figure in [0, 1] that trials are compared by; 0 where there are too few pairs for it."""
    return result.validation[study.selection.far] or 0.0


def read(cells: Path, cell: Cell, pairs: Iterable[str] = ()) -> CellResult | None:
    """The result of a cell; None if it is not done, or not judged on all of the sets ``pairs``."""
    result = read_result(cells / cell.key)
    return result if result is not None and set(pairs) <= result.judged_on else None


class _Runner:
    def __init__(self, study: Study, cells: Path, jobs: int) -> None:
        self.study, self.cells, self.jobs = study, cells, jobs
        self.console = Console()
        self.children: set[subprocess.Popen[bytes]] = set()
        self.lock = Lock()
        self.stopping = False

    def run(self, what: str, wanted: Iterable[Cell], pairs: Sequence[str]) -> list[str]:
        """Run the cells not done yet, or not judged on all ``pairs``; the keys that failed."""
        cells = list({cell.key: cell for cell in wanted}.values())
        self._check_data(cells)
        missing = [cell for cell in cells if read(self.cells, cell, pairs) is None]
        self.console.print(
            f"{self.study.name}: {len(cells)} {what}, {len(cells) - len(missing)} done before"
        )
        failed: list[str] = []
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=self.console,
        )
        with progress, ThreadPoolExecutor(self.jobs) as pool:
            task = progress.add_task(what, total=len(missing))
            running: dict[Future[str], Cell] = {}
            queue: Iterator[Cell] = iter(missing)
            try:
                while True:
                    while len(running) < self.jobs and (cell := next(queue, None)) is not None:
                        running[pool.submit(self._one, cell)] = cell
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        cell = running.pop(future)
                        progress.console.print(f"{cell.label}  {future.result()}", highlight=False)
                        if read(self.cells, cell, pairs) is None:
                            failed.append(cell.key)
                        progress.advance(task)
            except BaseException:
                self._stop()
                raise
        return failed

    def _check_data(self, cells: Iterable[Cell]) -> None:
        """Refuse finished cells of other data: their keys tell their settings only."""
        for cell in cells:
            result = read(self.cells, cell)
            if result is not None and result.data.fingerprint != self._fingerprint:
                raise UserError(
                    f"{self.cells / cell.key} was trained on different data than {self.study.name} "
                    f"uses (data.train {self._train}); give another folder as --cells"
                )

    @property
    def _train(self) -> str:
        train: str = self.study.base.get("data", {}).get("train", "auto")
        return train

    @cached_property
    def _fingerprint(self) -> str:
        """Of the study's data, which is opened only where finished cells are to be compared."""
        return open_source(locate(self._train).train).fingerprint()

    def _one(self, cell: Cell) -> str:
        """Run a cell's process to its end; what to tell of it."""
        folder = self.cells / cell.key
        folder.mkdir(exist_ok=True)
        # Anew each time: where the data lie and how many threads to use may have changed.
        atomic_write(folder / "config.yaml", configuration.dump(cell.config).encode())
        (folder / FAILURE).unlink(missing_ok=True)
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), PARENT: str(os.getpid())}
        command = [sys.executable, "-m", "sphereface2.study.cell", str(folder), *self.study.pairs]
        start = time.monotonic()
        with (folder / "log.txt").open("ab") as log:
            with self.lock:
                if self.stopping:
                    return "not started"
                child = subprocess.Popen(
                    command, stdout=log, stderr=subprocess.STDOUT, env=environment
                )
                self.children.add(child)
            status = child.wait()
            with self.lock:
                self.children.discard(child)
        if status and self.stopping:
            return "stopped"
        if status:
            end = (folder / "log.txt").read_text(errors="replace").splitlines()[-15:]
            text = "\n".join([f"exit status {status}", *end])
            atomic_write(folder / FAILURE, f"{text}\n".encode())
            return f"[red]failed[/red]: {end[-1] if end else f'exit status {status}'}"
        return f"{_summary(read(self.cells, cell))}, {time.monotonic() - start:.0f} s"

    def _stop(self) -> None:
        """End the cells' processes: each goes on from its last checkpoint next time."""
        with self.lock:
            self.stopping = True
            for child in self.children:
                child.terminate()


def _summary(result: CellResult | None) -> str:
    if result is None:
        return "no result"
    figures = [f"{one.name} {100 * one.accuracy:.2f} %" for one in result.pairs]
    tar = result.test.tar.get(1e-3)
    if tar is not None:
        figures.append(f"test TAR@1e-3 {100 * tar:.2f} %")
    return ", ".join(figures)


@contextmanager
def _locked(cells: Path, name: str) -> Iterator[None]:
    """Only one process at a time runs cells in a folder, lest two train the same one."""
    busy = f"another study is being run in {cells}: wait for it, or give {name} --cells of its own"
    with (cells / ".lock").open("a") as file:
        lock(file, busy)
        yield
