"""Open-set identification on LFW: who is this, if anybody?

    python benchmarks/identification.py runs/NAME --pairs lfw.bin --names pairs.txt

One image of everybody who has two or more in the pair list is enrolled in a gallery on SQLite.
Probes are these people's other images and all images of people who have one only, whom the gallery
does not know. Which image is enrolled is drawn anew in each split.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from sphereface2.data.opening import load_pairs
from sphereface2.evaluation.identification import Searches, rank_k, search, tpir_at_fpir
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import Enrolment, Gallery

FPIRS, RANKS = (0.01, 0.1), (1, 5, 10)


def split(people: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the pictures enrolled and of the probes."""
    counts = np.bincount(people)
    enrolled = np.array(
        [rng.choice(np.flatnonzero(people == p)) for p in np.flatnonzero(counts >= 2)]
    )
    return enrolled, np.setdiff1d(np.arange(len(people)), enrolled)


def through_gallery(
    gallery: Gallery, rows: np.ndarray, people: np.ndarray, enrolled: set[int]
) -> Searches:
    score, rank = np.empty(len(rows), np.float32), np.zeros(len(rows), np.int64)
    enrolled_probes = np.array([int(p) in enrolled for p in people])
    for i, matches in enumerate(gallery.search(rows, k=max(RANKS))):
        names = [match.person for match in matches]
        place = names.index(str(people[i])) if str(people[i]) in names else None
        rank[i] = 0 if not enrolled_probes[i] else len(enrolled) if place is None else place + 1
        score[i] = matches[place if enrolled_probes[i] and place is not None else 0].score
    return Searches(enrolled_probes, score, rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--names", type=Path, help="pairs.txt that names the people of a .bin")
    parser.add_argument("--splits", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.checkpoint is None or options.pairs is None:
        print("nothing measured: give a checkpoint and --pairs (and --names for a .bin)")
        return
    embedder = FaceEmbedder.from_pretrained(options.checkpoint)
    pairs = load_pairs(options.pairs, names=options.names)
    if pairs.people is None:
        raise SystemExit(f"{options.pairs} does not name its people: give --names")
    rows = embedder.embed(pairs.images, aligned=True)
    rng = np.random.default_rng(options.seed)
    figures = []
    for number in range(options.splits):
        enrolled, probes = split(pairs.people, rng)
        with (
            tempfile.TemporaryDirectory() as folder,
            Gallery.open(Path(folder) / "gallery.db", embedder=embedder) as gallery,
        ):
            for _ in gallery.add_many(
                Enrolment(str(pairs.people[i]), rows[i][None]) for i in enrolled
            ):
                pass
            found = through_gallery(
                gallery, rows[probes], pairs.people[probes], set(pairs.people[enrolled])
            )
        exact = search(rows[probes], pairs.people[probes], rows[enrolled], pairs.people[enrolled])
        tpirs = [rate.value for rate in tpir_at_fpir(found, FPIRS)]
        assert tpirs == [rate.value for rate in tpir_at_fpir(exact, FPIRS)], "not exact"
        ranks = [rate.value for rate in rank_k(found, RANKS)]
        assert ranks == [rate.value for rate in rank_k(exact, RANKS)], "not exact"
        figures.append([*tpirs, *ranks])
        if not number:
            print(
                f"{len(rows):,} images; {len(enrolled):,} people enrolled with one image each, "
                f"{found.enrolled.sum():,} probes of them, {(~found.enrolled).sum():,} of "
                "people not enrolled"
            )
    names = [f"TPIR at FPIR {f:.0%}" for f in FPIRS] + [f"rank {k}" for k in RANKS]
    for name, values in zip(names, np.array(figures).T, strict=True):
        print(
            f"{name:17} {100 * values.mean():5.1f} % "
            f"(standard deviation {100 * values.std():.1f} over {options.splits} splits)"
        )


if __name__ == "__main__":
    main()
