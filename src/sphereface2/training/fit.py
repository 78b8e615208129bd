"""``sphereface2 fit``: from a configuration to a trained, evaluated run folder."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from sphereface2.data.conditions import choose, corrupt
from sphereface2.data.dataset import FaceDataset
from sphereface2.data.locate import TrainingData, locate
from sphereface2.data.sampler import BatchSampler
from sphereface2.data.sources import Source, open_source, split_people
from sphereface2.data.verification import PairSet, load_pairs
from sphereface2.errors import UserError
from sphereface2.files import atomic_write
from sphereface2.training import config as configuration
from sphereface2.training.config import RunConfig
from sphereface2.training.distributed import World, world
from sphereface2.training.logging import environment
from sphereface2.training.report import report
from sphereface2.training.trainer import Progress, Trainer
from sphereface2.training.validation import Validation


@dataclass
class Inputs:
    """The data of a run, opened."""

    source: Source
    train_indices: np.ndarray
    held_out_indices: np.ndarray
    test_indices: np.ndarray
    train_labels: np.ndarray
    """int64, the class of each training image, in [0, num_classes)."""
    num_classes: int
    pairs: list[PairSet]
    located: TrainingData


def fit(
    config: Path | None,
    *,
    resume: Path | None = None,
    run: Path | None = None,
    ranks: str | None = None,
    overrides: Sequence[str] = (),
) -> None:
    """Train, validate, save and report.

    Args:
        config: YAML file of a ``RunConfig``; None: the defaults.
        resume: a run folder whose last checkpoint to continue from, with its own configuration;
            ``overrides`` change it from there on.
        run: the run's folder, where a launcher that restarts the same command (torchrun, Slurm,
            Kubernetes) finds it again: its last checkpoint is resumed if there is one, with the
            run's own configuration; else the run starts there. None: a new folder.
        ranks: processes to start on this machine, a number or ``auto`` (one a GPU, or one a CPU
            core); None: this process alone, or the one that torchrun started.
        overrides: ``--section.key value`` words.

    Raises:
        UserError: a bad setting, missing data, a diverging run.
    """
    if resume is not None and config is not None:
        raise UserError("--resume uses the run's own configuration; leave --config out")
    if run is not None:
        if resume is not None:
            raise UserError("--run-folder resumes by itself what it finds; leave --resume out")
        if (run / "checkpoints" / "last").exists():
            resume, config = run, None
    settings = configuration.load(resume / "config.yaml" if resume else config, overrides)
    if ranks is not None and "WORLD_SIZE" not in os.environ:
        count = _count_ranks(ranks, settings)
        if count > 1:
            _launch(count, config, resume, run, overrides)
            return
    with world(settings.training.device, settings.training.threads) as place:
        folder = _run_folder(settings, resume or run, place)
        inputs = open_inputs(settings, place)
        progress = _train(settings, folder, place, inputs, overrides, resumes=resume is not None)
        main = place.is_main
    if main:
        torch.set_num_threads(settings.training.threads or os.cpu_count() or 1)
        report(
            folder,
            settings,
            inputs.located,
            inputs.source,
            inputs.held_out_indices,
            inputs.pairs,
            progress,
        )


def _train(
    settings: RunConfig,
    folder: Path,
    place: World,
    inputs: Inputs,
    overrides: Sequence[str],
    *,
    resumes: bool,
) -> Progress:
    """Apart from ``fit`` so that nothing of the training is left when the group is destroyed."""
    trainer = build_trainer(settings, folder, place, inputs)
    if resumes:
        trainer.resume()
    if place.is_main:
        _record(folder, settings, inputs, trainer, overrides)
    return trainer.train()


def _count_ranks(ranks: str, settings: RunConfig) -> int:
    if ranks == "auto":
        if settings.training.device in ("auto", "cuda") and torch.cuda.is_available():
            return torch.cuda.device_count()
        return os.cpu_count() or 1
    if not ranks.isdigit() or int(ranks) < 1:
        raise UserError(f"--ranks {ranks!r} must be a positive number or auto")
    return int(ranks)


def _launch(
    count: int,
    config: Path | None,
    resume: Path | None,
    run: Path | None,
    overrides: Sequence[str],
) -> None:
    """Run the same command in ``count`` processes of this machine, by torchrun's own launcher."""
    command = ["-m", "sphereface2", "fit"]
    command += ["--config", str(config)] if config else []
    command += ["--resume", str(resume)] if resume and not run else []
    command += ["--run-folder", str(run)] if run else []
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    # The failing rank has said why; the launcher's own account of it would bury that.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    launch = elastic_launch(
        LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
        ),
        sys.executable,
    )
    try:
        launch(*command, *overrides)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise UserError(
            f"training ended: rank {rank} left with status {failure.exitcode}, see above for why"
        ) from error


def _run_folder(settings: RunConfig, given: Path | None, place: World) -> Path:
    """The folder ``given``, or a new one."""
    if given is not None:
        if place.is_main:
            given.mkdir(parents=True, exist_ok=True)
        place.barrier()
        return given
    stamp = place.broadcast(time.strftime("%Y%m%d-%H%M%S"))
    run = Path(settings.output) / f"{settings.name}-{stamp}"
    if place.is_main:
        try:
            run.mkdir(parents=True)
        except FileExistsError as error:
            raise UserError(f"{run} exists already; choose another --name") from error
    place.barrier()
    return run


