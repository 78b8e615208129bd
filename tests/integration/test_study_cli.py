"""A study of synthetic faces through the command line: run, run again, report."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import ran

from sphereface2.data import synthetic
from sphereface2.signals import STOPPED

COMMAND = [sys.executable, "-m", "sphereface2", "study"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are not broken, in processes of their own and in this one."""
    monkeypatch.setenv("COLUMNS", ENVIRONMENT["COLUMNS"])


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """A study in a process of its own; `ran` spares the start where that is not tried."""
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        timeout=280,
        env=ENVIRONMENT,
        check=False,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("faces") / "set"
    data = synthetic.write(folder, people=20, images_per_person=6, pairs_per_fold=6)
    return {
        "base": {
            "data": {"train": str(data), "validation_people": 4, "test_people": 6},
            "backbone": {"name": "sfnet4", "width": 0.125, "input_size": 32, "embedding_dim": 16},
            "training": {
                "epochs": 2,
                "batch_size": 16,
                "lr": 0.02,
                "device": "cpu",
                "log_every": 2,
                "log_similarities": True,
            },
            "validation": {"every": 0, "pairs": [], "fars": [0.1]},
        },
        "seeds": [0],
        "baseline": "cosface",
        "selection": {"far": 0.1},
        "pairs": [str(data / "synthetic.bin")],
        "arms": {
            "cosface": {"settings": {"head": {"name": "cosface", "s": 16, "m": 0.1}}},
            # Its steps are far too long, so its loss is no number; the others go on.
            "broken": {
                "settings": {"head": {"name": "normface"}, "training": {"lr": 1e30}},
            },
        },
    }


