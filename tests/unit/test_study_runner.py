"""Running a study: how it ends."""

from __future__ import annotations

from threading import Lock
from types import SimpleNamespace

from sphereface2.study.runner import _Runner, _summary


def test_workers_that_end_by_themselves_are_ended_with_the_others() -> None:
    # One signal stops them all, and each is taken out as soon as its process has ended.
    runner = object.__new__(_Runner)
    runner.lock, runner.workers, ended = Lock(), set(), []

    def worker(name: str) -> SimpleNamespace:
        def wait() -> None:
            runner.workers.discard(made)
            ended.append(name)

        class Worker(SimpleNamespace):
            __hash__ = object.__hash__

        made = Worker(end=lambda: None, process=SimpleNamespace(wait=wait))
        return made

    runner.workers |= {worker(name) for name in "abc"}
    runner.__exit__()
    assert runner.stopping
    assert sorted(ended) == ["a", "b", "c"]


def test_the_line_of_a_cell_has_the_figures_that_there_are() -> None:
    accuracy, test = SimpleNamespace(name="LFW", accuracy=0.9), SimpleNamespace(tar={1e-3: 0.5})
    told = _summary(SimpleNamespace(pairs=[accuracy], test=test))  # type: ignore[arg-type]
    assert told == ["LFW 90.00 %", "test TAR@1e-3 50.00 %"]
    without = SimpleNamespace(pairs=[], test=SimpleNamespace(tar={0.1: 0.5}))
    assert _summary(without) == []  # type: ignore[arg-type]
