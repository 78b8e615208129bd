"""The end of a run: its shipped network evaluated in full, and a short table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from sphereface2 import console
from sphereface2.backbones import bundle
from sphereface2.data.hardening import Hardening, hardenings
from sphereface2.data.locate import TrainingData
from sphereface2.data.pairs import PairSet
from sphereface2.data.source import Source
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError
from sphereface2.evaluation.all_pairs import AllPairsResult, evaluate_all_pairs
from sphereface2.evaluation.pairs import REPLICATES, PairsResult, evaluate_pairs
from sphereface2.evaluation.results import OperatingPoint, far_key, to_dict
from sphereface2.evaluation.verification import pair_scores
from sphereface2.extras import require
from sphereface2.files import atomic_write
from sphereface2.training.config import RunConfig
from sphereface2.training.trainer import Progress

FILE = "results.json"


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


def report(
    run: Path,
    settings: RunConfig,
    located: TrainingData,
    source: Source,
    held_out: np.ndarray,
    pairs: Sequence[PairSet],
    progress: Progress,
) -> RunReport:
    """Evaluate the run's best checkpoint, write ``results.json`` and plots, print the table."""
    plots, where = _plots(run)
    options: dict[str, Any] = {"replicates": REPLICATES, "seed": settings.seed, "plots": plots}
    with Embedder.load(run, flip=settings.validation.flip) as embedder:
        sets = [
            evaluate_pairs(
                pair_scores(embedder.embed_pairs(pair_set), pair_set.pairs), pair_set, **options
            )
            for pair_set in pairs
        ]
        people: list[AllPairsResult] = []
        if len(held_out):
            conditions = hardenings(settings.validation.conditions)
            people = [
                _held_out(embedder, source, held_out, harden, settings.validation.fars, options)
                for harden in (None, *conditions)
            ]
    found = RunReport(
        data=DataFacts(located.kind, located.note, located.is_synthetic),
        checkpoint=bundle.resolve(run).resolve().name,
        training=TrainingFacts(
            steps=progress.step,
            images=progress.images,
            seconds=progress.seconds,
            images_per_second=progress.images / progress.seconds,
            ranks=progress.world_size,
            unreadable=list(progress.unreadable),
        ),
        sets=tuple(sets),
        held_out=people[0] if people else None,
        hardened=tuple(people[1:]),
    )
    atomic_write(run / FILE, json.dumps(to_dict(found), indent=1).encode())
    console.show(_table(run, settings, found, where))
    return found


def _plots(run: Path) -> tuple[Path | None, str]:
    """The folder of a run's plots and what to say of it; None where they cannot be drawn."""
    try:
        require("plots", "matplotlib")
    except UserError as error:
        return None, f"none: {error}"
    return run / "plots", str(run / "plots")


def _held_out(
    embedder: Embedder,
    source: Source,
    held_out: np.ndarray,
    harden: Hardening | None,
    fars: Sequence[float],
    options: Mapping[str, Any],
) -> AllPairsResult:
    lost: list[int] = []
    embeddings = embedder.embed_source(source, held_out, unreadable=lost, change=harden)
    found = evaluate_all_pairs(
        embeddings,
        np.delete(np.asarray(source.labels)[held_out], lost),
        name="held-out" if harden is None else f"held-out-{harden.name}",
        unreadable=[source.name(int(held_out[index])) for index in lost],
        fars=fars,
        **options,
    )
    return replace(found, condition=harden.name if harden else None)


def _table(run: Path, settings: RunConfig, found: RunReport, plots: str) -> Table:
    training = found.training
    table = Table(title=escape(settings.name), show_header=False)
    table.add_row("data", escape(found.data.note))
    table.add_row("loss", escape(_component(settings.head)))
    table.add_row("backbone", escape(_component(settings.backbone)))
    table.add_row(
        "training",
        f"{settings.training.epochs:g} epochs, {training.steps:,} steps of "
        f"{settings.training.batch_size} images in {training.seconds / 60:.1f} min: "
        f"{training.images_per_second:,.0f} images/s on {training.ranks} rank(s)",
    )
    if names := training.unreadable:
        listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        table.add_row("unreadable", f"{len(names)} images replaced by others: {escape(listed)}")
    synthetic = " (synthetic)" if found.data.synthetic else ""
    for one in found.sets:
        table.add_row(
            escape(f"{one.name}{synthetic}"),
            f"{one.folds}-fold accuracy [bold]{100 * one.accuracy:.2f} ± "
            f"{100 * one.accuracy_std:.2f} %[/bold]; {_tars(one.tar)}",
        )
    if (held := found.held_out) is not None:
        table.add_row(
            f"{held.people:,} held-out people", f"all {held.pairs:,} pairs: {_tars(held.tar)}"
        )
    for harder in found.hardened:
        table.add_row(f"  {harder.condition}", _tars(harder.tar))
    table.add_row("checkpoint", escape(str(run / "checkpoints" / "best")))
    table.add_row("metrics", escape(f"{run / 'metrics.jsonl'}, {run / FILE}"))
    table.add_row("plots", escape(plots))
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
