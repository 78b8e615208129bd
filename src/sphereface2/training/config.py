"""The typed configuration of a run: dataclasses, filled from YAML and command-line overrides.

One file says all: ``RunConfig`` is stored beside a run's results as ``config.yaml`` and is enough
to repeat it. Components chosen by name (``backbone``, ``head``) carry the keyword arguments of the
thing they name, checked against its signature. An unknown key is an error that suggests the
nearest known one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

import torch
import yaml
from pydantic import TypeAdapter, ValidationError

from sphereface2 import backbones, heads
from sphereface2.data.conditions import LabelNoise, Subset
from sphereface2.data.transforms import Augmentation
from sphereface2.errors import UserError, did_you_mean

T = TypeVar("T")


@dataclass
class DataConfig:
    """What to train on and how batches are drawn."""

    train: str = "auto"
    """Folder, list, RecordIO or WebDataset; ``auto`` finds one (see ``data.locate``)."""
    validation_people: int = 400
    """People split off by label, never trained on; the best checkpoint is chosen on them."""
    test_people: int = 0
    """People split off likewise whom the run never looks at: for judging several runs
    (``sphereface2 study``) on people that chose neither a checkpoint nor a setting."""
    held_out_max_images: int | None = None
    """Leave the people split off that have more images than this out of validation and test (they
    are not trained on either): a person's pairs grow with the square of the images, and a few
    people with many, from another source than the rest, can decide what a FAR admits."""
    split_seed: int = 0
    """Seed of the split, apart from ``seed`` so that seeds share their held-out people."""
    subset: Subset = field(default_factory=Subset)
    label_noise: LabelNoise = field(default_factory=LabelNoise)
    workers: int | None = None
    """Loader processes a rank; default 0 on the CPU (its cores train) and 4 with CUDA."""
    max_unreadable: float = 0.01
    """Share of unreadable images above which the run stops, in [0, 1]."""
    people_per_batch: int | None = None
    """With ``images_per_person``: draw P people × K images instead of shuffled images."""
    images_per_person: int | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)


@dataclass
class TrainingConfig:
    """The loop: length, optimiser, schedule, precision, checkpoints."""

    epochs: float = 12.0
    batch_size: int = 256
    """Images an optimiser step, over all ranks and accumulation steps."""
    accumulate: int = 1
    """Forward-backward passes an optimiser step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = 0.1
    head_lr_multiplier: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    head_weight_decay: float | None = None
    """Weight decay of the prototypes; default: ``weight_decay``."""
    schedule: Literal["cosine", "step", "polynomial"] = "cosine"
    milestones: list[float] = field(default_factory=lambda: [0.5, 0.78, 0.94])
    """``step``: shares of the run after which the rate is multiplied by ``gamma``."""
    gamma: float = 0.1
    power: float = 2.0
    """``polynomial``: (1 - share of the run done) ** power."""
    warmup: float = 0.02
    """Share of the run with a linear warm-up."""
    clip_norm: float | None = 5.0
    """Greatest norm of the gradient over all parameters; ``null``: no clipping."""
    clip_embedding_norm: float | None = None
    """Greatest norm of the gradient by the batch's embeddings, which goes on into the backbone."""
    fused_head: bool = False
    """Take the prototypes' SGD step while the loss is computed, so that no gradient of their size
    is held (``heads.FusedSGD``); needs ``head.streaming`` or ``head.sharded``."""
    fused_momentum: Literal["full", "bfloat16"] = "full"
    """``fused_head``: how the prototypes' momentum is kept."""
    autocast: Literal["off", "bf16", "fp16"] = "off"
    compile: bool = False
    channels_last: bool = True
    ema: float = 0.0
    """Decay a step of the weights' exponential moving average, which then is what is evaluated
    and saved as the model; 0: off."""
    device: str = "auto"
    threads: int | None = None
    """CPU threads a rank; default: the cores divided by the ranks on this machine."""
    checkpoint_every: int = 200
    """Optimiser steps between checkpoints."""
    log_every: int = 20
    """Optimiser steps between log lines."""
    max_loss_ratio: float = 10.0
    """Stop as diverging once the smoothed loss exceeds this multiple of its first value."""


@dataclass
class ValidationConfig:
    """Periodic evaluation on the held-out people and on verification sets."""

    every: float = 3.0
    """Epochs between validations; 0: only at the end."""
    pairs: list[str] = field(default_factory=lambda: ["auto"])
    """Verification sets scored at each validation; ``auto``: those that lie with the data."""
    names: str | None = None
    """A pairs.txt that names the people of a .bin, for intervals over people."""
    flip: bool = True
    fars: list[float] = field(default_factory=lambda: [1e-1, 1e-2, 1e-3, 1e-4])


