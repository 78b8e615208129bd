"""Training through the command line: resuming, ranks, divergence."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL

import numpy as np
import pytest
import torch
from command_line import parsed, ran
from killing import Run, assert_equal, metrics, weights
from PIL import Image

from sphereface2.backbones import bundle
from sphereface2.data import synthetic
from sphereface2.data.convert import convert
from sphereface2.data.opening import open_source
from sphereface2.training.config import load
from sphereface2.training.fit import _slow
from sphereface2.training.report import _next_commands

SETTINGS = {
    "backbone.name": "sfnet4",
    "backbone.width": 0.125,
    "backbone.input_size": 64,
    "backbone.embedding_dim": 16,
    "backbone.dropout": 0.2,
    "head.name": "sphereface2",
    "head.loss_weight": 5,
    "data.validation_people": 4,
    "data.augmentation.affine": 0.5,
    "training.epochs": 4,
    "training.batch_size": 16,
    "training.lr": 0.02,
    "training.checkpoint_every": 5,
    "training.log_every": 3,
    "training.ema": 0.9,
    "training.device": "cpu",
    "training.threads": 1,
    "validation.every": 2,
    "validation.pairs": "[]",
}
CONDITIONS = "[yaw, light]"


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.write(
        tmp_path_factory.mktemp("faces") / "set", people=24, images_per_person=8, pairs_per_fold=6
    )


def command(*words: str | Path, **settings: object) -> list[str]:
    options = [str(w) for k, v in settings.items() for w in (f"--{k}", v)]
    return [sys.executable, "-m", "sphereface2", "fit", *map(str, words), *options]


def run(*words: str | Path, **settings: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command(*words, **settings), capture_output=True, text=True, timeout=240, env=environment
    )


def only_run(output: Path) -> Path:
    (folder,) = output.iterdir()
    return folder


def lines(run_folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def trained(run_folder: Path) -> dict[str, float]:
    return json.loads((run_folder / "results.json").read_text())["training"]


@pytest.fixture(scope="module")
def uninterrupted(faces: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole")
    settings = {"data.train": faces, "output": output, "validation.conditions": CONDITIONS}
    done = run(**SETTINGS, **settings)
    assert done.returncode == 0, done.stderr
    assert "held-out" in done.stdout and "  light" in done.stdout
    shown = re.sub(r"[│\s]+", " ", done.stdout)
    assert "on the 4 held-out people" in shown or "are no higher than those" in shown
    assert "sphereface2 gallery add" in shown
    return only_run(output)


def test_a_run_folder_holds_what_determines_it_and_loads(uninterrupted: Path) -> None:
    network = bundle.load(uninterrupted)
    assert network.preprocessing.size == (64, 64)
    record = json.loads((uninterrupted / "environment.json").read_text())
    # What calibrating the network needs to know of its training.
    head, data = network.metadata["head"], network.metadata["data"]
    assert (head["name"], head["r"], head["t"]) == ("sphereface2", 40, 3)
    assert -100 < head["bias"] < 100
    assert data["fingerprint"] == record["data"]["fingerprint"]
    assert record["data"]["synthetic"]  # for the model card
    assert data["validation_people"] == 4
    assert len(record["data"]["fingerprint"]) == 64
    (start,) = record["starts"]
    assert start["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    results = json.loads((uninterrupted / "results.json").read_text())
    assert results["held_out"]["people"] == 4
    assert 0 <= results["held_out"]["tar"]["1e-1"] <= 1
    lined = lines(uninterrupted)
    assert [line["step"] for line in lined if line["kind"] == "train"] == [*range(3, 40, 3), 40]
    # Each condition stands beside the clean figures, in the report as at the validation before it.
    best = int(results["checkpoint"].split("-")[-1])
    (at_best,) = [one for one in lined if one["kind"] == "validation" and one["step"] == best]
    for condition, found in zip(
        (None, "yaw", "light"), (results["held_out"], *results["hardened"]), strict=True
    ):
        assert found.get("condition") == condition
        key = f"held-out {condition} TAR@0.1" if condition else "held-out TAR@0.1"
        assert found["tar"]["1e-1"] == pytest.approx(at_best[key], abs=1e-6)
    drawn = {path.name for path in (uninterrupted / "plots").iterdir()}
    assert drawn >= {"curves.png", "batch.png", "worst_pairs.png", "held-out_all_pairs_roc.png"}


def test_half_precision_on_a_cpu_is_told_to_be_slow() -> None:
    half, full = (load(None, ["--training.autocast", one]) for one in ("fp16", "bf16"))
    assert "bf16 or off takes a small part" in str(_slow(half, "cpu"))
    assert _slow(half, "cuda") is None and _slow(full, "cpu") is None


def test_the_end_of_a_run_names_commands_with_real_paths(tmp_path: Path) -> None:
    for name in ("a b/1.png", "a b/2.png", "c/1.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name)
    source, train = open_source(tmp_path / "set"), tmp_path / "set"
    lines = _next_commands(tmp_path / "run", source, np.arange(3), train)
    verify, add, serve = (shlex.split(line)[1:] for line in lines[1:])
    found = parsed(*verify)
    assert [found["first"], found["second"]] == [train / "a b/1.png", train / "a b/2.png"]
    assert parsed(*add)["folder"] == train and parsed(*add)["aligned"]
    assert parsed(*serve)["gallery"] == parsed(*add)["gallery"]
    packed = _next_commands(tmp_path / "run", source, np.arange(0), train)
    assert "PHOTOS" in packed[0] and "--aligned" not in "".join(packed)
    # A folder with a list, such as `data audit` writes, is none of people's photographs.
    train = tmp_path / "clean"
    train.mkdir()
    images = "".join(f"{tmp_path}/set/a b/{number}.png 0\n" for number in (1, 2))
    (train / "train.txt").write_text(images)
    listed = _next_commands(tmp_path / "run", open_source(train), np.arange(2), train)
    assert "PHOTOS" in listed[0] and "a b/1.png" in listed[1] and str(train) not in listed[2]


@pytest.mark.parametrize(("kill_after", "workers"), [(3, 0), (24, 2)])
def test_kill_and_resume_gives_the_same_weights_bit_for_bit(
    faces: Path, uninterrupted: Path, tmp_path: Path, kill_after: int, workers: int
) -> None:
    settings = {**SETTINGS, "data.train": faces, "data.workers": workers}
    settings["validation.conditions"] = CONDITIONS
    folder = tmp_path / "run"
    killed = Run(folder, settings)
    assert killed.signal_when(SIGKILL, lambda: 3 * len(metrics(folder)) >= kill_after, 0)
    killed.wait()
    if kill_after < 5:
        again = Run(folder, command=["--resume", folder])
        assert again.wait() == [2]
        assert "no checkpoint to resume from" in again.told()
        return
    assert len(metrics(folder)) < len(metrics(uninterrupted)), "killed too late to test anything"
    done = run("--resume", folder)
    assert done.returncode == 0, done.stderr
    assert_equal(weights(folder), weights(uninterrupted))
    assert metrics(folder) == metrics(uninterrupted)
    # Also what lies between the last line of the log and the checkpoint was trained on.
    assert trained(folder)["images"] == trained(uninterrupted)["images"] == 40 * 16
    told = [line["seconds"] for line in lines(folder)]
    assert told == sorted(told) and trained(folder)["seconds"] == told[-1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"head.sharded": "true"}, marks=pytest.mark.slow),
        {
            "head.sharded": "true",
            "training.fused_head": "true",
            "training.clip_norm": "null",
            "training.clip_embedding_norm": 0.02,
        },
    ],
    ids=["replicated", "sharded", "sharded and fused"],
)
def test_two_ranks_train_as_one(faces: Path, tmp_path: Path, options: dict[str, str]) -> None:
    """Without dropout, two halves of each batch with averaged gradients make the same step."""
    settings = {
        **SETTINGS,
        **options,
        "data.train": faces,
        "backbone.dropout": 0,
        "training.epochs": 1,
        "training.ema": 0,
    }
    single, double = tmp_path / "1", tmp_path / "2"
    alone = Run(single, settings)
    assert alone.wait() == [0], alone.told()
    both = Run(double, settings, ranks=2)
    assert both.wait() == [0, 0], both.told()
    one, two = weights(single), weights(double)
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-5)
    # A checkpoint of two ranks goes on with one.
    longer = Run(double, {"training.epochs": 2}, command=["--resume", double])
    assert longer.wait() == [0], longer.told()
    assert metrics(double)[-1]["step"] == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prototypes", "sharded"), [("imprinted", "false"), ("imprinted", "true"), ("kept", "true")]
)
def test_two_ranks_fine_tune_as_one(
    faces: Path, tmp_path: Path, prototypes: str, sharded: str
) -> None:
    """Each rank embeds half of the images; the prototypes start at the sums over both."""
    people = convert(faces, tmp_path / "people", to="folder").target
    settings = {**SETTINGS, "data.train": people, "training.epochs": 1, "training.ema": 0}
    settings["backbone.dropout"] = 0
    assert run("--run-folder", tmp_path / "start", **settings).returncode == 0
    settings = {k: v for k, v in settings.items() if not k.startswith("backbone")}
    settings |= {"training.prototypes": prototypes, "head.sharded": sharded, "seed": 1}
    for ranks in ("1", "2"):
        done = run(
            "--start-from", tmp_path / "start", "--ranks", ranks, "--run-folder", tmp_path / ranks,
            **settings,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    one, two, before = (weights(tmp_path / name) for name in ("1", "2", "start"))
    starts = [
        json.loads((tmp_path / name / "environment.json").read_text())["starts"][0]["start_from"]
        for name in ("1", "2")
    ]
    assert starts[0] == starts[1]
    assert ("prototypes_kept" in starts[0]) == (prototypes == "kept")
    for key in one:
        torch.testing.assert_close(two[key], one[key], rtol=1e-3, atol=2e-5)
    assert not torch.equal(one["fc.weight"], before["fc.weight"])
    heads = []
    for name in ("1", "2"):
        state = bundle.resolve(tmp_path / name).resolve() / "state"
        reader = torch.distributed.checkpoint.FileSystemReader(state)
        shape = reader.read_metadata().state_dict_metadata["head.weight"].size
        loaded = {"head": {"weight": torch.empty(shape)}}
        torch.distributed.checkpoint.load(loaded, storage_reader=reader, no_dist=True)
        heads.append(torch.nn.functional.normalize(loaded["head"]["weight"], dim=1))
    torch.testing.assert_close(heads[0], heads[1], rtol=1e-3, atol=1e-4)


def test_a_killed_rank_ends_the_run_with_a_message(faces: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "data.train": faces, "training.epochs": 400, "head.sharded": "true"}
    process = subprocess.Popen(
        command("--ranks", "2", "--run-folder", tmp_path / "run", **settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    kill_a_rank(process, tmp_path / "run", after=7)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "left with status -9" in errors.splitlines()[-1]


def test_torchrun_restarts_from_the_last_checkpoint(faces: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "data.train": faces, "head.sharded": "true"}
    settings["training.autocast"] = "bf16"
    whole = tmp_path / "whole"
    uncut = Run(whole, settings, ranks=2)
    assert uncut.wait() == [0, 0], uncut.told()
    cut = tmp_path / "cut"
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    fit = command("--run-folder", cut, **settings)
    process = subprocess.Popen(
        [*fit[:2], *launcher, "-m", *fit[2:]],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    kill_a_rank(process, cut, after=12)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors[-3000:]
    starts = json.loads((cut / "environment.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[1]["step"] >= 5
    assert_equal(weights(cut), weights(whole))
    assert metrics(cut) == metrics(whole)


def kill_a_rank(process: subprocess.Popen[str], folder: Path, after: int) -> None:
    """SIGKILL to the last worker of a launcher once ``after`` steps are logged."""
    log = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) >= after:
            break
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), SIGKILL)


def test_divergence_stops_with_one_sentence_and_keeps_the_last_checkpoint(
    faces: Path, tmp_path: Path
) -> None:
    settings = {
        **SETTINGS,
        "data.train": faces,
        "training.lr": 1e30,
        "training.clip_norm": "null",
        "training.warmup": 0,
        "training.checkpoint_every": 1,
    }
    diverging = Run(tmp_path / "run", settings)
    assert diverging.wait() == [2]
    assert "Traceback" not in diverging.told()
    assert "the loss became" in diverging.told() or "diverges" in diverging.told()
    assert weights(tmp_path / "run")


def test_bad_settings_and_missing_data_are_one_sentence(tmp_path: Path) -> None:
    done = ran("fit", "--training.epoch", 3)
    assert done.returncode == 2
    assert done.stderr.strip().count("\n") == 0
    assert "did you mean 'epochs'" in done.stderr
    done = ran("fit", "--training.fused_head", "true", "--head.streaming", "true")
    assert done.returncode == 2
    assert "training.clip_norm must be null with training.fused_head, got 5.0" in done.stderr
    done = ran("fit", "--training.fused_head", "true", "--training.clip_norm", "null")
    assert done.returncode == 2
    assert "a fused update needs a head with streaming=True" in done.stderr
    fused = ("--training.fused_head", "true", "--training.clip_norm", "null")
    done = ran("fit", *fused, "--head.streaming", "true", "--training.autocast", "fp16")
    assert done.returncode == 2
    assert "training.autocast must be off or bf16 or auto with training.fused_head" in done.stderr
    done = ran("fit", "--head.name", "cosface", "--head.sharded", "true")
    assert done.returncode == 2
    assert "cosface cannot be sharded" in done.stderr
    done = ran("fit", "--data.train", tmp_path / "none", "--output", tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
