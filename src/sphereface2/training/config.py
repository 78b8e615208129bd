"""The typed configuration of a run: dataclasses, filled from YAML and command-line overrides.

One file says all: ``RunConfig`` is stored beside a run's results as ``config.yaml`` and is enough
to repeat it. Ranges are part of the types; what concerns several settings of a section is checked
by the section. Components chosen by name (``backbone``, ``head``) carry the keyword arguments of
the thing they name, which checks them itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
import yaml
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from sphereface2 import backbones, heads
from sphereface2.backbones.preprocessing import as_size
from sphereface2.data.conditions import LabelNoise, Subset
from sphereface2.data.transforms import Augmentation
from sphereface2.errors import UserError, did_you_mean
from sphereface2.files import read_yaml as read_file

Count = Annotated[int, Field(ge=1)]
Size = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
ShareBelowOne = Annotated[float, Field(ge=0, lt=1)]
FalseAcceptRate = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]
"""A path; ``~`` in it is the home folder."""

T = TypeVar("T")


@dataclass
class DataConfig:
    """What to train on and how batches are drawn."""

    train: PathText = "auto"
    """Folder, list, RecordIO or WebDataset; ``auto``: what ``$SPHEREFACE2_DATA`` names."""
    validation_people: Size = 400
    """People split off by label, never trained on; the best checkpoint is chosen on them."""
    test_people: Size = 0
    """People split off likewise whom the run never looks at: for judging several runs
    (``sphereface2 study``) on people that chose neither a checkpoint nor a setting."""
    held_out_max_images: Annotated[int, Field(ge=2)] | None = None
    """Leave the people split off that have more images than this out of validation and test (they
    are not trained on either): a person's pairs grow with the square of the images, and a few
    people with many, from another source than the rest, can decide what a FAR admits."""
    split_seed: Seed = 0
    """Seed of the split, apart from ``seed`` so that seeds share their held-out people."""
    subset: Subset = field(default_factory=Subset)
    label_noise: LabelNoise = field(default_factory=LabelNoise)
    workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    """Loader processes a rank; default 0 on the CPU (its cores train) and 4 with CUDA."""
    max_unreadable: Share = 0.01
    """Share of unreadable images above which the run stops."""
    people_per_batch: Count | None = None
    """With ``images_per_person``: draw P people × K images instead of shuffled images."""
    images_per_person: Count | None = None
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if (self.people_per_batch is None) != (self.images_per_person is None):
            raise UserError(
                "data.people_per_batch and data.images_per_person go together; give both"
            )


@dataclass
class TrainingConfig:
    """The loop: length, optimiser, schedule, precision, checkpoints."""

    epochs: Positive = 12.0
    batch_size: Count = 256
    """Images an optimiser step, over all ranks and accumulation steps."""
    accumulate: Count = 1
    """Forward-backward passes an optimiser step."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.1
    head_lr_multiplier: Positive = 1.0
    momentum: ShareBelowOne = 0.9
    nesterov: bool = False
    weight_decay: NotNegative = 5e-4
    head_weight_decay: NotNegative | None = None
    """Weight decay of the prototypes; default: ``weight_decay``."""
    schedule: Literal["cosine", "step", "polynomial"] = "cosine"
    milestones: list[Share] = field(default_factory=lambda: [0.5, 0.78, 0.94])
    """``step``: shares of the run after which the rate is multiplied by ``gamma``."""
    gamma: Positive = 0.1
    power: NotNegative = 2.0
    """``polynomial``: (1 - share of the run done) ** power."""
    warmup: ShareBelowOne = 0.02
    """Share of the run with a linear warm-up."""
    clip_norm: Positive | None = 5.0
    """Greatest norm of the gradient over all parameters; ``null``: no clipping."""
    clip_embedding_norm: Positive | None = None
    """Greatest norm of the gradient by the batch's embeddings, which goes on into the backbone."""
    fused_head: bool = False
    """Take the prototypes' SGD step while the loss is computed, so that no gradient of their size
    is held (``heads.FusedSGD``); needs ``head.streaming`` or ``head.sharded``."""
    fused_momentum: Literal["full", "bfloat16"] = "full"
    """``fused_head``: how the prototypes' momentum is kept."""
    autocast: Literal["off", "bf16", "fp16"] = "off"
    compile: bool = False
    channels_last: bool = True
    ema: ShareBelowOne = 0.0
    """Decay a step of the weights' exponential moving average, which then is what is evaluated
    and saved as the model; 0: off."""
    device: Text = "auto"
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads a rank; default: the cores divided by the ranks on this machine."""
    checkpoint_every: Count = 200
    """Optimiser steps between checkpoints."""
    log_every: Count = 20
    """Optimiser steps between log lines."""
    max_loss_ratio: Annotated[float, Field(gt=1)] = 10.0
    """Stop as diverging once the smoothed loss exceeds this multiple of its first value."""

    def __post_init__(self) -> None:
        if self.nesterov and not self.momentum:
            raise UserError("training.nesterov needs training.momentum above 0")
        if self.fused_head:
            self._check_fused()

    def _check_fused(self) -> None:
        """What cannot be exact when the prototypes take their step before the backward pass."""
        if self.optimizer != "sgd":
            raise UserError(
                "training.optimizer must be sgd with training.fused_head, which takes SGD steps, "
                f"got {self.optimizer}; set it to sgd or leave fused_head out"
            )
        if self.clip_norm is not None:
            raise UserError(
                f"training.clip_norm must be null with training.fused_head, got {self.clip_norm}: "
                "the prototypes take their step before the norm over all parameters is known; set "
                "training.clip_embedding_norm instead"
            )
        if self.autocast == "fp16":
            raise UserError(
                "training.autocast must be off or bf16 with training.fused_head, got fp16, which "
                "must be able to skip a step that the prototypes have already taken; set it to bf16"
            )
        if self.accumulate > 1:
            raise UserError(
                f"training.accumulate must be 1 with training.fused_head, got {self.accumulate}: "
                "the prototypes take a step with every batch"
            )


@dataclass
class ValidationConfig:
    """Periodic evaluation on the held-out people and on verification sets."""

    every: NotNegative = 3.0
    """Epochs between validations; 0: only at the end."""
    pairs: list[PathText] = field(default_factory=lambda: ["auto"])
    """Verification sets scored at each validation; ``auto``: those that lie with the data."""
    names: PathText | None = None
    """A pairs.txt that names the people of a .bin, for intervals over people."""
    flip: bool = True
    fars: list[FalseAcceptRate] = field(default_factory=lambda: [1e-1, 1e-2, 1e-3, 1e-4])


@dataclass
class RunConfig:
    """Everything that determines a run."""

    __pydantic_config__ = ConfigDict(
        extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True
    )

    name: Text = "run"
    output: PathText = "runs"
    """Folder under which the run gets a folder of its own, NAME-DATE-TIME."""
    seed: Seed = 0
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
        overrides: ``["--training.epochs", "8", "--head.r=64"]``; values are read as YAML, those of
            text settings as they are.

    Raises:
        UserError: unreadable file, unknown key (naming the nearest), wrong type or range.
    """
    tree = {} if path is None else _typed(_read(path, "configuration"), RunConfig)
    given = dict(_parse_overrides(overrides))
    for key, value in given.items():
        assign(tree, key, _typed(value, _hint(RunConfig, key)))
    return from_dict(tree, "the command line" if path is None else str(path), frozenset(given))


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in a YAML file, which messages call a ``what``; an empty file has none."""
    tree: dict[str, Any] = _typed(_read(path, what), None)
    return tree


def from_dict(
    tree: dict[str, Any], where: str = "the configuration", overridden: Iterable[str] = ()
) -> RunConfig:
    """Build and check a ``RunConfig`` from nested plain values.

    Args:
        tree: as YAML gives it.
        where: what messages call its source.
        overridden: settings that come from the command line instead.

    Raises:
        UserError: unknown key (naming the nearest), wrong type or range.
    """
    for section, name in (("backbone", "sfnet20"), ("head", "sphereface2")):
        if isinstance(tree.get(section), dict):
            tree = {**tree, section: {"name": name, **tree[section]}}
    config = validated(RunConfig, tree, where, overridden)
    _check_components(config)
    config.data.augmentation = _sized(tree, config)
    return config


@functools.cache
def _adapter(section: Any) -> TypeAdapter[Any]:
    return TypeAdapter(section)


def validated(
    section: type[T], tree: dict[str, Any], where: str, overridden: Iterable[str] = ()
) -> T:
    """The dataclass ``section`` made of nested plain values.

    Raises:
        UserError: the first thing that is wrong: the setting, what was expected, what was given
            and where.
    """
    try:
        settings: T = _adapter(section).validate_python(tree)  # type: ignore[arg-type]
        return settings
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, UserError):
            raise cause from error
        if key in overridden:
            where = "the command line"
        if first["type"] == "unexpected_keyword_argument":
            *parents, name = first["loc"]
            known = _fields(_inner(section, parents))
            raise UserError(
                f"unknown setting {key} in {where}{did_you_mean(name, known)}; "
                f"known: {', '.join(sorted(known))}"
            ) from error
        raise UserError(
            f"{key} {_expected(first)}, got {shown(first['input'])} in {where}"
        ) from error


def _expected(error: Any) -> str:
    """What pydantic wants, as the end of a sentence about the setting."""
    kinds = {
        "missing": "must be given",
        "dataclass_type": "must be a section of settings",
        "dict_type": "must be a section of settings",
        "list_type": "must be a list, such as [1, 2]",
        "string_type": "must be text",
        "string_too_short": "must not be empty",
    }
    if error["type"] in kinds:
        return kinds[error["type"]]
    message: str = error["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    return message[0].lower() + message[1:]


def shown(value: Any) -> str:
    """A setting's value in a message, as YAML writes it."""
    try:
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    except yaml.YAMLError:  # no value that YAML has
        text = repr(value)
    text = text.removesuffix("\n").removesuffix("\n...")
    return text if len(text) <= 60 else text[:59] + "…"


