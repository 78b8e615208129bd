"""Two processes that change and search one gallery at once, and whether their answers agree.

Run as ``python serial_worker.py GALLERY SEED SECONDS``: prints what it did, a JSON line each.

The gallery holds pairs of people. An operation replaces both of a pair in one transaction, renames
the second there and back, removes the first, or looks both up in one call. What was written last
can be told from the score of a fixed probe. The history of a pair is that of a register with two
halves; it is right if the operations can be put in one order that has each between its beginning
and its end and explains every answer (linearizability, which holds of the whole where it holds of
each register).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass

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
            what, version = chance.choice(["write", "write", "remove", "read", "read", "read"]), None
            answer: object = None
            begun = time.monotonic_ns()
            if what == "write":
                version = chance.randrange(VERSIONS)
                both = [Enrolment(n, row(pair, h, version)) for h, n in enumerate(names)]
                with gallery._change() as connection:
                    items = [module_checked(one) for one in both]
                    gallery._store(connection, items, True)
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
