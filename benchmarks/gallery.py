"""Gallery: enrolment, opening, search latency, and what approximate search loses.

    OMP_NUM_THREADS=1 python benchmarks/gallery.py             # 10,000 and 100,000 images, SQLite
    python benchmarks/gallery.py --sizes 1000000 --probes 200  # see --folder
    python benchmarks/gallery.py --postgresql --sizes 100000   # a server of its own, with pgvector
    python benchmarks/gallery.py --peers --sizes 100000        # FAISS, LanceDB, hnswlib

The bound is what an exact search cannot do without: one product of all embeddings with the probe,
by numpy, in the same process and in turns with what is compared, because a machine's speed changes
meanwhile. The embeddings are drawn: groups of people who look alike, people in them, five noisy
images of each.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sphereface2.evaluation.identification import Searches, tpir_at_fpir
from sphereface2.machine import cores
from sphereface2.recognition.gallery import Enrolment, Gallery

IMAGES = 5
FPIR = 0.01
MODEL = "0" * 64
CLOCK = time.thread_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
# Of a library that searches in threads of its own.
ALL_THREADS = time.process_time if CLOCK is time.thread_time else CLOCK
Clock = Callable[[], float]


def unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return unit(rng.standard_normal(shape, np.float32))


def draw(
    rng: np.random.Generator, images: int, probes: int, dim: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gallery (n, d), probes of enrolled people and of strangers; image i is of person i // 5.

    Two images of a person have a cosine of about 0.24, of two people of a group 0.12.
    """
    people = images // IMAGES
    groups = noise(rng, 100, dim)
    centres = unit(
        groups[rng.integers(100, size=people + probes)] + noise(rng, people + probes, dim)
    )
    gallery = np.empty((people * IMAGES, dim), np.float32)
    for i in range(IMAGES):
        gallery[i::IMAGES] = unit(centres[:people] + 1.8 * noise(rng, people, dim))
    known = unit(centres[:probes] + 1.8 * noise(rng, probes, dim))
    strangers = unit(centres[people:] + 1.8 * noise(rng, probes, dim))
    return gallery, known, strangers


