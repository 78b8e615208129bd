"""How accurate a network of one minute's training is: LFW, and people held out of training.

``speedrun.yaml`` beside this file is the configuration; faces and LFW are those of ``--data``. The
seconds are those inside training steps, as in benchmarks/speedrun.md.
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

CONFIG = Path(__file__).with_name("speedrun.yaml")
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
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
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
