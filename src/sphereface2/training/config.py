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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import ConfigDict, Field

from sphereface2 import backbones, heads
from sphereface2.backbones import bundle
from sphereface2.backbones.preprocessing import as_size
from sphereface2.data.conditions import LabelNoise, Subset
from sphereface2.data.hardening import hardenings
from sphereface2.data.transforms import Augmentation
from sphereface2.errors import UserError
from sphereface2.heads import SampleToSampleConfig
from sphereface2.training import sections
from sphereface2.training.sections import (
    Count,
    FalseAcceptRate,
    FolderName,
    NotNegative,
    PathText,
    Positive,
    Seed,
    Share,
    ShareBelowOne,
    Size,
    Text,
)


@dataclass
class DataConfig:
    """What to train on and how batches are drawn."""

    train: PathText = "auto"
    """Folder, list, RecordIO or WebDataset; ``auto``: what ``$SPHEREFACE2_DATA`` names."""
    validation_people: Size | None = None
    """People split off by label, never trained on; the best checkpoint is chosen on them, and the
    model calibrated. Default: a tenth of the people with two images or more, at most 400."""
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
    cache: Literal["none", "ram", "device"] = "none"
    """Where images are kept once they are decoded: ``ram``, shared by the loader processes and
    ranks of a machine, or ``device``, where they are augmented too (images of one size)."""
    max_unreadable: Share = 0.01
    """Share of unreadable images above which the run stops."""
    people_per_batch: Count | None = None
    """With ``images_per_person``: draw P people × K images instead of shuffled images."""
    images_per_person: Count | None = None
    """With ``people_per_batch``."""
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if (self.people_per_batch is None) != (self.images_per_person is None):
            raise UserError(
                "data.people_per_batch and data.images_per_person go together; give both"
            )
        if self.people_per_batch and self.augmentation.alternate_flip:
            raise UserError(
                "data.augmentation.alternate_flip must be false with data.people_per_batch, by "
                "which an image may stand in a batch several times; leave it out"
            )
        if self.cache == "device" and self.workers:
            raise UserError(
                f"data.workers must be 0 with data.cache device, got {self.workers}: batches are "
                "made on the device; leave it out"
            )


_DEMANDS: dict[str, tuple[tuple[str, tuple[Any, ...], str], ...]] = {
    "cuda_graph": (
        ("autocast", ("off", "bf16", "auto"), "the host asks whether a step in fp16 overflowed"),
        ("optimizer", ("sgd", "muon"), "the host counts AdamW's steps"),
        ("accumulate", (1,), "a step of one pass is recorded"),
    ),
    # The prototypes take their step before the backward pass.
    "fused_head": (
        ("optimizer", ("sgd", "muon"), "the prototypes take SGD's steps"),
        ("clip_norm", (None,), "it comes after their step; see training.clip_embedding_norm"),
        ("autocast", ("off", "bf16", "auto"), "a step in fp16 may have to be undone"),
        ("accumulate", (1,), "they take a step with every batch"),
    ),
}
"""What a setting demands of others: their names, allowed values, and why."""


