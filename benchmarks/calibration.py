"""Calibrated thresholds keep their FAR on people they have not met; the shared bias does not.

    python benchmarks/calibration.py [RUN] [--data ../shared/data]

The held-out people of RUN's training set are halved, and LFW's folds: a calibration is fitted on
one half and judged on the other, both ways; last, fitted on the held-out people and judged on LFW.
Without RUN the people are drawn from a model of scores whose truth is known.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sphereface2.data import open_source, split_people
from sphereface2.data.opening import load_pairs
from sphereface2.embedder import Embedder
from sphereface2.evaluation.calibration import Calibration
from sphereface2.evaluation.pairs import sample_pairs
from sphereface2.evaluation.reliability import cllr, quality, reliability
from sphereface2.evaluation.thresholds import FALSE_ACCEPTS
from sphereface2.evaluation.verification import pair_scores
from sphereface2.recognition.calibrate import MOST_PAIRS, shared_bias

Scored = tuple[np.ndarray, np.ndarray, np.ndarray]
FARS = (1e-2, 1e-3)


def of_people(embeddings: np.ndarray, labels: np.ndarray) -> Scored:
    pairs, same = sample_pairs(labels, np.random.default_rng(0), MOST_PAIRS)
    return pair_scores(embeddings, pairs), same, labels[pairs]


def halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the images of either half of the people."""
    people = np.random.default_rng(1).permutation(np.unique(labels))
    first = np.isin(labels, people[: len(people) // 2])
    return first, ~first


def drawn(people: int = 400, images: int = 6, dim: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings around a direction for each person."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(people), images)
    rows = rng.normal(size=(people, dim))[labels] + 1.2 * rng.normal(size=(len(labels), dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), labels


def judge(table: Table, name: str, fit: Scored, test: Scored, metadata: Mapping[str, Any]) -> None:
    fars = [far for far in FARS if far * (~fit[1]).sum() >= FALSE_ACCEPTS]
    for method in ("logistic", "isotonic"):
        calibration = Calibration.fit(
            fit[0], fit[1], fingerprint="", fars=fars, method=method, people=fit[2]
        )
        found = quality(test[0], test[1], calibration)
        rates = [
            f"{100 * rate:.3g} % ({100 * one.far_ci[0]:.2g}–{100 * one.far_ci[1]:.2g})"
            for rate, one in zip(found.far.values(), calibration.thresholds.values(), strict=True)
        ]
        figures = [
            f"{100 * found.ece:.2f} %",
            f"{found.cllr:.4f}",
            f"{found.min_cllr:.4f}",
        ]
        table.add_row(name, method, *figures, *rates, *["too few"] * (len(FARS) - len(rates)))
    bias = shared_bias(metadata, test[0], test[1])
    if bias is not None:
        logits = bias.r * (2 * ((test[0] + 1) / 2) ** bias.t - 1) + bias.bias
        ece = reliability(1 / (1 + np.exp(-logits)), test[1]).ece
        cost = cllr(logits, test[1])
        rate = f"{100 * bias.far:.2g} %, TAR {100 * bias.tar:.1f} %"
        table.add_row("", "-b/r", f"{100 * ece:.2f} %", f"{cost:.4f}", "", rate)
    table.add_section()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    options = parser.parse_args()
    table = Table(title="FAR on the other half (interval told at fitting)", title_justify="left")
    for column in ("fitted on → judged on", "", "ECE", "Cllr", "min-Cllr"):
        table.add_column(column)
    for far in FARS:
        table.add_column(f"FAR wanted {100 * far:g} %")
    if options.run is None:
        embeddings, labels = drawn()
        sets, metadata = {"drawn people": (embeddings, labels)}, {}
    else:
        embedder = Embedder.load(options.run)
        metadata = embedder.metadata
        source = open_source(options.data / "celeb50k")
        split = metadata.get("data", {"validation_people": 400, "split_seed": 0})
        held_out = split_people(source, split["validation_people"], split["split_seed"]).validation
        embeddings = embedder.embed_source(source, held_out)
        labels = source.labels[held_out]
        sets = {"held-out people": (embeddings, labels)}
    for name, (embeddings, labels) in sets.items():
        one, two = (of_people(embeddings[half], labels[half]) for half in halves(labels))
        judge(table, f"{name}, half 1 → 2", one, two, metadata)
        judge(table, f"{name}, half 2 → 1", two, one, metadata)
    if options.run is not None:
        lfw = load_pairs(options.data / "lfw.bin", names=options.data / "lfw_pairs.txt")
        assert lfw.people is not None
        scores = pair_scores(embedder.embed_pairs(lfw), lfw.pairs)
        people = lfw.people[lfw.pairs]
        first = lfw.folds < 5
        one, two = ((scores[half], lfw.same[half], people[half]) for half in (first, ~first))
        judge(table, "LFW, folds 1–5 → 6–10", one, two, metadata)
        judge(table, "LFW, folds 6–10 → 1–5", two, one, metadata)
        everybody = of_people(embeddings, labels)
        judge(table, "held-out people → LFW", everybody, (scores, lfw.same, people), metadata)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
