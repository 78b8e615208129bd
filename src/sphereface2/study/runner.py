"""Runs the cells of a study that are not done yet, several at a time, each in a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sphereface2.console import say
from sphereface2.data.locate import locate
from sphereface2.data.opening import open_source
from sphereface2.errors import UserError
from sphereface2.files import atomic_write, lock
from sphereface2.machine import compute_threads
from sphereface2.signals import PARENT, STOPPED, Stopper, starting_process
from sphereface2.study import design
from sphereface2.study.design import Cell, Study
from sphereface2.study.stored import CellResult, read_result
from sphereface2.training import config as configuration

FAILURE = "failed.txt"
CELLS = Path("runs/study")
"""Where studies keep their runs by default."""


def run_study(
    path: Path, /, *, cells: Path = CELLS, jobs: int = 1, seconds: float | None = None
) -> None:
    """Train the runs of a study that are not finished yet.

    Trials come first, then the grid and the sweeps. A run has a folder ``CELLS/KEY``, whatever
    study it is part of. One with ``cell.json`` is done, one that was interrupted goes on from its
    last checkpoint, and one that was not judged on a verification set that is asked for now is
    judged on it from there. A run that fails (whose loss diverges, say) is noted in ``failed.txt``
    with the end of its log, and the others go on; the next call tries it again.

    Args:
        path: YAML file of the study, as in `configs/study/`.
        cells: Folder of the runs, shared by all studies.
        jobs: Number of runs at a time, each in a process; they share the CPU cores, or the GPU.
        seconds: After so many no run is started any more; the next call goes on.

    Raises:
        UserError: a bad definition, ``cells`` holds cells of other data, or cells failed.
    """
    study = design.load(path)
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    cells.mkdir(parents=True, exist_ok=True)
    with Stopper(STOPPED), _locked(cells, study.name), _Runner(study, cells, jobs) as runner:
        runner.run(None if seconds is None else time.monotonic() + seconds)
        failed = runner.failed
    if failed:
        raise UserError(
            f"{len(failed)} cells failed (the others are done); see {FAILURE} in "
            f"{', '.join(str(cells / key) for key in failed[:3])}"
        )


def best_trials(
    study: Study,
    find: Callable[[Cell], CellResult | None],
    trials: Sequence[Cell] | None = None,
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Each tuned arm's best trial by TAR on the validation people, and that TAR.

    Of equal ones it is the first. Untuned arms have the trial ``{}`` and no figure. Arms none of
    whose trials is done are left out, and so are trials that failed.
    """
    chosen: dict[str, dict[str, Any]] = {
        name: {} for name, arm in study.arms.items() if not arm.trials
    }
    best: dict[str, float] = {}
    for cell in design.trials(study) if trials is None else trials:
        result = find(cell)
        if result is None:
            continue
        figure = validation_tar(study, result)
        if figure > best.get(cell.arm, -1.0):
            best[cell.arm], chosen[cell.arm] = figure, cell.changed
    return chosen, best


def validation_tar(study: Study, result: CellResult) -> float:
    """The figure in [0, 1] that trials are compared by; 0 where there are too few pairs for it."""
    return result.validation[study.selection.far] or 0.0


def read(cells: Path, cell: Cell, pairs: Iterable[str] = ()) -> CellResult | None:
    """The result of a cell; None if it is not done, or not judged on all of the sets ``pairs``."""
    result = read_result(cells / cell.key)
    return result if result is not None and set(pairs) <= result.judged_on else None


