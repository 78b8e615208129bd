"""One cell: an ordinary run of ``fit`` in its own folder, then what the study keeps of it.

``python -m sphereface2.study.cell FOLDER [PAIRS ...]`` trains what ``FOLDER/config.yaml`` says,
going on from the folder's last checkpoint if there is one, and writes ``FOLDER/cell.json`` at the
end. Without a folder it takes one after another from its input, a JSON list of such words a line,
and answers each with a line; what the cells print goes to ``FOLDER/log.txt``. It ends with the
first that fails.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sphereface2 import console
from sphereface2.data.cache import KeptSource
from sphereface2.data.hardening import hardenings
from sphereface2.data.locate import locate
from sphereface2.data.opening import is_bin, load_pairs, open_source
from sphereface2.data.pairs import PairSet
from sphereface2.data.source import Source
from sphereface2.embedder import Embedder
from sphereface2.errors import Stopped, UserError
from sphereface2.evaluation.all_pairs import evaluate_all_pairs
from sphereface2.evaluation.one_threshold import boundary
from sphereface2.evaluation.results import OperatingPoint
from sphereface2.evaluation.verification import pair_scores
from sphereface2.files import writing
from sphereface2.images import read_image
from sphereface2.study.measure import (
    TRANSFERRED,
    describe_pairs,
    measure_pairs,
    measure_people,
    measure_transfer,
)
from sphereface2.study.stored import (
    EMBEDDINGS,
    SETS,
    CellData,
    CellResult,
    read_result,
    write_facts,
    write_result,
)
from sphereface2.training import config as configuration
from sphereface2.training.fit import fit
from sphereface2.training.inputs import Inputs
from sphereface2.training.report import TrainingFacts
from sphereface2.training.trainer import Progress

HARDENED = ("low_resolution", "light")
"""Conditions of the test people's images to which thresholds are carried over."""
BATCH = 512
_CURVE = 20
"""Points of a training's curve that are kept."""


def run(folder: Path, pairs: Sequence[str] = ("auto",)) -> None:
    """Train, and measure on the test people and the verification sets ``pairs``.

    A folder that is done already and was judged on all of ``pairs`` is left as it is; one that was
    judged on others is judged on them too.
    """
    before = read_result(folder)
    judged = set() if before is None else before.judged_on
    if before is not None and set(pairs) <= judged:
        return
    config = folder / "config.yaml"
    settings = configuration.load(config)
    source = _opened(locate(settings.data.train).train, settings.data.cache != "none")
    wanted = sorted(judged.union(pairs))
    used = 0.0 if before is None else before.cpu_seconds
    conclude = functools.partial(_measure, pairs=wanted, since=time.process_time() - used)
    train = functools.partial(fit, config, run=folder, source=source, conclude=conclude)
    # Without a graph it ends at the same but for rounding.
    eager = ["--training.cuda_graph", "false"] if settings.training.cuda_graph else []
    if not torch.cuda.is_available():
        train(overrides=eager)
        return
    try:
        train()
    except UserError as error:
        if not eager or "cannot be recorded" not in str(error):
            raise
        print(error, "- its steps are taken one kernel at a time", flush=True)
        train(overrides=eager)


@functools.cache
def _opened(train: Path, keep: bool, condition: str | None = None) -> Source:
    """The training set, with its images decoded once in this process if they are to be kept."""
    source = open_source(train) if condition is None else _opened(train, keep)
    change = None if condition is None else hardenings([condition])[0]
    return source if change is None and not keep else KeptSource(source, change, keep=keep)


@functools.cache
def _pair_set(path: Path, names: Path | None, keep: bool) -> tuple[PairSet, str]:
    """A verification set and its fingerprint."""
    found = load_pairs(path, names=names)
    fingerprint = found.fingerprint()
    if keep:
        images = [read_image(found.images[i]) for i in range(len(found.images))]
        found = dataclasses.replace(found, images=images)
    return found, fingerprint


def _pair_sets(inputs: Inputs, pairs: Sequence[str]) -> list[tuple[PairSet, str]]:
    located, validation = inputs.located, inputs.settings.validation
    paths = [*located.pairs] if "auto" in pairs else []
    paths += [Path(name) for name in pairs if name != "auto"]
    names = Path(validation.names) if validation.names else located.names
    keep = inputs.settings.data.cache != "none"
    return [_pair_set(path, names if is_bin(path) else None, keep) for path in paths]