@pytest.fixture(scope="module")
def cells(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a study that ended has left, beside its tiny.yaml: one cell done and one failed."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    first = run("run", folder / "tiny.yaml", "--cells", folder / "cells")
    assert first.returncode == 2, first.stdout + first.stderr
    assert "1 cells failed (the others are done)" in first.stderr
    return folder / "cells"


def test_run_then_report(cells: Path, tmp_path: Path) -> None:
    study = cells.with_name("tiny.yaml")
    (done,) = cells.glob("*/cell.json")
    result = json.loads(done.read_text())
    assert result["test"]["people"] == 6
    (sets,) = cells.glob("sets/*.json")
    assert result["pairs"][0]["fingerprint"] == sets.stem
    # Six images of each of six people; the pairs' set names nobody.
    embeddings = np.load(done.with_name("test.npy"))
    assert embeddings.shape == (36, 16) and embeddings.dtype == np.float16
    names = [one["name"] for one in result["transfer"]]
    assert names == ["test", "test, low_resolution", "test, light"]
    assert result["transfer"][0]["images"] == [6] * 6
    assert [point["step"] for point in result["curve"]] == [2, 4, 6]
    assert all(0 < point["pull"] <= 16 for point in result["curve"])

    told = ran("study", "report", study, "--cells", cells, "--out", tmp_path / "out")
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == str(tmp_path / "out" / "report.md")
    text = (tmp_path / "out" / "report.md").read_text()
    accuracy = f"{100 * result['pairs'][0]['accuracy']:.2f}"
    assert f"| cosface | 1 | {accuracy} |" in text
    assert "1 of 2 done" in text and "- broken · all data · seed 0: error: " in text

    before = done.stat().st_mtime_ns
    # No time is left for the broken one.
    again = ran("study", "run", study, "--cells", cells, "--seconds", "0")
    assert again.returncode == 0 and "2 cells, 1 done before" in again.stdout
    assert done.stat().st_mtime_ns == before


def test_a_cell_is_judged_on_a_new_set_and_never_on_other_data(
    cells: Path, tmp_path: Path, tree: dict[str, Any]
) -> None:
    study, cells = tmp_path / "tiny.yaml", shutil.copytree(cells, tmp_path / "cells")
    data = Path(tree["base"]["data"]["train"])
    base = tree["base"] | {"data": tree["base"]["data"] | {"train": str(tmp_path / "moved")}}
    tree = tree | {"base": base, "arms": {"cosface": tree["arms"]["cosface"]}}

    def write(**sections: Any) -> None:
        study.write_text(yaml.safe_dump(tree | sections))

    (done,) = cells.glob("*/cell.json")
    first = json.loads(done.read_text())
    other = tmp_path / "other.bin"
    other.write_bytes((data / "synthetic.bin").read_bytes())
    write(pairs=[str(other)])
    assert "does not exist" in ran("study", "run", study, "--cells", cells).stderr
    # Where the data lie is no part of what a cell is; the place that is told now counts.
    (tmp_path / "moved").symlink_to(data)
    again = ran("study", "run", study, "--cells", cells)
    assert again.returncode == 0 and "1 cells, 0 done before" in again.stdout
    result = json.loads(done.read_text())
    assert [one["name"] for one in result["pairs"]] == ["synthetic", "other"]
    assert result["pairs"][0] == first["pairs"][0] and result["test"] == first["test"]
    assert result["training"] == first["training"]

    (tmp_path / "moved").unlink()
    synthetic.write(tmp_path / "moved", people=20, images_per_person=6, pairs_per_fold=6, seed=9)
    refused = ran("study", "run", study, "--cells", cells)
    assert refused.returncode == 2
    assert "was trained on different data than tiny uses" in refused.stderr


def test_a_terminated_study_goes_on(tmp_path: Path, tree: dict[str, Any]) -> None:
    training = tree["base"]["training"] | {"epochs": 4000, "checkpoint_every": 5}
    arms = {"cosface": tree["arms"]["cosface"]}
    study, cells = tmp_path / "long.yaml", tmp_path / "cells"
    study.write_text(
        yaml.safe_dump(tree | {"base": tree["base"] | {"training": training}, "arms": arms})
    )
    with subprocess.Popen(
        [*COMMAND, "run", study, "--cells", cells],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(cells.glob("*/checkpoints/last/model.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        refused = ran("study", "run", study, "--cells", cells)
        assert refused.returncode == 2
        assert "another study is being run" in refused.stderr
        os.killpg(process.pid, signal.SIGTERM)  # as systemd does, and a terminal with SIGINT
        _, told = process.communicate()
    assert (process.returncode, told) == (143, f"{STOPPED}\n")
    assert not list(cells.glob("*/failed.txt"))
    (cell,) = (path.parent for path in cells.glob("*/config.yaml"))
    # Its process went too: nobody trains on.
    steps = (cell / "metrics.jsonl").read_text()
    time.sleep(1)
    assert (cell / "metrics.jsonl").read_text() == steps
    # What it left is gone on with, here to an end not far off.
    step = json.loads((cell / "checkpoints/last/progress.json").read_text())["step"]
    config = yaml.safe_load((cell / "config.yaml").read_text())
    config["training"]["epochs"] = step / 3 + 3  # 60 images make three batches
    (cell / "config.yaml").write_text(yaml.safe_dump(config))
    resumed = [sys.executable, "-m", "sphereface2.study.cell", cell, *tree["pairs"]]
    subprocess.run(resumed, check=True, timeout=280, env=ENVIRONMENT)
    starts = json.loads((cell / "environment.json").read_text())["starts"]
    assert [start["step"] > 0 for start in starts] == [False, True]
    assert (cell / "cell.json").exists()


@pytest.mark.slow
def test_a_cell_whose_process_is_killed_is_run_once_more(
    tmp_path: Path, tree: dict[str, Any]
) -> None:
    training = tree["base"]["training"] | {"epochs": 40, "checkpoint_every": 5}
    arms = {"cosface": tree["arms"]["cosface"]}
    study, cells = tmp_path / "tiny.yaml", tmp_path / "cells"
    base = tree["base"] | {"training": training}
    study.write_text(yaml.safe_dump(tree | {"base": base, "arms": arms}))
    with subprocess.Popen(
        [*COMMAND, "run", study, "--cells", cells],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        deadline = time.monotonic() + 120
        while not list(cells.glob("*/checkpoints/last/model.safetensors")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (worker,) = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(worker), signal.SIGKILL)
        told, _ = process.communicate()
    assert process.returncode == 0 and "failed: " in told
    (done,) = cells.glob("*/cell.json")
    starts = json.loads((done.parent / "environment.json").read_text())["starts"]
    assert [start["step"] > 0 for start in starts] == [False, True]
