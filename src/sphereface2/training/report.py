"""The end of a run: its shipped network evaluated in full and calibrated, and a short table."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sphereface2 import console
from sphereface2.align.unaligned import looks_unaligned
from sphereface2.backbones import bundle
from sphereface2.data.dataset import FaceDataset
from sphereface2.data.folder import FolderSource
from sphereface2.data.hardening import Hardening, hardenings
from sphereface2.data.source import Source
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError, counted
from sphereface2.evaluation.all_pairs import AllPairsResult, evaluate_all_pairs
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.calibration import Calibration, CalibrationSet, Images
from sphereface2.evaluation.pairs import (
    MOST_PAIRS,
    PairsResult,
    evaluate_pairs,
    sample_pairs,
)
from sphereface2.evaluation.results import OperatingPoint, far_key, to_dict
from sphereface2.evaluation.thresholds import pairs_needed
from sphereface2.evaluation.verification import pair_scores
from sphereface2.extras import require
from sphereface2.files import atomic_write
from sphereface2.images import read_image
from sphereface2.training.config import RunConfig
from sphereface2.training.inputs import Inputs
from sphereface2.training.trainer import Progress

FILE = "results.json"
_CALIBRATE = "sphereface2 calibrate {run} --pairs FILE does it"


@dataclass(frozen=True)
class DataFacts:
    """What a run was trained on: the kind of data, a note for people, whether it is drawn."""

    kind: str
    note: str
    synthetic: bool


@dataclass(frozen=True)
class TrainingFacts:
    """How long a run was.

    Attributes:
        steps, images: done.
        seconds: of training.
        images_per_second: over the whole run.
        ranks: processes.
        unreadable: names of images that were replaced by others.
    """

    steps: int
    images: int
    seconds: float
    images_per_second: float
    ranks: int
    unreadable: list[str]

    @classmethod
    def of(cls, progress: Progress) -> TrainingFacts:
        """Of a run that is done."""
        return cls(
            steps=progress.step,
            images=progress.images,
            seconds=progress.seconds,
            images_per_second=progress.images / progress.seconds,
            ranks=progress.world_size,
            unreadable=list(progress.unreadable),
        )


@dataclass(frozen=True)
class RunReport:
    """What ``results.json`` holds.

    Attributes:
        data, training: of the run.
        checkpoint: name of the one that was evaluated.
        sets: a result for each verification set.
        held_out: of all pairs of the held-out people, or None.
        hardened: the same under each condition of ``validation.conditions``.
    """

    data: DataFacts
    checkpoint: str
    training: TrainingFacts
    sets: tuple[PairsResult, ...]
    held_out: AllPairsResult | None = None
    hardened: tuple[AllPairsResult, ...] = ()


def report(run: Path, inputs: Inputs, progress: Progress) -> RunReport:
    """Evaluate the run's best checkpoint and calibrate it on the held-out people.

    Writes ``results.json``, ``calibration.json`` and plots, and prints a table and what to do next.
    """
    settings, source = inputs.settings, inputs.source
    plots, where = _plots(run)
    options: dict[str, Any] = {"bootstrap": Bootstrap(seed=settings.seed), "plots": plots}
    calibrated = f"none: nobody was held out; {_CALIBRATE.format(run=run)}"
    with Embedder.load(run, flip=settings.validation.flip) as embedder:
        sets = [
            evaluate_pairs(
                pair_scores(embedder.embed_pairs(pair_set), pair_set.pairs), pair_set, **options
            )
            for pair_set in inputs.pairs
        ]
        people: list[AllPairsResult] = []
        if len(inputs.held_out_indices):
            clean, embeddings, read = _held_out(embedder, inputs, None, options)
            people.append(clean)
            for harden in hardenings(settings.validation.conditions):
                people.append(_held_out(embedder, inputs, harden, options)[0])
            calibrated = _calibrate(run, embedder, inputs, embeddings, read, plots)
    if plots is not None:
        _draw(run, plots, inputs)
    found = RunReport(
        data=DataFacts(inputs.located.kind, inputs.located.note, inputs.located.is_synthetic),
        checkpoint=bundle.resolve(run).resolve().name,
        training=TrainingFacts.of(progress),
        sets=tuple(sets),
        held_out=people[0] if people else None,
        hardened=tuple(people[1:]),
    )
    atomic_write(run / FILE, json.dumps(to_dict(found), indent=1).encode())
    following = _next_commands(run, source, inputs.held_out_indices, inputs.located.train)
    console.show(_table(run, settings, found, calibrated, where), "", *following)
    return found


def _plots(run: Path) -> tuple[Path | None, str]:
    """The folder of a run's plots and what to say of it; None where they cannot be drawn."""
    try:
        require("plots", "matplotlib")
    except UserError as error:
        return None, f"none: {error}"
    return run / "plots", str(run / "plots")