def _measure(
    folder: Path, inputs: Inputs, progress: Progress, *, pairs: Sequence[str], since: float
) -> None:
    """Write what a study keeps of a finished run; thresholds on other sets if there are ``pairs``.

    A trial is judged by the validation people alone.
    """
    settings, test = inputs.settings, inputs.test_indices
    fars = sorted({*settings.validation.fars, *TRANSFERRED})
    transfer, judged = [], []
    with Embedder.load(folder, flip=settings.validation.flip) as embedder:
        embed = functools.partial(_embed, embedder, inputs)
        held_out = embed(inputs.held_out_indices)
        points = evaluate_all_pairs(*held_out, fars).tar if len(held_out[1]) else ()
        thresholds = _thresholds(embedder, points)
        embeddings, labels = embed(test)
        for pair_set, fingerprint in _pair_sets(inputs, pairs):
            rows = _rows(
                embedder, pair_set.images.__getitem__, pair_set.image_name, len(pair_set.images)
            )
            judged.append(measure_pairs(pair_scores(rows, pair_set.pairs), pair_set, fingerprint))
            write_facts(folder.parent / SETS, fingerprint, describe_pairs(pair_set))
            if pair_set.people is not None and thresholds:
                people = pair_set.people
                transfer.append(
                    measure_transfer(pair_set.name, fingerprint, rows, people, thresholds)
                )
        for name in ["", *HARDENED] if pairs and thresholds else []:
            rows = embed(test, name)[0] if name else embeddings
            title = f"test, {name}" if name else "test"
            transfer.append(measure_transfer(title, "", rows, labels, thresholds))
    with writing(folder / EMBEDDINGS):
        np.save(folder / EMBEDDINGS, embeddings.astype(np.float16))
    environment = json.loads((folder / "environment.json").read_text())
    data = environment["data"]
    validation = dataclasses.replace(settings.validation, pairs=list(pairs))
    result = CellResult(
        config=configuration.to_dict(dataclasses.replace(settings, validation=validation)),
        data=CellData(data["fingerprint"], data["images"], data["people"]),
        environment=environment["starts"],
        training=TrainingFacts.of(progress),
        validation={p.at: p.value for p in points if p.at in settings.validation.fars},
        test=measure_people(embeddings, labels),
        pairs=judged,
        cpu_seconds=time.process_time() - since,
        transfer=transfer,
        curve=_curve(folder / "metrics.jsonl"),
    )
    write_result(folder, result)


def _embed(
    embedder: Embedder, inputs: Inputs, indices: np.ndarray, condition: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings and labels of images of the training set, under a condition if one is named."""
    source = inputs.source
    if condition is not None:
        source = _opened(inputs.located.train, isinstance(source, KeptSource), condition)
    rows = _rows(
        embedder,
        lambda k: source.read(int(indices[k])),
        lambda k: source.name(int(indices[k])),
        len(indices),
    )
    return rows, source.labels[indices]


def _rows(
    embedder: Embedder, read: Callable[[int], Any], name: Callable[[int], str], count: int
) -> np.ndarray:
    """Embeddings (count, d) of images, read here: threads cost more than they save on kept ones."""
    parts = [np.zeros((0, embedder.embedding_dim), np.float32)]
    for start in range(0, count, BATCH):
        images = []
        for k in range(start, min(start + BATCH, count)):
            try:
                images.append(read_image(read(k)))
            except (OSError, UserError) as error:
                raise UserError(f"{name(k)} cannot be read: {error}") from error
        parts.append(embedder.forward(images))
    return np.concatenate(parts)


def _thresholds(
    embedder: Embedder, points: Sequence[OperatingPoint]
) -> list[tuple[float | None, float]]:
    """The validation people's thresholds by FAR, and the head's own by None."""
    found: list[tuple[float | None, float]] = [
        (point.at, point.threshold)
        for point in points
        if point.at in TRANSFERRED and point.threshold is not None
    ]
    own = boundary(embedder.metadata)
    return found if own is None else [*found, (None, own.reached)]


def _curve(log: Path) -> list[dict[str, float]]:
    """The lines of a run's log that tell of similarities, evenly thinned."""
    lines = map(json.loads, log.read_text().splitlines())
    rows = [line for line in lines if "positive_cosine" in line]
    if not rows:
        return []
    kept = np.unique(np.linspace(0, len(rows) - 1, _CURVE).round().astype(int))
    return [
        {
            name: float(f"{value:.5g}")
            for name, value in rows[k].items()
            if name != "kind" and isinstance(value, int | float)
        }
        for k in kept
    ]


def serve() -> None:
    """Run the cells that the input names, until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        folder, *pairs = json.loads(line)
        with (Path(folder) / "log.txt").open("ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        run(Path(folder), pairs)
        gc.collect()  # a device's memory goes with the objects that hold it
        print("done", file=answers, flush=True)


def main() -> None:
    """Run the cell that the command line names, or those that the input names."""
    try:
        run(Path(sys.argv[1]), sys.argv[2:]) if len(sys.argv) > 1 else serve()
    except Stopped as stop:
        console.note(stop)
        sys.exit(stop.status)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