def head_options(config: RunConfig) -> tuple[dict[str, Any], bool]:
    """``heads.build``'s arguments in ``config.head``, and whether the head is to be sharded."""
    options = dict(config.head)
    sharded = options.pop("sharded", False)
    if not isinstance(sharded, bool):
        raise UserError(f"head.sharded must be true or false, got {shown(sharded)}")
    if sharded:
        options["streaming"] = True
    return options, sharded


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested values, as stored in ``config.yaml``."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    """YAML text that ``load`` reads back as an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


class _Scalar(NamedTuple):
    """A value and the text that it was read from, which is the value of a text setting."""

    text: str
    value: Any


class _Loader(yaml.SafeLoader):
    """Keeps the text of values; YAML 1.1 reads ``5e-4`` as text, people write it as a number."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep=deep)
        if isinstance(node, yaml.ScalarNode) and not isinstance(value, str):
            return _Scalar(node.value, value)
        return value


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _read(path: Path, what: str) -> dict[str, Any]:
    loaded = read_file(path, _Loader)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UserError(f"the {what} {path} must be a mapping of settings, such as 'seed: 1'")
    return loaded


def _typed(value: Any, hint: Any) -> Any:
    """Plain values for what `_Loader` gave: texts where ``hint``, a type, wants text."""
    if isinstance(value, _Scalar):
        wants_text = str in _alternatives(hint) and value.value is not None
        return value.text if wants_text else _typed(value.value, hint)
    if isinstance(value, dict):
        known = _fields(hint)
        keys = {key: key.text if isinstance(key, _Scalar) else key for key in value}
        return {name: _typed(value[key], known.get(name)) for key, name in keys.items()}
    if isinstance(value, list):
        element = next((get_args(one)[0] for one in _alternatives(hint) if get_args(one)), None)
        return [_typed(item, element) for item in value]
    return value


def _alternatives(hint: Any) -> Iterator[Any]:
    """The types that a hint allows; ``str`` too for a choice of texts."""
    if get_origin(hint) is Literal:
        yield type(get_args(hint)[0])
    elif get_origin(hint) in (Union, UnionType):
        for one in get_args(hint):
            yield from _alternatives(one)
    else:
        yield hint


def _fields(hint: Any) -> Mapping[str, Any]:
    """The settings of a section and their types; the name alone of a component's."""
    if dataclasses.is_dataclass(hint):
        return _hints(hint)  # type: ignore[arg-type]
    return {"name": str} if get_origin(hint) is dict else {}


