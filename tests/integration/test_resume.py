"""What is damaged is named; what changes at a resumption takes effect or is refused.

``make test`` tries one of each kind, ``make test-slow`` the variants too.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from killing import SETTINGS, STEPS, Run, assert_equal, metrics, unpack_faces, weights

from sphereface2.backbones import bundle


def variant(*values: object) -> Any:
    """One more of a kind of which ``make test`` has a member."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack_faces(tmp_path_factory.mktemp("faces"))


@pytest.fixture(scope="module")
def whole(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing has happened to."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run = Run(folder, {**SETTINGS, "data.train": faces})
    assert run.wait() == [0], run.told()
    return folder


@pytest.fixture(scope="module")
def cut(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped by SIGTERM in the middle."""
    folder = tmp_path_factory.mktemp("cut") / "run"
    run = Run(folder, {**SETTINGS, "data.train": faces})
    assert run.signal_when(signal.SIGTERM, lambda: run.steps() >= STEPS // 2, 0)
    assert run.wait() == [128 + signal.SIGTERM], run.told()
    step = metrics(folder)[-1]["step"]
    assert run.told().splitlines()[-1] == (
        f"stopped at step {step}; continue with sphereface2 fit --resume {folder}"
    )
    assert json.loads((folder / "checkpoints/last/progress.json").read_text())["step"] == step
    return folder


@pytest.fixture
def folder(cut: Path, tmp_path: Path) -> Path:
    """A copy of the run that was cut."""
    shutil.copytree(cut, tmp_path / "run", symlinks=True)
    return tmp_path / "run"


def resume(folder: Path, ranks: int = 1, **settings: object) -> tuple[int | None, str]:
    """Exit code and the last line of ``fit --resume``."""
    options = {key.replace("__", "."): value for key, value in settings.items()}
    run = Run(folder, options, ranks, command=["--resume", folder])
    codes = run.wait()
    told = run.told()
    assert "Traceback" not in told, told
    return codes[0], (told.splitlines() or [""])[-1]


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def last(folder: Path) -> Path:
    return (folder / "checkpoints/last").resolve()


def test_stopped_and_resumed_it_ends_as_if_nothing_had_happened(folder: Path, whole: Path) -> None:
    # In the precision it began with, whichever is the faster one on the machine where it goes on.
    assert resume(folder, training__autocast="auto")[0] == 0
    assert_equal(weights(folder), weights(whole))
    assert metrics(folder) == metrics(whole)


# -- damage --------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _forget(path: Path) -> None:
    manifest = json.loads(path.read_text())
    del manifest["files"]["progress.json"]
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("state/__0_0.distcp", _flip),
        ("state/__0_0.distcp", _cut),
        ("state/__0_0.distcp", Path.unlink),
        ("progress.json", _cut),
        variant("progress.json", _flip),
        variant("progress.json", Path.unlink),
        ("run.json", _flip),
        variant("run.json", _cut),
        variant("run.json", Path.unlink),
        ("manifest.json", _flip),
        ("manifest.json", Path.unlink),
        variant("manifest.json", _cut),
        variant("manifest.json", _forget),
    ],
)
def test_a_damaged_checkpoint_is_named_with_the_one_before(
    name: str, damage: Callable[[Path], None], folder: Path, whole: Path
) -> None:
    damage(last(folder) / name)
    before = checkpoints(folder)[-2]
    status, told = resume(folder)
    assert status == 2
    assert f"{folder}/checkpoints/{last(folder).name} is damaged: " in told
    if name != "manifest.json" or damage is Path.unlink:
        assert f"damaged: {name} " in told
    assert told.endswith(f"{before.name} is whole: go on from it with --resume {before}")
    if name == "run.json" and damage is _flip:  # one way to go on is enough
        run = Run(folder, command=["--resume", before])
        assert run.wait() == [0], run.told()
        assert_equal(weights(folder), weights(whole))
        assert metrics(folder) == metrics(whole)


def test_a_restarted_job_goes_on_from_the_one_before_by_itself(folder: Path, whole: Path) -> None:
    damaged = last(folder)
    _cut(damaged / "state/__0_0.distcp")
    run = Run(folder)
    assert run.wait() == [0], run.told()
    assert f"{damaged.name} is damaged: state/__0_0.distcp has" in run.told()
    assert (folder / "checkpoints" / f"set-aside-{damaged.name}").is_dir()
    assert_equal(weights(folder), weights(whole))


def test_nothing_is_begun_anew_where_checkpoints_are_damaged(folder: Path) -> None:
    for path in checkpoints(folder):
        _cut(path / "state/.metadata")
    run = Run(folder)
    assert run.wait() == [2]
    assert "holds no checkpoint that is whole" in run.told()
    assert checkpoints(folder) and metrics(folder)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("environment.json", _cut),
        variant("environment.json", Path.unlink),
        ("metrics.jsonl", _cut),
        variant("metrics.jsonl", Path.unlink),
        ("people.json", Path.unlink),
        variant("people.json", _cut),
    ],
)
def test_records_beside_the_checkpoints_may_be_damaged(
    name: str, damage: Callable[[Path], None], folder: Path, whole: Path
) -> None:
    damage(folder / name)
    assert resume(folder)[0] == 0
    assert_equal(weights(folder), weights(whole))
    assert json.loads((folder / "environment.json").read_text())["starts"]


@pytest.mark.parametrize("content", ["", "name: x\n", "people: [1]\n", None])
def test_a_configuration_that_is_not_the_runs_is_refused(folder: Path, content: str | None) -> None:
    if content is None:
        (folder / "config.yaml").unlink()
    else:
        (folder / "config.yaml").write_text(content)
    status, told = resume(folder)
    assert status == 2
    assert f"{folder}/config.yaml" in told


# -- copies --------------------------------------------------------------------------------------


def test_a_lost_link_is_found_again(folder: Path, whole: Path) -> None:
    (folder / "checkpoints/last").unlink()
    (folder / "checkpoints/best").unlink()
    bundle.load(folder)
    run = Run(folder)  # as a scheduler starts it again
    assert run.wait() == [0], run.told()
    assert_equal(weights(folder), weights(whole))
    assert_equal(weights(folder, "best"), weights(whole, "best"))
    assert metrics(folder) == metrics(whole)


def test_a_dangling_link_is_found_again(folder: Path, whole: Path) -> None:
    (folder / "checkpoints/last").unlink()
    (folder / "checkpoints/last").symlink_to("step-99999999")
    assert resume(folder)[0] == 0
    assert_equal(weights(folder), weights(whole))


def test_a_copy_that_followed_the_links_goes_on(folder: Path, tmp_path: Path, whole: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied, symlinks=False)
    assert (copied / "checkpoints/last").is_dir() and not (copied / "checkpoints/last").is_symlink()
    assert resume(copied)[0] == 0
    assert_equal(weights(copied), weights(whole))
    assert {path.name for path in checkpoints(copied)} == {p.name for p in checkpoints(whole)}


def test_links_may_be_text_files(folder: Path, whole: Path) -> None:
    for name in ("last", "best"):
        link = folder / "checkpoints" / name
        target = link.resolve().name
        link.unlink()
        link.write_text(f"{target}\n")
    bundle.load(folder)
    assert resume(folder)[0] == 0
    assert_equal(weights(folder), weights(whole))


def test_an_older_checkpoint_is_gone_on_from_and_newer_ones_are_not_trusted(
    folder: Path, whole: Path
) -> None:
    older, newer = checkpoints(folder)[-2:]
    link = folder / "checkpoints/last"
    link.unlink()
    link.symlink_to(older.name)
    (newer / "progress.json").write_text("{}")  # would be taken up if it were trusted
    assert resume(folder)[0] == 0
    assert_equal(weights(folder), weights(whole))
    assert metrics(folder) == metrics(whole)
    assert (folder / "checkpoints" / f"set-aside-{newer.name}").is_dir()


def test_a_checkpoint_that_is_named_must_be_there(folder: Path) -> None:
    run = Run(folder, command=["--resume", folder / "checkpoints/step-9"])
    assert run.wait() == [2]
    there = ", ".join(path.name for path in checkpoints(folder))
    assert run.told() == (
        f"error: {folder}/checkpoints/step-9 does not exist; the run has {there}\n"
    )


# -- one owner -----------------------------------------------------------------------------------


def test_two_processes_cannot_train_in_one_folder(faces: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = {**SETTINGS, "data.train": faces, "training.epochs": 4000, "data.workers": 1}
    first = Run(folder, settings)
    while first.steps() < 2:
        time.sleep(0.01)
    second = Run(folder, settings, command=["--run-folder", folder])
    assert second.wait() == [2]
    (process,) = first.processes
    assert f"{folder} is in use by process {process.pid} on {os.uname().nodename}" in second.told()
    os.kill(process.pid, signal.SIGKILL)  # its loader process may live a little longer
    third = Run(folder, {"training.epochs": 5})
    status = third.wait()
    first.signal(signal.SIGKILL)
    assert status in ([0], [2]), third.told()
    assert "in use" not in third.told().splitlines()[-1]


# -- changed settings ----------------------------------------------------------------------------


def test_the_optimisers_settings_take_effect(folder: Path, whole: Path) -> None:
    changes = {"training__lr": 0.01, "training__weight_decay": 0.1, "training__momentum": 0.5}
    start = json.loads((folder / "checkpoints/last/progress.json").read_text())["step"]
    assert resume(folder, **changes)[0] == 0
    before, after = (
        {line["step"]: line["lr"] for line in metrics(run) if line["kind"] == "train"}
        for run in (whole, folder)
    )
    assert after[start] == before[start]
    assert after[start + 1] == pytest.approx(before[start + 1] / 5)
    recorded = yaml.safe_load((folder / "config.yaml").read_text())["training"]
    assert (recorded["lr"], recorded["weight_decay"], recorded["momentum"]) == (0.01, 0.1, 0.5)
    starts = json.loads((folder / "environment.json").read_text())["starts"]
    assert starts[-1]["changed"]["training.lr"] == [0.05, 0.01]
    only_rate = folder.with_name("only the rate")
    different = {k for k, v in weights(folder).items() if not v.equal(weights(whole)[k])}
    assert different and not only_rate.exists()


def test_another_batch_size_trains_the_same_epochs(folder: Path) -> None:
    assert resume(folder, training__batch_size=6)[0] == 0
    progress = json.loads((folder / "checkpoints/last/progress.json").read_text())
    # 36 images, 8 epochs: 12 steps of 12 images, or one more, then steps of 6.
    assert progress["images"] == 36 * 8
    assert metrics(folder)[-1]["epoch"] == 8


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", 1),
        ("backbone.width", 0.125),
        variant("backbone.embedding_dim", 16),
        variant("backbone.batch_norm", "false"),
        ("head", "{name: cosface}"),
        variant("head.r", 20),
        ("data.validation_people", 3),
        variant("data.split_seed", 1),
        ("data.subset.people", 4),
        variant("data.label_noise.share", 0.2),
        ("training.optimizer", "adamw"),
        ("training.momentum", 0),
        ("training.muon_lr", 0.1),
        variant("training.gamma", 0.5),
    ],
)
def test_what_cannot_change_is_refused_by_name(folder: Path, key: str, value: object) -> None:
    before = (folder / "config.yaml").read_text()
    run = Run(folder, {key: value}, command=["--resume", folder])
    assert run.wait() == [2]
    (told,) = run.told().splitlines()
    assert told.startswith(f"error: {key}") and " = " in told and str(folder) in told
    assert (folder / "config.yaml").read_text() == before


@pytest.mark.parametrize(
    "change",
    [
        {"training.ema": 0.9},
        variant({"training.autocast": "bf16"}),
        variant({"data.augmentation.rotation": 5}),
    ],
)
def test_what_may_change_is_recorded(folder: Path, change: dict[str, object]) -> None:
    run = Run(folder, change, command=["--resume", folder])
    assert run.wait() == [0], run.told()
    ((key, value),) = change.items()
    starts = json.loads((folder / "environment.json").read_text())["starts"]
    assert starts[-1]["changed"][key][1] == value


def test_another_number_of_ranks_goes_on(folder: Path) -> None:
    run = Run(folder, {}, 2, command=["--resume", folder])
    assert run.wait() == [0, 0], run.told()
    assert "1 rank of 1 thread trained this run until here and 2 ranks of 1 thread" in run.told()
    assert metrics(folder)[-1]["epoch"] == 8


def test_other_people_are_refused(folder: Path, faces: Path, tmp_path: Path) -> None:
    """The same images, but two people have changed their labels."""
    other = tmp_path / "other"
    shutil.copytree(faces, other)
    (other / "names.txt").write_text("\n".join(f"somebody {n}" for n in range(8)) + "\n")
    run = Run(folder, {"data.train": other}, command=["--resume", folder])
    assert run.wait() == [2]
    assert "would stand for other people" in run.told()


def test_a_finished_run_is_not_reported_as_trained_otherwise(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole, folder, symlinks=True)
    status, told = resume(folder, training__lr=1)
    assert status == 2 and "training.lr = 1.0 would have no effect" in told
    status, told = resume(folder, training__epochs=2)
    assert status == 2 and "has trained 8 epochs" in told
    # Nothing is left to train on, so nothing is decoded.
    run = Run(folder, {"data.cache": "ram"}, command=["--resume", folder])
    assert run.wait() == [0]
    assert "trained    to its end" in run.told() and "cache  " not in run.told()
    assert resume(folder, training__epochs=10)[0] == 0
    assert metrics(folder)[-1]["epoch"] == 10


def test_a_step_that_goes_wrong_leaves_nothing_behind(folder: Path, whole: Path) -> None:
    """The host reads of it ten steps later; weights that moved meanwhile are saved nowhere."""
    kept, before = last(folder), weights(folder)
    late = {key: 1000 for key in ("training.log_every", "training.checkpoint_every")}
    wild = {"training.lr": 1e30, "training.clip_norm": "null", "validation.every": 0, **late}
    run = Run(folder, wild, command=["--resume", folder])
    assert run.wait() == [2]
    told = run.told().splitlines()[-1]
    assert f"the last good checkpoint is {kept}, which --resume {folder} goes on from" in told
    assert last(folder) == kept == checkpoints(folder)[-1]
    assert_equal(weights(folder), before)
    tame = {key: SETTINGS.get(key, 5.0) for key in wild}
    run = Run(folder, tame, command=["--resume", folder])
    assert run.wait() == [0], run.told()
    assert_equal(weights(folder), weights(whole))


# -- full disks ----------------------------------------------------------------------------------


def test_a_limit_on_files_leaves_the_last_checkpoint_whole(folder: Path, whole: Path) -> None:
    kept = last(folder)
    run = Run(folder, largest_file=100_000)
    assert run.wait() == [2]
    told = run.told().splitlines()[-1]
    assert " cannot be written: " in told and told.endswith(f"; {kept.name} is kept")
    assert not [path for path in (folder / "checkpoints").iterdir() if path.name.startswith(".")]
    assert resume(folder)[0] == 0
    assert_equal(weights(folder), weights(whole))


# -- a teacher -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, variant(2)])
def test_a_run_with_a_teacher_and_a_loss_between_samples_is_resumed_bit_for_bit(
    faces: Path, whole: Path, tmp_path: Path, ranks: int
) -> None:
    """The teacher is a model, of another dimension, whose table stays in the run's folder."""
    distilled = {
        **SETTINGS,
        "data.train": faces,
        "teacher.path": whole,
        "backbone.embedding_dim": 6,
        "training.ema": 0.5,
        "sample_to_sample.weight": 0.5,
        "sample_to_sample.begin": 0.5,
    }
    uncut = Run(tmp_path / "uncut", distilled, ranks)
    assert uncut.wait() == [0] * ranks, uncut.told()
    cut = Run(tmp_path / "cut", distilled, ranks)
    assert cut.signal_when(signal.SIGKILL, lambda: cut.steps() >= STEPS // 2, 0)
    cut.wait()
    table = tmp_path / "cut/teacher.npz"
    embedded = table.stat().st_mtime_ns
    assert resume(tmp_path / "cut", ranks)[0] == 0
    assert table.stat().st_mtime_ns == embedded  # it is made once
    assert_equal(weights(tmp_path / "cut"), weights(tmp_path / "uncut"))
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "uncut")
    if ranks == 1:
        other = Run(tmp_path / "other", {**SETTINGS, "data.train": faces, "seed": 5})
        assert other.wait() == [0], other.told()
        code, told = resume(tmp_path / "cut", teacher__path=other.folder)
        assert code == 2 and "the teacher is not the one that" in told
