"""Small networks, whose training is bound by the host that starts its kernels: eager, and as one
CUDA graph a step, beside each other.

``full`` and ``bare`` are as in ``backbones``; ``bare`` too is a graph where the training is. Faces
are synthetic, so that nothing is waited for but the step.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from gpu import measure
from gpu.measure import Part
from sphereface2.data import synthetic
from sphereface2.training import config as configuration
from sphereface2.training.distributed import world
from training import throughput

PLAIN = {"flip": 0.5}
RICH = {"flip": 0.5, "affine": 0.6, "crop": 0.5, "low_resolution": 0.1, "photometric": 0.3}
RICH |= {"erase": 0.1}
"""As in speedrun.yaml."""
CASES = [
    ("sfnet10", 0.25, 48, 128, "sgd", PLAIN),
    ("sfnet10", 0.25, 48, 128, "muon", RICH),
    ("sfnet20", 0.5, 80, 512, "muon", RICH),
    ("sfnet20", 1.0, 80, 512, "muon", RICH),
]
"""Network, width, side, batch, optimiser, augmentation."""


def run(part: Part) -> None:
    with tempfile.TemporaryDirectory() as folder:
        people, images = (12, 4) if part.tiny else (150, 4)
        data = synthetic.write(
            Path(folder) / "faces", people=people, images_per_person=images, pairs_per_fold=5
        )
        for case in CASES[:1] if part.tiny else CASES:
            rates: dict[bool, float] = {}
            for graphed in (False, True) if part.device.type == "cuda" else (False,):
                name, width, side, batch, optimizer, augmentation = case
                with part.measuring(
                    backbone=name,
                    width=width,
                    side=side,
                    batch=batch,
                    optimizer=optimizer,
                    augmented=augmentation is RICH,
                    graphed=graphed,
                ) as row:
                    row |= one(part, data, case, graphed)
                    rates[graphed] = row["full images/s"]
                    row["× eager"] = rates[graphed] / rates.get(False, float("nan"))


def one(
    part: Part, data: Path, case: tuple[str, float, int, int, str, dict[str, float]], graphed: bool
) -> measure.Row:
    """Images a second of one network."""
    name, width, side, batch, optimizer, augmentation = case
    settings = configuration.from_dict(
        {
            "data": {
                "train": str(data),
                "validation_people": 0,
                "cache": "device",
                "augmentation": augmentation,
            },
            "backbone": {
                "name": name,
                "width": 0.125 if part.tiny else width,
                "batch_norm": True,
                "activation": "relu",
                "input_size": 32 if part.tiny else side,
                "embedding_dim": 16 if part.tiny else 128,
            },
            "training": {
                "batch_size": 8 if part.tiny else batch,
                "device": part.device.type,
                "optimizer": optimizer,
                "autocast": "bf16",
                "lr": 0.01,
                "cuda_graph": graphed,
            },
            "validation": {"pairs": []},
        }
    )
    steps, rounds = (1, 1) if part.tiny else (25, 2)
    with world(part.device.type) as place:
        found = throughput(settings, place, steps=steps, rounds=rounds)
    return {
        "bare images/s": found.bare,
        "full images/s": found.full,
        "full / bare": found.ratio,
        "ms a step": 1e3 * settings.training.batch_size / found.full,
        "first steps s": found.warm_up,
    }
