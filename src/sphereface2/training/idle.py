"""Settings that have no effect beside others: refused where they are asked for, else told."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from sphereface2 import heads
from sphereface2.errors import UserError
from sphereface2.training import sections
from sphereface2.training.config import RunConfig, to_dict

_NEEDS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("training", "muon_linear muon_lr", ("optimizer", "muon")),
    ("training", "momentum nesterov", ("optimizer", "sgd", "muon")),
    ("training", "milestones gamma", ("schedule", "step")),
    ("training", "power", ("schedule", "polynomial")),
    ("training", "fused_momentum", ("fused_head",)),
    ("training", "prototypes", ("start_from",)),
    ("sample_to_sample", "s m begin", ("weight",)),
    ("data.label_noise", "kind seed", ("share",)),
    ("data.augmentation", "rotation scale", ("affine",)),
    ("data.augmentation", "crop_pad", ("crop",)),
    ("data.augmentation", "yaw_degrees", ("yaw",)),
    ("data.augmentation", "low_resolution_min", ("low_resolution",)),
    ("data.augmentation", "light_ambient", ("light",)),
    ("data.augmentation", "brightness contrast saturation", ("photometric",)),
    ("data.augmentation", "jpeg_quality", ("jpeg",)),
    ("data.augmentation", "erase_area", ("erase",)),
    ("head", "negative_share", ("negatives", "uniform", "hard")),
)
"""Settings of a section, and the one that they need with the values that it may have; none: any
but false, 0 and null."""


def idle(settings: RunConfig) -> dict[str, str]:
    """The settings that have no effect, given or not, each with what is the reason."""
    flat = {"head.negatives": "all"} | flattened(to_dict(settings))
    found = {}
    for section, names, (other, *values) in _NEEDS:
        value = flat.get(f"{section}.{other}")
        if not (value in values if values else value):
            for name in names.split():
                found[f"{section}.{name}"] = f"{section}.{other} {sections.shown(value)}"
    return found | dict(_idle_otherwise(settings))


def _idle_otherwise(settings: RunConfig) -> Iterator[tuple[str, str]]:
    between, teacher, data = settings.sample_to_sample, settings.teacher, settings.data
    epochs = settings.training.epochs
    if between.begin >= epochs:
        yield (
            "sample_to_sample.weight",
            f"training.epochs {epochs:g} and sample_to_sample.begin {between.begin:g}",
        )
    if not teacher.weight and teacher.prototypes == "random":
        yield "teacher.path", "teacher.weight 0"
    if data.validation_people == 0:
        yield "validation.conditions", "data.validation_people 0"
        if not data.test_people:
            yield "data.held_out_max_images", "data.validation_people 0"


def idle_and_changed(settings: RunConfig) -> dict[str, str]:
    """Those of `idle` that are not as they are by default."""
    given, usual = flattened(to_dict(settings)), flattened(to_dict(RunConfig()))
    head = heads.defaults(settings.head["name"])
    usual |= {f"head.{name}": value for name, value in head.items()}
    return {
        key: why
        for key, why in idle(settings).items()
        if key in given and given[key] != usual.get(key)
    }


def check_asked(settings: RunConfig, asked: Iterable[str]) -> None:
    """UserError if a setting that the command line changes has no effect; ``asked``: its keys."""
    keys = list(asked)
    for key, why in idle_and_changed(settings).items():
        if any(f"{key}.".startswith(f"{one}.") for one in keys):
            raise UserError(f"{key} would have no effect with {why}: leave it out, or change that")


def flattened(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The plain values of nested settings by their full names, with the head's defaults."""
    flat: dict[str, Any] = {}
    if prefix == "head.":
        tree = heads.defaults(tree["name"]) | {"sharded": False} | tree
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.loads(json.dumps(value))
    return flat
