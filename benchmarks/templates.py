"""IJB-C's protocol at its real size: peak memory, and the pairs' scores against two peers.

    python benchmarks/templates.py

Meta files of IJB-C's size are written to a temporary folder (469,375 images in 23,124 templates,
15,658,489 pairs, two galleries) and read back; embeddings are drawn image by image, as a network
would give them, and everything from there on is what `sphereface2 evaluate --suite ijbc` does. Peak
memory is the process's resident set, Python and PyTorch included. Then the pairs' scores alone are
timed against fetching two features a pair, and against the bare product of the same blocks.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sphereface2.data import ijb
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.templates import (
    TemplateAverager,
    evaluate_templates,
    template_pair_scores,
)
from sphereface2.evaluation.verification import pair_scores

IMAGES, PROBES, GALLERIES, GENUINE = 469_375, 19_593, (1_772, 1_759), 19_557


def write(folder: Path, pairs: int, seed: int) -> None:
    import pyarrow as pa
    from pyarrow import csv

    rng = np.random.default_rng(seed)
    people = sum(GALLERIES)
    templates = people + PROBES
    person = np.concatenate([np.arange(people), np.arange(PROBES) % people])
    (folder / "meta").mkdir()
    (folder / "loose_crop").mkdir()

    def put(name: str, columns: list[np.ndarray], header: str = "", delimiter: str = " ") -> None:
        with (folder / "meta" / name).open("ab") as file:
            file.write(header.encode())
            csv.write_csv(
                pa.table({str(i): column for i, column in enumerate(columns)}),
                file,
                csv.WriteOptions(include_header=False, delimiter=delimiter, quoting_style="none"),
            )

    names = np.array([f"{i + 1}.jpg" for i in range(IMAGES)], object)
    template = np.sort(
        np.concatenate([np.arange(templates), rng.integers(templates, size=IMAGES - templates)])
    )
    put("ijbc_face_tid_mid.txt", [names, template + 1, np.arange(IMAGES) // 3])
    points = rng.uniform(0, 200, (10, IMAGES)).round(3)
    put("ijbc_name_5pts_score.txt", [names, *points, rng.uniform(0.5, 1, IMAGES).round(6)])
    header = "TEMPLATE_ID,SUBJECT_ID\n"
    first = 0
    for name, count in (
        ("gallery_G1", GALLERIES[0]),
        ("gallery_G2", GALLERIES[1]),
        ("probe_mixed", PROBES),
    ):
        own = np.arange(first, first + count)
        put(f"ijbc_1N_{name}.csv", [own + 1, person[own]], header, ",")
        first += count
    for start in range(0, pairs, 1 << 20):
        size = min(1 << 20, pairs - start)
        probe = people + rng.integers(PROBES, size=size)
        gallery = rng.integers(people, size=size)
        if start == 0:
            probe[:GENUINE] = people + np.arange(GENUINE)
            gallery[:GENUINE] = person[probe[:GENUINE]]
        by_chance = person[gallery] == person[probe]
        by_chance[: GENUINE if start == 0 else 0] = False
        gallery[by_chance] = (gallery[by_chance] + 1) % people
        same = (person[gallery] == person[probe]).astype(np.int8)
        put("ijbc_template_pair_label.txt", [gallery + 1, probe + 1, same])


def peak() -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15_658_489)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as place:
        # In a process of its own, so that the memory it takes is not counted.
        writer = multiprocessing.get_context("spawn").Process(
            target=write, args=(Path(place), args.pairs, args.seed)
        )
        writer.start()
        writer.join()
        started = time.perf_counter()
        found = ijb.load("ijbc", place)
        assert found.pairs is not None and found.probes is not None
        print(f"reading the meta files {time.perf_counter() - started:.1f} s")
        started = time.perf_counter()
        rng = np.random.default_rng(args.seed)
        person = np.zeros(len(found.template_ids), np.int64)
        for who in (*found.galleries, found.probes):
            person[who.templates] = who.people
        directions = rng.standard_normal((int(person.max()) + 1, args.dim), np.float32)
        averager = TemplateAverager(found.template, found.media, found.scores)
        for start in range(0, len(found), 4096):
            rows = directions[person[found.template[start : start + 4096]]]
            rows += 9.0 * rng.standard_normal(rows.shape, np.float32)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            averager.add(rows)
        features = averager.features()
        print(
            f"{len(found):,} embeddings drawn, folded into {len(features):,} templates "
            f"in {time.perf_counter() - started:.1f} s"
        )
        started = time.perf_counter()
        report = evaluate_templates(features, found, bootstrap=Bootstrap(1000))
        print(f"every figure {time.perf_counter() - started:.1f} s")
        pairs = report.verification
        assert pairs is not None
        for point in pairs.tar:
            print(f"  TAR at FAR {point.at:g}: {point.value:.6f}")
        for fpir, mean in report.means("tpir").items():
            print(f"  TPIR at FPIR {fpir:g}: {mean:.6f}")
        print(", ".join(f"  rank-{k} {mean:.6f}" for k, mean in report.means("rank").items()))
        print(
            f"peak resident memory {peak():.2f} GiB for {pairs.pairs:,} pairs "
            f"({pairs.genuine:,} genuine) of {len(features):,} x {args.dim} templates"
        )

        started = time.perf_counter()
        scores = template_pair_scores(features, found.pairs)
        blocks = time.perf_counter() - started
        started = time.perf_counter()
        for start in range(0, len(features), 1024):
            features[start : start + 1024] @ features.T
        product = time.perf_counter() - started
        part = found.pairs[:: max(1, len(found.pairs) // 1_000_000)]
        started = time.perf_counter()
        fetched = pair_scores(features, part)
        fetching = (time.perf_counter() - started) * len(found.pairs) / len(part)
        worst = np.abs(fetched - scores[:: max(1, len(found.pairs) // 1_000_000)]).max()
        print(
            f"pairs' scores {blocks:.1f} s; fetching two features a pair {fetching:.1f} s "
            f"(from {len(part):,} pairs): ratio {fetching / blocks:.1f}; "
            f"the scores differ by at most {worst:.1e}"
        )
        print(f"bare product of all templates {product:.1f} s; ratio {blocks / product:.2f}")


if __name__ == "__main__":
    main()
