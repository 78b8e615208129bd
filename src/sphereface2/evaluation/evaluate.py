"""Scoring a network: verification sets, and all pairs of a labelled set."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from sphereface2.backbones import bundle
from sphereface2.data.locate import TrainingData
from sphereface2.data.sources import Source, open_source
from sphereface2.data.verification import Image, PairSet, load_pairs
from sphereface2.device import resolve
from sphereface2.errors import UserError
from sphereface2.evaluation import verification as metrics
from sphereface2.evaluation.all_pairs import all_pairs_tar
from sphereface2.evaluation.embedding import embed

REPLICATES = 1000
_NAMED = 20  # unreadable images that a report names


def evaluate_pairs(
    net: nn.Module,
    pair_set: PairSet,
    *,
    flip: bool = True,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    fars: Sequence[float] = metrics.FARS,
    replicates: int = REPLICATES,
    seed: int = 0,
    plots: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Embed a verification set and score its pairs by cosine similarity.

    Args:
        net: a backbone with its ``preprocessing``.
        pair_set: from `load_pairs`.
        flip: add the mirror image's embedding.
        fars: where TAR is wanted.
        replicates: of the bootstrap; 0 leaves the intervals out.
        seed: of the bootstrap.
        plots: folder for ``NAME_roc.png`` and ``NAME_scores.png``.

    Returns:
        The report of `score_pairs`.

    Raises:
        UserError: an image cannot be read. Leaving it out would change the protocol.
    """
    images = pair_set.images
    embeddings = _embed(
        net,
        (images[i] for i in range(len(images))),
        len(images),
        pair_set.name,
        progress,
        batch_size=batch_size,
        flip=flip,
        device=device,
        name=pair_set.image_name,
    )
    scores = metrics.pair_scores(embeddings, pair_set.pairs)
    report = score_pairs(scores, pair_set, fars=fars, replicates=replicates, seed=seed)
    if plots is not None:
        from sphereface2.evaluation.plots import plot_pairs  # matplotlib is slow to import

        written = plot_pairs(pair_set.name, scores, pair_set.same, report["threshold"], plots)
        report["plots"] = [str(path) for path in written]
    return report


