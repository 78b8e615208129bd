"""``sphereface2 fit``: from a configuration to a trained, evaluated run folder."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from sphereface2 import console
from sphereface2.align.unaligned import warn_if_unaligned
from sphereface2.backbones import bundle
from sphereface2.data.dataset import FaceDataset
from sphereface2.data.folder import check_outside
from sphereface2.data.sampler import BatchSampler
from sphereface2.data.source import Source
from sphereface2.device import resolve
from sphereface2.errors import UserError, counted
from sphereface2.files import check_folder, owned, takes_paths
from sphereface2.machine import cores
from sphereface2.signals import Stopper, parent
from sphereface2.training import config as configuration
from sphereface2.training import resuming, starting
from sphereface2.training.checkpoint import Checkpoint, Checkpointer, has_checkpoints
from sphereface2.training.config import RunConfig
from sphereface2.training.distributed import World, launch, world
from sphereface2.training.idle import idle_and_changed
from sphereface2.training.inputs import USUAL_BATCH, Inputs, open_inputs
from sphereface2.training.loading import cache_images
from sphereface2.training.logging import environment
from sphereface2.training.report import report
from sphereface2.training.teacher import Teacher, open_teacher
from sphereface2.training.trainer import Progress, Trainer
from sphereface2.training.validation import Validation

_IMAGES_A_RANK = 32  # of a batch, where the number of ranks is ours to choose
_RANKS_A_CORE = 8  # processes that one core can drive, each with a copy of the network


@takes_paths
def fit(
    config: Path | None,
    *,
    resume: Path | None = None,
    run: Path | None = None,
    ranks: str | None = None,
    overrides: Sequence[str] = (),
    source: Source | None = None,
    conclude: Callable[[Path, Inputs, Progress], object] = report,
) -> None:
    """Train, validate, save and report.

    Args:
        config: YAML file of a ``RunConfig``; None: the defaults, or the recipe ``finetune`` where
            ``training.start_from`` is given.
        resume: a run folder whose last checkpoint to continue from, or one of its checkpoints,
            with the run's own configuration; ``overrides`` change it from there on.
        run: the run's folder, where a launcher that restarts the same command (torchrun, Slurm,
            Kubernetes) finds it again: its last whole checkpoint is resumed if there is one, with
            ``config`` or else the run's own configuration; else the run starts there. None: a new
            folder.
        ranks: processes to start on this machine, a number or ``auto`` (one a GPU, or one a CPU
            core, of 32 images a batch at least); None: this process alone, or torchrun's.
        overrides: ``--section.key value`` words.
        source: the training set, for callers that have opened it; None: what the settings name.
        conclude: what is done with the trained network in the end, on rank 0.

    Raises:
        UserError: a bad setting, missing data, a damaged checkpoint, a diverging run.
        Stopped: a signal ended it in order.
    """
    if resume is not None and config is not None:
        raise UserError("--resume uses the run's own configuration; leave --config out")
    if run is not None and resume is not None:
        raise UserError("--run-folder resumes by itself what it finds; leave --resume out")
    wanted: Path | None = None
    if resume is not None and resume.parent.name == "checkpoints":
        wanted, resume = resume, resume.parent.parent
    given = resume or run
    resumes = resume is not None or (run is not None and has_checkpoints(run))
    if resumes and given is not None and config is None:
        settings = resuming.own_settings(given, overrides, opened=source is not None)
    else:
        settings = starting.settings(config, overrides)
    if ranks is not None and "WORLD_SIZE" not in os.environ:
        count = _count_ranks(ranks, settings)
        if count > 1:
            words = ["-m", "sphereface2", "fit"]
            words += ["--config", str(config)] if config else []
            words += ["--resume", str(wanted or resume)] if resume else []
            words += ["--run-folder", str(run)] if run else []
            launch(count, [*words, *overrides])
            return
    again = "start the same command again"
    before = f"stopped before the first step; {again}"
    with ExitStack() as owning, Stopper(before, parent=parent()) as stopper:
        owning.callback(torch.set_num_threads, torch.get_num_threads())  # the caller's
        with world(settings.training.device, settings.training.threads) as place:
            resuming.check_ranks(place, settings, resumes)
            folder = place.on_main(lambda: _run_folder(settings, given))
            found: Checkpoint | None = None
            if resumes:
                checkpointer = Checkpointer(folder, place)
                place.on_main(lambda: _own(checkpointer, owning))
                strict = resume is not None
                found = place.on_main(lambda: resuming.find(checkpointer, wanted, strict=strict))
                settings = resuming.left_to_machine(folder, found, settings)
            inputs = open_inputs(settings, place, source)
            if not resumes:
                check_outside(folder, inputs.source)
            settings = inputs.settings
            changed = {} if found is None else resuming.check_settings(folder, found, settings)
            start = {"overrides": list(overrides), "changed": changed}
            progress = _train(folder, place, inputs, found, start, stopper, owning)
            main = place.is_main
        if main:
            stopper.message = f"stopped while the trained network was evaluated; {again}"
            torch.set_num_threads(min(cores(), place.local_size * torch.get_num_threads()))
            conclude(folder, inputs, progress)


def _train(
    folder: Path,
    place: World,
    inputs: Inputs,
    found: Checkpoint | None,
    start: dict[str, Any],
    stopper: Stopper,
    owning: ExitStack,
) -> Progress:
    """Apart from ``fit`` so that nothing of the training is left when the group is destroyed."""
    settings, train = inputs.settings, inputs.located.train
    teacher = open_teacher(
        settings, folder, place, inputs.source, inputs.train_indices, inputs.train_labels
    )
    trainer = build_trainer(folder, place, inputs, teacher, found)
    if place.is_main and not trainer.is_done:
        warn_if_unaligned(
            str(train),
            inputs.source.read,
            inputs.train_indices,
            remedy=f"run sphereface2 align {train} CROPS and train on CROPS",
        )
    if found is not None:
        if trainer.is_done:
            resuming.check_done(folder, start["changed"])
        place.on_main(lambda: trainer.checkpointer.go_on_from(found, trainer.progress.best_step))
        _check_best(trainer, place)
    elif settings.training.start_from is not None:
        start["start_from"] = starting.begin(
            settings.training,
            trainer.network,
            trainer.head,
            place,
            inputs.source,
            inputs.train_indices,
            inputs.train_labels,
            inputs.people["classes"],
        )
        trainer.restart_average()
    if found is None:  # now that nothing of the settings and the data is refused any more
        place.on_main(lambda: _own(trainer.checkpointer, owning))
    start = {"step": trainer.progress.step, "ranks": place.size, **start, **environment()}
    if place.device.type == "cpu" and not trainer.is_done:
        place.on_main(lambda: resuming.tell_threads(folder, start))
    data = inputs.record(trainer.data_fingerprint)
    place.on_main(lambda: resuming.write_records(folder, settings, inputs.people, data, start))
    return trainer.train(stopper)


def _check_best(trainer: Trainer, place: World) -> None:
    """Choose the best checkpoint anew if it is lost or damaged."""
    progress = trainer.progress
    if math.isinf(progress.best) or place.on_main(trainer.checkpointer.has_best):
        return
    if place.is_main:
        console.show(
            "the best checkpoint is lost or damaged; it is chosen again among the "
            "checkpoints from here on"
        )
        (trainer.checkpointer.folder / "best").unlink(missing_ok=True)
    progress.best, progress.best_step = -math.inf, None


def _count_ranks(ranks: str, settings: RunConfig) -> int:
    if ranks == "auto":
        if settings.training.device in ("auto", "cuda") and torch.cuda.is_available():
            return torch.cuda.device_count()
        if resolve(settings.training.device).type == "mps":
            return 1
        # Each normalises by its own share of a batch, whose statistics are poor of fewer images.
        batch = settings.training.batch_size or USUAL_BATCH
        share, rest = divmod(batch, settings.training.accumulate)
        most = max(1, min(cores(), share // _IMAGES_A_RANK))
        if settings.training.batch_size is None or rest:
            return most
        return max(count for count in range(1, most + 1) if share % count == 0)
    if not ranks.isdigit() or int(ranks) < 1:
        raise UserError(f"--ranks {ranks!r} must be a positive number or auto")
    if int(ranks) > (most := _RANKS_A_CORE * cores()):
        raise UserError(f"--ranks {ranks} is more than this machine bears ({most}): give auto")
    return int(ranks)


def _run_folder(settings: RunConfig, given: Path | None) -> Path:
    """The folder ``given``, or the name of a new one."""
    if given is not None:
        check_folder(given)
        if (given / bundle.WEIGHTS).exists():
            raise UserError(
                f"{given} is a model's folder, whose network would hide the run's: give "
                "--run-folder another one"
            )
        return given
    run = Path(settings.output) / f"{settings.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    if run.exists():
        raise UserError(f"{run} exists already; choose another --name")
    return run


def _own(checkpointer: Checkpointer, owning: ExitStack) -> None:
    """Make the run's folder, keep other processes out and put its checkpoints in order."""
    folder = checkpointer.folder.parent
    owning.enter_context(owned(folder))
    checkpointer.tidy()


