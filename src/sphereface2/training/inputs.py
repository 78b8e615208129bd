"""The data of a run: found, opened, split, and what its size decides."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from sphereface2.data.conditions import choose, corrupt
from sphereface2.data.locate import TrainingData, locate
from sphereface2.data.opening import is_bin, load_pairs, open_source
from sphereface2.data.pairs import PairSet
from sphereface2.data.source import Source
from sphereface2.data.split import default_validation_people, split_people
from sphereface2.device import faster_in_bf16
from sphereface2.errors import UserError, counted
from sphereface2.training import resuming
from sphereface2.training.config import DataConfig, RunConfig, TrainingConfig
from sphereface2.training.distributed import World

USUAL_BATCH = 256  # images a step where none are asked for
_STEPS_AN_EPOCH = 10


@dataclass
class Inputs:
    """The data of a run, opened, and its settings with what was left to the data to decide."""

    settings: RunConfig
    chosen: list[str]
    """What the data and the device decided, for people."""
    source: Source
    train_indices: np.ndarray
    held_out_indices: np.ndarray
    test_indices: np.ndarray
    train_labels: np.ndarray
    """int64, the class of each training image, in [0, num_classes)."""
    num_classes: int
    people: dict[str, list[Any]]
    """Who the classes are and who is held out, see `resuming.people`."""
    pairs: list[PairSet]
    located: TrainingData

    def record(self, fingerprint: str) -> dict[str, Any]:
        """What ``environment.json`` says of the data, whose source has that fingerprint."""
        return {
            "kind": self.located.kind,
            "train": str(self.located.train.absolute()),
            "fingerprint": fingerprint,
            "images": len(self.train_indices),
            "people": self.num_classes,
            "synthetic": self.located.is_synthetic,
        }


def open_inputs(settings: RunConfig, place: World, source: Source | None = None) -> Inputs:
    """Find the data, open it unless ``source`` is it, and set the validation people aside.

    Every rank calls it.
    """
    data = settings.data
    located = locate(data.train)
    source = source or open_source(located.train)
    chosen = []
    if data.validation_people is None:
        count = default_validation_people(source)
        data = dataclasses.replace(data, validation_people=count)
        chosen.append(f"data.validation_people {count}")
    split = split_people(
        source,
        data.validation_people or 0,
        data.split_seed,
        test_people=data.test_people,
        max_images=data.held_out_max_images,
    )
    labels = np.asarray(source.labels)
    train = split.train[choose(labels[split.train], data.subset)]
    people, classes = np.unique(labels[train], return_inverse=True)
    if len(people) < 2:
        raise UserError(_too_few(data, located.train, len(people), len(np.unique(labels))))
    paths = [Path(p) for p in settings.validation.pairs if p != "auto"]
    if "auto" in settings.validation.pairs:
        paths = [*located.pairs, *paths]
    names = Path(settings.validation.names) if settings.validation.names else located.names
    if len(np.unique(labels[split.validation])) == 1:
        raise UserError(
            f"data.validation_people = {data.validation_people} must be 0 or 2 and more, as one "
            "person makes no impostor pair"
        )
    training = _with_batch_size(settings, place, len(train), len(people))
    if training is not settings.training:
        chosen.append(f"training.batch_size {training.batch_size}")
    if training.autocast == "auto":
        # One precision on all ranks: Muon's steps would be others on others, and weights drift.
        everywhere = all(place.gather(faster_in_bf16(place.device)))
        autocast: Literal["bf16", "off"] = "bf16" if everywhere else "off"
        training = dataclasses.replace(training, autocast=autocast)
        chosen.append(f"training.autocast {autocast}")
    inputs = Inputs(
        settings=dataclasses.replace(settings, data=data, training=training),
        chosen=chosen,
        source=source,
        train_indices=train,
        held_out_indices=split.validation,
        test_indices=split.test,
        train_labels=corrupt(classes, data.label_noise),
        num_classes=len(people),
        people=resuming.people(
            labels,
            source.class_names,
            {"train": train, "validation": split.validation, "test": split.test},
        ),
        pairs=[load_pairs(path, names=names if is_bin(path) else None) for path in paths],
        located=located,
    )
    _check_same(inputs, place)
    return inputs


def _check_same(inputs: Inputs, place: World) -> None:
    """Raise a UserError, alike on all ranks, where they have opened different data."""
    own = (
        resuming.digest(
            inputs.people, inputs.train_indices, inputs.train_labels, inputs.held_out_indices
        ),
        [len(one) for one in inputs.pairs],
        f"{len(inputs.source):,} images of {inputs.source.num_classes:,} people in "
        f"{inputs.located.train.absolute()} and {counted(len(inputs.pairs), 'verification set')}",
    )
    first, *others = place.gather(own)
    for rank, other in enumerate(others, 1):
        if other[:2] != first[:2]:
            raise UserError(
                f"the ranks of a run must read the same data, and rank 0 has {first[2]}, rank "
                f"{rank} {other[2]}: copy the set to all nodes again"
            )


def _too_few(data: DataConfig, train: Path, people: int, all_of_them: int) -> str:
    """Why there is nothing to tell apart."""
    if all_of_them < 2:
        remedy = f"{train} has {all_of_them}: give a set of more, such as a folder of each person"
    else:
        remedy = (
            f"of the {all_of_them:,} in {train} {people} would be left: lower "
            "data.validation_people and data.test_people, or loosen data.subset"
        )
    return f"training needs images of two people or more, and {remedy}"


def _with_batch_size(settings: RunConfig, place: World, images: int, people: int) -> TrainingConfig:
    """The settings of the training with a batch size, which must suit so many images and people."""
    training, data = settings.training, settings.data
    share = place.size * training.accumulate
    if (data.people_per_batch or 0) > people:
        raise UserError(
            f"data.people_per_batch = {data.people_per_batch} must be at most the number of people "
            f"trained on, {people}"
        )
    if training.batch_size is None:
        if data.people_per_batch and data.images_per_person:
            batch = data.people_per_batch * data.images_per_person * training.accumulate
        else:
            fits = 2 ** int(math.log2(max(images / _STEPS_AN_EPOCH, 1)))
            # Two images a pass at the least, which batch normalisation needs.
            batch = max(min(USUAL_BATCH, fits) // share, 2) * share
        training = dataclasses.replace(training, batch_size=batch)
    elif training.batch_size > images and not data.people_per_batch:
        raise UserError(
            f"training.batch_size = {training.batch_size} must be at most the number of training "
            f"images, {images}: lower it or leave it out"
        )
    if (training.batch_size or 0) % share:
        raise UserError(
            f"training.batch_size = {training.batch_size} must be a multiple of ranks × "
            f"training.accumulate = {share}"
        )
    return training