class _Worker:
    """A process that runs one cell after another, until one fails."""

    def __init__(self, jobs: int) -> None:
        threads = compute_threads(jobs)
        with starting_process():
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sphereface2.study.cell"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ
                | {
                    "OMP_NUM_THREADS": str(threads),
                    "PYTHONIOENCODING": "utf-8",  # of its log
                    PARENT: str(os.getpid()),
                },
            )

    def run(self, folder: Path, pairs: Sequence[str]) -> int:
        """Run a cell; other than 0 is the exit status of the process, which has ended."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([str(folder), *pairs]).encode() + b"\n")
            self.process.stdin.flush()
        return 0 if self.process.stdout.readline() else self.process.wait() or 1

    def end(self) -> None:
        """End it, or let it end after its cell: it goes on from a checkpoint next time."""
        self.process.terminate()


class _Runner:
    def __init__(self, study: Study, cells: Path, jobs: int) -> None:
        self.study, self.cells, self.jobs = study, cells, jobs
        self.console = Console()
        self.idle: list[_Worker] = []
        self.workers: set[_Worker] = set()
        self.lock = Lock()
        self.stopping = False
        self.trials, self.grid = design.trials(study), list[Cell]()
        self.decided: tuple[dict[str, Any], list[str]] | None = None
        self.found: dict[str, CellResult] = {}
        self.started: set[tuple[str, bool]] = set()
        self.crashed: set[tuple[str, bool]] = set()
        #: Keys of the cells that failed.
        self.failed: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers."""
        with self.lock:
            self.stopping = True
            workers = [*self.workers]  # of which threads take out those that end
            for worker in workers:
                worker.end()
        for worker in workers:
            worker.process.wait()

    def run(self, until: float | None) -> None:
        """Run the cells not done yet, no new one from ``until`` on."""
        known = self._known()
        done = {cell.key for cell, judged in known if self._find(cell, judged) is not None}
        trials = len({cell.key for cell, _ in known if cell.role == "trial"})
        say(
            self.console,
            f"{self.study.name}: {self._count(known)} cells, {len(done)} done before"
            + (f", {trials} of them trials" if trials else ""),
        )
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=3600,  # a cell takes minutes
        )
        with progress, ThreadPoolExecutor(self.jobs) as pool:
            task = progress.add_task("cells", completed=len(self.found))
            running: dict[Future[str], tuple[Cell, bool]] = {}
            try:
                while True:
                    late = until is not None and time.monotonic() >= until
                    while len(running) < self.jobs and not late:
                        cell, judged = next(self._waiting(), (None, False))
                        if cell is None:
                            break
                        self.started.add((cell.key, judged))
                        running[pool.submit(self._one, cell, judged)] = cell, judged
                    progress.update(
                        task, total=self._count(self._known()), completed=len(self.found)
                    )
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        cell, judged = running.pop(future)
                        say(progress.console, f"{cell.label}  {future.result()}")
                        self.found.pop(cell.key, None)
                        if self._find(cell, judged) is None:
                            self._again(cell, judged)
            except BaseException:
                self.__exit__()
                raise

    def _again(self, cell: Cell, judged: bool) -> None:
        """Give up a cell, or let it be tried once more if its process ended without a reason.

        A device's driver may end all processes that share it for a fault of one.
        """
        reason = (self.cells / cell.key / FAILURE).read_text("utf-8", "replace").splitlines()[-1:]
        told = any(line.startswith("error: ") for line in reason)
        if told or self.stopping or (cell.key, judged) in self.crashed:
            self.failed.append(cell.key)
        else:
            self.crashed.add((cell.key, judged))
            self.started.discard((cell.key, judged))

    def _known(self) -> list[tuple[Cell, bool]]:
        """What is to be run as far as it is decided, the most valuable first, and whether it is
        to be judged on the verification sets.

        Trials are chosen by the validation people alone; an arm's grid begins when all of its
        trials have ended.
        """
        trials = self.trials
        chosen, best = best_trials(self.study, self._find, trials)
        open_arms = {cell.arm for cell in trials if not self._ended(cell)}
        decided = {arm: trial for arm, trial in chosen.items() if arm not in open_arms}
        figures = {arm: best.get(arm, -1.0) for arm in self.study.arms if arm not in open_arms}
        finals = design.finalists(self.study, figures)
        if (decided, finals) != self.decided:
            self.decided = decided, finals
            self.grid = design.grid(self.study.only(decided), decided, finals)
        return [*((cell, False) for cell in trials), *((cell, True) for cell in self.grid)]

    def _waiting(self) -> Iterator[tuple[Cell, bool]]:
        for cell, judged in self._known():
            if (cell.key, judged) not in self.started and self._find(cell, judged) is None:
                yield cell, judged

    def _ended(self, cell: Cell) -> bool:
        return cell.key in self.failed or self._find(cell) is not None

    def _count(self, cells: Iterable[tuple[Cell, bool]]) -> int:
        return len({cell.key for cell, _ in cells})

    def _find(self, cell: Cell, judged: bool = False) -> CellResult | None:
        """A finished cell, of these data: its key tells its settings only."""
        if cell.key not in self.found:
            if (result := read(self.cells, cell)) is None:
                return None
            if result.data.fingerprint != self._fingerprint:
                raise UserError(
                    f"{self.cells / cell.key} was trained on different data than {self.study.name} "
                    f"uses (data.train {self._train}); give another folder as --cells"
                )
            self.found[cell.key] = result
        result = self.found[cell.key]
        return result if not judged or set(self.study.pairs) <= result.judged_on else None

    @property
    def _train(self) -> str:
        train: str = self.study.base.get("data", {}).get("train", "auto")
        return train

    @cached_property
    def _fingerprint(self) -> str:
        """Of the study's data, which is opened only where finished cells are to be compared."""
        return open_source(locate(self._train).train).fingerprint()

    def _one(self, cell: Cell, judged: bool) -> str:
        """Run a cell in a worker to its end; what to tell of it."""
        folder = self.cells / cell.key
        folder.mkdir(exist_ok=True)
        # Anew each time: where the data lie and how many threads to use may have changed.
        atomic_write(folder / "config.yaml", configuration.dump(cell.config).encode())
        (folder / FAILURE).unlink(missing_ok=True)
        start = time.monotonic()
        with self.lock:
            if self.stopping:
                return "not started"
            worker = self.idle.pop() if self.idle else _Worker(self.jobs)
            self.workers.add(worker)
        status = worker.run(folder, self.study.pairs if judged else ())
        with self.lock:
            if status:
                self.workers.discard(worker)
            else:
                self.idle.append(worker)
        if status and self.stopping:
            return "stopped"
        if status:
            log = folder / "log.txt"
            end = log.read_text("utf-8", "replace").splitlines()[-15:] if log.exists() else []
            text = "\n".join([f"exit status {status}", *end])
            atomic_write(folder / FAILURE, f"{text}\n".encode())
            return f"failed: {end[-1] if end else f'exit status {status}'}"
        took = f"{time.monotonic() - start:.0f} s"
        return ", ".join([*_summary(read(self.cells, cell)), took])


def _summary(result: CellResult | None) -> list[str]:
    if result is None:
        return ["no result"]
    figures = [f"{one.name} {100 * one.accuracy:.2f} %" for one in result.pairs]
    tar = result.test.tar.get(1e-3)
    if tar is not None:
        figures.append(f"test TAR@1e-3 {100 * tar:.2f} %")
    return figures


@contextmanager
def _locked(cells: Path, name: str) -> Iterator[None]:
    """Only one process at a time runs cells in a folder, lest two train the same one."""
    busy = f"another study is being run in {cells}: wait for it, or give {name} --cells of its own"
    with (cells / ".lock").open("a") as file:
        lock(file, busy)
        yield
