"""`make box` as it is written, at a tiny size, from a file in dlib's format."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from sphereface2.backbones import bundle
from sphereface2.data import synthetic
from sphereface2.embedder import Embedder

ROOT = Path(__file__).parents[2]
WIDTHS = [32] * 4 + [64] * 4 + [128] * 3 + [256] * 4


def dlib_file(path: Path) -> list[np.ndarray]:
    """Write dlib's layers with random values; the values of each, in the order of the file."""
    rng = np.random.default_rng(0)
    content, written = b"\x08net_type", []

    def tensor(name: bytes, values: np.ndarray, *sizes: int) -> None:
        nonlocal content
        written.append(values.astype("<f4"))
        numbers = b"".join(b"\x04" + n.to_bytes(4, "little") for n in (*sizes, 2, values.size))
        content += name + numbers + 3 * b"\x01\x01" + written[-1].tobytes()

    def convolution(inputs: int, outputs: int, side: int) -> None:
        fan = inputs * side * side
        tensor(b"con_4", rng.normal(0, (2 / fan) ** 0.5, outputs * fan + outputs))
        tensor(b"affine_", rng.uniform(0.5, 1.0, 2 * outputs) * ([1.0] * outputs + [0.0] * outputs))

    convolution(3, 32, 7)
    for inputs, outputs in pairwise(WIDTHS):
        convolution(inputs, outputs, 3)
        convolution(outputs, outputs, 3)
    tensor(b"fc_2", rng.normal(0, 0.1, 256 * 128), 128, 256)
    path.write_bytes(content)
    return written


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[[str], list[str]]:
    """The words of the command in `make box` that names a file or a command."""
    shown = subprocess.run(
        ["make", "-n", "box", f"BIN={Path(sys.executable).parent}", f"SPHEREFACE2_DATA={tmp_path}"]
        + [f"BOX={tmp_path / 'box'}", "VENV=/", f"--old-file={'/'}.installed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return lambda what: next(shlex.split(line) for line in shown if what in line)


@pytest.mark.slow
def test_make_box_as_it_is_written(tmp_path: Path, recipe: Callable[[str], list[str]]) -> None:
    synthetic.write(tmp_path / "celeb50k", people=125, images_per_person=4, pairs_per_fold=1)
    values = dlib_file(tmp_path / "dlib.dat")
    (tmp_path / "face_recognition_models.py").write_text(
        f"def face_recognition_model_location(): return {str(tmp_path / 'dlib.dat')!r}\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "SPHEREFACE2_DATA": str(tmp_path)}

    def run(what: str, *more: object) -> None:
        words = [*recipe(what), *map(str, more)]
        subprocess.run(words, cwd=ROOT, env=environment, check=True)

    run("dlib_network.py")
    teacher = bundle.load(tmp_path / "box" / "dlib")
    filters, (gamma, beta) = values[0], values[1].reshape(2, 32)
    weight = filters[:-32].reshape(32, 3, 7, 7) * gamma[:, None, None, None]
    np.testing.assert_allclose(teacher.stem.weight.detach(), weight, rtol=1e-6)
    mean, middle = np.array([122.782, 117.001, 104.298]), 128  # dlib's, and the preprocessing's
    expected = filters[-32:] * gamma + beta - weight.sum((2, 3)) @ (mean - middle) / 256
    np.testing.assert_allclose(teacher.stem.bias.detach(), expected, atol=1e-5)
    face = synthetic.person(0, 0, 1)
    assert Embedder(teacher).embed(face).shape == (1, 128)

    held = {"data.validation_people": 115, "data.test_people": 2, "training.device": "cpu"}
    brief = held | {"training.epochs": 1, "training.batch_size": 8}
    words = [word for key, value in brief.items() for word in (f"--{key}", value)]
    run("--config box ", *words, "--backbone.width", 0.125)
    run("mapped.py")
    run("--config box_tune", *words)
    (tmp_path / "packed").mkdir()
    run("pack.py", tmp_path / "packed")
    models = tmp_path / "packed", tmp_path / "packed" / "model.onnx"
    made = [Embedder.load(model).embed(face) for model in models]
    np.testing.assert_allclose(*made, atol=1e-3)
