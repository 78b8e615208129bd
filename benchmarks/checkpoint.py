"""What a checkpoint costs training: the copy, not the writing.

Claim: training waits for a checkpoint at most a quarter of the time that writing it takes. Both are
measured in turns, in one process: `save` alone, after which training goes on, and `save` followed
by `wait`, as it is without the thread. The other figure is how much longer the steps take that run
while a checkpoint is written on the same cores.

    python benchmarks/checkpoint.py [--config configs/speedrun.yaml] [--people 8122] [--rounds 9]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from sphereface2.data.dataset import Batch, FaceDataset
from sphereface2.data.sampler import BatchSampler
from sphereface2.training import config as configuration
from sphereface2.training.config import RunConfig
from sphereface2.training.distributed import World, world
from sphereface2.training.trainer import Trainer


class People:
    """A source of labels alone: no image of it is read."""

    class_names = None

    def __init__(self, people: int) -> None:
        self.labels = np.repeat(np.arange(people), 2)
        self.num_classes = people

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> bytes:
        raise OSError(f"image {index} is not there")

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return str(len(self.labels))


def build(settings: RunConfig, place: World, people: int, folder: Path) -> Trainer:
    dataset = FaceDataset(People(people), augmentation=settings.data.augmentation)
    sampler = BatchSampler(dataset.labels, settings.training.batch_size)
    return Trainer(settings, folder, place, dataset, sampler, people, lambda *_: ({}, []))


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/speedrun.yaml"))
    parser.add_argument("--people", type=int, default=8122)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps beside a checkpoint")
    arguments, overrides = parser.parse_known_args()
    settings = configuration.load(arguments.config, overrides)
    settings.training.threads = arguments.threads
    with world(threads=arguments.threads) as place, tempfile.TemporaryDirectory() as folder:
        trainer = build(settings, place, arguments.people, Path(folder))
        side, count = trainer.network.preprocessing.size[0], settings.training.batch_size
        batch = Batch(
            torch.randint(256, (count, 3, side, side), dtype=torch.uint8),
            torch.randint(arguments.people, (count,)),
            [],
            torch.arange(count),
        )

        def steps() -> None:
            for _ in range(arguments.steps):
                trainer.step([batch])

        def save() -> None:
            trainer.progress.step += 1
            trainer._save(best=False)

        steps(), save(), trainer.checkpointer.wait()
        alone, copied, written, beside = [], [], [], []
        for _ in range(arguments.rounds):
            alone.append(seconds(steps))
            pause = seconds(save)
            written.append(pause + seconds(trainer.checkpointer.wait))
            copied.append(seconds(save))
            beside.append(seconds(steps))
            trainer.checkpointer.wait()
        stored = Path(folder) / "checkpoints" / "last"
        size = sum(path.stat().st_size for path in stored.rglob("*") if path.is_file())
        trainer.checkpointer.close()
    ratio = statistics.median(c / w for c, w in zip(copied, written, strict=True))
    longer = statistics.median(b - a for a, b in zip(alone, beside, strict=True))
    print(f"{arguments.config}, {arguments.people:,} people: a checkpoint of {size / 1e6:.0f} MB")
    print(f"a step                          {statistics.median(alone) / arguments.steps:7.3f} s")
    print(f"written while training waits    {statistics.median(written):7.3f} s")
    print(f"copied, then written beside it  {statistics.median(copied):7.3f} s")
    print(f"ratio                           {ratio:7.3f}     (claim: <= 0.25)")
    print(f"the steps beside it take longer {longer:7.3f} s")


if __name__ == "__main__":
    main()