@dataclass
class RunConfig:
    """Everything that determines a run."""

    name: str = "run"
    output: str = "runs"
    """Folder under which the run gets a folder of its own, NAME-DATE-TIME."""
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    backbone: dict[str, Any] = field(default_factory=lambda: {"name": "sfnet20"})
    """``name`` and the keyword arguments of ``backbones.build``."""
    head: dict[str, Any] = field(default_factory=lambda: {"name": "sphereface2"})
    """``name`` and the keyword arguments of ``heads.build``; ``sharded: true`` splits the
    prototypes over the ranks."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)


def load(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply command-line overrides.

    Args:
        path: a YAML mapping of ``RunConfig``'s fields, or None for the defaults.
        overrides: ``["--training.epochs", "8", "--head.r=64"]``; values are read as YAML.

    Raises:
        UserError: unreadable file, unknown key (naming the nearest), wrong type or range.
    """
    tree: dict[str, Any] = {}
    where = "the command line"
    if path is not None:
        where = str(path)
        tree = read_yaml(path, "configuration")
    for key, value in _parse_overrides(overrides):
        assign(tree, key, value)
    return from_dict(tree, where)


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file, which messages call a ``what``; an empty file has none."""
    try:
        loaded = yaml.load(path.read_text(), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise UserError(f"cannot read the {what} {path}: {reason}") from error
    except yaml.YAMLError as error:
        line = str(error).replace("\n", " ")
        raise UserError(f"{path} is not valid YAML: {line}") from error
    if loaded is not None and not isinstance(loaded, dict):
        raise UserError(f"{path} must hold a mapping of settings, found a {type(loaded)}")
    return loaded or {}


@functools.cache
def _adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def from_dict(tree: dict[str, Any], where: str = "the configuration") -> RunConfig:
    """Build and check a ``RunConfig`` from nested plain values."""
    _check_keys(RunConfig, tree, prefix="", where=where)
    for section, name in (("backbone", "sfnet20"), ("head", "sphereface2")):
        if isinstance(tree.get(section), dict):
            tree = {**tree, section: {"name": name, **tree[section]}}
    config = validated(_adapter(), tree, where)
    config.data.augmentation = _sized(tree, config)
    _check_components(config)
    _check_ranges(config)
    return config


def validated(adapter: TypeAdapter[T], tree: dict[str, Any], where: str) -> T:
    """What ``adapter`` makes of nested plain values.

    Raises:
        UserError: the first thing that is wrong, of ``where``.
    """
    try:
        return adapter.validate_python(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        value = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise UserError(f"{key}{value} in {where}: {reason}") from error


def head_options(config: RunConfig) -> tuple[dict[str, Any], bool]:
    """``heads.build``'s arguments in ``config.head``, and whether the head is to be sharded."""
    options = dict(config.head)
    sharded = options.pop("sharded", False)
    if sharded:
        options["streaming"] = True
    return options, sharded


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested values, as stored in ``config.yaml``."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    """YAML text that ``load`` reads back as an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``5e-4`` as text; people write it as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _parse_overrides(arguments: Sequence[str]) -> Iterable[tuple[str, Any]]:
    words = list(arguments)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}; settings are given as --key value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise UserError(f"--{key} needs a value")
            text = words.pop(0)
        try:
            yield key.replace("-", "_"), yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise UserError(f"the value {text!r} of --{key} cannot be read") from error


