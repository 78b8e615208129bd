"""What an audit is worth: networks trained on a set with wrong labels, cleaned and as it was.

    python benchmarks/cleaning.py SET [--device cuda] [--seeds 0 1 2] [--shares 0 0.2] [--jobs 6]

At the scale of configs/study/losses.yaml: SFNet-10 of a quarter of the width, 48 × 48 pixels,
SphereFace2, 3,000 people, seven passes. In each cell (a seed and a share of wrong labels, drawn
anew at random) a network is trained on the labels as they are, *raw*. It audits its own training
set, whose wrong labels it has learned from, with `judge`'s defaults; new networks are trained on
the set *cleaned* as the report says, and with images *moved* to the label that they look like
(``--move 0.9``). With ``--table AUDIT/embeddings.parquet``, of ``data audit SET --out AUDIT``, one
more is trained on the set as that audit's model cleans it, *by table*. Of 1,000 other people, TAR
at two FARs over all pairs. A line a cell, then the means over seeds and the paired differences to
raw with their standard errors. What is done stays in ``--work`` and is not done again; processes
with different seeds may share it.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import torch

from sphereface2 import backbones
from sphereface2.data.opening import open_source
from sphereface2.data.split import split_people
from sphereface2.evaluation.all_pairs import evaluate_all_pairs
from sphereface2.files import atomic_write
from sphereface2.heads import SphereFace2
from sphereface2.images import decode
from sphereface2.recognition.audit.faces import Faces
from sphereface2.recognition.audit.findings import cleaned
from sphereface2.recognition.audit.judge import judge
from sphereface2.recognition.feature_parts import measures
from sphereface2.training.config import TrainingConfig
from sphereface2.training.optim import build_optimizers, learning_rate_factor, set_learning_rate

SIDE, FARS = 48, (1e-2, 1e-3)
#: Networks by what they are trained on: who embeds the set for the audit, and ``--move``.
CLEANED = {"cleaned": ("raw", 2.0), "moved": ("raw", 0.9), "by table": ("table", 2.0)}
MEASURES = ("pixels", "sharpness", "brightness", "contrast")


def opened(path: Path, people: int, test_people: int) -> dict[str, np.ndarray]:
    """Pixels, labels and measures of the training people's images, pixels and labels of others."""
    source = open_source(path)
    split = split_people(source, 400, 0, test_people=test_people, max_images=10)
    labels = np.asarray(source.labels)
    known = np.random.default_rng(0).permutation(np.unique(labels[split.train]))[:people]
    train = split.train[np.isin(labels[split.train], known)]

    def one(index: int) -> tuple[np.ndarray, dict[str, Any]]:
        image = decode(source.read(index))
        small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
        return small, measures(index, image, None)

    with ThreadPoolExecutor() as pool:
        found, others = list(pool.map(one, train.tolist())), list(pool.map(one, split.test))
    rows = [kept for _, kept in found]
    grey = b"".join(kept["thumbnail"] for kept in rows)
    return {
        "index": train,
        "images": np.stack([image for image, _ in found]),
        "labels": np.unique(labels[train], return_inverse=True)[1],
        "test_images": np.stack([image for image, _ in others]),
        "test_labels": np.unique(labels[split.test], return_inverse=True)[1],
        "thumbnails": np.frombuffer(grey, np.uint8).reshape(len(rows), -1),
        **{name: np.array([kept[name] for kept in rows]) for name in MEASURES},
    }


def train(images: torch.Tensor, labels: np.ndarray, epochs: float, seed: int) -> backbones.Backbone:
    """A network trained on images (N, 3, SIDE, SIDE) uint8, which lie where it is computed."""
    torch.manual_seed(seed)
    device, count = images.device, min(128, len(labels))
    network = backbones.build(
        "sfnet10", width=0.25, input_size=SIDE, embedding_dim=128, batch_norm=True
    )
    head = SphereFace2(128, int(labels.max()) + 1, r=16, m=0.2, loss_weight=10)
    network, head = network.to(device).train(), head.to(device)
    config = TrainingConfig(lr=0.2, head_lr_multiplier=10.0)
    optimizers = build_optimizers(config, network, head)
    steps, of = max(2, round(epochs * len(labels) / count)), torch.as_tensor(labels, device=device)
    order = torch.cat([torch.randperm(len(labels), device=device) for _ in range(int(epochs) + 2)])
    for step in range(steps):
        batch = order[step * count : (step + 1) * count]
        pixels = images[batch]
        mirrored = torch.rand(count, 1, 1, 1, device=device) < 0.5
        pixels = network.preprocessing(torch.where(mirrored, pixels.flip(3), pixels))
        with torch.autocast(device.type, torch.bfloat16):
            embeddings = network(pixels)
        loss = head(embeddings.float(), of[batch])
        loss.backward()
        parameters = [*network.parameters(), *head.parameters()]
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        set_learning_rate(optimizers, learning_rate_factor(config, step, steps))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return network.eval()


@torch.inference_mode()
def embed(network: backbones.Backbone, images: torch.Tensor) -> np.ndarray:
    rows = []
    for part in images.split(512):
        both = [network(network.preprocessing(some)) for some in (part, part.flip(3))]
        rows.append(torch.nn.functional.normalize(both[0] + both[1]).cpu().numpy())
    return np.concatenate(rows)


