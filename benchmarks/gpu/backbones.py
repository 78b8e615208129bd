"""Training images a second, everything included, against the bare backbone; and the share of the
card's arithmetic that is used.

``full`` is the training loop: batches made of the images that ``data.cache`` keeps on the device,
augmentation and resizing included, the head over all people of the set, the optimiser. ``bare`` is
the same network's forward and backward pass over one batch; both are CUDA graphs where the row says
so. MFU counts the multiply-adds of the convolutions and linear layers, forward and twice that
backward, against the bf16 product rate that the card reached in this run.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from backbone_speed import cost
from gpu import measure
from gpu.measure import ROOT, Part
from sphereface2.data import synthetic
from sphereface2.training import config as configuration
from sphereface2.training.distributed import world
from training import throughput

NETWORKS = [
    ("iresnet100", {}, True, True),
    ("iresnet50", {}, True, True),  # of the same residual units: nothing is left to compile
    ("iresnet100", {}, True, False),
    ("sfnet20", {"batch_norm": True}, True, True),
    ("sfnet64", {"batch_norm": True}, True, True),
    ("iresnet50", {}, False, False),
    ("iresnet100", {}, False, False),
]
"""Name, options, whether compiled, whether as a CUDA graph; the fastest form first."""
BATCH = 256
SIDE = 112


def faces(part: Part, scratch: Path) -> Path:
    """The training set: the one that was carried, or synthetic faces."""
    if part.data is not None:
        return part.data
    people, images = (12, 4) if part.tiny else (500, 8)
    return synthetic.write(
        scratch / "faces", people=people, images_per_person=images, pairs_per_fold=5
    )


def run(part: Part) -> None:
    rate = measure.ceilings(part)["bf16 TFLOP/s"]
    with tempfile.TemporaryDirectory() as folder:
        data = faces(part, Path(folder))
        for name, options, compiled, graphed in NETWORKS[-2:-1] if part.tiny else NETWORKS:
            about = {"backbone": name, "compiled": compiled, "graphed": graphed}
            if part.left < 10 and not part.tiny:
                part.record(**about, error="no time was left")
                continue
            with part.measuring(**about) as row:
                training = {"compile": compiled, "cuda_graph": graphed}
                row |= one(part, data, {"name": name, **options}, training, rate)


def one(
    part: Part, data: Path, backbone: dict[str, object], training: dict[str, bool], rate: float
) -> measure.Row:
    """Images a second of one network, trained by SphereFace2's loss alone."""
    batch = 8 if part.tiny else BATCH
    backbone["input_size"] = 32 if part.tiny else SIDE
    if part.tiny:
        backbone |= {"width": 0.125, "embedding_dim": 16}
    settings = configuration.load(ROOT / "configs" / "small.yaml")
    tree = configuration.to_dict(settings)
    tree["data"] |= {"train": str(data), "validation_people": 0}
    tree["data"]["cache"] = "device"
    tree["data"]["augmentation"] = {"flip": 0.5}
    tree["backbone"] = backbone
    tree["sample_to_sample"]["weight"] = 0
    tree["training"] |= {
        **training,
        "batch_size": batch,
        "device": part.device.type,
        "optimizer": "sgd",
        "autocast": "bf16",
        "channels_last": True,
        "lr": 0.01,
    }
    tree["validation"]["pairs"] = []
    settings = configuration.from_dict(tree)
    steps, rounds = (1, 1) if part.tiny else (15, 3)
    with world(part.device.type) as place:
        found = throughput(settings, place, steps=steps, rounds=rounds)
    work = 6 * cost(**backbone)[1]
    return {
        "batch": batch,
        "bare images/s": found.bare,
        "full images/s": found.full,
        "full / bare": found.ratio,
        "MFU bare": found.bare * work / rate / 1e12,
        "MFU full": found.full * work / rate / 1e12,
        "first steps s": found.warm_up,
    }
