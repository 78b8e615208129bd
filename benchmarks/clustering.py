"""`data cluster`'s clustering beside scikit-learn's DBSCAN and chinese whispers.

    python benchmarks/clustering.py SET [--model M] [--people 400]

On people of SET that a model has not seen: by default the model in the package and the validation
and test people that were kept out of its training. For each number of people, drawn several times,
pairwise F and BCubed F at the default threshold, which is taken from the calibration, and of each
method at the best of all thresholds for it, which only the truth can tell. What is nobody's for
DBSCAN counts as people of one image. Chinese whispers (Biemann, 2006) is the iteration that dlib
clusters faces with, on the graph of similarities above the threshold, weighted by them.

    python benchmarks/clustering.py --drawn 50000               # time, memory, pairs that are found
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from scipy.sparse import coo_array

from sphereface2.data.opening import open_source
from sphereface2.data.split import split_people
from sphereface2.evaluation.clustering import cluster, compare
from sphereface2.evaluation.neighbours import Pairs, pairs_from
from sphereface2.recognition.audit.cluster import threshold_for
from sphereface2.recognition.box import MODEL
from sphereface2.recognition.face_embedder import FaceEmbedder

LIMIT, FEW = 0.45, 2000  # of drawn embeddings: the threshold, and those whose pairs are counted


def dbscan(rows: np.ndarray, threshold: float) -> np.ndarray:
    from sklearn.cluster import DBSCAN

    found = DBSCAN(eps=1 - threshold, min_samples=2, metric="cosine").fit_predict(rows)
    alone = found == -1
    found[alone] = found.max() + 1 + np.arange(alone.sum())
    return found


def chinese_whispers(rows: np.ndarray, threshold: float) -> np.ndarray:
    scores = rows @ rows.T
    a, b = np.nonzero(np.triu(scores >= threshold, 1))
    values, ends = np.tile(scores[a, b], 2), (np.append(a, b), np.append(b, a))
    graph = coo_array((values, ends), shape=scores.shape).tocsr()
    found, rng = np.arange(len(rows)), np.random.default_rng(0)
    for _ in range(20):
        before = found.copy()
        for i in rng.permutation(len(rows)):
            part = slice(graph.indptr[i], graph.indptr[i + 1])
            if part.start < part.stop:
                near, which = np.unique(found[graph.indices[part]], return_inverse=True)
                found[i] = near[np.bincount(which, graph.data[part]).argmax()]
        if (found == before).all():
            break
    return np.unique(found, return_inverse=True)[1]


METHODS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "average linkage": cluster,
    "chinese whispers": chinese_whispers,
    "DBSCAN": dbscan,
}


def trial(rows: np.ndarray, labels: np.ndarray, default: float) -> dict[str, list[float]]:
    """By method: threshold, pairwise F and BCubed F, where BCubed F is best."""
    truth = np.unique(labels, return_inverse=True)[1]
    grid = [round(0.2 + 0.025 * step, 3) for step in range(23)]
    found = {}
    for name, method in METHODS.items():
        scores = [(t, compare(method(rows, t), truth)) for t in grid]
        limit, best = max(scores, key=lambda one: one[1].bcubed_f)
        found[f"{name}, best"] = [limit, best.f, best.bcubed_f]
    ours = compare(cluster(rows, default), truth)
    return {"average linkage, default": [default, ours.f, ours.bcubed_f], **found}


def drawn(images: int) -> dict[str, float]:
    """Of embeddings like the package's model's: 144 numbers, five images a person."""
    rng = np.random.default_rng(0)
    rows = np.empty((images, 144), np.float32)
    people = rng.standard_normal((-(-images // 5), 144)).astype(np.float32)
    for start in range(0, images, 65536):
        part = np.arange(start, min(start + 65536, images))
        rows[part] = people[part // 5] + 0.85 * rng.standard_normal((len(part), 144))
        rows[part] /= np.linalg.norm(rows[part], axis=1, keepdims=True)
    got: list[int] = []
    step = -(-images // FEW)

    def counted(some: np.ndarray, limit: float, work: Pairs, **options: Any) -> None:
        def both(a: np.ndarray, b: np.ndarray, scores: np.ndarray) -> None:
            got.append(int((a % step == 0).sum()))
            work(a, b, scores)

        pairs_from(some, limit, both if len(some) == images else work, **options)  # or of clusters

    start_at, begun = time.process_time(), time.perf_counter()
    with mock.patch("sphereface2.evaluation.neighbours.pairs_from", counted):
        found = cluster(rows, LIMIT)
    seconds, wall = time.process_time() - start_at, time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "images": images,
        "clusters": int(found.max()) + 1,
        "bcubed_f": compare(found, np.arange(images) // 5).bcubed_f,
        "cpu_seconds": seconds,
        "seconds": wall,
        "embeddings_mib": rows.nbytes / (1 << 20),
        "peak_mib": peak,
        "recall of pairs": sum(got) / max(pairs_of_few(rows, step), 1),
    }


def pairs_of_few(rows: np.ndarray, step: int) -> int:
    """How many pairs of each so-manieth embedding with later ones reach the threshold."""
    count = 0
    for start in range(0, len(rows), 250 * step):
        some = np.arange(start, min(start + 250 * step, len(rows)), step)
        a, b = np.nonzero(rows[some] @ rows.T >= LIMIT)
        count += int((some[a] < b).sum())
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", type=Path, nargs="?")
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--people", type=int, nargs="+", default=[50, 100, 200, 400, 767])
    parser.add_argument("--images", type=int, default=4000, help="in all draws of a size")
    parser.add_argument("--drawn", type=int)
    given = parser.parse_args()
    if given.drawn:
        print(json.dumps(drawn(given.drawn)))
        return
    if given.set is None:
        print("nothing measured: give SET, or --drawn")
        return
    source = open_source(given.set)
    split = split_people(source, 400, 0, test_people=400, max_images=10)
    chosen = np.sort(np.concatenate([split.validation, split.test]))
    labels = np.asarray(source.labels)[chosen]
    embedder = FaceEmbedder.from_pretrained(given.model, device="cpu")
    rows = embedder.embed((source.read(int(i)) for i in chosen), aligned=True)
    everybody, rng = np.unique(labels), np.random.default_rng(0)
    for people in given.people:
        trials: list[dict[str, list[float]]] = []
        while sum(one["images"][0] for one in trials) < given.images and len(trials) < 8:
            who = rng.choice(everybody, min(people, len(everybody)), replace=False)
            some = np.isin(labels, who)
            default = threshold_for(embedder.calibration, int(some.sum()))
            one = trial(rows[some], labels[some], default)
            trials.append({"images": [float(some.sum())], **one})
            if people >= len(everybody):
                break
        means = {name: np.mean([t[name] for t in trials], axis=0).round(4) for name in trials[0]}
        told = {name: values.tolist() for name, values in means.items()}
        print(json.dumps({"people": people, "draws": len(trials), **told}), flush=True)


if __name__ == "__main__":
    main()
