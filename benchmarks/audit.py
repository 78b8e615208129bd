"""Planted errors in real faces, and how many of them an audit names.

    python benchmarks/audit.py SET                       # the model in the package
    python benchmarks/audit.py SET --model RUN --people 1000
    python benchmarks/audit.py SET --trained --people 3000 --seeds 1
    python benchmarks/audit.py --drawn 1000000           # time and memory alone

By default on people of SET that the model has not seen: of a run those that are not in its
``people.json``, of the model in the package the 800 kept out of its training; with ``--seen`` on as
many that it was trained on. Their images are embedded once; with ``--trained`` no model is taken,
but in each trial a network of the scale of configs/study/losses.yaml is trained on the set with its
errors (`cleaning.train`), and audits it. In each trial errors are planted:
labels drawn anew, images added a second time (encoded anew, mirrored and cropped by up to 8 % in
turn), and people split in two. Precision and recall, of all seeds together, are of what `judge`
names with the command's defaults. Errors that the set has by nature count as false alarms.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import torch

from sphereface2.data.opening import open_source
from sphereface2.data.source import Source
from sphereface2.data.split import split_people
from sphereface2.evaluation.label_errors import alike_labels, score_labels
from sphereface2.images import decode
from sphereface2.recognition.audit.duplicates import find_duplicates
from sphereface2.recognition.audit.faces import Faces
from sphereface2.recognition.audit.judge import judge
from sphereface2.recognition.box import MODEL
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.feature_parts import SIDE, measures

COPIES, SPLIT = 0.02, 0.01


def copy(image: np.ndarray, kind: int, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[:2]
    if kind == 0:
        return cv2.imdecode(cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 40])[1], 1)
    if kind == 1:
        return np.ascontiguousarray(image[:, ::-1])
    margin = int(0.08 * height)
    y, x = rng.integers(0, margin + 1, 2)
    part = image[y : height - margin + y, x : width - margin + x]
    return cv2.resize(part, (width, height), interpolation=cv2.INTER_LINEAR)


def plant(
    labels: np.ndarray, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, dict[int, int]]:
    """Labels with errors, and the people that were split: new label -> old one."""
    result, people = labels.copy(), int(labels.max()) + 1
    chosen = rng.permutation(people)[: round(SPLIT * people)]
    split = {}
    for number, person in enumerate(chosen.tolist(), people):
        images = rng.permutation(np.flatnonzero(labels == person))
        result[images[: len(images) // 2]] = number
        split[number] = person
    wrong = rng.permutation(len(labels))[: round(share * len(labels))]
    result[wrong] = rng.integers(people, size=len(wrong))
    return result, split


def trial(
    parts: dict[str, Any],
    truth: np.ndarray,
    share: float,
    seed: int,
    rows_of: Callable[[np.ndarray], np.ndarray],
) -> dict[str, tuple[int, int, int]]:
    """Of each kind of error how many were planted, named, and both.

    ``rows_of(labels)`` embeds all images.
    """
    rng = np.random.default_rng(seed)
    count = len(truth) - len(parts["copy_of"])
    labels, split = plant(truth[:count], share, rng)
    labels = np.concatenate([labels, labels[parts["copy_of"]]])
    source = SimpleNamespace(labels=labels, class_names=None, name=str)
    index, rows = np.arange(len(labels)), rows_of(labels)
    faces = Faces(source=source, index=index, rows=rows, left_out=[], **parts["columns"])
    found = judge(
        faces, wrong=0.5, move=2.0, false_pairs=0.1, steps=lambda title: lambda amount: None
    )[0]
    person = np.array([split.get(label, label) for label in labels.tolist()])
    planted = {
        "wrong label": set(np.flatnonzero(person != truth).tolist()),
        "duplicate": {tuple(pair) for pair in parts["pairs"].tolist()},
        "same person": {(old, new) for new, old in split.items()},
    }
    named = {
        "wrong label": {f.index for f in found if f.kind == "wrong label"},
        "duplicate": {
            (min(f.index, f.other), max(f.index, f.other))
            for f in found
            if f.kind.startswith("duplicate")
        },
        "same person": {(f.index, f.other) for f in found if f.kind == "same person"},
    }
    return {k: (len(v), len(named[k]), len(v & named[k])) for k, v in planted.items()}


def drawn(images: int) -> dict[str, float]:
    """CPU seconds of an audit's steps on drawn embeddings, five a person, 2 % of them wrong."""
    rng = np.random.default_rng(0)
    truth = np.arange(images) // 5
    people = rng.standard_normal((int(truth[-1]) + 1, 144)).astype(np.float32)
    rows = np.empty((images, 144), np.float32)
    for start in range(0, images, 65536):
        part = slice(start, start + 65536)
        noise = rng.standard_normal((len(truth[part]), 144), np.float32)
        rows[part] = people[truth[part]] + 0.85 * noise
        rows[part] /= np.linalg.norm(rows[part], axis=1, keepdims=True)
    labels, wrong = truth.copy(), rng.permutation(images)[: images // 50]
    labels[wrong] = rng.integers(labels.max() + 1, size=len(wrong))
    # No two of them are alike, so all that is measured is the search for similar embeddings.
    thumbnails = rng.integers(256, size=(images, SIDE**2), dtype=np.uint8)
    pixels = np.arange(images).astype("S16")
    times = {"images": float(images), "before_mib": peak()}
    start = time.process_time()
    find_duplicates(rows, thumbnails, pixels)
    times["duplicates"] = time.process_time() - start
    start = time.process_time()
    scores = score_labels(rows, labels)
    named = np.flatnonzero(scores.wrong > 0.5)
    hit = int(np.isin(named, np.flatnonzero(labels != truth)).sum())
    times |= {"labels": time.process_time() - start, "named": len(named), "hit": hit}
    times["planted"] = int((labels != truth).sum())
    start = time.process_time()
    alike_labels(rows, labels, 1 - scores.wrong)
    return times | {"pairs of labels": time.process_time() - start, "peak_mib": peak()}


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def people_of(source: Source, model: str, seen: bool) -> np.ndarray:
    known = Path(model) / "people.json"
    if known.exists():
        trained = np.array(json.loads(known.read_text())["classes"])
        return trained if seen else np.setdiff1d(source.labels, trained)
    split = split_people(source, 400, 0, test_people=400, max_images=10)
    chosen = split.train if seen else np.concatenate([split.validation, split.test])
    return np.unique(np.asarray(source.labels)[chosen])


def embedded(images: list[np.ndarray], model: str) -> Callable[[np.ndarray], np.ndarray]:
    rows = FaceEmbedder.from_pretrained(model, device="cpu").embed(images, aligned=True)
    return lambda labels: rows


def trained(images: list[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    import cleaning

    size = (cleaning.SIDE, cleaning.SIDE)
    small = np.stack([cv2.resize(one, size, interpolation=cv2.INTER_AREA) for one in images])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pixels = cleaning.tensor(small, device)
    return lambda labels: cleaning.embed(cleaning.train(pixels, labels, 7, 0), pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", type=Path, nargs="?")
    parser.add_argument("--model", default=str(MODEL))
    parser.add_argument("--people", type=int, default=800)
    parser.add_argument("--seen", action="store_true")
    parser.add_argument("--trained", action="store_true", help="a network on each set with errors")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.05, 0.2])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--drawn", type=int)
    given = parser.parse_args()
    if given.drawn:
        print(json.dumps(drawn(given.drawn)))
        return
    if given.set is None:
        print("nothing measured: give SET, or --drawn")
        return
    source = open_source(given.set)
    rng = np.random.default_rng(0)
    seen = given.seen or given.trained
    who = rng.permutation(people_of(source, given.model, seen))[: given.people]
    chosen = np.flatnonzero(np.isin(source.labels, who))
    chosen = chosen[np.bincount(source.labels)[source.labels[chosen]] <= 10]
    images = [decode(source.read(int(i))) for i in chosen]
    truth = np.unique(np.asarray(source.labels)[chosen], return_inverse=True)[1]
    copied = rng.permutation(len(images))[: round(COPIES * len(images))]
    images += [copy(images[i], k % 3, rng) for k, i in enumerate(copied.tolist())]
    pairs = np.stack([copied, np.arange(len(truth), len(images))], axis=1)
    rows_of = trained(images) if given.trained else embedded(images, given.model)
    kept = [measures(i, image, None) for i, image in enumerate(images)]
    columns = {
        name: np.array([one[name] for one in kept])
        for name in ("pixels", "sharpness", "brightness", "contrast")
    }
    columns["thumbnails"] = np.stack([np.frombuffer(one["thumbnail"], np.uint8) for one in kept])
    parts = {"columns": columns, "pairs": pairs, "copy_of": copied}
    everybody = np.concatenate([truth, truth[copied]])
    print(json.dumps({"images": len(images), "people": int(truth.max()) + 1}), flush=True)
    for share in given.shares:
        trials = [trial(parts, everybody, share, seed, rows_of) for seed in range(given.seeds)]
        for kind in trials[0]:
            planted, named, hit = (sum(one[kind][i] for one in trials) for i in range(3))
            line = {"share": share, "kind": kind, "planted": planted, "named": named, "hit": hit}
            print(
                json.dumps(line | {"precision": hit / (named or 1), "recall": hit / (planted or 1)})
            )


if __name__ == "__main__":
    main()