def open_inputs(settings: RunConfig, place: World) -> Inputs:
    """Find and open the data, and set the validation people aside; every rank calls it."""
    data = settings.data
    if data.train == "auto":
        # Rank 0 alone may download or generate; the others then find what it left.
        located = place.broadcast(locate() if place.is_main else None)
    else:
        path = Path(data.train)
        located = TrainingData(
            kind="given", train=path, pairs=[], names=None, note=str(path), is_synthetic=False
        )
    source = open_source(located.train)
    split = split_people(
        source,
        data.validation_people,
        data.split_seed,
        test_people=data.test_people,
        max_images=data.held_out_max_images,
    )
    labels = np.asarray(source.labels)
    train = split.train[choose(labels[split.train], data.subset)]
    people, classes = np.unique(labels[train], return_inverse=True)
    paths = [Path(p) for p in settings.validation.pairs if p != "auto"]
    if "auto" in settings.validation.pairs:
        paths = [*located.pairs, *paths]
    names = Path(settings.validation.names) if settings.validation.names else located.names
    return Inputs(
        source=source,
        train_indices=train,
        held_out_indices=split.validation,
        test_indices=split.test,
        train_labels=corrupt(classes, data.label_noise),
        num_classes=len(people),
        pairs=[load_pairs(path, names=names if path.suffix == ".bin" else None) for path in paths],
        located=located,
    )


def build_trainer(settings: RunConfig, run: Path, place: World, inputs: Inputs) -> Trainer:
    """A trainer at step 0, with its data set, sampler and validation; every rank calls it."""
    training, data = settings.training, settings.data
    share = place.size * training.accumulate
    if training.batch_size % share:
        raise UserError(
            f"training.batch_size = {training.batch_size} must be a multiple of ranks × "
            f"training.accumulate = {share}"
        )
    dataset = FaceDataset(
        inputs.source,
        inputs.train_indices,
        inputs.train_labels,
        augmentation=data.augmentation,
        seed=settings.seed,
        max_unreadable=data.max_unreadable,
    )
    sampler = BatchSampler(
        dataset.labels,
        training.batch_size // training.accumulate,
        rank=place.rank,
        world_size=place.size,
        seed=settings.seed,
        people_per_batch=data.people_per_batch,
        images_per_person=data.images_per_person,
    )
    validate = Validation(
        settings.validation, place, inputs.source, inputs.held_out_indices, inputs.pairs
    )
    trainer = Trainer(settings, run, place, dataset, sampler, inputs.num_classes, validate)
    if place.is_main:
        _announce(settings, run, place, inputs, trainer)
    return trainer


def _announce(
    settings: RunConfig, run: Path, place: World, inputs: Inputs, trainer: Trainer
) -> None:
    parameters = sum(p.numel() for p in trainer.network.parameters())
    print(
        f"data       {inputs.located.note}\n"
        f"           {len(inputs.train_indices):,} images of {inputs.num_classes:,} people; "
        f"{settings.data.validation_people:,} people held out{_aside(settings)}\n"
        f"backbone   {settings.backbone['name']}, {parameters / 1e6:.2f} M parameters, "
        f"input {trainer.network.preprocessing.size}\n"
        f"head       {settings.head['name']}\n"
        f"schedule   {trainer.total_steps:,} steps of {settings.training.batch_size} images on "
        f"{place.size} rank(s), {place.device.type}\n"
        f"run        {run}",
        flush=True,
    )


def _aside(settings: RunConfig) -> str:
    """What else is special about the data."""
    data = settings.data
    told = f", {data.test_people:,} set aside for test" if data.test_people else ""
    if data.held_out_max_images is not None:
        told += f" (those with more than {data.held_out_max_images:,} images left out)"
    if data.label_noise.share:
        told += f"; {data.label_noise.share:.0%} of the labels wrong ({data.label_noise.kind})"
    return told


def _record(
    run: Path, settings: RunConfig, inputs: Inputs, trainer: Trainer, overrides: Sequence[str]
) -> None:
    """Write what determines the run beside its results: ``config.yaml``, ``environment.json``.

    A resumption may change settings (more epochs, say): ``config.yaml`` then holds the new ones,
    and ``environment.json`` tells of every start, its step and what was changed.
    """
    path = run / "environment.json"
    fingerprint = trainer.data_fingerprint
    before = json.loads(path.read_text()) if path.exists() else {"starts": []}
    if before["starts"] and before["data"]["fingerprint"] != fingerprint:
        raise UserError(
            f"{inputs.located.train} is not what {run} was trained on (its fingerprint changed); "
            "resume with the original data or start a new run"
        )
    start = {"step": trainer.progress.step, "overrides": list(overrides), **environment()}
    record = {
        "starts": [*before["starts"], start],
        "data": {
            "kind": inputs.located.kind,
            "train": str(inputs.located.train),
            "fingerprint": fingerprint,
            "images": len(inputs.train_indices),
            "people": inputs.num_classes,
        },
    }
    atomic_write(run / "config.yaml", configuration.dump(settings).encode())
    atomic_write(path, json.dumps(record, indent=1).encode())