def tensor(images: np.ndarray, device: str) -> torch.Tensor:
    return torch.as_tensor(images).permute(0, 3, 1, 2).contiguous().to(device)


def rows_of(table: Path, index: np.ndarray) -> np.ndarray:
    """The embeddings of images of a set, of length 1, from the table of its audit."""
    read = pq.read_table(table, columns=["index", "embedding"])
    places = read["index"].to_numpy()
    order = np.searchsorted(places, index)
    if (places[order] != index).any():
        raise SystemExit(f"{table} lacks images that are trained on; give that of the whole set")
    flat = read["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    rows = flat.reshape(len(places), -1)[order].astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cell(given: argparse.Namespace, path: Path, seed: int, share: float) -> dict[str, Any]:
    """A seed and a share of wrong labels; its networks that are trained already are not again."""
    torch.set_num_threads(1)
    data = dict(np.load(path))
    images, others = (tensor(data[name], given.device) for name in ("images", "test_images"))
    rng = np.random.default_rng(seed)
    labels, people = data["labels"].copy(), int(data["labels"].max()) + 1
    wrong = rng.permutation(len(labels))[: round(share * len(labels))]
    labels[wrong] = (labels[wrong] + rng.integers(1, people, len(wrong))) % people
    place = path.with_suffix("") / f"{seed}-{share}-{given.epochs}"
    place.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"seed": seed, "share": share, "images": len(labels)}

    def done(name: str, some: np.ndarray, their: np.ndarray) -> None:
        file, start = place / f"{name}.json", time.perf_counter()
        if not file.exists():
            network = train(images[torch.as_tensor(some)], their, given.epochs, seed)
            found = evaluate_all_pairs(embed(network, others), data["test_labels"], FARS)
            kept = {"tar": [point.value for point in found.tar], "images": len(some)}
            kept["seconds"] = round(time.perf_counter() - start, 1)
            if name == "raw":
                np.save(place / "rows.npy", embed(network, images))
            atomic_write(file, json.dumps(kept).encode())
        result[name] = json.loads(file.read_text())

    done("raw", np.arange(len(labels)), labels)
    rows = {"raw": np.load(place / "rows.npy")}
    if given.table is not None:
        rows["table"] = rows_of(given.table, data["index"])
    source = SimpleNamespace(labels=labels, num_classes=people, class_names=None, name=str)
    columns = {name: data[name] for name in ("thumbnails", *MEASURES)}
    for name, (whose, move) in CLEANED.items():
        if whose not in rows or name not in given.ways:
            continue
        faces = Faces(source, np.arange(len(labels)), rows[whose], left_out=[], **columns)
        found = judge(
            faces, wrong=0.5, move=move, false_pairs=0.1, steps=lambda title: lambda amount: None
        )[0]
        chosen = cleaned(source, found)
        done(name, chosen.index, chosen.labels)
        named = {f.index for f in found if f.kind == "wrong label"}
        hit = len(named & set(wrong.tolist()))
        result[name] |= {
            "named": len(named),
            "precision": hit / max(len(named), 1),
            "recall": hit / max(len(wrong), 1),
        }
    return result


def told(results: list[dict[str, Any]]) -> None:
    for share in sorted({one["share"] for one in results}):
        some = [one for one in results if one["share"] == share]
        for place, far in enumerate(FARS):
            line: dict[str, Any] = {"share": share, "TAR at FAR": far, "seeds": len(some)}
            raw = np.array([one["raw"]["tar"][place] for one in some], float)
            line["raw"] = round(float(raw.mean()), 4)
            for name in (name for name in CLEANED if name in some[0]):
                values = np.array([one[name]["tar"][place] for one in some], float)
                line[name] = round(float(values.mean()), 4)
                gain = values - raw
                error = gain.std(ddof=1) / len(gain) ** 0.5 if len(gain) > 1 else np.nan
                line[f"{name} - raw"] = [round(float(gain.mean()), 4), round(float(error), 4)]
            print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", type=Path, nargs="?")
    parser.add_argument("--work", type=Path, default=Path("/tmp/cleaning"), help="what is done")
    parser.add_argument("--table", type=Path, help="embeddings.parquet of data audit SET")
    parser.add_argument("--ways", nargs="+", choices=CLEANED, default=list(CLEANED))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0, 0.2])
    parser.add_argument("--people", type=int, default=3000)
    parser.add_argument("--test-people", type=int, default=1000)
    parser.add_argument("--epochs", type=float, default=7)
    parser.add_argument("--jobs", type=int, default=6)
    given = parser.parse_args()
    if given.set is None:
        print("nothing measured: give SET")
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given.work.mkdir(parents=True, exist_ok=True)
    path = given.work / f"{given.people}-{given.test_people}.npz"
    if not path.exists():
        content = io.BytesIO()
        np.savez(content, **opened(given.set, given.people, given.test_people))
        atomic_write(path, content.getvalue())
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        waiting = [
            pool.submit(cell, given, path, seed, share)
            for seed in given.seeds
            for share in given.shares
        ]
        results = []
        for future in waiting:
            results.append(future.result())
            print(json.dumps(results[-1]), flush=True)
    told(results)


if __name__ == "__main__":
    main()
