"""Loader: images/s on one core, against what the JPEG decoder alone can do.

    python benchmarks/loader.py

The bound is the faster of OpenCV and torchvision decoding the same bytes, already in memory, and
throwing the pixels away. The loader reads them from the data set, decodes, augments, resizes and
assembles batches with labels; "cached" takes the images from memory, as with `data.cache: ram`.
Everything in one process and thread, in turn batch by batch, in CPU time, so that a busy machine
disturbs all alike; the ratio is the median over the rounds. Uses the real faces that
`sphereface2 fit` would train on, else synthetic ones.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg

from sphereface2.data import Augmentation, BatchSampler, FaceDataset, open_source, synthetic
from sphereface2.data.locate import find
from sphereface2.training.distributed import World
from sphereface2.training.loading import cache_images

SETTINGS = {
    "no augmentation, 112 px": Augmentation.none(112),
    "default augmentation, 112 px": Augmentation(112),
    "default augmentation, 64 px": Augmentation(64),
    "everything at 0.1, 112 px": Augmentation(
        112, affine=0.1, crop=0.1, low_resolution=0.1, photometric=0.1, jpeg=0.1, erase=0.1
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=None, help="a training set to read")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    with tempfile.TemporaryDirectory() as folder:
        found = find()
        train = args.data or (found.train if found else None)
        if train is None:
            print("no faces found: synthetic ones")
            train = synthetic.write(Path(folder) / "faces", people=100)
        run(train, args.images, args.batch_size, args.rounds)


def run(train: Path, images: int, batch_size: int, rounds: int) -> None:
    source = open_source(train)
    indices = np.random.default_rng(0).permutation(len(source))[:images]
    encoded = [np.frombuffer(source.read(int(i)), np.uint8) for i in indices]
    tensors = [torch.from_numpy(data.copy()) for data in encoded]
    count = len(indices) // batch_size * batch_size

    def opencv() -> Iterator[None]:
        for start in range(0, count, batch_size):
            for data in encoded[start : start + batch_size]:
                cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)
            yield

    def torchvision() -> Iterator[None]:
        for start in range(0, count, batch_size):
            for data in tensors[start : start + batch_size]:
                decode_jpeg(data, ImageReadMode.RGB)
            yield

    def loader_of(augmentation: Augmentation, cached: bool) -> DataLoader:
        dataset = FaceDataset(source, indices, augmentation=augmentation)
        if cached:
            cache_images(dataset, "ram", World(0, 1, 0, 1, torch.device("cpu")))
        sampler = BatchSampler(dataset.labels, batch_size)
        return DataLoader(dataset, sampler=sampler, batch_size=None, num_workers=0)

    decoders = {"OpenCV": opencv, "torchvision": torchvision}
    loaders = {
        f"{name}{', cached' if cached else ''}": loader_of(augmentation, cached)
        for name, augmentation in SETTINGS.items()
        for cached in (False, True)
    }
    ratios: dict[str, list[float]] = {name: [] for name in loaders}
    rates: dict[str, list[float]] = {name: [] for name in (*decoders, *loaders)}
    for round_number in range(rounds + 1):
        # Batch by batch in turn: what else runs here then slows all alike.
        running = {name: iter(work()) for name, work in decoders.items()}
        running |= {name: iter(loader) for name, loader in loaders.items()}
        seconds = dict.fromkeys(running, 0.0)
        for _ in range(count // batch_size):
            for name, batches in running.items():
                started = time.process_time()
                next(batches)
                seconds[name] += time.process_time() - started
        if round_number == 0:  # warm-up
            continue
        bound = min(seconds[name] for name in decoders)
        for name in loaders:
            ratios[name].append(bound / seconds[name])
        for name, value in seconds.items():
            rates[name].append(count / value)

    print(f"{count:,} images of {train}, batches of {batch_size}, one thread, images/CPU-second")
    for name in decoders:
        print(f"  {name + ' decoding alone':46}{statistics.median(rates[name]):8,.0f}")
    for name in loaders:
        middle = statistics.median(ratios[name])
        spread = f"{min(ratios[name]):.2f} to {max(ratios[name]):.2f}"
        print(
            f"  loader, {name:38}{statistics.median(rates[name]):8,.0f}"
            f"   {middle:.2f} of the bound ({spread})"
        )


if __name__ == "__main__":
    main()
