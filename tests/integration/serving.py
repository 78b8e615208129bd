"""What the tests of the service share: a small model, pictures, a server of their own."""

from __future__ import annotations

import base64
import io
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image
from skimage.data import astronaut

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.data.synthetic import person
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.calibration import Calibration

BASE = "http://127.0.0.1:8000"
ALIGNED = {"aligned": "true"}


def make_model(folder: Path, *, calibrated: bool = True) -> Path:
    """An untrained network; its calibration is of scores drawn at random."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    network = backbones.build("sfnet4", width=0.125, input_size=64, embedding_dim=32)
    bundle.save(network, folder)
    if calibrated:
        rng = np.random.default_rng(0)
        scores = np.concatenate([rng.normal(0.1, 0.2, 2000), rng.normal(0.6, 0.2, 500)]).clip(-1, 1)
        same = np.arange(2500) >= 2000
        Calibration.fit(
            scores,
            same,
            fingerprint=bundle.fingerprint(network),
            fars=(1e-2, 1e-1),
            bootstrap=Bootstrap(10),
        ).save(folder)
    return folder


def drawn(seed: int, number: int = 0) -> bytes:
    """A drawn face, JPEG, 112×112."""
    return person(seed, number, number + 1)[number]


def photograph() -> bytes:
    """A photograph in the public domain, with one face."""
    return encoded(astronaut()[:300, 50:400])


def encoded(picture: np.ndarray | Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    """An array (H, W, 3) or a PIL image as a file's bytes."""
    file = io.BytesIO()
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    image.save(file, kind, **options)
    return file.getvalue()


def files(*images: bytes, name: str = "images") -> list[tuple[str, tuple[str, bytes, str]]]:
    return [(name, ("secret-file-name.jpg", image, "image/jpeg")) for image in images]


def base64_of(image: bytes) -> str:
    return base64.b64encode(image).decode()


def rows_of(answer: httpx.Response) -> np.ndarray:
    return np.array([one["embedding"] for one in answer.json()["embeddings"]])


@dataclass
class Server:
    """A running `sphereface2 serve`."""

    process: subprocess.Popen[str]
    url: str
    log: list[str]

    def stop(self, sig: int = signal.SIGTERM, timeout: float = 30) -> int:
        self.process.send_signal(sig)
        return self.process.wait(timeout)


@contextmanager
def serving(
    model: Path, gallery: Path, *options: str, program: Sequence[str] = ("-m", "sphereface2")
) -> Iterator[Server]:
    """Start a server on a free port; it is stopped at the end if it still runs."""
    command = [sys.executable, *program, "serve", str(model), "--gallery", str(gallery)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    log: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if found := re.search(r"running on (https?://\S+)", line):
                break
        else:
            raise AssertionError("".join(log))
        rest = process.stdout
        reader = threading.Thread(target=lambda: log.extend(rest), daemon=True)
        reader.start()
        yield Server(process, found[1], log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
