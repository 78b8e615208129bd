"""A study of synthetic faces through the command line: run, run again, report."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import yaml

from sphereface2.data import synthetic


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sphereface2", "study", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        check=False,
    )


def test_run_then_report(tmp_path: Path) -> None:
    data = synthetic.write(tmp_path / "set", people=20, images_per_person=6, pairs_per_fold=6)
    tree = {
        "base": {
            "data": {"train": str(data), "validation_people": 4, "test_people": 6},
            "backbone": {"name": "sfnet4", "width": 0.125, "input_size": 32, "embedding_dim": 16},
            "training": {"epochs": 2, "batch_size": 16, "lr": 0.02, "device": "cpu"},
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
    study, cells = tmp_path / "tiny.yaml", tmp_path / "cells"
    study.write_text(yaml.safe_dump(tree))
    first = run("run", study, "--cells", cells)
    assert first.returncode == 2, first.stdout + first.stderr
    assert "1 cells failed, the others are done" in first.stderr
    (done,) = cells.glob("*/cell.json")
    result = json.loads(done.read_text())
    assert result["test"]["people"] == 6
    (sets,) = cells.glob("sets/*.json")
    assert result["pairs"][0]["fingerprint"] == sets.stem

    told = run("report", study, "--cells", cells, "--out", tmp_path / "out")
    assert told.returncode == 0, told.stderr
    assert told.stdout.strip() == str(tmp_path / "out" / "report.html")
    text = (tmp_path / "out" / "report.md").read_text()
    accuracy = f"{100 * result['pairs'][0]['accuracy']:.2f}"
    assert f"| cosface | 1 | {accuracy} |" in text
    assert "1 of 2 done" in text and "- broken · all data · seed 0: error: " in text

    before = done.stat().st_mtime_ns
    assert "2 cells, 1 done before" in run("run", study, "--cells", cells).stdout
    assert done.stat().st_mtime_ns == before