@functools.cache
def _hints(section: Any) -> dict[str, Any]:
    return get_type_hints(section)


def _hint(section: Any, key: str) -> Any:
    """The type of ``section.key``; None where there is no such setting."""
    for part in key.split("."):
        section = _fields(section).get(part)
    return section


def _inner(hint: Any, path: Sequence[Any]) -> Any:
    """The type of what lies at ``path`` within a section."""
    for part in path:
        hint = _fields(hint).get(part) or next(iter(get_args(hint)[-1:]), None)
    return hint


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
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, RecursionError, ValueError):
            value = text  # what a text setting may be, and no other
        while isinstance(value, _Scalar):
            value = value.value
        yield key.replace("-", "_"), _Scalar(text, value)


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


def _sized(tree: dict[str, Any], config: RunConfig) -> Augmentation:
    """The augmentation with the backbone's input size, which it must agree with if it is given."""
    height, width = as_size(config.backbone.get("input_size", 112))
    if height != width:
        raise UserError(
            f"backbone.input_size must be one side, as training takes square images, got "
            f"{height} × {width}"
        )
    given = tree.get("data", {}).get("augmentation", {}).get("size")
    if given not in (None, height):
        raise UserError(
            f"data.augmentation.size must be backbone.input_size, {height}, got {given}; leave it "
            "out"
        )
    return dataclasses.replace(config.data.augmentation, size=height)