@dataclass
class TrainingConfig:
    """The loop: length, optimiser, schedule, precision, checkpoints."""

    start_from: PathText | None = None
    """Run, model folder or hub id whose network the training starts from (fine-tuning), with its
    architecture and preprocessing, which need not be given; ``null``: from random weights."""
    prototypes: Literal["imprinted", "kept", "random"] = "imprinted"
    """``start_from``: where the head starts. ``imprinted``: each person at the mean embedding of
    the person's training images; ``kept``: those whom the run of ``start_from`` trained on, by
    name, where it left them, the others imprinted; ``random``: as without ``start_from``."""
    freeze: list[Text] = field(default_factory=list)
    """Parts of the backbone that keep their weights, by the beginning of their names, such as
    ``stages.0`` or ``layer1``."""
    freeze_batch_norm: bool = False
    """Batch normalisation keeps its statistics, scales and shifts: for few images a person."""
    lr_factors: dict[str, Positive] = field(default_factory=dict)
    """Factors on the rate of parts of the backbone, by the beginning of their names, such as
    ``{stages.0: 0.1, stages: 0.3}``; the longest beginning counts."""
    epochs: Positive = 12.0
    """Passes over the training images; may be a fraction."""
    batch_size: Count | None = None
    """Images an optimiser step, over all ranks and accumulation steps. Default: 256, and fewer for
    a small set, so that an epoch has ten steps."""
    accumulate: Count = 1
    """Forward-backward passes an optimiser step."""
    optimizer: Literal["sgd", "adamw", "muon"] = "sgd"
    """``muon``: the convolutions' filters by `training.muon.Muon`, all else by SGD."""
    lr: Positive = 0.1
    """Learning rate after the warm-up, before the schedule lowers it."""
    muon_lr: Positive = 0.05
    """``muon``: length of a step of a filter, relative to the filter's, times the schedule."""
    muon_linear: bool = False
    """``muon``: linear layers of the backbone too, whose scale a normalisation must undo."""
    head_lr_multiplier: Positive = 1.0
    """Learning rate of the head, relative to ``lr``."""
    momentum: ShareBelowOne = 0.9
    """Of SGD and Muon."""
    nesterov: bool = False
    """Nesterov's momentum; SGD."""
    weight_decay: NotNegative = 5e-4
    """L2 penalty of the weights (decoupled with adamw)."""
    head_weight_decay: NotNegative | None = None
    """Weight decay of the prototypes; default: ``weight_decay``."""
    schedule: Literal["cosine", "step", "polynomial"] = "cosine"
    """How the learning rate falls."""
    milestones: list[Share] = field(default_factory=lambda: [0.5, 0.78, 0.94])
    """``step``: shares of the run after which the rate is multiplied by ``gamma``."""
    gamma: Positive = 0.1
    """``step``: factor at each milestone."""
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
    autocast: Literal["off", "bf16", "fp16", "auto"] = "off"
    """Of the backbone's operators (heads take float32); ``auto``: bf16 where it is faster."""
    compile: bool = False
    """Compile the backbone with ``torch.compile``."""
    cuda_graph: bool = False
    """Record a step as a CUDA graph after the first three, and let the host start its kernels
    together: for networks whose kernels take less time than starting them. One GPU, SGD or Muon."""
    channels_last: bool = True
    """Keep images in channels-last memory, the faster layout, where torch's gradients are sound."""
    ema: ShareBelowOne = 0.0
    """Decay a step of the weights' moving average, which is then evaluated and saved; 0: off."""
    device: Text = "auto"
    """``auto``: CUDA or MPS where there is one, else ``cpu``; or a device such as ``cuda:1``."""
    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads a rank; default: its share of the cores, at most ``OMP_NUM_THREADS``."""
    checkpoint_every: Count = 200
    """Optimiser steps between checkpoints."""
    log_similarities: bool = False
    """Log the batch's cosines with its own and other prototypes, the embeddings' norm and how hard
    the loss pulls and pushes, too (`training.similarities`); not with a sharded head."""
    log_every: Count = 20
    """Optimiser steps between log lines."""
    max_loss_ratio: Annotated[float, Field(gt=1)] = 10.0
    """Stop as diverging once the smoothed loss exceeds this multiple of its first value."""

    def __post_init__(self) -> None:
        if self.lr * self.head_lr_multiplier > 1e38:
            raise UserError(
                "training.lr times training.head_lr_multiplier must be ≤ 1e38, got "
                f"{self.lr * self.head_lr_multiplier:g}"
            )
        if self.nesterov and not self.momentum:
            raise UserError("training.nesterov needs training.momentum above 0")
        for by, rules in _DEMANDS.items():
            for name, allowed, why in rules if getattr(self, by) else ():
                if (value := getattr(self, name)) not in allowed:
                    wanted = " or ".join("null" if one is None else str(one) for one in allowed)
                    raise UserError(
                        f"training.{name} must be {wanted} with training.{by}, got {value}: {why}; "
                        f"change it or leave {by} out"
                    )


@dataclass
class TeacherConfig:
    """Distillation: embeddings follow a teacher's, see `training.teacher`."""

    path: PathText | None = None
    """The teacher: a table that ``sphereface2 embed`` made of the training set (Parquet), an npz
    file with ``name`` and ``embedding``, or a model, which embeds the training images first;
    ``null``: none."""
    weight: NotNegative = 1.0
    """Weight of the teacher's loss, the mean of 1 - cosine."""
    labels: NotNegative = 1.0
    """Weight of the head's loss beside it; 0: the labels are not used."""
    prototypes: Literal["random", "start", "fixed"] = "random"
    """``start``: prototypes start at the class means of the teacher's embeddings, which must have
    the dimension of the run's; ``fixed``: they stay there."""


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
    """Add the embedding of the mirror image."""
    fars: list[FalseAcceptRate] = field(default_factory=lambda: [1e-1, 1e-2, 1e-3, 1e-4])
    """False accept rates at which TAR is reported."""
    conditions: list[Text] = field(default_factory=list)
    """Conditions under which the held-out people are scored too, made of their images: ``[all]``,
    or some of ``yaw``, ``low_resolution``, ``light``, ``occlusion``, ``age`` (`data.hardening`)."""

    def __post_init__(self) -> None:
        hardenings(self.conditions)


@dataclass
class RunConfig:
    """Everything that determines a run."""

    __pydantic_config__ = ConfigDict(
        extra="forbid", allow_inf_nan=False, coerce_numbers_to_str=True
    )

    name: FolderName = "run"
    """Of the run; its folder begins with it."""
    output: PathText = "runs"
    """Folder under which the run gets a folder of its own, NAME-DATE-TIME."""
    seed: Seed = 0
    """Of weights, order of images and augmentation."""
    data: DataConfig = field(default_factory=DataConfig)
    backbone: dict[str, Any] = field(default_factory=lambda: {"name": "sfnet20"})
    """``name`` and the keyword arguments of ``backbones.build``."""
    head: dict[str, Any] = field(default_factory=lambda: {"name": "sphereface2"})
    """``name`` and the keyword arguments of ``heads.build``; ``sharded: true`` splits the
    prototypes over the ranks."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    sample_to_sample: SampleToSampleConfig = field(default_factory=SampleToSampleConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        if not (self.teacher.weight or self.teacher.labels or self.sample_to_sample.weight):
            raise UserError(
                "teacher.weight, teacher.labels and sample_to_sample.weight are all 0, so that "
                "nothing would be learned: raise one of them"
            )


def load(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file and apply command-line overrides.

    Args:
        path: a YAML mapping of ``RunConfig``'s fields, or None for the defaults.
        overrides: ``["--training.epochs", "8", "--head.r=64"]``; values are read as YAML, those of
            text settings as they are.

    Raises:
        UserError: unreadable file, unknown key (naming the nearest), wrong type or range.
    """
    tree, given = read(path, overrides)
    return from_dict(tree, "the command line" if path is None else str(path), given)