def score_pairs(
    scores: np.ndarray,
    pair_set: PairSet,
    *,
    fars: Sequence[float] = metrics.FARS,
    replicates: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Every figure of a verification set from the scores (P,) of its pairs, JSON-able.

    Keys: ``accuracy`` and ``accuracy_std`` (mean and population s.d. over ``folds`` folds),
    ``fold_accuracy``, ``threshold`` (mean over folds), ``eer``, ``auc``, ``tar`` and
    ``tar_threshold`` by FAR ("1e-3" and so on; None where the set has too few mismatched pairs to
    tell), the counts, and ``notes``. With ``replicates`` also ``tar_ci``, ``eer_ci``, ``auc_ci``
    ([low, high]) and ``intervals``: how they were made, over people where the set knows them.
    """
    same = pair_set.same
    folds = metrics.kfold_accuracy(scores, same, pair_set.folds)
    tars = metrics.tar_at_far(scores, same, fars)
    report: dict[str, Any] = {
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
        "notes": _notes(tars, int((~same).sum())),
    }
    if replicates:
        people = None if pair_set.people is None else pair_set.people[pair_set.pairs]
        found = metrics.bootstrap(
            scores, same, fars, people=people, replicates=replicates, seed=seed
        )
        report |= {
            "tar_ci": {
                metrics.far_key(f): _pair(ci) for f, ci in zip(fars, found.tar, strict=True)
            },
            "eer_ci": _pair(found.eer),
            "auc_ci": _pair(found.auc),
            "intervals": _how(found.over, found.replicates, seed),
        }
    return report


def evaluate_people(
    net: nn.Module,
    source: Source,
    indices: np.ndarray | None = None,
    *,
    name: str = "all pairs",
    flip: bool = True,
    batch_size: int = 128,
    device: str | torch.device | None = None,
    fars: Sequence[float] = metrics.FARS,
    replicates: int = REPLICATES,
    seed: int = 0,
    plots: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """TAR at FAR over every pair of a labelled set, or of ``indices`` into it; JSON-able.

    Unreadable images are left out, counted in ``unreadable`` and named (the first 20) in
    ``unreadable_names``. ``tar``, ``tar_threshold`` and ``tar_ci`` are by FAR as in `score_pairs`,
    the intervals from a bootstrap over people with the thresholds held fixed. ``rank1`` is the
    share of images whose nearest other image shows the same person. The other arguments are those
    of `evaluate_pairs`.
    """
    indices = np.arange(len(source)) if indices is None else np.asarray(indices)

    def read(i: int) -> bytes:
        try:
            return source.read(int(indices[i]))
        except (OSError, UserError):
            return b""  # no image decodes from this: counted with the unreadable ones

    unreadable: list[int] = []
    embeddings = _embed(
        net,
        (read(i) for i in range(len(indices))),
        len(indices),
        f"{name}: images",
        progress,
        batch_size=batch_size,
        flip=flip,
        device=device,
        unreadable=unreadable,
    )
    labels = np.delete(np.asarray(source.labels)[indices], unreadable)
    curve = np.logspace(-6, 0, 25) if plots is not None else np.zeros(0)
    found = all_pairs_tar(
        embeddings,
        labels,
        [*fars, *curve],
        seed=seed,
        replicates=replicates,
        progress=_advance(progress, f"{name}: pairs", 1),
    )
    tars = found.tars[: len(fars)]
    report: dict[str, Any] = {
        "name": name,
        "images": len(labels),
        "people": len(np.unique(labels)),
        "unreadable": len(unreadable),
        "unreadable_names": [source.name(int(indices[i])) for i in unreadable[:_NAMED]],
        "pairs": found.genuine + found.impostors,
        "matched": found.genuine,
        "mismatched": found.impostors,
        "tar": {metrics.far_key(t.far): t.tar for t in tars},
        "tar_threshold": {metrics.far_key(t.far): t.threshold for t in tars},
        "rank1": found.rank1,
        "notes": _notes(tars, found.impostors),
    }
    if replicates:
        report["tar_ci"] = {metrics.far_key(t.far): _pair(t.ci) for t in tars}
        report["intervals"] = _how("people", replicates, seed) | {"thresholds": "fixed"}
    if plots is not None:
        from sphereface2.evaluation.plots import plot_roc

        told = [t for t in found.tars[len(fars) :] if t.tar is not None]
        path = Path(plots) / f"{name}_all_pairs_roc.png"
        plot_roc(
            {name: (np.array([t.far for t in told]), np.array([t.tar for t in told], float))},
            path,
            title=f"{name}: ROC of all {report['pairs']:,} pairs",
        )
        report["plots"] = [str(path)]
    return report


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
    """The command ``sphereface2 evaluate``: score a checkpoint, print tables or JSON, return it.

    The report holds ``checkpoint``, ``flip``, ``sets`` (a list with the `score_pairs` report of
    each of ``pairs``, in their order) and, if asked for, ``all_pairs`` (from `evaluate_people`).
    ``images`` is for the text lists among ``pairs``; ``names`` for the one ``.bin`` among them, by
    default ``X_pairs.txt`` beside ``X.bin``.
    """
    if not pairs and all_pairs is None:
        raise UserError("nothing to evaluate on: give --pairs FILE or --all-pairs SET")
    sets = _load_sets([Path(path) for path in pairs], images, names)
    source = open_source(all_pairs) if all_pairs is not None else None
    net = bundle.load(checkpoint, device=(place := resolve(device)))
    report: dict[str, Any] = {"checkpoint": str(checkpoint), "flip": flip, "sets": []}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        options: dict[str, Any] = {
            "flip": flip,
            "batch_size": batch_size,
            "device": place,
            "seed": seed,
            "plots": plots,
            "progress": progress,
        }
        for path, pair_set in zip(pairs, sets, strict=True):
            result = evaluate_pairs(net, pair_set, **options)
            report["sets"].append({"path": str(path), **result})
        if source is not None and all_pairs is not None:
            result = evaluate_people(net, source, name=Path(all_pairs).resolve().stem, **options)
            report["all_pairs"] = {"path": str(all_pairs), **result}
    if as_json:
        json.dump(report, sys.stdout, indent=2, allow_nan=False)
        sys.stdout.write("\n")
    else:
        _print(report)
    return report


def _load_sets(
    paths: Sequence[Path], images: str | Path | None, names: str | Path | None
) -> list[PairSet]:
    packed = [path for path in paths if path.suffix == ".bin"]
    if names is not None and len(packed) != 1:
        raise UserError(f"--names belongs to one .bin file, and --pairs gives {len(packed)}")
    if images is not None and len(packed) == len(paths):
        raise UserError("--images belongs to a text list of pairs, and --pairs gives none")
    return [
        load_pairs(path, names=names or TrainingData.names_for(path))
        if path in packed
        else load_pairs(path, images=images)
        for path in paths
    ]


def _advance(progress: Progress | None, title: str, total: float) -> Callable[[float], None]:
    if progress is None:
        return lambda amount: None
    task = progress.add_task(title, total=total)
    return lambda amount: progress.advance(task, amount)


def _embed(
    net: nn.Module,
    images: Iterable[Image],
    count: int,
    title: str,
    progress: Progress | None,
    **options: Any,
) -> np.ndarray:
    return embed(net, images, progress=_advance(progress, title, count), **options)


def _notes(tars: Sequence[metrics.Tar], impostors: int) -> list[str]:
    untold = [t.far for t in tars if t.tar is None]
    if not untold:
        return []
    return [
        f"TAR at FAR {metrics.far_key(max(untold))} and below cannot be told from "
        f"{impostors:,} mismatched pairs"
    ]


def _pair(ci: tuple[float, float] | None) -> list[float] | None:
    return None if ci is None else list(ci)


def _how(over: str, replicates: int, seed: int) -> dict[str, Any]:
    return {"level": metrics.LEVEL, "over": over, "replicates": replicates, "seed": seed}


# --- tables --------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    console = Console()
    for result in [*report["sets"], *([report["all_pairs"]] if "all_pairs" in report else [])]:
        console.print(_table(result))
        for line in _remarks(result):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        console.print()


def _remarks(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['matched']:,} matched and {result['mismatched']:,} mismatched pairs"]
    lines += result["notes"]
    if result.get("unreadable"):
        lines.append(
            f"{result['unreadable']} unreadable images left out, "
            f"the first is {result['unreadable_names'][0]}"
        )
    if result.get("plots"):
        lines.append("plots: " + ", ".join(result["plots"]))
    return lines


def _table(result: dict[str, Any]) -> Table:
    level = f"{metrics.LEVEL:.0%} interval over {result['intervals']['over']}"
    table = Table(
        title=f"{result['name']}: {result['images']:,} images",
        title_justify="left",
    )
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column(level, justify="right", style="dim")

    def percent(value: float) -> str:
        return f"{100 * value:.2f} %"

    def interval(ci: list[float] | None, told: Callable[[float], str] = percent) -> str:
        return "" if ci is None else f"{told(ci[0])} – {told(ci[1])}"

    if "accuracy" in result:
        table.add_row(
            f"{result['folds']}-fold accuracy",
            f"[bold]{100 * result['accuracy']:.2f} ± {100 * result['accuracy_std']:.2f} %[/bold]",
            "",
        )
        table.add_row("EER", percent(result["eer"]), interval(result["eer_ci"]))
        table.add_row("AUC", f"{result['auc']:.4f}", interval(result["auc_ci"], "{:.4f}".format))
        table.add_section()
    for far, tar in result["tar"].items():
        told = "–" if tar is None else percent(tar)
        table.add_row(f"TAR at FAR {far}", told, interval(result["tar_ci"][far]))
    if "rank1" in result:
        table.add_section()
        table.add_row("rank-1 identification", percent(result["rank1"]))
    return table
