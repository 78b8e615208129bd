"""Planted errors in real faces, and how many of them an audit names.

    python benchmarks/audit.py SET RUN [--people 1000]

RUN is a run folder whose ``people.json`` says which people of SET its network was trained on; the
others, whom it has not seen, are audited. Their images are embedded once. In each trial errors are
planted: labels drawn anew, images added a second time (encoded anew, cropped by up to 8 % and
mirrored in turn), and people split in two. Precision and recall are of what `judge` names with the
command's defaults. Errors that the set has by nature count as false alarms.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np

from sphereface2.data.opening import open_source
from sphereface2.images import decode
from sphereface2.recognition.audit.faces import Faces
from sphereface2.recognition.audit.judge import judge
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.measures import measures

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


def trial(parts: dict[str, Any], truth: np.ndarray, share: float, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    count = len(truth) - len(parts["copy_of"])
    labels, split = plant(truth[:count], share, rng)
    labels = np.concatenate([labels, labels[parts["copy_of"]]])
    source = SimpleNamespace(labels=labels, class_names=None, name=str)
    faces = Faces(source=source, index=np.arange(len(labels)), left_out=[], **parts["columns"])
    start = time.perf_counter()
    found = judge(
        faces, wrong=0.5, move=2.0, false_pairs=0.1, steps=lambda title: lambda amount: None
    ).findings
    seconds = time.perf_counter() - start
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
    table = {}
    for kind, there in planted.items():
        hit = len(there & named[kind])
        table[kind] = {
            "planted": len(there),
            "named": len(named[kind]),
            "precision": hit / max(len(named[kind]), 1),
            "recall": hit / max(len(there), 1),
        }
    return {"share": share, "seconds": seconds, **table}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    source = open_source(given.set)
    rng = np.random.default_rng(given.seed)
    known = json.loads((given.run / "people.json").read_text())["classes"]
    strangers = rng.permutation(np.setdiff1d(source.labels, known))[: given.people]
    chosen = np.flatnonzero(np.isin(source.labels, strangers))
    images = [decode(source.read(int(i))) for i in chosen]
    truth = np.unique(source.labels[chosen], return_inverse=True)[1]
    copied = rng.permutation(len(images))[: round(COPIES * len(images))]
    images += [copy(images[i], k % 3, rng) for k, i in enumerate(copied.tolist())]
    pairs = np.stack([copied, np.arange(len(truth), len(images))], axis=1)
    start = time.perf_counter()
    embedder = FaceEmbedder.from_pretrained(given.run, device="cpu")
    rows = embedder.embed(images, aligned=True)
    print(json.dumps({"images": len(images), "embedding": time.perf_counter() - start}))
    kept = [measures(i, image, None) for i, image in enumerate(images)]
    columns = {
        name: np.array([one[name] for one in kept])
        for name in ("pixels", "sharpness", "brightness", "contrast")
    }
    columns["thumbnails"] = np.stack([np.frombuffer(one["thumbnail"], np.uint8) for one in kept])
    parts = {"columns": columns | {"rows": rows}, "pairs": pairs, "copy_of": copied}
    everybody = np.concatenate([truth, truth[copied]])
    for share in (0.0, 0.05, 0.2):
        print(json.dumps(trial(parts, everybody, share, given.seed)), flush=True)
    print(json.dumps({"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


if __name__ == "__main__":
    main()
