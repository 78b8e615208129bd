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
from pathlib import Path

import torch

from sphereface2.training import config as configuration
from sphereface2.training.distributed import world
from sphereface2.training.fit import build_trainer, open_inputs


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
    with tempfile.TemporaryDirectory() as folder, world(threads=arguments.threads) as place:
        inputs = open_inputs(settings, place)
        trainer = build_trainer(settings, Path(folder), place, inputs)
        trainer.network.train()
        batches = trainer.batches(0)
        side = trainer.network.preprocessing.size
        count = settings.training.batch_size // settings.training.accumulate
        pixels = torch.randn(count, 3, *side, device=place.device).contiguous(
            memory_format=trainer.memory_format
        )

        def bare() -> None:
            with torch.autocast(
                place.device.type, trainer.dtype, enabled=trainer.dtype is not None
            ):
                embeddings = trainer.network(pixels)
            embeddings.backward(torch.ones_like(embeddings))
            trainer.network.zero_grad(set_to_none=True)

        def full() -> None:
            trainer.step([next(batches)])

        def seconds(work) -> float:  # type: ignore[no-untyped-def]
            # Processor time on the CPU: a busy machine then disturbs both turns alike.
            clock = time.perf_counter if place.device.type == "cuda" else time.process_time
            start = clock()
            for _ in range(arguments.steps):
                work()
            if place.device.type == "cuda":
                torch.cuda.synchronize()
            return clock() - start

        seconds(bare), seconds(full)
        ratios, rates = [], []
        for _ in range(arguments.rounds):
            bound, measured = seconds(bare), seconds(full)
            ratios.append(bound / measured)
            rates.append((arguments.steps * count / bound, arguments.steps * count / measured))
    bound_rate = statistics.median(rate for rate, _ in rates)
    full_rate = statistics.median(rate for _, rate in rates)
    print(
        f"{arguments.config}: backbone {settings.backbone}, {inputs.num_classes:,} people, "
        f"batch {count}, {arguments.threads} thread(s), {inputs.located.kind} data"
    )
    print(f"bare forward + backward  {bound_rate:8,.0f} images/s")
    print(f"training                 {full_rate:8,.0f} images/s")
    print(f"ratio                    {statistics.median(ratios):8.3f}   (claim: >= 0.9)")


if __name__ == "__main__":
    main()