class Data:
    """Drawn embeddings and what numpy finds in them."""

    def __init__(self, size: int, options: argparse.Namespace) -> None:
        self.probes = min(options.probes, size // IMAGES)
        rng = np.random.default_rng(options.seed)
        self.gallery, self.known, strangers = draw(rng, size, self.probes, options.dim)
        self.everyone = np.concatenate([self.known, strangers])
        self.some = self.everyone[:: max(1, len(self.everyone) // options.latencies)]
        step = max(1, 2**26 // size)
        parts = np.split(self.everyone, range(step, len(self.everyone), step))
        products = [part @ self.gallery.T for part in parts]
        self.truth = np.concatenate([product.argmax(1) for product in products]) // IMAGES
        self.exact = self.tpir(self.truth, np.concatenate([p.max(1) for p in products]))

    def people(self) -> Iterator[Enrolment]:
        for i in range(len(self.gallery) // IMAGES):
            yield Enrolment(f"person {i}", self.gallery[IMAGES * i : IMAGES * (i + 1)])

    def product(self, probe: np.ndarray) -> int:
        return int(np.argmax(self.gallery @ probe))

    def tpir(self, best: np.ndarray, scores: np.ndarray) -> float:
        """TPIR at FPIR 1 % if these people come first with these scores."""
        enrolled = np.arange(len(self.everyone)) < self.probes
        right = enrolled & (best == np.arange(len(self.everyone)))
        ranks = np.where(enrolled, np.where(right, 1, 2), 0)
        found = Searches(enrolled, scores.astype(np.float32), ranks)
        return float(tpir_at_fpir(found, [FPIR])[0].value or 0)

    def report(
        self,
        name: str,
        search: Callable[[np.ndarray], tuple[int, float]],
        clock: Clock = CLOCK,
    ) -> None:
        """Time a search of one probe in turns with the product, then searches alone.

        The ratio is of medians of this thread's CPU time where numpy has one thread, so that other
        work on the machine does not count; else, and where a server searches, of the time that
        passed. Each product drives all
        that a search needs out of the caches, as no user of the gallery does: hence the second
        figure, of searches one after the other.
        """
        search(self.some[0])
        took, bound, cpu = [], [], ([], [])
        for probe in self.some:
            for function, times, mine in ((search, took, cpu[0]), (self.product, bound, cpu[1])):
                start, begun = time.perf_counter(), clock()
                function(probe)
                mine.append(clock() - begun)
                times.append(time.perf_counter() - start)
        ratio = np.median(cpu[0]) / np.median(cpu[1])
        found, alone = [], ([], [])
        for probe in self.everyone:
            start, begun = time.perf_counter(), clock()
            found.append(search(probe))
            alone[1].append(clock() - begun)
            alone[0].append(time.perf_counter() - start)
        best = np.array([person for person, _ in found])
        tpir = self.tpir(best, np.array([score for _, score in found]))
        p50, p99 = 1e3 * np.percentile(took, [50, 99])
        product = 1e3 * np.median(bound)
        own = "in all" if clock is time.perf_counter else "CPU"
        print(
            f"  {name:28} p50 {p50:8.2f} ms  p99 {p99:8.2f} ms  product {product:7.2f} ms  "
            f"{own} {1e3 * np.median(cpu[0]):.2f} ms  "
            f"ratio {ratio:6.3f}  alone p50 {1e3 * np.median(alone[0]):.2f} ms, {own} "
            f"{1e3 * np.median(alone[1]):.2f} ms  recall@1 {np.mean(best == self.truth):.4f}  "
            f"TPIR@FPIR {FPIR:.0%} {tpir:.4f} ({100 * (tpir - self.exact):+.2f} points)",
            flush=True,
        )


def first(gallery: Gallery, **options: object) -> Callable[[np.ndarray], tuple[int, float]]:
    def search(probe: np.ndarray) -> tuple[int, float]:
        (match,) = gallery.search(probe, k=1, **options)[0]
        return int(match.person.split()[1]), match.score

    return search


def measure(address: str, data: Data, options: argparse.Namespace) -> None:
    """A gallery at an address: filled, opened again, searched, grown."""
    size, dim = data.gallery.shape
    start = time.perf_counter()
    with Gallery.open(address, fingerprint=MODEL, dim=dim, storage=options.storage) as gallery:
        if gallery.get("person 0") is None:  # else kept by `--folder`
            if not gallery.is_file:  # PostgreSQL builds an index faster than it grows one
                gallery.set_index(None)
            for _ in gallery.add_many(data.people()):
                pass
            inserted = time.perf_counter() - start
            print(f"  enrolled {size / inserted:,.0f} images/s", flush=True)
            start = time.perf_counter()
            gallery.set_index(0)
            print(f"  index built in {time.perf_counter() - start:.1f} s", flush=True)
        if not gallery.is_file:
            gallery.compact()
            with gallery._db.read() as connection:
                sizes = connection.exec_driver_sql(
                    "SELECT pg_table_size('images'), pg_relation_size('images_hnsw'), "
                    "pg_total_relation_size('people')"
                ).one()
            table, index, people = (value / size for value in sizes)
            print(f"  bytes an image: table {table:,.0f}, index {index:,.0f}, people {people:,.0f}")
    if Path(address).exists():
        print(f"  {Path(address).stat().st_size / size:,.0f} bytes an image in the file")
    start, begun = time.perf_counter(), time.process_time()
    with Gallery.open(address, create=False) as gallery:
        gallery.warm_up()
        took = time.perf_counter() - start
        print(f"  opened and read in {took:.2f} s, {time.process_time() - begun:.2f} s of CPU")
        clock = CLOCK if gallery.is_file else time.perf_counter
        data.report("exact", first(gallery, exact=True), clock)
        many = data.everyone[:100]
        took, bound = [], []
        for _ in range(3):
            start = time.perf_counter()
            gallery.search(many, k=1, exact=True)
            took.append(time.perf_counter() - start)
            start = time.perf_counter()
            (many @ data.gallery.T).argmax(1)
            bound.append(time.perf_counter() - start)
        each = 1e3 * min(took) / len(many)
        print(f"  100 probes in a call: {each:.2f} ms each, {min(took) / min(bound):.2f} x product")
        if gallery.is_file:
            gallery._search._residents[0].ivf.wait()
        data.report("index", first(gallery), clock)
        rng, times, cpu = np.random.default_rng(1), [], []
        for i in range(40):
            rows = noise(rng, IMAGES, dim)
            start, begun = time.perf_counter(), time.thread_time()
            gallery.add(f"new {i} {time.time_ns()}", rows)
            cpu.append(time.thread_time() - begun)
            times.append(time.perf_counter() - start)
        p50, p99 = 1e3 * np.percentile(times, [50, 99])
        print(
            f"  one person of five images enrolled: p50 {p50:.1f} ms  p99 {p99:.1f} ms  "
            f"CPU {1e3 * np.median(cpu):.1f} ms"
        )
        start = time.perf_counter()
        gallery.search(data.some[0])
        print(f"  the search after: {1e3 * (time.perf_counter() - start):.1f} ms", flush=True)


def peers(data: Data) -> None:
    """Others' exact and approximate searches of the same embeddings."""
    size, dim = data.gallery.shape

    def usual(search: Callable[[np.ndarray], tuple[int, float]]) -> Callable:
        def named(probe: np.ndarray) -> tuple[int, float]:
            row, score = search(probe)
            return row // IMAGES, score

        return named

    def timed(name: str, build: Callable[[], object]) -> object:
        start = time.perf_counter()
        built = build()
        print(f"  {name}: built in {time.perf_counter() - start:.1f} s", flush=True)
        return built

    import faiss
    import hnswlib
    import lancedb

    def by(index: object) -> Callable[[np.ndarray], tuple[int, float]]:
        def search(probe: np.ndarray) -> tuple[int, float]:
            scores, rows = index.search(probe[None], 1)
            return int(rows[0, 0]), float(scores[0, 0])

        return usual(search)

    flat = faiss.IndexFlatIP(dim)
    flat.add(data.gallery)
    data.report("FAISS flat", by(flat))
    with tempfile.TemporaryDirectory() as folder:
        rows = [{"id": i, "vector": row} for i, row in enumerate(data.gallery)]
        table = lancedb.connect(folder).create_table("images", rows)

        def by_lance(probe: np.ndarray, **how: int) -> tuple[int, float]:
            query = table.search(probe).metric("dot").limit(1)
            for option, value in how.items():
                query = getattr(query, option)(value)
            (row,) = query.to_list()
            return row["id"], 1 - row["_distance"]

        data.report("LanceDB exact", usual(by_lance), ALL_THREADS)
        timed(
            "LanceDB HNSW",
            lambda: table.create_index("dot", index_type="IVF_HNSW_SQ", num_partitions=1),
        )
        fine = {"ef": 256, "refine_factor": 16}
        data.report("LanceDB HNSW", usual(lambda q: by_lance(q, **fine)), ALL_THREADS)
    graph = faiss.IndexHNSWFlat(dim, 16, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction, graph.hnsw.efSearch = 128, 256
    timed("FAISS HNSW", lambda: graph.add(data.gallery))
    data.report("FAISS HNSW", by(graph))
    other = hnswlib.Index("ip", dim)
    other.init_index(size, M=16, ef_construction=128)
    timed("hnswlib", lambda: other.add_items(data.gallery))
    other.set_ef(256)

    def by_hnswlib(probe: np.ndarray) -> tuple[int, float]:
        rows, distances = other.knn_query(probe, 1, num_threads=1)
        return int(rows[0, 0]), 1 - float(distances[0, 0])

    data.report("hnswlib", usual(by_hnswlib))


def tune(data: Data) -> None:
    """How the index's settings trade time for recall."""
    import faiss

    size, dim = data.gallery.shape

    def rescoring(rows: Callable[[np.ndarray], np.ndarray]) -> Callable:
        def search(probe: np.ndarray) -> tuple[int, float]:
            found = rows(probe)
            scores = data.gallery[found] @ probe
            return int(found[scores.argmax()]) // IMAGES, float(scores.max())

        return search

    for lists, parts in itertools.product((1, 2), (dim // 4, dim // 2)):
        start = time.perf_counter()
        count = round(lists * size**0.5)
        ivf = faiss.index_factory(dim, f"IVF{count},PQ{parts}x4fs", faiss.METRIC_INNER_PRODUCT)
        ivf.train(data.gallery[:: max(1, size // (32 * count))])
        ivf.add(data.gallery)
        took = time.perf_counter() - start
        print(f"  {count} lists, {parts // 2} bytes a code: built in {took:.1f} s")
        for share, few in itertools.product((16, 8, 4), (64, 256)):
            ivf.nprobe = count // share
            search = rescoring(lambda probe, ivf=ivf, few=few: ivf.search(probe[None], few)[1][0])
            data.report(f"a {share}th of the lists, {few} rescored", search)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--probes", type=int, default=500, help="of people enrolled, and others")
    parser.add_argument("--latencies", type=int, default=100, help="searches timed one by one")
    parser.add_argument("--storage", default=None, help="float32 or float16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="keep the SQLite galleries there, and take them if they are"
    )
    parser.add_argument("--postgresql", action="store_true", help="a server instead of SQLite")
    parser.add_argument("--peers", action="store_true", help="FAISS, hnswlib and LanceDB instead")
    parser.add_argument("--tune", action="store_true", help="the index's settings instead")
    options = parser.parse_args()
    print(f"numpy on {cores()} cores")
    for size in options.sizes:
        data = Data(size, options)
        print(
            f"{size:,} images of {size // IMAGES:,} people, {options.dim} numbers; exact "
            f"TPIR@FPIR {FPIR:.0%} {data.exact:.4f}",
            flush=True,
        )
        if options.peers:
            peers(data)
        elif options.tune:
            tune(data)
        elif options.postgresql:
            sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
            from postgres import postgres

            with postgres() as server:
                measure(server.database(), data, options)
        else:
            with tempfile.TemporaryDirectory() as folder:
                place = options.folder or Path(folder)
                name = f"{size}_{data.gallery.shape[1]}_seed{options.seed}.db"
                measure(str(place / name), data, options)


if __name__ == "__main__":
    main()
