"""Training against its bound: the bare backbone's forward and backward pass on tensors in memory.

Claim: `fit` trains at no less than 0.9 of the bound, with decoding, augmentation, the head over all
people, the optimiser and the log included. All is measured in turns, in one process, on the same
batch size, precision and memory format; a figure is the median of turns, a ratio the median ratio
of neighbouring turns.

    python benchmarks/training.py [--config configs/small.yaml] [--threads 1] [--rounds 7]
    python benchmarks/training.py --and "--data.cache ram"      # other settings, side by side
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

from sphereface2.cuda_graph import Graphed
from sphereface2.training import config as configuration
from sphereface2.training.config import RunConfig
from sphereface2.training.distributed import World, world
from sphereface2.training.fit import build_trainer
from sphereface2.training.inputs import open_inputs


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


class Contender:
    """One training, a turn at a time.

    Args:
        settings: of the run.
        place: where it trains.
        folder: of the run.
        steps: optimiser steps a turn.
    """

    def __init__(self, settings: RunConfig, place: World, folder: Path, steps: int) -> None:
        self.device, self.steps = place.device, steps
        self.recorded: Callable[[], None] | None = None
        inputs = open_inputs(settings, place)
        settings = inputs.settings
        self.trainer = trainer = build_trainer(folder, place, inputs)
        trainer.network.train()
        self.batches = trainer.batches(0)
        self.count = settings.training.batch_size // settings.training.accumulate
        self.images = steps * self.count
        shape = (self.count, 3, *trainer.network.preprocessing.size)
        self.pixels = torch.randn(shape, device=place.device).contiguous(
            memory_format=trainer.step.memory_format
        )

    def bare(self) -> float:
        """Seconds of a turn of the network alone; as a CUDA graph where the training is one."""
        step = self.trainer.step

        def once() -> None:
            with torch.autocast(self.device.type, step.dtype, enabled=step.dtype is not None):
                embeddings = step.forward(self.pixels)
            embeddings.backward(torch.ones_like(embeddings))
            self.trainer.network.zero_grad(set_to_none=True)

        if self.recorded is None:
            graphed = self.trainer.config.training.cuda_graph
            self.recorded = Graphed(once, self.device, "the network") if graphed else once
        return self._seconds(self.recorded)

    def full(self) -> float:
        """Seconds of a turn of training; batches that are ready before it are used up first."""

        def once() -> None:
            self.trainer.step([next(self.batches)])

        loader = self.trainer.loader
        for _ in range(loader.num_workers * (loader.prefetch_factor or 0)):
            once()
        return self._seconds(once)

    def _seconds(self, work: Callable[[], None]) -> float:
        # Processor time on the CPU: a busy machine then disturbs both turns alike.
        on_gpu = self.device.type == "cuda"
        clock = time.perf_counter if on_gpu else time.process_time
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        for _ in range(self.steps):
            work()
        if on_gpu:
            torch.cuda.synchronize()
        return clock() - start


def throughput(settings: RunConfig, place: World, *, steps: int, rounds: int) -> Throughput:
    """How fast the bare network and training are, in turns after one turn that warms up."""
    with tempfile.TemporaryDirectory() as folder:
        one = Contender(settings, place, Path(folder), steps)
        started = time.perf_counter()
        one.bare(), one.full()
        warm_up = time.perf_counter() - started
        turns = [(one.bare(), one.full()) for _ in range(rounds)]
    return Throughput(
        statistics.median(one.images / bound for bound, _ in turns),
        statistics.median(one.images / measured for _, measured in turns),
        statistics.median(bound / measured for bound, measured in turns),
        warm_up,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/small.yaml"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="optimiser steps a turn")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--and", dest="others", action="append", default=[], metavar="SETTINGS")
    arguments, overrides = parser.parse_known_args()
    with world(threads=arguments.threads) as place, tempfile.TemporaryDirectory() as folder:
        contenders: dict[str, Contender] = {}
        for words in ("", *arguments.others):
            settings = configuration.load(arguments.config, [*overrides, *words.split()])
            settings.training.threads = arguments.threads
            settings.validation.pairs = []
            contenders[words] = Contender(settings, place, Path(folder), arguments.steps)
        first = contenders[""]
        turns = {"bare forward + backward": (first.bare, first.images)}
        for words, one in contenders.items():
            turns[f"training {words}"] = one.full, one.images
        seconds: dict[str, list[float]] = {name: [] for name in turns}  # an image
        for number in range(arguments.rounds + 1):
            for name, (turn, images) in turns.items():
                taken = turn()
                if number:  # the first round warms up
                    seconds[name].append(taken / images)
    print(f"{arguments.config}, batch {first.count}, {arguments.threads} thread(s)")
    print(f"{'':50}images/s   of bare   of the first training")
    for name, taken in seconds.items():
        to = [
            statistics.median(a / b for a, b in zip(seconds[other], taken, strict=True))
            for other in ("bare forward + backward", "training ")
        ]
        rate = statistics.median(1 / one for one in taken)
        print(f"{name:50}{rate:8,.0f}   {to[0]:7.3f}   {to[1]:7.3f}")


if __name__ == "__main__":
    main()