def read(path: Path | None, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], frozenset[str]]:
    """The settings that are given, as nested plain values, and those that `overrides` gave."""
    tree = {} if path is None else sections.read(path, "configuration", RunConfig)
    given = dict(sections.parse(overrides, RunConfig))
    sections.override(tree, given)
    return tree, frozenset(given)


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
    config = sections.validated(RunConfig, tree, where, overridden)
    _check_components(config)
    _check_prototypes(config)
    config.data.augmentation = _sized(tree, config, frozenset(overridden))
    return config


def head_options(config: RunConfig) -> tuple[dict[str, Any], bool]:
    """``heads.build``'s arguments in ``config.head``, and whether the head is to be sharded."""
    options = dict(config.head)
    sharded = options.pop("sharded", False)
    if not isinstance(sharded, bool):
        raise UserError(f"head.sharded must be true or false, got {sections.shown(sharded)}")
    if sharded:
        options["streaming"] = True
    return options, sharded


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain nested values, as stored in ``config.yaml``."""
    return dataclasses.asdict(config)


def dump(config: RunConfig) -> str:
    """YAML text that ``load`` reads back as an equal configuration."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def _sized(tree: dict[str, Any], config: RunConfig, overridden: frozenset[str]) -> Augmentation:
    """The augmentation with the backbone's input size, which it must agree with if it is given."""
    height, width = as_size(config.backbone.get("input_size", 112))
    if height != width:
        raise UserError(
            f"backbone.input_size must be one side, as training takes square images, got "
            f"{height} × {width}"
        )
    given = tree.get("data", {}).get("augmentation", {}).get("size")
    if "backbone.input_size" in overridden and "data.augmentation.size" not in overridden:
        given = None  # of a file that was written when it agreed
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
        except RuntimeError as error:  # of torch, though the tensors take no memory here
            raise UserError(f"{section} is too large for any machine: {error}") from error


@functools.lru_cache
def _check_backbone(text: str) -> None:
    """Once for equal options, JSON: a study has hundreds of runs of one backbone."""
    options = json.loads(text)
    backbones.parameters(options["name"])
    as_size(options.get("input_size", 112))
    if options["name"] in backbones.available():
        with torch.device("meta"), bundle.uninitialised():
            backbones.build(**options)


def _check_head(config: RunConfig) -> None:
    options, sharded = head_options(config)
    if sharded and "process_group" not in heads.parameters(options["name"]):
        raise UserError(f"sharded must be false: {options['name']} cannot be sharded")
    heads.check_settings(**options)
    head = heads.build(embedding_dim=2, num_classes=2, **options)
    if sharded and config.training.autocast == "fp16":
        raise UserError(
            "sharded must be false with training.autocast fp16, whose scaler knows no sharded "
            "gradients: give training.autocast bf16"
        )
    if sharded and config.training.log_similarities:
        raise UserError("training.log_similarities must be false with head.sharded true")
    if config.training.fused_head:
        heads.FusedSGD(head, lr=1.0)
    if config.training.cuda_graph and head.asks_host:
        raise UserError(
            f"{head.asks_host} with training.cuda_graph, where the host knows nothing of a step; "
            "change it or leave cuda_graph out"
        )
    if not config.training.fused_head and options.get("weight_dtype") == "bfloat16":
        raise UserError(
            "weight_dtype bfloat16 would lose small steps to rounding; set training.fused_head to "
            "true, which rounds stochastically, or leave it out"
        )


def _check_prototypes(config: RunConfig) -> None:
    """UserError where two settings would place or move the prototypes, of which one would win."""
    teacher, training = config.teacher, config.training
    if training.fused_head and teacher.prototypes == "fixed":
        raise UserError(
            "teacher.prototypes must not be fixed with training.fused_head, whose steps move them: "
            "set it to start or leave fused_head out"
        )
    if training.fused_head and teacher.labels not in (0, 1):
        raise UserError(
            f"teacher.labels must be 0 or 1 with training.fused_head, got {teacher.labels:g}: the "
            "prototypes take their step before the loss is weighted; change teacher.weight instead"
        )
    if training.start_from and "random" not in (teacher.prototypes, training.prototypes):
        raise UserError(
            f"training.prototypes {training.prototypes} and teacher.prototypes "
            f"{teacher.prototypes} both say where the head starts: set one of them to random"
        )
