"""Training on the device: exact resuming, no waiting of the host, embeddings as on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import numpy as np
import pytest
import safetensors.torch
import torch

from sphereface2 import backbones, cuda_graph
from sphereface2.data import synthetic
from sphereface2.embedder import Embedder
from sphereface2.training import config as configuration
from sphereface2.training.distributed import world
from sphereface2.training.fit import build_trainer
from sphereface2.training.inputs import open_inputs
from sphereface2.training.optim import set_learning_rate
from sphereface2.training.teacher import Teacher

# Before the first product: what deterministic algorithms ask of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

SETTINGS = {
    "backbone.name": "sfnet4",
    "backbone.width": 0.125,
    "backbone.input_size": 64,
    "backbone.embedding_dim": 32,
    "backbone.batch_norm": True,
    "backbone.dropout": 0.2,
    "head.streaming": True,
    "head.loss_weight": 5,
    "data.validation_people": 4,
    "data.workers": 2,
    "data.augmentation.affine": 0.5,
    "training.fused_head": True,
    "training.clip_norm": "null",
    "training.clip_embedding_norm": 5,
    "training.autocast": "bf16",
    "training.epochs": 12,
    "training.batch_size": 16,
    "training.lr": 0.02,
    "training.checkpoint_every": 5,
    "training.log_every": 3,
    "training.ema": 0.9,
    "validation.every": 0,
    "validation.pairs": "[]",
}
EAGER_HEAD = {"training.fused_head": False, "head.streaming": False, "training.clip_norm": 5}
EAGER_HEAD |= {"training.clip_embedding_norm": "null"}
GRAPHED = {
    "sgd": EAGER_HEAD,
    "muon, cache": {
        **EAGER_HEAD,
        "training.optimizer": "muon",
        "data.cache": "device",
        "data.workers": 0,
        "data.augmentation.photometric": 0.5,
    },
    "between samples": {
        **EAGER_HEAD,
        "sample_to_sample.weight": 0.5,
        "sample_to_sample.s": 8,
    },
    "fused": {},
    "sampled, bf16": {
        "head.negatives": "uniform",
        "head.negative_share": 0.5,
        "head.weight_dtype": "bfloat16",
    },
}
DETERMINISTIC = (
    "import sys, torch; torch.use_deterministic_algorithms(True);"
    "from sphereface2.cli import main; sys.exit(main())"
)


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces") / "set"
    return synthetic.write(folder, people=24, images_per_person=8, pairs_per_fold=6)


def start(*words, **settings):
    options = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", DETERMINISTIC, "fit", *map(str, words), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process):
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-3000:]


def logged(output):
    return [
        json.loads(line)
        for path in output.glob("*/metrics.jsonl")
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]


@pytest.mark.parametrize("autocast", ["off", "bf16"])
@pytest.mark.parametrize("fused", [False, True])
def test_no_training_step_waits_for_the_device(cuda, faces, tmp_path, autocast, fused):
    settings = {**SETTINGS, "data.train": faces, "data.workers": 0, "training.device": "cuda"}
    settings |= {"training.autocast": autocast, "training.fused_head": fused}
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    config = configuration.load(None, words)
    with world("cuda") as place:
        trainer = build_trainer(tmp_path, place, open_inputs(config, place))
        trainer.step.forward.train()
        batches = trainer.batches(0)
        for mode in ("default", "default", "error"):
            batch = next(batches)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                trainer.step([batch])
            finally:
                torch.cuda.set_sync_debug_mode("default")


@contextmanager
def trainer_of(faces, folder, changes):
    """A trainer on the GPU, ready for steps, and its batches."""
    settings = {**SETTINGS, "data.train": faces, "data.workers": 0, "training.device": "cuda"}
    settings |= changes
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    config = configuration.load(None, words)
    with world("cuda") as place:
        inputs = open_inputs(config, place)
        teacher = None
        if settings.get("training.optimizer") == "muon":
            rows = np.random.default_rng(0).normal(size=(len(inputs.train_indices), 24))
            rows = (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)
            teacher = Teacher(rows, inputs.train_labels, 32, config.teacher)
        trainer = build_trainer(folder, place, inputs, teacher)
        trainer.step.begin(config.training.batch_size)
        yield trainer, trainer.batches(0)


def taken(faces, folder, changes, steps=10):
    """Losses of some steps with falling rates, and the parameters and buffers after them."""
    with trainer_of(faces, folder, changes) as (trainer, batches):
        losses = []
        for number in range(1, steps + 1):
            set_learning_rate(trainer.optimizers, 1 / number)
            losses.append(trainer.step([next(batches)], number)[0].item())
        states = {name: one.state_dict() for name, one in trainer.step.modules.items()}
        return losses, {
            f"{name}.{k}": v.cpu() for name, one in states.items() for k, v in one.items()
        }


@pytest.mark.parametrize("case", GRAPHED)
def test_steps_of_a_graph_are_the_steps(cuda, faces, tmp_path, monkeypatch, case):
    torch.use_deterministic_algorithms(True)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    try:
        plain, _ = taken(faces, tmp_path, GRAPHED[case])
        changes = {**GRAPHED[case], "training.cuda_graph": True}
        losses, state = taken(faces, tmp_path, changes)
        monkeypatch.setattr(cuda_graph, "WARM_UP", 1000)  # the same operations, one by one
        expected, same = taken(faces, tmp_path, changes)
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses == expected
    for key, value in same.items():
        assert torch.equal(state[key], value), key
    np.testing.assert_allclose(losses, plain, rtol=0.05)


def test_a_step_of_a_graph_does_not_wait_and_is_faster(cuda, faces, tmp_path):
    network = {"backbone.name": "sfnet10", "backbone.width": 0.25}
    seconds = {}
    for graphed in (False, True):
        changes = {**GRAPHED["muon, cache"], **network, "training.cuda_graph": graphed}
        with trainer_of(faces, tmp_path, changes) as (trainer, batches):
            for _ in range(6):
                trainer.step([next(batches)])
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            started = time.perf_counter()
            try:
                for _ in range(30):
                    trainer.step([next(batches)])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
            seconds[graphed] = time.perf_counter() - started
    print(f"30 steps: eager {seconds[False]:.4f} s, as a graph {seconds[True]:.4f} s")
    assert seconds[True] < seconds[False] / 2


@pytest.mark.parametrize("name", ["sfnet4", "iresnet18", "mobilefacenet"])
def test_networks_give_the_cpus_embeddings(device, name):
    torch.manual_seed(0)
    network = backbones.build(name, input_size=64, embedding_dim=32, width=0.25)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (72, 72, 3), dtype=np.uint8) for _ in range(9)]
    expected = Embedder(network, device="cpu").embed(images)
    found = Embedder(network, device=device, batch_size=4).embed(images)
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_compiled_step_takes_the_same_step(cuda, faces, tmp_path):
    losses = {}
    for compiled in (False, True):
        settings = {**SETTINGS, "data.train": faces, "data.workers": 0, "training.device": "cuda"}
        settings |= {"backbone.dropout": 0, "training.compile": compiled}
        words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
        config = configuration.load(None, words)
        with world("cuda") as place:
            trainer = build_trainer(tmp_path, place, open_inputs(config, place))
            trainer.step.begin(16)
            batches = trainer.batches(0)
            losses[compiled] = [trainer.step([next(batches)])[0].item() for _ in range(4)]
    np.testing.assert_allclose(losses[True], losses[False], rtol=0.02)


# Last, as a run on a card may be short: these start three processes each.


def test_killed_and_resumed_training_ends_at_the_same_weights(slow_on_cpu, faces, tmp_path):
    settings = {**SETTINGS, "data.train": faces, "training.device": slow_on_cpu.type}
    end_at_the_same_weights(settings, tmp_path)


def test_a_training_of_graphs_that_was_killed_ends_at_the_same_weights(cuda, faces, tmp_path):
    settings = {**SETTINGS, **GRAPHED["muon, cache"], "data.train": faces}
    settings |= {"training.device": cuda.type, "training.epochs": 30, "training.cuda_graph": True}
    end_at_the_same_weights(settings, tmp_path)


def end_at_the_same_weights(settings, tmp_path):
    """A run that is killed after its first checkpoint and resumed, and one that is not."""
    whole = start(**settings, output=tmp_path / "whole")
    killed = start(**settings, output=tmp_path / "killed")
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and killed.poll() is None:
        if list((tmp_path / "killed").glob("*/checkpoints/last/manifest.json")):
            break
        time.sleep(0.005)
    assert killed.poll() is None, killed.communicate()[0][-3000:]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    steps = max((line["step"] for line in logged(tmp_path / "killed")), default=0)
    finish(whole)
    last = max(line["step"] for line in logged(tmp_path / "whole"))
    assert steps < last, "killed too late to test anything"
    (folder,) = (tmp_path / "killed").iterdir()
    finish(start("--resume", folder))
    found, expected = (
        safetensors.torch.load_file(
            next((tmp_path / name).iterdir()) / "checkpoints" / "last" / "model.safetensors"
        )
        for name in ("killed", "whole")
    )
    assert found.keys() == expected.keys()
    for key in expected:
        assert torch.equal(found[key], expected[key]), key
