"""What must be the same for a run to go on, what may change, and what is recorded of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sphereface2 import backbones, console
from sphereface2.backbones import bundle
from sphereface2.errors import UserError, counted
from sphereface2.files import atomic_write, pointed
from sphereface2.heads.sharding import differences
from sphereface2.training import config as configuration
from sphereface2.training import sections
from sphereface2.training.checkpoint import Checkpoint, Checkpointer
from sphereface2.training.config import RunConfig
from sphereface2.training.distributed import World
from sphereface2.training.idle import flattened, idle
from sphereface2.version import __version__

CONFIG, ENVIRONMENT, PEOPLE = "config.yaml", "environment.json", "people.json"

_FIXED = (
    "seed",
    "output",
    "backbone",
    "head",
    "data.validation_people",
    "data.test_people",
    "data.held_out_max_images",
    "data.split_seed",
    "data.subset",
    "data.label_noise",
    "teacher.prototypes",
    "sample_to_sample",
    "training.optimizer",
    "training.muon_linear",
    "training.fused_head",
    "training.fused_momentum",
    "training.start_from",
    "training.prototypes",
    # An optimiser has a state for what is trained, by its groups.
    "training.freeze",
    "training.freeze_batch_norm",
    "training.lr_factors",
)
# Those that the configuration of every run has had, of whatever version.
_SECTIONS = ("name", "output", "seed", "data", "backbone", "head", "training", "validation")
# Sections without a fixed list of settings.
_OPEN = ("backbone.", "head.", "training.lr_factors.")
# How a head computes, not what.
_HOW = ("streaming", "sharded", "chunk_size")
# What still has an effect when everything is trained.
_AFTERWARDS = (
    "name",
    "validation",
    "data.train",
    "data.workers",
    "data.cache",
    "training.device",
    "training.threads",
)
# What may differ from rank to rank: where things lie, and what a machine has.
_OF_A_RANK = (
    "name",
    "output",
    "data.train",
    "data.workers",
    "teacher.path",
    "training.device",
    "training.start_from",
    "training.threads",
    "validation.names",
    "validation.pairs",
)


def own_settings(run: Path, overrides: Sequence[str], *, opened: bool = False) -> RunConfig:
    """The settings that a run folder holds, changed by ``overrides``.

    Args:
        run: the folder.
        overrides: ``--section.key value`` words.
        opened: whether the caller has the training set, wherever it lies.

    Raises:
        UserError: they are missing, cut, another's, of a version that has other settings, or name
            data by a path relative to another folder.
    """
    path = run / CONFIG
    if not path.is_file():
        raise UserError(f"{path} does not exist, so {run} is no run: give the folder of a run")
    tree = sections.read(path, "run's configuration", RunConfig)
    for section in _SECTIONS:
        if section not in tree:
            raise UserError(
                f"{path} has no {section} and so is not the configuration of a run, or was cut; "
                "restore it from a copy, or start a new run"
            )
    try:
        settings = configuration.load(path, overrides)
    except UserError as error:
        starts = read_environment(run).get("starts") or [{}]
        written = starts[-1].get("packages", {}).get("sphereface2", __version__)
        if written == __version__:
            raise
        raise UserError(
            f"{error}; sphereface2 {written} wrote it and this is {__version__}"
        ) from error
    given = {key for key, _ in sections.parse(overrides, RunConfig)}
    _check_places(run, settings, given | {"data.train"} if opened else given)
    return settings


def _check_places(run: Path, settings: RunConfig, given: set[str]) -> None:
    """Paths that a run's settings give relative to where it was started lead nowhere elsewhere."""
    named = [("data.train", settings.data.train)]
    named += [("validation.names", settings.validation.names or "auto")]
    named += [("validation.pairs", pairs) for pairs in settings.validation.pairs]
    for key, place in named:
        if key in given or place == "auto":
            continue
        if not (Path(place).is_absolute() or Path(place).exists()):
            was = read_environment(run).get("data", {}).get("train", "")
            known = f", then {was}" if key == "data.train" and Path(was).is_absolute() else ""
            raise UserError(
                f"{key} {place} does not exist: {run} names it relative to the folder in which it "
                f"was started{known}; start in that folder, or give --{key} PATH"
            )


