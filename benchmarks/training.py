"""Training against its bound: the bare backbone's forward and backward pass on tensors in memory.

Claim: `fit` trains at no less than 0.9 of the bound, with decoding, augmentation, the head over all
people, the optimiser and the log included. Both are measured in turns, in one process, on the same
batch size, precision and memory format; the figure is the median ratio of neighbouring turns.

    python benchmarks/training.py [--config configs/small.yaml] [--threads 1] [--rounds 7]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from sphereface2.training import config as configuration
from sphereface2.training.config import RunConfig
from sphereface2.training.distributed import World, world
from sphereface2.training.fit import build_trainer, open_inputs


class Throughput(NamedTuple):
    """Medians of images a second.

    Attributes:
        bare: of the network's forward and backward pass.
        full: of training.
        ratio: median of full / bare.
        warm_up: seconds of the first turns, in which networks are compiled.
    """

    bare: float
    full: float
    ratio: float
    warm_up: float


def throughput(settings: RunConfig, place: World, *, steps: int, rounds: int) -> Throughput:
    """How fast the bare network and training are.

    Both run in turns of ``steps`` optimiser steps, after one turn that warms up. Batches that the
    loader's processes have made ready meanwhile are used up before a turn of training is timed.
    """
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(settings, Path(folder), place, open_inputs(settings, place))
        trainer.network.train()
        batches = trainer.batches(0)
        side = trainer.network.preprocessing.size
        count = settings.training.batch_size // settings.training.accumulate
        pixels = torch.randn(count, 3, *side, device=place.device).contiguous(
            memory_format=trainer.step.memory_format
        )

        def bare() -> None:
            with torch.autocast(
                place.device.type, trainer.step.dtype, enabled=trainer.step.dtype is not None
            ):
                embeddings = trainer.step.forward(pixels)
            embeddings.backward(torch.ones_like(embeddings))
            trainer.network.zero_grad(set_to_none=True)

        def full() -> None:
            trainer.step([next(batches)])

        loader = trainer.loader
        ready = loader.num_workers * (loader.prefetch_factor or 0)

        def seconds(work: Callable[[], None]) -> float:
            # Processor time on the CPU: a busy machine then disturbs both turns alike.
            on_gpu = place.device.type == "cuda"
            clock = time.perf_counter if on_gpu else time.process_time
            if on_gpu:
                torch.cuda.synchronize()
            start = clock()
            for _ in range(steps):
                work()
            if on_gpu:
                torch.cuda.synchronize()
            return clock() - start

        def training() -> float:
            for _ in range(ready):
                full()
            return seconds(full)

        started = time.perf_counter()
        seconds(bare), seconds(full)
        warm_up = time.perf_counter() - started
        turns = [(seconds(bare), training()) for _ in range(rounds)]
    images = steps * count
    return Throughput(
        statistics.median(images / bound for bound, _ in turns),
        statistics.median(images / measured for _, measured in turns),
        statistics.median(bound / measured for bound, measured in turns),
        warm_up,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/small.yaml"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps a turn")
    parser.add_argument("--rounds", type=int, default=7)
    arguments, overrides = parser.parse_known_args()
    settings = configuration.load(arguments.config, overrides)
    settings.training.threads = arguments.threads
    settings.validation.pairs = []
    with world(threads=arguments.threads) as place:
        found = throughput(settings, place, steps=arguments.steps, rounds=arguments.rounds)
    print(
        f"{arguments.config}: backbone {settings.backbone}, "
        f"batch {settings.training.batch_size}, {arguments.threads} thread(s)"
    )
    print(f"bare forward + backward  {found.bare:8,.0f} images/s")
    print(f"training                 {found.full:8,.0f} images/s")
    print(f"ratio                    {found.ratio:8.3f}   (claim: >= 0.9)")


if __name__ == "__main__":
    main()
