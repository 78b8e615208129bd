"""Two processes that change and search one gallery at once, and whether their answers agree.

Run as ``python serial_worker.py GALLERY SEED SECONDS``: prints what it did, a JSON line each.

The gallery holds pairs of people. An operation replaces both of a pair in one transaction, removes
the first, or looks both up in one call. What was written last can be told from the score of a fixed
probe. The history of a pair is that of a register with two halves; it is right if the operations
can be put in one order that has each between its beginning and its end and explains every answer:
linearizability, which holds of the whole where it holds of each register.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from sphereface2.recognition.gallery import Enrolment, Gallery

DIM, MODEL, PAIRS, VERSIONS = 32, "f" * 64, 4, 900
State = tuple[int | None, int | None]


def basis(pair: int, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Two orthogonal directions that nobody else has."""
    rows = np.eye(DIM)
    first = 4 * pair + 2 * half
    return rows[first], rows[first + 1]


def row(pair: int, half: int, version: int) -> np.ndarray:
    """An embedding whose cosine with the pair's probe tells the version."""
    a, b = basis(pair, half)
    cosine = 0.99 - version * 1e-3
    return cosine * a + np.sqrt(1 - cosine**2) * b


def work(uri: str, seed: int, seconds: float) -> None:
    """Do at random, and tell."""
    chance = random.Random(seed)
    with Gallery.open(uri, fingerprint=MODEL, dim=DIM) as gallery:
        print("ready", flush=True)
        sys.stdin.readline()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pair = chance.randrange(PAIRS)
            names = [f"{pair} {half}" for half in "ab"]
            what, version = (
                chance.choice(["write", "write", "remove", "read", "read", "read"]),
                None,
            )
            answer: object = None
            begun = time.monotonic_ns()
            if what == "write":
                version = chance.randrange(VERSIONS)
                both = [Enrolment(n, row(pair, h, version)) for h, n in enumerate(names)]
                assert len(list(gallery.add_many(both, replace=True))) == 1
            elif what == "remove":
                answer = gallery.remove(names[0])
            else:
                probes = np.stack([basis(pair, half)[0] for half in (0, 1)])
                found = gallery.search(probes, k=2 * PAIRS, fusion=chance.choice(["max", "mean"]))
                answer = []
                for name, matches in zip(names, found, strict=True):
                    scores = [m.score for m in matches if m.person == name]
                    answer.append(round((0.99 - scores[0]) * 1e3) if scores else None)
            print(json.dumps([pair, what, version, answer, begun, time.monotonic_ns()]))


class Operation(NamedTuple):
    """What one process did with a pair, and when."""

    what: str
    version: int | None
    answer: Any
    begun: int
    ended: int

    def after(self, state: State) -> State | None:
        """The pair's state afterwards; None if the answer is wrong in this state."""
        if self.what == "write":
            return self.version, self.version
        if self.what == "remove":
            return (None, state[1]) if self.answer == (state[0] is not None) else None
        return state if tuple(self.answer) == state else None


def serial(history: list[Operation]) -> bool:
    """Whether one order of a pair's operations explains all answers, from an empty gallery on."""
    history = sorted(history, key=lambda one: one.begun)
    seen: set[tuple[int, frozenset[int], State]] = set()
    # Done are the first `start` operations and those of `ahead`.
    todo: list[tuple[int, frozenset[int], State]] = [(0, frozenset(), (None, None))]
    while todo:
        start, ahead, state = todo.pop()
        while start in ahead:
            ahead, start = ahead - {start}, start + 1
        if start == len(history):
            return True
        if (start, ahead, state) in seen:
            continue
        seen.add((start, ahead, state))
        # Next may come whatever began before every other that is left has ended.
        ended, number = history[start].ended, start
        while number < len(history) and history[number].begun <= ended:
            if number not in ahead:
                ended = min(ended, history[number].ended)
                if (new := history[number].after(state)) is not None:
                    todo.append((start, ahead | {number}, new))
            number += 1
    return False


def compete(uri: str, processes: int, seconds: float) -> tuple[int, dict[int, list[Operation]]]:
    """Let processes compete; how much each kind of operation was done, the histories by pair."""
    with Gallery.open(uri, fingerprint=MODEL, dim=DIM):
        pass
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, uri, str(seed), str(seconds)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in range(processes)
    ]
    for worker in workers:
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
    for worker in workers:  # all at once
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    histories: dict[int, list[Operation]] = {pair: [] for pair in range(PAIRS)}
    with ThreadPoolExecutor(processes) as pool:
        outputs = list(pool.map(lambda worker: worker.communicate()[0], workers))
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0
        for line in output.splitlines():
            pair, *rest = json.loads(line)
            histories[pair].append(Operation(*rest))
    return sum(map(len, histories.values())), histories


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
