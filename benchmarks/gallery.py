"""Gallery on Milvus Lite: insertion, search latency, what the approximate indexes lose.

    python benchmarks/gallery.py                                  # 10,000 pictures
    python benchmarks/gallery.py --sizes 100000 --plot curve.png  # some ten minutes
    python benchmarks/gallery.py --kills 20                       # only kill -9 while inserting

The bound is what a search cannot do without: one product of all embeddings with the probe, by
numpy, in the same process. The embeddings are drawn: groups of people who look alike, people in
them, five noisy pictures of each.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from sphereface2.evaluation.identification import Searches, tpir_at_fpir
from sphereface2.recognition.gallery import Enrolment, Gallery

EFFORTS = {"ivf": (1, 2, 4, 8, 16, 32, 64), "hnsw": (8, 16, 32, 64, 128, 256)}
PICTURES = 5
FPIR = 0.01


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return unit(rng.standard_normal(shape, np.float32))


def draw(
    rng: np.random.Generator, pictures: int, probes: int, dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gallery (n, d), probes of enrolled people and of strangers; picture i is of person i // 5.

    Two pictures of a person have a cosine of about 0.24, of two people of a group 0.12.
    """
    people = pictures // PICTURES
    groups = noise(rng, 100, dim)
    centres = unit(
        groups[rng.integers(100, size=people + probes)] + noise(rng, people + probes, dim)
    )
    gallery = np.empty((people * PICTURES, dim), np.float32)
    for i in range(PICTURES):
        gallery[i::PICTURES] = unit(centres[:people] + 1.8 * noise(rng, people, dim))
    known = unit(centres[:probes] + 1.8 * noise(rng, probes, dim))
    strangers = unit(centres[people:] + 1.8 * noise(rng, probes, dim))
    return gallery, known, strangers


def percentiles(times: list[float]) -> str:
    p50, p99 = np.percentile(times, [50, 99])
    return f"p50 {1e3 * p50:8.1f} ms  p99 {1e3 * p99:8.1f} ms"


def timed(function, queries: np.ndarray) -> list[float]:
    times = []
    for query in queries:
        start = time.perf_counter()
        function(query)
        times.append(time.perf_counter() - start)
    return times


def searches(gallery: Gallery, probes: np.ndarray, known: int, **options) -> tuple[list, Searches]:
    """Who comes first for each probe, the first `known` of which show the people 0, 1, ..."""
    best = [m[0] for m in gallery.search(probes, k=1, **options)]
    right = np.array([i < known and m.person == f"person {i}" for i, m in enumerate(best)])
    enrolled = np.arange(len(probes)) < known
    scores = np.array([m.score for m in best], np.float32)
    found = Searches(enrolled, scores, np.where(enrolled, np.where(right, 1, 2), 0))
    return [m.person for m in best], found


def measure(size: int, indexes: list[str], options: argparse.Namespace) -> dict[str, list]:
    rng = np.random.default_rng(options.seed)
    probes = min(options.probes, size // PICTURES)
    data, known, strangers = draw(rng, size, probes, options.dim)
    everyone = np.concatenate([known, strangers])
    print(f"\n{size:,} pictures of {size // PICTURES:,} people, {options.dim} numbers", flush=True)
    some = known[: options.latencies]
    bound = timed(lambda q: int(np.argmax(data @ q)), some)
    print(f"bound  numpy product        {percentiles(bound)}")
    truth = [f"person {int(np.argmax(data @ q)) // PICTURES}" for q in everyone]
    curves: dict[str, list] = {}
    for index in indexes:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "gallery"
            keep = {"fingerprint": "0" * 64, "dim": options.dim}
            start = time.perf_counter()
            with Gallery.open(place, index=index, **keep) as gallery:
                people = (
                    Enrolment(f"person {i}", data[PICTURES * i : PICTURES * (i + 1)])
                    for i in range(size // PICTURES)
                )
                for _ in gallery.add_many(people):
                    pass
                inserted = time.perf_counter() - start
            built = time.perf_counter() - start - inserted
            start = time.perf_counter()
            with Gallery.open(place, **keep) as gallery:
                opened = time.perf_counter() - start
                print(
                    f"{index:5}  inserted {size / inserted:,.0f} pictures/s, then {built:.1f} s "
                    f"for files and index; opens in {opened:.1f} s"
                )
                gallery.search(some[:1])
                took = timed(lambda q, g=gallery: g.search(q, k=1), some)
                print(
                    f"       one probe            {percentiles(took)}  "
                    f"{np.median(took) / np.median(bound):.1f} x bound"
                )
                start = time.perf_counter()
                first, found = searches(gallery, everyone, probes, exact=True)
                each = (time.perf_counter() - start) / len(everyone)
                start = time.perf_counter()
                np.argmax(everyone @ data.T, axis=1)
                all_at_once = (time.perf_counter() - start) / len(everyone)
                recall = np.mean([a == b for a, b in zip(first, truth, strict=True)])
                exact = tpir_at_fpir(found, [FPIR])[0].value
                print(
                    f"       exact, {len(everyone)} at once   {1e3 * each:.2f} ms each, "
                    f"{each / all_at_once:.1f} x bound; recall@1 {recall:.4f}; "
                    f"TPIR@FPIR {FPIR:.0%} {exact:.4f}"
                )
                for effort in EFFORTS.get(index, ()):
                    took = timed(
                        lambda q, g=gallery, e=effort: g.search(q, k=1, effort=e), some[:30]
                    )
                    first, found = searches(gallery, everyone, probes, effort=effort)
                    recall = np.mean([a == b for a, b in zip(first, truth, strict=True)])
                    tpir = tpir_at_fpir(found, [FPIR])[0].value
                    curves.setdefault(index, []).append((effort, recall, tpir / exact))
                    print(
                        f"       effort {effort:4}  recall@1 {recall:.4f}  TPIR@FPIR {FPIR:.0%} "
                        f"{tpir:.4f} ({tpir / exact:.4f} of exact)  "
                        f"p50 {1e3 * np.median(took):.1f} ms",
                        flush=True,
                    )
    return curves


def plot(curves: dict[str, list], size: int, path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, (index, points) in zip(axes, curves.items(), strict=False):
        effort, recall, tpir = zip(*points, strict=True)
        axis.plot(effort, recall, "o-", label="recall@1 of exact search")
        axis.plot(effort, tpir, "s--", label=f"TPIR at FPIR {FPIR:.0%} / exact")
        axis.set(xscale="log", title=f"{index}, {size:,} pictures")
        axis.set_xlabel({"ivf": "cells looked into, of 256", "hnsw": "candidates"}[index])
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def kills(count: int, seed: int) -> None:
    """Kill a process that enrols people `count` times; see what the next one finds."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "integration"))
    from gallery_worker import kill_and_check

    with tempfile.TemporaryDirectory() as folder:
        for outcome in kill_and_check(Path(folder) / "gallery", count, seed):
            print(outcome, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000])
    parser.add_argument("--indexes", nargs="+", default=["flat", "ivf", "hnsw"])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--probes", type=int, default=1000, help="of people enrolled, and others")
    parser.add_argument("--latencies", type=int, default=100, help="searches timed one by one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="PNG of recall and TPIR of the largest size")
    parser.add_argument("--kills", type=int, default=0)
    options = parser.parse_args()
    if options.kills:
        kills(options.kills, options.seed)
        return
    print(f"numpy on {os.cpu_count()} cores")
    for size in options.sizes:
        curves = measure(size, options.indexes, options)
    if options.plot and curves:
        plot(curves, options.sizes[-1], options.plot)


if __name__ == "__main__":
    main()
