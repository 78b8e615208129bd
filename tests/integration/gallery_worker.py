"""Enrol people until killed, telling who was acknowledged; and what to expect of those after.

Run as ``python gallery_worker.py GALLERY SEED FIRST``.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sphereface2.recognition.gallery import Enrolment, Gallery

DIM, MODEL = 64, "f" * 64


def pictures(name: str, seed: int) -> np.ndarray:
    """The embeddings of a person: as many as the name says, the same in every process."""
    number = int(name.split()[1])
    rng = np.random.default_rng([seed, number])
    return rng.standard_normal((1 + number % 7, DIM)).astype(np.float32)


def enrol(folder: Path, seed: int, first: int) -> None:
    people = (
        Enrolment(f"person {i}", pictures(f"person {i}", seed), {"number": i})
        for i in range(first, first + 1_000_000)
    )
    with Gallery.open(folder, fingerprint=MODEL, dim=DIM) as gallery:
        print("ready", flush=True)
        for stored in gallery.add_many(people):
            print(*(person.name.split()[1] for person in stored), flush=True)


def kill_and_check(folder: Path, kills: int, seed: int) -> Iterator[str]:
    """Kill -9 an enrolling process `kills` times; yields a line an outcome, raises on a fault.

    Afterwards all acknowledged people must be there, everybody who is there must have all their
    pictures, and no picture may be left that is nobody's.
    """
    chance = random.Random(seed)
    acknowledged: set[int] = set()
    first = 0
    for kill in range(1, kills + 1):
        worker = subprocess.Popen(
            [sys.executable, __file__, str(folder), str(seed), str(first)],
            stdout=subprocess.PIPE,
            # Small memory tables, so that kills fall into their writing to files and merging too.
            env={**os.environ, "MILVUS_LITE_MEMTABLE_MEMORY_LIMIT_BYTES": "400000"},
            text=True,
        )
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        time.sleep(chance.uniform(0.0, 1.5))
        worker.kill()
        told = worker.stdout.read().splitlines(keepends=True)
        worker.wait()
        # The last line may be cut by the kill itself.
        lines = [line for line in told if line.endswith("\n")]
        new = {int(number) for line in lines for number in line.split()}
        acknowledged |= new
        with Gallery.open(folder, fingerprint=MODEL, dim=DIM) as gallery:
            there = {int(p.name.split()[1]): p for p in gallery.people()}
            missing = acknowledged - there.keys()
            half = [i for i, p in there.items() if p.pictures != 1 + i % 7]
            total = sum(person.pictures for person in there.values())
            stored = gallery.stats()["pictures"]
            some = sorted(chance.sample(sorted(there), min(20, len(there))))
            for i in some:
                probes = pictures(f"person {i}", seed)
                for matches in gallery.search(probes, k=1):
                    assert matches[0].person == f"person {i}", (i, matches)
                    assert matches[0].score > 0.9999
        outcome = (
            f"kill {kill}: {len(new)} acknowledged, {len(there)} there in all, "
            f"{len(missing)} missing, {len(half)} half there, {stored - total} pictures of nobody"
        )
        assert not missing and not half and stored == total, outcome
        yield outcome
        first = max(there, default=first - 1) + 1


if __name__ == "__main__":
    enrol(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
