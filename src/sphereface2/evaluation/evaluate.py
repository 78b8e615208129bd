"""Scoring a network: verification sets, and all pairs of a labelled set."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from sphereface2.backbones import bundle
from sphereface2.data.verification import PairSet, load_pairs
from sphereface2.errors import UserError
from sphereface2.evaluation import verification as metrics
from sphereface2.evaluation.embedding import default_device, embed


def evaluate_pairs(
    net: nn.Module,
    pair_set: PairSet,
    *,
    flip: bool = True,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    fars: Sequence[float] = metrics.FARS,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Embed a verification set and score its pairs by cosine similarity.

    Returns:
        A JSON-able report: ``accuracy``, ``accuracy_std``, ``threshold``, ``eer``, ``auc``, ``tar``
        (by FAR, "1e-3" and so on; None where the set is too small to tell), and the counts.

    Raises:
        UserError: an image cannot be read (leaving it out would change the protocol).
    """
    embeddings = _embed(net, pair_set, flip, batch_size, device, progress)
    return score_pairs(metrics.pair_scores(embeddings, pair_set.pairs), pair_set, fars=fars)


def score_pairs(
    scores: np.ndarray, pair_set: PairSet, *, fars: Sequence[float] = metrics.FARS
) -> dict[str, Any]:
    """The report of `evaluate_pairs` from the scores (P,) of the set's pairs."""
    same = pair_set.same
    folds = metrics.kfold_accuracy(scores, same, pair_set.folds)
    tars = metrics.tar_at_far(scores, same, fars)
    return {
        "name": pair_set.name,
        "pairs": len(pair_set),
        "matched": int(same.sum()),
        "mismatched": int((~same).sum()),
        "images": len(pair_set.images),
        "people": None if pair_set.people is None else len(np.unique(pair_set.people)),
        "folds": len(folds.per_fold),
        "accuracy": folds.accuracy,
        "accuracy_std": folds.std,
        "fold_accuracy": folds.per_fold.tolist(),
        "threshold": float(folds.thresholds.mean()),
        "eer": metrics.eer(scores, same),
        "auc": metrics.auc(scores, same),
        "tar": {metrics.far_key(t.far): t.tar for t in tars},
        "tar_threshold": {metrics.far_key(t.far): t.threshold for t in tars},
    }


def _embed(
    net: nn.Module,
    pair_set: PairSet,
    flip: bool,
    batch_size: int,
    device: str | torch.device | None,
    progress: Progress | None,
) -> np.ndarray:
    images = pair_set.images
    task = progress.add_task(pair_set.name, total=len(images)) if progress else None

    def advance(count: int) -> None:
        if progress is not None and task is not None:
            progress.advance(task, count)

    return embed(
        net,
        (images[i] for i in range(len(images))),
        batch_size=batch_size,
        flip=flip,
        device=device,
        name=pair_set.image_name,
        progress=advance,
    )


def evaluate(
    checkpoint: str | Path,
    *,
    pairs: Sequence[str | Path] = (),
    images: str | Path | None = None,
    names: str | Path | None = None,
    all_pairs: str | Path | None = None,
    flip: bool = True,
    batch_size: int = 128,
    seed: int = 0,
    plots: str | Path | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """The command ``sphereface2 evaluate``: score a checkpoint, print tables or JSON, return it."""
    if not pairs and all_pairs is None:
        raise UserError("nothing to evaluate on: give --pairs FILE or --all-pairs SET")
    place = torch.device(device) if device else default_device()
    net = bundle.load(checkpoint, device=place)
    sets = [load_pairs(path, images=images, names=names) for path in pairs]
    report: dict[str, Any] = {"checkpoint": str(checkpoint), "flip": flip, "sets": []}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for pair_set in sets:
            report["sets"].append(
                evaluate_pairs(
                    net, pair_set, flip=flip, batch_size=batch_size, device=place, progress=progress
                )
            )
    if as_json:
        json.dump(report, sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
    else:
        console = Console()
        for result in report["sets"]:
            console.print(_table(result))
    return report


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['name']}: {result['pairs']:,} pairs", show_header=False)
    accuracy, std = 100 * result["accuracy"], 100 * result["accuracy_std"]
    table.add_row(f"{result['folds']}-fold accuracy", f"{accuracy:.2f} ± {std:.2f} %")
    table.add_row("EER", f"{100 * result['eer']:.2f} %")
    table.add_row("AUC", f"{result['auc']:.4f}")
    for far, tar in result["tar"].items():
        table.add_row(f"TAR at FAR {far}", "too few pairs" if tar is None else f"{100 * tar:.2f} %")
    return table
