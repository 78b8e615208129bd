"""What version 0.1.0 wrote: a run, a model with its calibration, a table of embeddings.

``tests/assets/0.1.0.tar.xz`` holds a run on 48 drawn faces that was killed at step 20 of 48, the
model of its best checkpoint with a calibration, and the model's embeddings of the faces.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from command_line import ran

from sphereface2.data.opening import open_source

ARCHIVE = Path(__file__).parents[1] / "assets" / "0.1.0.tar.xz"


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder, which is the current one too."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "0.1.0")
    return tmp_path / "0.1.0"


def test_a_run_of_an_older_version_goes_on(old: Path) -> None:
    words = [sys.executable, "-m", "sphereface2", "fit", "--resume", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (old / "run/metrics.jsonl").open()]
    assert steps == sorted(steps) and steps[-1] == 48
    results = json.loads((old / "run/results.json").read_text())
    assert results["training"]["images"] == 48 * 12


def test_a_model_of_an_older_version_gives_the_same_embeddings(old: Path) -> None:
    done = ran("embed", "model", "faces", "--aligned", "--out", "new.parquet")
    assert done.returncode == 0, done.stderr
    tables = [pq.read_table(old / name) for name in ("table.parquet", "new.parquet")]
    before, now = (np.stack(table["embedding"].to_numpy()) for table in tables)
    np.testing.assert_allclose(now, before, atol=1e-5)
    assert tables[0]["label"].equals(tables[1]["label"])


def test_a_calibration_of_an_older_version_decides(old: Path) -> None:
    source = open_source(old / "faces")
    for index in (0, 1):
        (old / f"{index}.jpg").write_bytes(source.read(index))
        assert cv2.imread(str(old / f"{index}.jpg")) is not None
    done = ran("verify", "0.jpg", "1.jpg", "--model", "model", "--aligned", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    calibration = json.loads((old / "model/calibration.json").read_text())
    assert told["threshold"] == calibration["thresholds"][0]["threshold"]
    assert told["far"] == 0.4


def test_a_table_of_an_older_version_is_enrolled(old: Path) -> None:
    words = ["gallery", "add", "gallery", "--features", "table.parquet", "--model", "model"]
    done = ran(*words)
    assert done.returncode == 0, done.stderr
    stats = json.loads(ran("gallery", "stats", "gallery", "--json").stdout)
    assert stats["people"] == 8