def _draw(run: Path, folder: Path, inputs: Inputs) -> None:
    from sphereface2.training.plots import plot_batch, plot_curves  # matplotlib is slow to import

    settings = inputs.settings
    plot_curves(run / "metrics.jsonl", folder / "curves.png")
    dataset = FaceDataset(
        inputs.source,
        inputs.train_indices,
        inputs.train_labels,
        augmentation=settings.data.augmentation,
        seed=settings.seed,
        max_unreadable=1.0,
    )
    plot_batch(dataset, folder / "batch.png")


def _held_out(
    embedder: Embedder, inputs: Inputs, harden: Hardening | None, options: Mapping[str, Any]
) -> tuple[AllPairsResult, np.ndarray, np.ndarray]:
    """The figures of the held-out people, their embeddings, and which images these are of."""
    source, held_out = inputs.source, inputs.held_out_indices
    lost: list[int] = []
    embeddings = embedder.embed_source(source, held_out, unreadable=lost, change=harden)
    read = np.delete(held_out, lost)
    found = evaluate_all_pairs(
        embeddings,
        np.asarray(source.labels)[read],
        name="held-out" if harden is None else f"held-out-{harden.name}",
        unreadable=[source.name(int(held_out[index])) for index in lost],
        fars=inputs.settings.validation.fars,
        **options,
    )
    found = replace(found, condition=harden.name if harden else None)
    return found, embeddings, read


def _calibrate(
    run: Path,
    embedder: Embedder,
    inputs: Inputs,
    embeddings: np.ndarray,
    read: np.ndarray,
    plots: Path | None,
) -> str:
    """Calibrate the run's network on the held-out people and say how.

    Args:
        run, embedder, inputs: of the run.
        embeddings: (N, d) of the held-out people.
        read: int64 (N,), the images that these are of.
        plots: folder for a mosaic of the worst pairs, or None.
    """
    source, labels = inputs.source, np.asarray(inputs.source.labels)[read]
    seed = inputs.settings.seed
    pairs, same = sample_pairs(labels, np.random.default_rng(seed), MOST_PAIRS)
    scores = pair_scores(embeddings, pairs)
    if plots is not None:
        from sphereface2.training.plots import plot_worst_pairs  # matplotlib is slow to import

        path = plots / "worst_pairs.png"
        plot_worst_pairs(lambda i: read_image(source.read(int(read[i]))), pairs, scores, same, path)
    people, lost = len(np.unique(labels)), len(inputs.held_out_indices) - len(read)
    about = f"{inputs.located.train.resolve().stem}, {people} people held out of training"
    data = CalibrationSet.of(about, same, labels[pairs], source.fingerprint(), lost)
    images: Images = "photographs" if looks_unaligned(source.read, read) else "crops"
    # The default of `sphereface2 calibrate`, or what so few people allow.
    far = next((one for one in (1e-2, 1e-1) if pairs_needed(one) <= data.impostor), 1e-2)
    try:
        calibration = Calibration.fit(
            scores,
            same,
            fingerprint=embedder.fingerprint,
            fars=[far],
            people=labels[pairs],
            data=[data],
            images=images,
            bootstrap=Bootstrap(seed=seed),
        )
    except UserError as error:
        return f"none: {error}; {_CALIBRATE.format(run=run)}"
    calibration.save(bundle.resolve(run).resolve())
    threshold = f"threshold {calibration.threshold():.4f} at FAR {far_key(far)}"
    return f"{threshold}, on the {people:,} held-out people"


