"""The wheel in an empty environment, outside the repository, where nothing else can help it."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DRAW = """
from sphereface2.data import synthetic
synthetic.write("faces", people=40, images_per_person=4, pairs_per_fold=2)
"""
SMALL = (
    "--data.train people --backbone.name sfnet4 --training.epochs 1 --training.autocast off "
    "--validation.pairs [faces/synthetic.bin]"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``venv/``, in which the wheel and what it needs are installed.

    ``$SPHEREFACE2_TEST_TORCH`` names the torch to install where PyTorch's index of CPU builds
    cannot be reached.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [str(folder / "venv" / "bin" / "python"), "-m", "pip", "install", "-q"]
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT]
    subprocess.run(wheel, check=True)
    cpu = [*pip, "torch", "--index-url", CPU_INDEX, "--retries", "0"]
    if subprocess.run(cpu, check=False).returncode:
        subprocess.run([*pip, os.environ.get("SPHEREFACE2_TEST_TORCH", "torch")], check=True)
    (built,) = folder.glob("*.whl")
    subprocess.run([*pip, built], check=True)
    return folder


def run(place: Path, *words: object) -> str:
    """A program of the environment, without anything of the tests' own."""
    program = place / "venv" / "bin" / str(words[0])
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [program, *map(str, words[1:])]
    done = subprocess.run(command, cwd=place, env=kept, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_way_of_a_newcomer_from_the_wheel(place: Path) -> None:
    assert "small" in run(
        place,
        "python",
        "-c",
        "from sphereface2.training.sections import recipes; print(*recipes())",
    )
    run(place, "python", "-c", DRAW)
    run(place, "sphereface2", "data", "info", "faces")
    run(place, "sphereface2", "data", "convert", "faces", "people", "--to", "folder")
    told = run(place, "sphereface2", "fit", "--config", "small", *SMALL.split())
    (model,) = (place / "runs").iterdir()
    run(place, "sphereface2", "evaluate", model, "--pairs", "faces/synthetic.bin")
    run(place, "sphereface2", "calibrate", model, "--all-pairs", "people", "--far", 0.2)
    lines = [line.strip() for line in told.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("sphereface2 ")]
    verify, add, serve = commands[-3:]
    assert "similarity" in run(place, *verify)
    run(place, *add)
    assert serve[1] == "serve"
    person = sorted((place / "people").iterdir())[0]
    first, second = sorted(person.iterdir())[:2]
    shown = run(place, "sphereface2", "verify", first, second, "--model", model, "--aligned")
    assert "similarity" in shown
    assert "similarity" in run(place, "sphereface2", "verify", first, second, "--aligned")
    run(place, "sphereface2", "embed", model, "faces", "--out", "features.parquet", "--aligned")
    use = ["--model", model, "--aligned"]
    run(place, "sphereface2", "gallery", "add", "g.sqlite", "--folder", "people", *use)
    found = run(place, "sphereface2", "gallery", "search", "g.sqlite", first, *use)
    assert person.name in found