def find(checkpointer: Checkpointer, wanted: Path | None, *, strict: bool) -> Checkpoint:
    """The checkpoint to go on from.

    Args:
        checkpointer: the run's.
        wanted: the one that the user names; None: the last.
        strict: do not go on from an older one unless that is asked for.

    Raises:
        UserError: there is none that is whole; with ``strict`` also if a newer one is damaged.
    """
    if wanted is not None and pointed(wanted) is None:
        there = ", ".join(path.name for path in sorted(checkpointer.folder.glob("step-*")))
        raise UserError(f"{wanted} does not exist; the run has {there or 'no checkpoint'}")
    found = checkpointer.find(wanted)
    if found.damaged:
        damage = "; ".join(found.damaged)
        if strict:
            raise UserError(
                f"{damage}; {found.folder.name} is whole: go on from it with --resume "
                f"{found.folder}"
            )
        console.show(f"{damage}; going on from {found.folder.name}, which is whole")
    return found


def left_to_machine(run: Path, found: Checkpoint, settings: RunConfig) -> RunConfig:
    """The settings, and where they leave one to the machine, what the run had until now.

    Unless the machine can never choose that: fp16 has demands that were not checked.
    """
    training, before = settings.training, _settings_of(run, found)["training"].get("autocast")
    if training.autocast == "auto" and before in ("off", "bf16"):
        training = replace(training, autocast=before)
    return replace(settings, training=training)


def _settings_of(run: Path, found: Checkpoint) -> dict[str, Any]:
    """What a run was trained by; version 0.1.0 did not write it into checkpoints."""
    settings = found.run.get("settings")
    return settings or sections.read(run / CONFIG, "run's configuration", RunConfig)


def check_settings(run: Path, found: Checkpoint, settings: RunConfig) -> dict[str, list[Any]]:
    """The settings that change at a resumption, each with its old and new value.

    Raises:
        UserError: one that cannot change.
    """
    recorded = _settings_of(run, found)
    old, new = flattened(recorded), flattened(configuration.to_dict(settings))
    if same_network(recorded["backbone"], settings.backbone):
        old, new = (
            {key: value for key, value in one.items() if not key.startswith("backbone.")}
            for one in (old, new)
        )
    changed = {
        key: [old.get(key), new.get(key)]
        for key in sorted(old.keys() | new.keys())
        # A setting that the older version did not have is not a change.
        if old.get(key) != new.get(key) and (key in old or key.startswith(_OPEN))
    }
    without_effect = idle(settings)
    for key in changed:
        if needed := without_effect.get(key):
            raise UserError(
                f"{key} = {changed[key][1]!r} would have no effect on {run}, which has {needed}: "
                f"leave it as it was, {changed[key][0]!r}"
            )
    if 0 in changed.get("training.momentum", ()):
        fixed = ["training.momentum"]
    else:
        fixed = [
            key
            for key in changed
            if any(key == one or key.startswith(f"{one}.") for one in _FIXED)
            and key.removeprefix("head.") not in _HOW
        ]
    if fixed:
        before, now = changed[fixed[0]]
        others = f" (and {', '.join(fixed[1:])})" if fixed[1:] else ""
        raise UserError(
            f"{fixed[0]} = {now!r}{others} cannot be given to {run}, which was trained with "
            f"{before!r}: leave it as it was, or start a new run"
        )
    return changed


def check_ranks(place: World, settings: RunConfig, resumes: bool) -> None:
    """Raise a UserError, alike on all ranks, where they were given different runs.

    Nodes have their own copies of a configuration. Ranks of different settings would wait for each
    other for ever, or train something that is neither.
    """
    flat = flattened(configuration.to_dict(settings))
    own = {key: value for key, value in flat.items() if not key.startswith(_OF_A_RANK)}
    own["a checkpoint to go on from"] = resumes
    for rank, key, here, there in differences(place.gather(own)):
        raise UserError(
            f"the ranks of a run must have the same settings, and {key} is {here!r} on rank 0 and "
            f"{there!r} on rank {rank}: give all nodes the same configuration, options and run "
            "folder"
        )


def check_done(run: Path, changed: dict[str, list[Any]]) -> None:
    """UserError if settings of a run that is trained to its end were changed to no effect."""
    idle = [key for key in changed if not key.startswith(_AFTERWARDS)]
    if idle:
        raise UserError(
            f"{idle[0]} = {changed[idle[0]][1]!r} would have no effect: {run} is trained to its "
            "end; raise training.epochs to train on, or start a new run"
        )


