"""A gallery outlives the death of the process that fills it, and admits one process at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pymilvus")
pytest.importorskip("milvus_lite")

sys.path.insert(0, str(Path(__file__).parent))
from gallery_worker import DIM, MODEL, kill_and_check

from sphereface2.recognition.gallery import Gallery


def test_three_kills(tmp_path: Path) -> None:
    assert len(list(kill_and_check(tmp_path / "g", 3, seed=0))) == 3


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_kills(tmp_path: Path) -> None:
    assert len(list(kill_and_check(tmp_path / "g", 20, seed=1))) == 20


def test_a_second_process_is_told_and_harms_nothing(tmp_path: Path) -> None:
    other = (
        "import sys; from sphereface2.cli import main;"
        f"sys.exit(main(['gallery', 'list', {str(tmp_path / 'g')!r}]))"
    )
    with Gallery.open(tmp_path / "g", fingerprint=MODEL, dim=DIM) as gallery:
        gallery.add("x", [1.0] * DIM)
        ran = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
        assert ran.returncode == 2 and "is open elsewhere" in ran.stderr
        assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr
        assert gallery.get("x") is not None
    ran = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
    assert ran.returncode == 0 and "x" in ran.stdout