def assign(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set ``section.key`` of nested settings.

    Raises:
        UserError: a part of the way is a setting, not a section.
    """
    *parents, leaf = key.split(".")
    for depth, part in enumerate(parents):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UserError(f"--{key}: {'.'.join(parents[: depth + 1])} is not a section")
    tree[leaf] = value


def _check_keys(cls: type, tree: dict[str, Any], prefix: str, where: str) -> None:
    hints = get_type_hints(cls)
    for key, value in tree.items():
        if key not in hints:
            raise UserError(
                f"unknown setting {prefix}{key} in {where}{did_you_mean(key, hints)}; "
                f"known: {', '.join(sorted(hints))}"
            )
        if dataclasses.is_dataclass(hints[key]) and isinstance(value, dict):
            _check_keys(hints[key], value, f"{prefix}{key}.", where)  # type: ignore[arg-type]


def _sized(tree: dict[str, Any], config: RunConfig) -> Augmentation:
    """The augmentation with the backbone's input size, which it must agree with if it is given."""
    side = config.backbone.get("input_size", 112)
    given = tree.get("data", {}).get("augmentation", {}).get("size")
    if isinstance(side, list | tuple):
        if side[0] != side[1]:
            raise UserError(f"backbone.input_size = {side}: training takes square images only")
        side = side[0]
    if given is not None and given != side:
        raise UserError(
            f"data.augmentation.size = {given} contradicts backbone.input_size = {side}; "
            "leave the former out"
        )
    return dataclasses.replace(config.data.augmentation, size=side)


def _check_components(config: RunConfig) -> None:
    """Build the named components, without memory or tiny, so that they check themselves."""
    try:
        backbones.parameters(config.backbone["name"])
        if config.backbone["name"] in backbones.available():
            _check_backbone(json.dumps(config.backbone))
        options, sharded = head_options(config)
        head = heads.build(embedding_dim=2, num_classes=2, **options)
        if sharded and "process_group" not in head.scaling:
            raise ValueError(f"head.sharded: {options['name']} cannot be sharded")
        if config.training.fused_head:
            heads.FusedSGD(head, lr=1.0)
        elif options.get("weight_dtype") == "bfloat16":
            raise ValueError(
                "head.weight_dtype: bfloat16 prototypes would lose their small steps to rounding; "
                "set training.fused_head to true, which rounds stochastically, or leave it out"
            )
    except ValueError as error:
        raise UserError(str(error)) from error
    except TypeError as error:
        raise UserError(f"bad options in {config.backbone} or {config.head}: {error}") from error


@functools.lru_cache
def _check_backbone(options: str) -> None:
    """Once for equal options, JSON: a study has hundreds of runs of one backbone."""
    with torch.device("meta"):
        backbones.build(**json.loads(options))


def _check_ranges(config: RunConfig) -> None:
    training, data, validation = config.training, config.data, config.validation
    rules = [
        ("training.epochs", training.epochs, training.epochs > 0, "above 0"),
        ("training.batch_size", training.batch_size, training.batch_size >= 1, "at least 1"),
        ("training.accumulate", training.accumulate, training.accumulate >= 1, "at least 1"),
        ("training.lr", training.lr, training.lr > 0, "above 0"),
        ("training.momentum", training.momentum, 0 <= training.momentum < 1, "in [0, 1)"),
        ("training.weight_decay", training.weight_decay, training.weight_decay >= 0, "at least 0"),
        ("training.warmup", training.warmup, 0 <= training.warmup < 1, "in [0, 1)"),
        ("training.ema", training.ema, 0 <= training.ema < 1, "in [0, 1)"),
        (
            "training.clip_norm",
            training.clip_norm,
            training.clip_norm is None or training.clip_norm > 0,
            "above 0, or null",
        ),
        (
            "training.clip_embedding_norm",
            training.clip_embedding_norm,
            training.clip_embedding_norm is None or training.clip_embedding_norm > 0,
            "above 0, or null",
        ),
        ("training.threads", training.threads, (training.threads or 1) >= 1, "at least 1"),
        (
            "training.checkpoint_every",
            training.checkpoint_every,
            training.checkpoint_every >= 1,
            "at least 1",
        ),
        ("training.log_every", training.log_every, training.log_every >= 1, "at least 1"),
        ("data.max_unreadable", data.max_unreadable, 0 <= data.max_unreadable <= 1, "in [0, 1]"),
        ("data.validation_people", data.validation_people, data.validation_people >= 0, ">= 0"),
        ("data.test_people", data.test_people, data.test_people >= 0, ">= 0"),
        (
            "data.held_out_max_images",
            data.held_out_max_images,
            data.held_out_max_images is None or data.held_out_max_images >= 2,
            "at least 2, or null",
        ),
        ("data.workers", data.workers, (data.workers or 0) >= 0, "at least 0"),
        ("validation.every", validation.every, validation.every >= 0, "at least 0"),
        (
            "validation.fars",
            validation.fars,
            all(0 < far <= 1 for far in validation.fars),
            "numbers in (0, 1]",
        ),
    ]
    for key, value, good, expected in rules:
        if not good:
            raise UserError(f"{key} = {value!r}: must be {expected}")
    if training.fused_head:
        _check_fused(training)
    if (data.people_per_batch is None) != (data.images_per_person is None):
        raise UserError("data.people_per_batch and data.images_per_person go together; give both")


def _check_fused(training: TrainingConfig) -> None:
    """What cannot be exact when the prototypes take their step before the backward pass."""
    if training.optimizer != "sgd":
        raise UserError(
            f"training.fused_head takes SGD steps; set training.optimizer to sgd, not "
            f"{training.optimizer}, or leave fused_head out"
        )
    if training.clip_norm is not None:
        raise UserError(
            "training.clip_norm needs the norm over all parameters before any takes its step, "
            "which training.fused_head cannot wait for; set training.clip_norm to null and "
            "training.clip_embedding_norm instead"
        )
    if training.autocast == "fp16":
        raise UserError(
            "training.autocast fp16 must be able to skip a step whose gradients overflow, which "
            "training.fused_head has already taken; set training.autocast to bf16"
        )
    if training.accumulate > 1:
        raise UserError(
            "training.fused_head takes a step with every batch and cannot wait for "
            "training.accumulate of them; set training.accumulate to 1"
        )