def same_network(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two ``backbone`` sections mean one network, though only one may name a default."""
    if first == second:
        return True
    if first["name"] != second["name"] or first["name"] not in backbones.available():
        return False
    with torch.device("meta"), bundle.uninitialised():
        networks = [backbones.build(**options) for options in (first, second)]
    one, other = (
        (str(n), n.preprocessing, {k: v.shape for k, v in n.state_dict().items()}) for n in networks
    )
    return one == other


# -- people --------------------------------------------------------------------------------------


def people(
    labels: np.ndarray, names: list[str] | None, indices: dict[str, np.ndarray]
) -> dict[str, list[Any]]:
    """Who is who: for each class of ``train``, and of those held out, the person's name or label.

    Args:
        labels: int64 (N,) of the source.
        names: the source's people, if it names them.
        indices: images of ``train``, ``validation`` and ``test``.
    """
    who = {part: np.unique(labels[chosen]).tolist() for part, chosen in indices.items()}
    if names is not None:
        who = {part: [names[label] for label in found] for part, found in who.items()}
    return {"classes": who["train"], "validation": who["validation"], "test": who["test"]}


def digest(who: dict[str, list[Any]], *arrays: np.ndarray) -> str:
    """SHA-256 of `people` and of the images and classes that they stand for."""
    hasher = hashlib.sha256(json.dumps(who).encode("utf-8", "surrogatepass"))
    for array in arrays:
        hasher.update(np.ascontiguousarray(array, np.int64).tobytes())
    return hasher.hexdigest()


def check_data(run: Path, found: Checkpoint, record: dict[str, Any], train: Path) -> None:
    """UserError unless the data and the people are those that the run was trained on."""
    known = found.run or read_environment(run).get("data", {})
    if known.get("fingerprint", record["fingerprint"]) != record["fingerprint"]:
        raise UserError(
            f"{train} is not what {run} was trained on (its fingerprint changed); resume with the "
            "original data or start a new run"
        )
    if found.run.get("teacher") != record["teacher"]:
        raise UserError(
            f"the teacher is not the one that {run} was trained with (its embeddings differ): give "
            "that one, or start a new run"
        )
    if found.run.get("people", record["people"]) != record["people"]:
        raise UserError(
            f"the classes of {run} would stand for other people or images than those it was "
            f"trained on, which {run / PEOPLE} lists: start a new run"
        )


# -- records -------------------------------------------------------------------------------------


def read_environment(run: Path) -> dict[str, Any]:
    """``environment.json``; empty if it is missing or damaged: checkpoints hold what is needed."""
    try:
        found = json.loads((run / ENVIRONMENT).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("starts"), list) else {}


def tell_threads(run: Path, start: dict[str, Any]) -> None:
    """Say if a run goes on with other ranks or threads, and so comes out otherwise."""
    last = (read_environment(run).get("starts") or [{}])[-1]
    had, has = (
        f"{counted(one['ranks'], 'rank')} of {counted(one['threads'], 'thread')}"
        for one in (start | last, start)
    )
    if had != has:
        console.show(
            f"{had} trained this run until here and {has} from here: the weights at the end will "
            "not be those of an uninterrupted run bit for bit"
        )


def write_records(
    run: Path,
    settings: RunConfig,
    who: dict[str, list[Any]],
    data: dict[str, Any],
    start: dict[str, Any],
) -> None:
    """Write what determines a run beside its results.

    A resumption may change settings: ``config.yaml`` then holds the new ones, and
    ``environment.json`` tells of every start, its step and what was changed.
    """
    path = run / ENVIRONMENT
    before = read_environment(run)
    if path.exists() and not before:
        console.show(
            f"{path} is damaged and was started again; the checkpoint holds what is needed"
        )
    record = {"starts": [*before.get("starts", []), start], "data": data}
    for name, text in (
        (PEOPLE, json.dumps(who)),
        (CONFIG, configuration.dump(settings)),
        (ENVIRONMENT, json.dumps(record, indent=1)),
    ):
        atomic_write(run / name, text.encode("utf-8", "surrogatepass"))