def _next_commands(run: Path, source: Source, held_out: np.ndarray, train: Path) -> list[str]:
    """Commands that use the model, with files of the held-out people where they are files."""
    images, people, aligned = ["FIRST.jpg", "SECOND.jpg"], "PHOTOS", []
    labels = np.asarray(source.labels)[held_out]
    pairs = np.flatnonzero(labels[1:] == labels[:-1])
    root = train if train.is_dir() else train.parent
    if len(pairs):
        named = [root / source.name(int(held_out[pairs[0] + k])) for k in (0, 1)]
        if all(path.is_file() for path in named):
            images, aligned = [str(path) for path in named], ["--aligned"]
            people = str(train) if isinstance(source, FolderSource) else people
    model, gallery = str(run), str(run / "gallery.db")
    flags = aligned if people != "PHOTOS" else []
    commands = [
        ["verify", *images, "--model", model, *aligned],
        ["gallery", "add", gallery, "--folder", people, "--model", model, *flags],
        ["serve", model, "--gallery", gallery],
    ]
    lines = [f"  sphereface2 {shlex.join(words)}" for words in commands]
    photos = " (PHOTOS: a folder of photographs for each person)" if people == "PHOTOS" else ""
    return [f"next{photos}:", *lines]


def _table(run: Path, settings: RunConfig, found: RunReport, calibrated: str, plots: str) -> Table:
    training = found.training
    table = Table(title=console.cell(settings.name), show_header=False)
    table.add_row("data", console.cell(found.data.note))
    between = settings.sample_to_sample
    beside = f"; between samples s {between.s:g}, m {between.m:g}, weight {between.weight:g}"
    table.add_row(
        "loss", console.cell(_component(settings.head)) + (beside if between.weight else "")
    )
    table.add_row("backbone", console.cell(_component(settings.backbone)))
    table.add_row(
        "training",
        f"{counted(settings.training.epochs, 'epoch')}, {counted(training.steps, 'step')} of "
        f"{settings.training.batch_size} images in {training.seconds / 60:.1f} min: "
        f"{training.images_per_second:,.0f} images/s on {counted(training.ranks, 'rank')}",
    )
    if names := training.unreadable:
        listed = console.cell(", ".join(names[:3]) + (", …" if len(names) > 3 else ""))
        table.add_row("unreadable", f"{len(names)} images replaced by others: {listed}")
    synthetic = " (synthetic)" if found.data.synthetic else ""
    for one in found.sets:
        table.add_row(
            console.cell(f"{one.name}{synthetic}"),
            f"{one.folds}-fold accuracy [bold]{100 * one.accuracy:.2f} ± "
            f"{100 * one.accuracy_std:.2f} %[/bold]; {_tars(one.tar)}",
        )
    if (held := found.held_out) is not None:
        table.add_row(
            f"{held.people:,} held-out people", f"all {held.pairs:,} pairs: {_tars(held.tar)}"
        )
    for harder in found.hardened:
        table.add_row(f"  {harder.condition}", _tars(harder.tar))
    table.add_row("calibration", console.cell(calibrated))
    table.add_row("checkpoint", console.cell(str(run / "checkpoints" / "best")))
    table.add_row("metrics", console.cell(f"{run / 'metrics.jsonl'}, {run / FILE}"))
    table.add_row("plots", console.cell(plots))
    return table


def _component(settings: Mapping[str, Any]) -> str:
    """A head or a backbone: its name and its options."""
    options = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "name")
    return f"{settings['name']} {options}"


def _tars(points: Sequence[OperatingPoint]) -> str:
    measured = [
        f"{100 * point.value:.1f} % @{far_key(point.at)}"
        for point in points
        if point.value is not None
    ]
    return "TAR " + ", ".join(measured)
