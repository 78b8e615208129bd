"""``sphereface2 data``: what a user and a script see."""

import json
import pickle
import subprocess
import sys

import cv2
import numpy as np
import pytest
from command_line import ran


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for person in ("anna", "bert"):
        (tmp_path / "faces" / person).mkdir(parents=True)
        for number in range(3):
            image = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / "faces" / person / f"{number}.png"), image)
    (tmp_path / "faces" / "anna" / "3.png").write_bytes(b"damaged")
    return tmp_path / "faces"


def test_convert_then_info(folder, tmp_path):
    words = ["data", "convert", folder, tmp_path / "rec", "--to", "recordio"]
    command = [sys.executable, "-m", "sphereface2", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert "6 images of 2 people" in done.stdout
    assert done.stderr == ""
    assert "anna/3.png" in done.stdout
    found = ran("data", "info", tmp_path / "rec", "--json")
    assert found.returncode == 0
    report = json.loads(found.stdout)
    assert [report[k] for k in ("images", "people", "unreadable", "duplicates")] == [6, 2, 0, 0]
    shown = ran("data", "info", folder)
    assert shown.returncode == 0
    assert "anna/3.png" in shown.stdout
    assert "█" in shown.stdout


def test_mistakes_are_one_sentence_and_status_2(folder, tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("code ran",))

    evil = tmp_path / "evil.bin"
    evil.write_bytes(pickle.dumps(Evil()))
    for words, message in (
        (("data", "info", evil), "evil.bin"),
        (("data", "info", tmp_path / "absent"), "does not exist"),
        (("data", "convert", folder, folder, "--to", "list"), "exists already"),
        (("data", "convert", folder, tmp_path / "x", "--to", "zip"), "choose one of"),
    ):
        done = ran(*words)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert "code ran" not in done.stdout
