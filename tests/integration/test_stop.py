"""Signals at any moment, and surroundings in which a run must go on or say what to do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from killing import SETTINGS, STEPS, Run, assert_equal, left_behind, metrics, unpack_faces, weights
from killing import words as as_words

from sphereface2.backbones import bundle
from sphereface2.data.opening import open_source
from sphereface2.data.split import split_people
from sphereface2.signals import STOPPED


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return {**SETTINGS, "data.train": unpack_faces(tmp_path_factory.mktemp("faces"))}


@pytest.fixture(scope="module")
def whole(settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = Run(folder, settings)
    assert run.wait() == [0], run.told()
    return folder


# -- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "signum",
    [
        signal.SIGHUP,
        *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGTERM)),
    ],
)
def test_a_signal_while_a_checkpoint_is_written(
    signum: signal.Signals, settings: dict[str, object], tmp_path: Path, whole: Path
) -> None:
    folder = tmp_path / "run"
    run = Run(folder, settings)
    assert run.signal_when(signum, lambda: run.steps() > 3 and run.is_writing(), 0)
    assert run.wait() == [128 + signum], run.told()
    step = json.loads((folder / "checkpoints/last/progress.json").read_text())["step"]
    assert run.told().splitlines()[-1] == (
        f"stopped at step {step}; continue with sphereface2 fit --resume {folder}"
    )
    assert step == metrics(folder)[-1]["step"] < STEPS
    assert not list(left_behind(folder)) and "Traceback" not in run.told()
    again = Run(folder, command=["--resume", folder])
    assert again.wait() == [0], again.told()
    assert_equal(weights(folder), weights(whole))
    assert metrics(folder) == metrics(whole)


def test_a_second_signal_ends_a_run_that_cannot_end_in_order(
    settings: dict[str, object], tmp_path: Path
) -> None:
    """One of two ranks stands still, so that the other waits for it in a library."""
    folder = tmp_path / "run"
    run = Run(folder, {**settings, "training.epochs": 4000}, ranks=2)
    while not (folder / "checkpoints/last").exists():
        time.sleep(0.01)
    waiting, still = (process.pid for process in run.processes)
    assert waiting is not None and still is not None
    try:
        os.kill(still, signal.SIGSTOP)
        os.kill(waiting, signal.SIGTERM)
        run.processes[0].join(1.5)
        assert run.processes[0].exitcode is None, "it did not wait for the other rank"
        began = time.monotonic()
        os.kill(waiting, signal.SIGTERM)
        run.processes[0].join(20)
        assert run.processes[0].exitcode == 128 + signal.SIGTERM
        assert time.monotonic() - began < 5
    finally:
        run.signal(signal.SIGKILL)
    assert "Traceback" not in run.told()
    short = Run(folder, {"training.epochs": metrics(folder)[-1]["epoch"] + 1})
    assert short.wait() == [0], short.told()


@pytest.mark.parametrize("command", ["fit", "study"])
def test_ctrl_c_while_processes_are_starting(
    command: str, settings: dict[str, object], tmp_path: Path
) -> None:
    data = {"train": str(settings["data.train"]), "validation_people": 2, "test_people": 2}
    study = {
        "base": {"data": data, "validation": {"pairs": []}},
        "arms": {"normface": {"settings": {"head": {"name": "normface"}}}},
        "seeds": [0, 1],
    }
    (tmp_path / "one.yaml").write_text(json.dumps(study))
    words = {
        "fit": ["fit", "--ranks", "2", *as_words(settings)],
        "study": ["study", "run", "one.yaml", "--jobs", "2", "--cells", "cells"],
    }[command]
    with subprocess.Popen(
        [sys.executable, "-m", "sphereface2", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        start_new_session=True,
    ) as process:
        children = Path(f"/proc/{process.pid}/task")
        while sum(len((one / "children").read_text().split()) for one in children.iterdir()) < 2:
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        _, told = process.communicate()
    assert (process.returncode, told) == (130, f"{STOPPED if command == 'study' else 'stopped'}\n")


# -- surroundings --------------------------------------------------------------------------------


@pytest.mark.slow
def test_standard_output_of_another_encoding(settings: dict[str, object], tmp_path: Path) -> None:
    folder = tmp_path / "läuft_走る"
    run = Run(folder, {**settings, "training.epochs": 1}, encoding="ascii", log=tmp_path / "log")
    assert run.wait() == [0], run.told()
    assert "epoch 1.00" in run.told()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_standard_output_that_is_full(settings: dict[str, object], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphereface2", "fit", *as_words(settings)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        "error: standard output cannot be written: No space left on device\n",
    )


def in_namespace(script: str, settings: dict[str, object], folder: Path) -> tuple[int, str]:
    """Exit code and errors of a script that may mount, in which "$@" is ``fit`` in ``folder``."""
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("mounting needs root")
    fit = [sys.executable, "-m", "sphereface2", "fit", "--run-folder", folder, *as_words(settings)]
    command = ["unshare", "-m", "bash", "-c", script, "bash", *map(str, fit)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.slow
def test_little_shared_memory(settings: dict[str, object], tmp_path: Path) -> None:
    workers = {**settings, "data.workers": 2, "training.epochs": 1}
    script = 'mount -t tmpfs -o size={} none /dev/shm && exec "$@"'
    status, told = in_namespace(script.format("64m"), workers, tmp_path / "enough")
    assert status == 0, told
    status, told = in_namespace(script.format("200k"), workers, tmp_path / "too little")
    assert status == 2
    assert "data.workers = 2: loader processes need 1 MB of shared memory and" in told


@pytest.mark.slow
@pytest.mark.parametrize("full", ["size=1m", "size=50m,nr_inodes=48"])
def test_a_full_disk_keeps_the_last_checkpoint(
    full: str, settings: dict[str, object], tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = (
        f'mount -t tmpfs -o {full} none {disk} || exit 99; "$@" && exit 98; '
        f'mount -o remount,size=50m,nr_inodes=1000 {disk} || exit 97; exec "$@"'
    )
    status, told = in_namespace(script, settings, disk / "run")
    assert status == 0, told
    (told,) = told.splitlines()
    assert " cannot be written: " in told and told.endswith(" is kept"), told


@pytest.mark.slow
def test_a_read_only_run_folder_is_named(settings: dict[str, object], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    script = f'mount -t tmpfs -o ro none {folder} && exec "$@"'
    status, told = in_namespace(script, settings, folder)
    assert status == 2 and str(folder) in told and "Read-only file system" in told


@pytest.mark.slow
@pytest.mark.parametrize("home", ["read-only", "missing"])
def test_a_home_that_cannot_be_written(
    home: str, settings: dict[str, object], tmp_path: Path
) -> None:
    (tmp_path / "read-only").mkdir()
    script = f'mount -t tmpfs -o ro none {tmp_path}/read-only && HOME={tmp_path}/{home} exec "$@"'
    status, told = in_namespace(script, {**settings, "training.epochs": 1}, tmp_path / "run")
    assert status == 0, told


def test_where_there_are_no_symbolic_links_training_goes_on(
    settings: dict[str, object], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run = Run(folder, settings, links=False)
    assert run.wait() == [0], run.told()
    assert (folder / "checkpoints/last").read_text() == f"step-{STEPS:08}\n"
    bundle.load(folder)


# -- bad data ------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(settings: dict[str, object], tmp_path: Path) -> Path:
    """The faces as a folder; two images of held-out people and one of another are damaged."""
    folder, source = tmp_path / "spoilt", open_source(str(settings["data.train"]))
    assert source.class_names is not None
    people = split_people(source, 2, 0)
    damaged = [*people.validation[[0, 7]], people.train[3]]
    for index in range(len(source)):
        person = folder / source.class_names[source.labels[index]]
        person.mkdir(parents=True, exist_ok=True)
        content = source.read(index)
        (person / f"{index:02}.jpg").write_bytes(content[:200] if index in damaged else content)
    return folder


@pytest.mark.parametrize(("ranks", "workers"), [(1, 1), (2, 0)])
def test_unreadable_images_count_into_one_share_over_people_ranks_and_workers(
    spoilt: Path, settings: dict[str, object], tmp_path: Path, ranks: int, workers: int
) -> None:
    settings = {**settings, "data.train": spoilt, "data.workers": workers}
    allowed = Run(tmp_path / "allowed", {**settings, "data.max_unreadable": 3 / 48}, ranks)
    assert allowed.wait() == [0] * ranks, allowed.told()
    progress = json.loads((tmp_path / "allowed/checkpoints/last/progress.json").read_text())
    assert len(progress["unreadable"]) == 3
    assert any(line["kind"] == "validation" for line in metrics(tmp_path / "allowed"))

    refused = Run(tmp_path / "refused", {**settings, "data.max_unreadable": 2.9 / 48}, ranks)
    assert refused.wait() == [2] * ranks
    (told,) = [line for line in refused.told().splitlines() if "error" in line]
    assert "3 of 48 images cannot be read" in told
    assert list((tmp_path / "refused/checkpoints").glob("step-*"))  # what was trained until then
