"""How accurate a network of one minute's training is: LFW, and people held out of training.

``speedrun.yaml`` beside this file is the configuration; faces and LFW are those of ``--data``. Its
number of epochs is what this machine does in a minute, measured first. The seconds are those inside
training steps, as in benchmarks/speedrun.md.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu.backbones import faces
from gpu.measure import Part
from sphereface2.data import open_source
from sphereface2.training import config as configuration
from sphereface2.training.distributed import world
from training import throughput

CONFIG = Path(__file__).with_name("speedrun.yaml")
MINUTE = 57.0
"""Seconds to plan for; the first steps of a run are slower."""
OVERHEAD = 35.0
"""Seconds of a run outside its steps: starting, measuring the rate, evaluating."""
TINY = {
    "backbone.name": "sfnet4",
    "backbone.width": 0.125,
    "backbone.input_size": 32,
    "backbone.embedding_dim": 16,
    "data.validation_people": 4,
    "training.epochs": 1,
    "training.batch_size": 8,
}


def run(part: Part) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = faces(part, Path(folder))
        with part.measuring(faces="given" if part.data else "synthetic") as row:
            row |= train(part, data, Path(folder))


def options(settings: dict[str, object]) -> list[str]:
    """Settings as words of a command line."""
    return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]


def epochs_in(seconds: float, overrides: list[str], data: Path) -> float:
    """Epochs that this machine trains in some seconds."""
    settings = configuration.load(CONFIG, overrides)
    settings.data.train = str(data)
    settings.validation.pairs = []
    with world(settings.training.device) as place:
        _, rate, _ = throughput(settings, place, steps=30, rounds=1)
    return seconds * rate / len(open_source(data))


def train(part: Part, data: Path, folder: Path) -> dict[str, object]:
    """Run ``sphereface2 fit`` and read its results."""
    workers = 0 if part.tiny else max(2, (os.cpu_count() or 2) - 2)
    settings = {
        "output": folder / "runs",
        "training.device": part.device.type,
        "data.workers": workers,
        **(TINY if part.tiny else {}),
    }
    if part.data is None and not part.tiny:
        settings["data.validation_people"] = 50
    if not part.tiny:
        seconds = min(MINUTE, part.left - OVERHEAD)
        settings["training.epochs"] = round(epochs_in(seconds, options(settings), data), 1)
    words = options(settings)
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "sphereface2", "fit", "--config", str(CONFIG), *words],
        env={**os.environ, "SPHEREFACE2_DATA": str(data)},
        start_new_session=True,
    )
    try:
        status = process.wait(max(part.left, 5))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status:
        raise RuntimeError(f"fit ended with status {status}")
    (file,) = (folder / "runs").glob("*/results.json")
    results = json.loads(file.read_text())
    row: dict[str, object] = {
        "epochs": settings.get("training.epochs"),
        "training seconds": results["training"]["seconds"],
        "wall seconds": time.monotonic() - started,
        "images/s": results["training"]["images_per_second"],
    }
    for found in results["sets"]:
        row[f"{found['name']} accuracy"] = found["accuracy"]
        row[f"{found['name']} ±"] = found["accuracy_std"]
    for far, tar in results["held_out"]["tar"].items():
        row[f"held-out TAR@{far}"] = tar
    return row
