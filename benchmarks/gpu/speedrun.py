"""How accurate a network of one minute's training is, and one of five: LFW, and held-out people.

``speedrun.yaml`` beside this file is the configuration; faces and LFW are those of ``--data``. The
number of epochs is what this machine does in the time, measured first. The seconds are those inside
training steps, as in benchmarks/speedrun.md. A training that takes longer than planned is stopped
and evaluated as it stands, so that each part ends with a result.
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
from typing import Any

from gpu.backbones import faces
from gpu.measure import Part
from sphereface2.training import config as configuration
from sphereface2.training.distributed import world
from sphereface2.training.inputs import open_inputs
from training import throughput

CONFIG = Path(__file__).with_name("speedrun.yaml")
CELLS = {"minute": 58.0, "five minutes": 290.0}
"""Seconds of training to plan for."""
START, END = 12.0, 25.0
"""Seconds of a run before its first step, and after its last one: validation and the report."""
STEADY = 0.95
"""Share of the measured rate to count on: the first steps of a run are slower."""
WORTH = 30.0
"""Seconds of training that make a second cell."""
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
        settings: dict[str, object] = {
            "training.device": part.device.type,
            "training.cuda_graph": part.device.type == "cuda",
            "data.cache": "device",
            **(TINY if part.tiny else {}),
        }
        if part.data is None and not part.tiny:
            settings["data.validation_people"] = 50
        rate: float | None = None
        for cell, seconds in CELLS.items():
            seconds = min(seconds, part.left - START - END)
            if part.rows and (part.tiny or seconds < WORTH):
                break
            with part.measuring(cell=cell, faces="given" if part.data else "synthetic") as row:
                if rate is None and not part.tiny:
                    rate = epochs_a_second(settings, data)
                    seconds = min(seconds, part.left - START - END)
                if rate is not None:
                    settings["training.epochs"] = round(max(seconds, 5) * rate * STEADY, 2)
                row |= train(part, data, Path(folder) / cell, settings)
                rate = row["epochs"] / row["training seconds"]


def options(settings: dict[str, object]) -> list[str]:
    """Settings as words of a command line."""
    return [str(word) for key, value in settings.items() for word in (f"--{key}", value)]


def epochs_a_second(overrides: dict[str, object], data: Path) -> float:
    """How fast this machine trains."""
    settings = configuration.load(CONFIG, options(overrides))
    settings.data.train = str(data)
    settings.validation.pairs = []
    with world(settings.training.device) as place:
        images = len(open_inputs(settings, place).train_indices)
        return throughput(settings, place, steps=60, rounds=1).full / images


def train(part: Part, data: Path, folder: Path, settings: dict[str, object]) -> dict[str, Any]:
    """Run ``sphereface2 fit`` and read its results."""
    started = time.monotonic()
    words = ["--config", str(CONFIG), "--output", str(folder), *options(settings)]
    stopped = not fit(words, data, part.left - START - END)
    if stopped:
        runs = [*folder.glob("*/checkpoints/last")]
        if not runs:
            raise RuntimeError(f"no step was done in the {part.seconds:.0f} s of this part")
        run = runs[0].parents[1]
        done = json.loads((runs[0] / "progress.json").read_text())
        # One step more, the schedule's last, and what follows the last step.
        epochs = (done["step"] + 1) / done["epoch_steps"]
        fit(["--resume", str(run), "--training.epochs", str(epochs)], data, None)
    (file,) = folder.glob("*/results.json")
    results = json.loads(file.read_text())
    training = results["training"]
    row: dict[str, Any] = {
        "stopped": stopped,
        "epochs": configuration.load(file.with_name("config.yaml")).training.epochs,
        "training seconds": training["seconds"],
        "wall seconds": time.monotonic() - started,
        "images/s": training["images_per_second"],
    }
    for found in results["sets"]:
        row[f"{found['name']} accuracy"] = found["accuracy"]
        row[f"{found['name']} ±"] = found["accuracy_std"]
    for far, tar in results["held_out"]["tar"].items():
        row[f"held-out TAR@{far}"] = tar
    return row


def fit(words: list[str], data: Path, seconds: float | None) -> bool:
    """Run ``sphereface2 fit``; False if it was stopped after some seconds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sphereface2", "fit", *words],
        env={**os.environ, "SPHEREFACE2_DATA": str(data)},
        start_new_session=True,
    )
    stopped = False
    try:
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            stopped = True
            process.terminate()
            status = process.wait(15)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status and not stopped:
        raise RuntimeError(f"fit ended with status {status}")
    return not stopped
