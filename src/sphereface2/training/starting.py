"""Fine-tuning: the weights that a training starts from, and the parts of them that it changes.

Starting is not resuming: `resuming` goes on with a run, its people and its optimiser; here a new
run takes over a network and nothing else, unless its head too starts where a run left it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from sphereface2.backbones import Backbone, bundle, hub
from sphereface2.data.source import Source
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError, did_you_mean
from sphereface2.files import one_name
from sphereface2.heads import Head
from sphereface2.heads.sharding import local
from sphereface2.training import config as configuration
from sphereface2.training.config import RunConfig, TrainingConfig
from sphereface2.training.distributed import World
from sphereface2.training.idle import check_asked
from sphereface2.training.optim import belongs
from sphereface2.training.resuming import PEOPLE, same_network
from sphereface2.training.sections import recipes

_FREE = ("dropout",)  # options of a backbone that fine-tuning may set anew
_AT_ONCE = 8192
_OPEN = "???"
"""In a configuration, what each training must say for itself."""


def settings(path: Path | None, overrides: Sequence[str]) -> RunConfig:
    """`configuration.load`, with the backbone of ``training.start_from`` where that is given.

    Without a file, a start has the recipe ``finetune``: the defaults are those of a new network.

    Raises:
        UserError: there is no such network, a setting of the backbone contradicts it, the file
            leaves a setting open that nobody gives, or an override has no effect.
    """
    tree, given = configuration.read(path, overrides)
    for section, key, option in (
        ("training", "start_from", "--start-from MODEL, the trained network that it goes on from"),
        ("teacher", "path", "--teacher PATH, the embeddings or the model that it follows"),
    ):
        if isinstance(part := tree.get(section), dict) and part.get(key) == _OPEN:
            raise UserError(f"the configuration {path} needs {option}")
    training = tree.get("training")
    start = training.get("start_from") if isinstance(training, dict) else None
    if start is not None:
        if path is None:
            path = recipes()["finetune"]
            tree, given = configuration.read(path, overrides)
        wanted = tree.get("backbone") or {}
        own = load(str(start)).config
        theirs = {"name": own["name"], **own["kwargs"]}
        free = {key: wanted[key] for key in _FREE if isinstance(wanted, dict) and key in wanted}
        _check_agrees(wanted, theirs | free, str(start))
        tree = {**tree, "backbone": theirs | free}
    where = "the command line" if path is None else str(path)
    found = configuration.from_dict(tree, where, given)
    check_asked(found, given)
    return found


def _check_agrees(wanted: Any, theirs: dict[str, Any], start: str) -> None:
    if not isinstance(wanted, dict):
        return  # which the configuration tells of
    for key, value in wanted.items():
        if theirs.get(key) == json.loads(json.dumps(value)):
            continue
        # 64 is [64, 64], and a default need not be among the options of the weights.
        if key != "name" and same_network(theirs, {**theirs, key: value}):
            continue
        raise UserError(
            f"backbone.{key} = {value!r} contradicts training.start_from: the network of {start} "
            f"has {theirs.get(key, 'another')!r}; leave it out"
        )


def load(start: str) -> Backbone:
    """The network of ``training.start_from``: a run, a model folder or a hub id.

    Raises:
        UserError: there is none, or it is an ONNX file.
    """
    folder = hub.model_folder(start)
    if folder.suffix == ".onnx":
        raise UserError(
            f"training cannot start from {start}, an ONNX network: give the run or the weights of "
            "PyTorch that it was exported from"
        )
    return bundle.load(folder)


def freeze(network: Backbone, settings: TrainingConfig) -> None:
    """Stop the training of the parts that ``freeze`` and ``freeze_batch_norm`` name.

    Frozen parts stay in evaluation mode: their batch normalisation keeps its statistics.

    Raises:
        UserError: a name that no part has, or nothing is left to train.
    """
    parts = [name for name, _ in network.named_modules() if name]
    names = [name for name, _ in network.named_parameters()]
    for setting, given in (("freeze", settings.freeze), ("lr_factors", settings.lr_factors)):
        for part in given:
            if part not in parts and part not in names:
                raise UserError(
                    f"training.{setting}: the backbone has no part {part!r}"
                    f"{did_you_mean(part, parts)}; it has "
                    f"{', '.join(name for name, _ in network.named_children())} and their parts"
                )
    frozen = [
        name
        for name, module in network.named_modules()
        if any(belongs(name, part) for part in settings.freeze)
        or (settings.freeze_batch_norm and isinstance(module, nn.modules.batchnorm._BatchNorm))
    ]
    for name, parameter in network.named_parameters():
        if any(belongs(name, part) for part in [*settings.freeze, *frozen]):
            parameter.requires_grad = False
    network.frozen = frozenset(frozen)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise UserError("training.freeze leaves nothing of the backbone to train")


def begin(
    settings: TrainingConfig,
    network: Backbone,
    head: Head,
    place: World,
    source: Source,
    indices: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[Any],
) -> dict[str, Any]:
    """Take over the weights of ``start_from`` and start the prototypes; every rank calls it.

    Args:
        settings: of the training; ``start_from`` is given.
        network, head: of the run, on the device.
        place: this process's.
        source, indices, labels: the training images, their positions and classes.
        classes: name or label of each class.

    Returns:
        What to record: the fingerprint of the network, and how many prototypes were kept.

    Raises:
        UserError: prototypes are to be kept, and the run has none, or people have no names.
    """
    start = settings.start_from
    assert start is not None
    network.load_state_dict(load(start).state_dict())
    record: dict[str, Any] = {"network": bundle.fingerprint(network)}
    if settings.prototypes == "random":
        return record
    batch = settings.batch_size or 256
    sums = _sums(network, place, source, indices, labels, len(classes), batch)
    if settings.prototypes == "kept":
        kept = place.on_main(lambda: _kept(hub.model_folder(start), classes))
        for number, row in kept.items():
            sums[number] = row
        record |= {"prototypes_kept": len(kept)}
    rows = sums[head.shard.start : head.shard.stop]
    known = rows.norm(dim=1) > 0  # not of people whose images cannot be read
    with torch.no_grad():
        weight = local(head.weight)
        directions = nn.functional.normalize(rows[known]).to(weight)
        weight[known.to(weight.device)] = directions * weight[known.to(weight.device)].norm(
            dim=1, keepdim=True
        )
    return record


def _sums(
    network: Backbone,
    place: World,
    source: Source,
    indices: np.ndarray,
    labels: np.ndarray,
    count: int,
    batch_size: int,
) -> Tensor:
    """(C, d), on the CPU: the sum of the unit embeddings of each class's images."""
    sums = torch.zeros(count, network.embedding_dim)
    mine = np.arange(place.rank, len(indices), place.size)
    with Embedder(network, flip=False, batch_size=min(batch_size, 256)) as embedder:
        for first in range(0, len(mine), _AT_ONCE):
            chosen = mine[first : first + _AT_ONCE]
            unreadable: list[int] = []  # the training counts them
            rows = embedder.embed_source(source, indices[chosen], unreadable=unreadable)
            kept = np.delete(chosen, unreadable)
            sums.index_add_(0, torch.from_numpy(labels[kept]), torch.from_numpy(rows))
    device = next(network.parameters()).device
    return place.sum(sums.to(device)).cpu()


def _kept(folder: Path, classes: Iterable[Any]) -> dict[int, Tensor]:
    """Prototypes of a checkpoint by the numbers of the classes here that have the same names."""
    state, people = folder / "state", folder.parents[1] / PEOPLE
    try:
        named = json.loads(people.read_text("utf-8"))["classes"]
        reader = dcp.FileSystemReader(state)
        shape = reader.read_metadata().state_dict_metadata["head.weight"].size  # type: ignore[union-attr]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"training.prototypes kept: {folder} is no checkpoint of a run, whose head it would "
            "need; set imprinted"
        ) from error
    here = list(classes)
    if not all(isinstance(name, str) for name in [*named, *here]):
        raise UserError(
            "training.prototypes kept: people are known again by their names, and these sets have "
            "numbers only; set imprinted"
        )
    loaded = {"head": {"weight": torch.empty(shape)}}
    with warnings.catch_warnings():  # that a single process loads alone
        warnings.simplefilter("ignore")
        dcp.load(loaded, storage_reader=reader, no_dist=True)
    rows = dict(zip(map(one_name, named), loaded["head"]["weight"], strict=True))
    return {n: rows[name] for n, name in enumerate(map(one_name, here)) if name in rows}
