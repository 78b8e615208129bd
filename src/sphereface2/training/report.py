"""The end of a run: its shipped network evaluated in full, and a short table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from sphereface2.backbones import bundle
from sphereface2.data.locate import TrainingData
from sphereface2.data.sources import Source
from sphereface2.data.verification import PairSet
from sphereface2.evaluation.evaluate import evaluate_pairs, evaluate_people
from sphereface2.files import atomic_write
from sphereface2.training.config import RunConfig
from sphereface2.training.trainer import Progress


def report(
    run: Path,
    settings: RunConfig,
    located: TrainingData,
    source: Source,
    held_out: np.ndarray,
    pairs: list[PairSet],
    progress: Progress,
) -> dict[str, Any]:
    """Evaluate the run's best checkpoint, write ``results.json`` and plots, print the table."""
    network = bundle.load(run)
    options: dict[str, Any] = {
        "flip": settings.validation.flip,
        "seed": settings.seed,
        "plots": run / "plots",
    }
    results: dict[str, Any] = {
        "data": {"kind": located.kind, "note": located.note, "synthetic": located.is_synthetic},
        "checkpoint": bundle.resolve(run).resolve().name,
        "training": {
            "steps": progress.step,
            "images": progress.images,
            "seconds": progress.seconds,
            "images_per_second": progress.images / progress.seconds,
            "ranks": progress.world_size,
            "unreadable": progress.unreadable,
        },
        "sets": [evaluate_pairs(network, pair_set, **options) for pair_set in pairs],
    }
    if len(held_out):
        results["held_out"] = evaluate_people(
            network, source, held_out, name="held-out", fars=settings.validation.fars, **options
        )
    atomic_write(run / "results.json", json.dumps(results, indent=1).encode())
    Console().print(_table(run, settings, results))
    return results


def _table(run: Path, settings: RunConfig, results: dict[str, Any]) -> Table:
    training = results["training"]
    table = Table(title=f"{settings.name}", show_header=False)
    table.add_row("data", results["data"]["note"])
    head = {k: v for k, v in settings.head.items() if k != "name"}
    table.add_row("loss", f"{settings.head['name']} {_told(head)}")
    backbone = {k: v for k, v in settings.backbone.items() if k != "name"}
    table.add_row("backbone", f"{settings.backbone['name']} {_told(backbone)}")
    table.add_row(
        "training",
        f"{settings.training.epochs:g} epochs, {training['steps']:,} steps of "
        f"{settings.training.batch_size} images in {training['seconds'] / 60:.1f} min: "
        f"{training['images_per_second']:,.0f} images/s on {training['ranks']} rank(s)",
    )
    if training["unreadable"]:
        names = training["unreadable"]
        told = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        table.add_row("unreadable", f"{len(names)} images replaced by others: {told}")
    for result in results["sets"]:
        synthetic = " (synthetic)" if results["data"]["synthetic"] else ""
        table.add_row(
            f"{result['name']}{synthetic}",
            f"{result['folds']}-fold accuracy [bold]{100 * result['accuracy']:.2f} ± "
            f"{100 * result['accuracy_std']:.2f} %[/bold]; {_tars(result['tar'])}",
        )
    if held := results.get("held_out"):
        table.add_row(
            f"{held['people']:,} held-out people",
            f"all {held['pairs']:,} pairs: {_tars(held['tar'])}",
        )
    table.add_row("checkpoint", str(run / "checkpoints" / "best"))
    table.add_row("metrics", f"{run / 'metrics.jsonl'}, {run / 'results.json'}")
    table.add_row("plots", str(run / "plots"))
    return table


def _told(options: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in options.items())


def _tars(tar: dict[str, float | None]) -> str:
    told = [f"{100 * value:.1f} % @{far}" for far, value in tar.items() if value is not None]
    return "TAR " + ", ".join(told)
