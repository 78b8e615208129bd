"""All-pairs TAR at FAR: time against the bare matrix product, and peak memory.

    python benchmarks/all_pairs.py --images 100000

The bound is the same tiles of the same product in the same threads, with nothing done to the
scores. Peak memory is the process's resident set, embeddings and Python included.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import numpy as np

from sphereface2.evaluation.all_pairs import evaluate_all_pairs
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.tiles import Tiles


def synthetic(images: int, people: int, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows around one direction a person, so that the two kinds of score overlap."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(people, size=images)
    rows = rng.standard_normal((people, dim), dtype=np.float32)[labels]
    for start in range(0, images, 8192):
        part = rows[start : start + 8192]
        part += 3.0 * rng.standard_normal(part.shape, dtype=np.float32)
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return rows, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=30_000)
    parser.add_argument("--people", type=int, default=None, help="default: images / 5")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replicates", type=int, default=0, help="of intervals over people")
    args = parser.parse_args()

    rows, labels = synthetic(args.images, args.people or args.images // 5, args.dim, args.seed)
    started = time.perf_counter()
    result = evaluate_all_pairs(
        rows,
        labels,
        block=args.block,
        workers=args.workers,
        bootstrap=Bootstrap(args.replicates, args.seed),
    )
    counted = time.perf_counter() - started
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30

    order = np.argsort(labels, kind="stable")
    tiles = Tiles(rows[order], np.sort(labels).astype(np.int32), args.block, args.workers)
    started = time.perf_counter()
    tiles._run(tiles.all, lambda i, j, scores: None)
    product = time.perf_counter() - started

    pairs = result.genuine + result.impostor
    print(f"{args.images:,} x {args.dim} embeddings, {pairs:,} pairs, {args.workers} threads")
    for tar in result.tar:
        print(f"  TAR at FAR {tar.at:g}: {tar.value:.6f} (threshold {tar.threshold:.6f})")
    print(f"all pairs {counted:.1f} s in all, {pairs / counted / 1e6:.0f} M/s")
    print(f"bare product {product:.1f} s; ratio {counted / product:.2f}")
    print(f"peak resident memory {peak:.2f} GiB")


if __name__ == "__main__":
    main()
