"""Enrol people until killed, telling who was acknowledged; and what to expect of those after.

Run as ``python gallery_worker.py GALLERY SEED FIRST``.
"""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from sphereface2.recognition.gallery import Enrolment, Gallery, GalleryUnavailableError
from sphereface2.recognition.gallery import gallery as module

DIM, MODEL = 64, "f" * 64


def images(number: int, seed: int) -> np.ndarray:
    """The embeddings of a person: as many as the number says, the same in every process."""
    rng = np.random.default_rng([seed, number])
    return rng.standard_normal((1 + number % 7, DIM)).astype(np.float32)


def enrol(uri: str, seed: int, first: int) -> None:
    """Add people without end, through every loss of the database."""
    module.BATCH_IMAGES = 60  # so that kills meet many transactions
    with Gallery.open(uri, fingerprint=MODEL, dim=DIM) as gallery:
        print("ready", flush=True)
        while True:
            people = (
                Enrolment(f"person {i}", images(i, seed), {"number": i})
                for i in range(first, first + 1_000_000)
            )
            try:
                for stored in gallery.add_many(people):
                    numbers = [int(person.name.split()[1]) for person in stored]
                    first = max(numbers) + 1
                    print(*numbers, flush=True)
            except GalleryUnavailableError as error:
                print(f"lost: {error}", flush=True)
                time.sleep(0.1)
                try:  # it may have been stored though the answer was lost
                    while gallery.get(f"person {first}") is not None:
                        first += 1
                except GalleryUnavailableError:
                    continue


class Worker:
    """A process that enrols, and what it said so far."""

    def __init__(self, uri: str, seed: int, first: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, uri, str(seed), str(first)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self.lines.extend, args=(self.process.stdout,))
        self._reader.start()

    def acknowledged(self) -> set[int]:
        """Whom it said to be stored; the last line may be cut by its death."""
        whole = [line for line in self.lines if line.endswith("\n") and line[0].isdigit()]
        return {int(number) for line in whole for number in line.split()}

    def wait(self, more_than: int = 0) -> None:
        """Until it has stored more than so many people."""
        until = time.monotonic() + 60
        while len(self.acknowledged()) <= more_than:
            assert self.process.poll() is None and time.monotonic() < until, self.lines
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill -9 it."""
        self.process.kill()
        self._reader.join()
        self.process.wait()


def check(uri: str, seed: int, acknowledged: set[int], chance: random.Random) -> tuple[int, str]:
    """The highest number there and a line; AssertionError if somebody is missing or half there."""
    with Gallery.open(uri, fingerprint=MODEL, dim=DIM) as gallery:
        while True:  # an enrolling process may go on: what is compared has to be of one moment
            there = {int(p.name.split()[1]): p for p in gallery.people()}
            stored = gallery.stats()["images"]
            if gallery.count() == len(there):
                break
        missing = acknowledged - there.keys()
        half = [i for i, p in there.items() if p.images != 1 + i % 7 or p.metadata["number"] != i]
        total = sum(person.images for person in there.values())
        for i in sorted(chance.sample(sorted(there), min(20, len(there)))):
            for matches in gallery.search(images(i, seed), k=1):
                assert matches[0].person == f"person {i}", (i, matches)
                assert matches[0].score > 0.9999
    line = (
        f"{len(acknowledged)} acknowledged, {len(there)} there, {len(missing)} missing, "
        f"{len(half)} half there, {stored - total} images of nobody"
    )
    assert not missing and not half and stored == total, line
    return max(there, default=-1), line


def kill_clients(uri: str, kills: int, seed: int) -> Iterator[str]:
    """Kill -9 an enrolling process `kills` times; yields a line an outcome, raises on a fault."""
    chance, acknowledged, first = random.Random(seed), set[int](), 0
    for kill in range(1, kills + 1):
        worker = Worker(uri, seed, first)
        try:
            worker.wait()
            time.sleep(chance.uniform(0.0, 0.5))
        finally:
            worker.kill()
        acknowledged |= worker.acknowledged()
        last, line = check(uri, seed, acknowledged, chance)
        yield f"kill {kill} of a client: {line}"
        first = last + 1


def kill_server(
    uri: str, kill: Callable[[], None], start: Callable[[], None], kills: int, seed: int
) -> Iterator[str]:
    """Kill -9 the database under an enrolling process, which goes on when it is back."""
    chance, worker = random.Random(seed), Worker(uri, seed, 0)
    try:
        for number in range(1, kills + 1):
            worker.wait(len(worker.acknowledged()))  # it recovered by itself
            time.sleep(chance.uniform(0.0, 0.5))
            kill()
            start()
            _, line = check(uri, seed, worker.acknowledged(), chance)
            yield f"kill {number} of the server: {line}"
        lost = [line for line in worker.lines if line.startswith("lost")]
        assert len(lost) >= kills and all("does not answer" in line for line in lost), lost
    finally:
        worker.kill()


if __name__ == "__main__":
    enrol(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