def _check_components(config: RunConfig) -> None:
    """Build the named components, without memory or tiny, so that they check themselves."""
    for section, options in (("backbone", config.backbone), ("head", config.head)):
        try:
            if section == "backbone":
                _check_backbone(json.dumps(options))
            else:
                _check_head(config)
        except UserError as error:
            dot = "." if str(error).split()[0] in options else ": "
            raise UserError(f"{section}{dot}{error}") from error
        except TypeError as error:
            raise UserError(f"{section} has an option of the wrong type: {error}") from error


@functools.lru_cache
def _check_backbone(text: str) -> None:
    """Once for equal options, JSON: a study has hundreds of runs of one backbone."""
    options = json.loads(text)
    backbones.parameters(options["name"])
    as_size(options.get("input_size", 112))
    if options["name"] in backbones.available():
        with torch.device("meta"):
            backbones.build(**options)


def _check_head(config: RunConfig) -> None:
    options, sharded = head_options(config)
    head = heads.build(embedding_dim=2, num_classes=2, **options)
    if sharded and "process_group" not in head.scaling:
        raise UserError(f"sharded must be false: {options['name']} cannot be sharded")
    if config.training.fused_head:
        heads.FusedSGD(head, lr=1.0)
    elif options.get("weight_dtype") == "bfloat16":
        raise UserError(
            "weight_dtype bfloat16 would lose small steps to rounding; set training.fused_head to "
            "true, which rounds stochastically, or leave it out"
        )