def build_trainer(
    run: Path,
    place: World,
    inputs: Inputs,
    teacher: Teacher | None = None,
    found: Checkpoint | None = None,
) -> Trainer:
    """A trainer with its data set, sampler and validation; every rank calls it.

    It stands at step 0, or where the checkpoint ``found`` was written. The training images are
    decoded last, and not for a run that is trained to its end.
    """
    settings = inputs.settings
    training, data = settings.training, settings.data
    assert training.batch_size is not None  # `open_inputs` has decided
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
    trainer = Trainer(
        settings,
        run,
        place,
        dataset,
        sampler,
        inputs.num_classes,
        validate,
        held_out=len(inputs.held_out_indices),
        teacher=teacher,
    )
    trainer.record = _record(inputs, trainer, teacher)
    if found is not None:
        resuming.check_data(run, found, trainer.record, inputs.located.train)
        trainer.resume(found)
    cached = None
    if data.cache != "none" and not trainer.is_done:
        cached = cache_images(dataset, data.cache, place)
        if data.cache == "device" and training.cuda_graph:
            dataset.record()
    if place.is_main:
        _announce(run, place, inputs, trainer, cached)
    return trainer


def _record(inputs: Inputs, trainer: Trainer, teacher: Teacher | None) -> dict[str, Any]:
    """What a resumption must find again."""
    people = resuming.digest(
        inputs.people, inputs.train_indices, inputs.train_labels, inputs.held_out_indices
    )
    return {
        "teacher": None if teacher is None else teacher.fingerprint,
        "settings": configuration.to_dict(inputs.settings),
        "fingerprint": trainer.data_fingerprint,
        "people": people,
    }


