"""Galleries of the tests, and what a search among them must find."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sphereface2.recognition.gallery import (
    Enrolment,
    Gallery,
    Match,
)

MODEL, DIM = "a" * 64, 16


ENGINES = ("sqlite", "postgresql")


def opened(address: str | Path, **options) -> Gallery:
    return Gallery.open(address, **{"fingerprint": MODEL, "dim": DIM, **options})


def vectors(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*shape, DIM)).astype(np.float32)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def brute_force(people: dict[str, np.ndarray], probes: np.ndarray, fusion: str, k: int) -> list:
    """The k best names for each probe and their scores, one person after the other."""
    answers = []
    for probe in unit(probes.astype(np.float64)):
        scores = {
            name: float(
                (unit(rows.astype(np.float64)) @ probe).max()
                if fusion == "max"
                else unit(unit(rows.astype(np.float64)).sum(0)) @ probe
            )
            for name, rows in people.items()
        }
        answers.append(sorted(scores.items(), key=lambda item: -item[1])[:k])
    return answers


def agrees(found: list[list[Match]], wanted: list) -> None:
    assert [[m.person for m in ms] for ms in found] == [[n for n, _ in ns] for ns in wanted]
    np.testing.assert_allclose(
        [m.score for ms in found for m in ms], [s for ns in wanted for _, s in ns], atol=1e-5
    )


def filled(gallery: Gallery, seed: int = 0, count: int = 120) -> dict[str, np.ndarray]:
    """Enrol people of one to five images; their embeddings."""
    counts = np.random.default_rng(seed).integers(1, 6, count)
    people = {f"p{i}": vectors(1000 * seed + i, int(n)) for i, n in enumerate(counts)}
    stored = list(gallery.add_many(Enrolment(n, rows) for n, rows in people.items()))
    assert sorted(p.name for some in stored for p in some) == sorted(people)
    return people