def _announce(
    run: Path, place: World, inputs: Inputs, trainer: Trainer, cached: str | None
) -> None:
    settings, chosen = inputs.settings, ", ".join(inputs.chosen)
    parameters = sum(p.numel() for p in trainer.network.parameters())
    lines = [
        f"data       {inputs.located.note}",
        f"           {len(inputs.train_indices):,} images of {inputs.num_classes:,} people; "
        f"{settings.data.validation_people:,} people held out{_aside(settings)}",
        f"cache      {cached}" if cached else None,
        f"backbone   {settings.backbone['name']}, {parameters / 1e6:.2f} M parameters, "
        f"input {trainer.network.preprocessing.size}",
        f"head       {settings.head['name']}",
        _teacher(settings),
        f"schedule   {counted(trainer.total_steps, 'step')} of {settings.training.batch_size} "
        f"images on {counted(place.size, 'rank')}, {place.device.type}",
        f"chosen     {chosen}, for this set and device" if chosen else None,
        "trained    to its end" if trainer.is_done else None,
        _slow(settings, place.device.type),
        *(f"no effect  {key}, with {why}" for key, why in idle_and_changed(settings).items()),
        f"run        {run}",
    ]
    console.show(*filter(None, lines))


def _teacher(settings: RunConfig) -> str | None:
    """Whom the embeddings follow, as a line of its own."""
    teacher = settings.teacher
    labels = f"with labels × {teacher.labels:g}" if teacher.labels else "without labels"
    return f"teacher    {teacher.path} × {teacher.weight:g}, {labels}" if teacher.path else None


def _slow(settings: RunConfig, device: str) -> str | None:
    """A precision whose gradients torch computes on a CPU without its quick kernels."""
    if device != "cpu" or settings.training.autocast != "fp16":
        return None
    return "slow       training.autocast fp16 on a CPU: bf16 or off takes a small part of its time"


def _aside(settings: RunConfig) -> str:
    """What else is special about the data."""
    data = settings.data
    described = f", {data.test_people:,} set aside for test" if data.test_people else ""
    if data.held_out_max_images is not None:
        described += f" (those with more than {data.held_out_max_images:,} images left out)"
    if noise := data.label_noise.share:
        described += f"; {100 * noise:g} % of the labels wrong ({data.label_noise.kind})"
    return described
