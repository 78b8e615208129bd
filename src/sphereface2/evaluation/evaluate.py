"""Scoring a network: verification sets, and all pairs of a labelled set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from sphereface2.evaluation import reports
from sphereface2.evaluation import verification as metrics
from sphereface2.evaluation.all_pairs import all_pairs_tar
from sphereface2.evaluation.calibration import quality, reliability
from sphereface2.evaluation.embedding import embed, or_nothing
from sphereface2.evaluation.suites import (
    SUITES,
    MegaFace,
    TemplateSet,
    evaluate_megaface,
    evaluate_templates,
    open_suite,
    tables,
)

if TYPE_CHECKING:
    from sphereface2.recognition.calibration import Calibration

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
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Embed a verification set and score its pairs by cosine similarity.

    Args:
        net: a backbone with its ``preprocessing``.
        pair_set: from `load_pairs`.
        flip: add the mirror image's embedding.
        fars: where TAR is wanted.
        replicates: of the bootstrap; 0 leaves the intervals out.
        seed: of the bootstrap.
        plots: folder for ``NAME_roc.png``, ``NAME_scores.png`` and, with a calibration,
            ``NAME_reliability.png``.
        calibration: of this network, to be judged on the set.

    Returns:
        The report of `score_pairs`; with a calibration also ``calibration``: its `quality`, and
        ``fitted_here``, whether it was fitted on these very pairs, which makes it look too good.

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
    if calibration is not None:
        fitted_on = {one["fingerprint"] for one in calibration.data}
        report["calibration"] = quality(scores, pair_set.same, calibration)
        report["calibration"]["fitted_here"] = pair_set.fingerprint() in fitted_on
        if report["calibration"]["fitted_here"]:
            report["notes"].append(
                "the calibration was fitted on these very pairs: its figures are too good here"
            )
        if plots is not None:
            from sphereface2.evaluation.plots import plot_reliability

            path = Path(plots) / f"{pair_set.name}_reliability.png"
            found = reliability(calibration.probability(scores), pair_set.same)
            plot_reliability(found, path, title=f"{pair_set.name}: reliability")
            report["plots"].append(str(path))
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
        "notes": _untold(tars, int((~same).sum())),
    }
    if replicates:
        people = None if pair_set.people is None else pair_set.people[pair_set.pairs]
        found = metrics.bootstrap(
            scores, same, fars, people=people, replicates=replicates, seed=seed
        )
        report |= {
            "tar_ci": {
                metrics.far_key(f): reports.pair(ci) for f, ci in zip(fars, found.tar, strict=True)
            },
            "eer_ci": reports.pair(found.eer),
            "auc_ci": reports.pair(found.auc),
            "intervals": reports.how(found.over, found.replicates, seed),
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

    unreadable: list[int] = []
    embeddings = _embed(
        net,
        (or_nothing(source.read, int(i)) for i in indices),
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
        progress=reports.advance(progress, f"{name}: pairs", 1),
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
        "notes": _untold(tars, found.impostors),
    }
    if replicates:
        report["tar_ci"] = {metrics.far_key(t.far): reports.pair(t.ci) for t in tars}
        report["intervals"] = reports.how_fixed("people", replicates, seed)
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
    checkpoint: Path,
    /,
    *,
    pairs: Sequence[Path] = (),
    images: Path | None = None,
    names: Path | None = None,
    all_pairs: Path | None = None,
    suites: Sequence[str] = (),
    root: Path | None = None,
    detector_weights: bool = False,
    flip: bool = True,
    batch_size: int = 128,
    seed: int = 0,
    plots: Path | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Measure a model's accuracy on verification pairs, all pairs of a set, or standard suites.

    The report holds ``checkpoint``, ``flip``, ``sets`` (a list with the `score_pairs` report of
    each of ``pairs``, in their order) and, if asked for, ``all_pairs`` (from `evaluate_people`).
    Where a ``calibration.json`` lies beside the network, each set is judged by it too, unless
    ``flip`` is off: it was fitted on embeddings with the mirror image.
    IJB's reports go to ``templates``, MegaFace's to ``distractors``, a list each.

    Args:
        checkpoint: A run, a checkpoint folder, its weights, or an `.onnx` file.
        pairs: Verification set: a `.bin` file, a `pairs.txt` or a pair list; repeatable.
        images: Image folder of a `pairs.txt`.
        names: A `pairs.txt` that names the people of a `.bin` file; default: `X_pairs.txt` beside
            `X.bin`.
        all_pairs: Score every pair of this folder, list or RecordIO file.
        suites: lfw, agedb30, calfw, cplfw, cfp_ff, cfp_fp, combined, ijbb, ijbc or megaface;
            repeatable.
        root: Folder that holds the suites.
        detector_weights: IJB: weight images by the detector's score.
        flip: Add the embedding of the mirror image.
        batch_size: Number of images in one forward pass.
        seed: Seed of the bootstrap.
        plots: Folder for PNG files of ROC curves and score histograms.
        device: "cpu", "cuda" or "mps"; default: the best there is.
        as_json: Print JSON instead of tables.
    """
    # Recognition builds on evaluation; here alone it is the other way about.
    from sphereface2.recognition.calibration import Calibration
    from sphereface2.recognition.fingerprint import fingerprint

    if not pairs and all_pairs is None and not suites:
        raise UserError(
            "nothing to evaluate on: give --pairs FILE, --all-pairs SET or --suite NAME --root DIR"
        )
    if suites and root is None:
        raise UserError(f"--suite {suites[0]} needs --root, the folder that holds it")
    if root is not None and not suites:
        raise UserError(f"--root belongs to --suite, one of {', '.join(SUITES)}")
    if detector_weights and not {"ijbb", "ijbc"} & set(suites):
        raise UserError("--detector-weights belongs to --suite ijbb or ijbc")
    sets = load_sets([Path(path) for path in pairs], images, names)
    opened = [open_suite(name, root or ".") for name in suites]
    sets += [suite for suite in opened if isinstance(suite, PairSet)]
    paths = [*pairs, *[root or "."] * (len(sets) - len(pairs))]
    source = open_source(all_pairs) if all_pairs is not None else None
    folder = bundle.resolve(checkpoint).resolve()
    net = bundle.load(folder, device=(place := resolve(device)))
    calibration = Calibration.load(folder, fingerprint=fingerprint(net)) if flip else None
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
        for path, pair_set in zip(paths, sets, strict=True):
            result = evaluate_pairs(net, pair_set, calibration=calibration, **options)
            report["sets"].append({"path": str(path), **result})
        if source is not None and all_pairs is not None:
            result = evaluate_people(net, source, name=Path(all_pairs).resolve().stem, **options)
            report["all_pairs"] = {"path": str(all_pairs), **result}
        del options["plots"]
        for suite in opened:
            if isinstance(suite, TemplateSet):
                result = evaluate_templates(
                    net, suite, detector_weights=detector_weights, **options
                )
                report.setdefault("templates", []).append({"path": str(root), **result})
            elif isinstance(suite, MegaFace):
                result = evaluate_megaface(net, suite, **options)
                report.setdefault("distractors", []).append({"path": str(root), **result})
    if as_json:
        reports.print_json(report)
    else:
        _print(report)
    return report


def load_sets(
    paths: Sequence[Path], images: str | Path | None, names: str | Path | None
) -> list[PairSet]:
    """The verification sets of a command line's ``--pairs``, ``--images`` and ``--names``."""
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


def _embed(
    net: nn.Module,
    images: Iterable[Image],
    count: int,
    title: str,
    progress: Progress | None,
    **options: Any,
) -> np.ndarray:
    return embed(net, images, progress=reports.advance(progress, title, count), **options)


def _untold(tars: Sequence[metrics.Tar], impostors: int) -> list[str]:
    untold = [t.far for t in tars if t.tar is None]
    return reports.untold("TAR at FAR", untold, impostors, "mismatched pairs")


# --- tables --------------------------------------------------------------------------------------


def _print(report: dict[str, Any]) -> None:
    console = Console()
    for result in [*report["sets"], *([report["all_pairs"]] if "all_pairs" in report else [])]:
        console.print(_table(result))
        for line in _remarks(result):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        console.print()
    for result in [*report.get("templates", []), *report.get("distractors", [])]:
        for part in tables(result):
            console.print(part, soft_wrap=isinstance(part, str), highlight=False, markup=False)
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

    if "accuracy" in result:
        table.add_row(
            f"{result['folds']}-fold accuracy",
            f"[bold]{100 * result['accuracy']:.2f} ± {100 * result['accuracy_std']:.2f} %[/bold]",
            "",
        )
        table.add_row("EER", reports.percent(result["eer"]), reports.interval(result["eer_ci"]))
        table.add_row(
            "AUC", f"{result['auc']:.4f}", reports.interval(result["auc_ci"], "{:.4f}".format)
        )
        table.add_section()
    for far, tar in result["tar"].items():
        table.add_row(
            f"TAR at FAR {far}", reports.percent(tar), reports.interval(result["tar_ci"][far])
        )
    if calibration := result.get("calibration"):
        table.add_section()
        table.add_row("Cllr", f"{calibration['cllr']:.4f}", "")
        table.add_row("min-Cllr", f"{calibration['min_cllr']:.4f}", "")
        table.add_row("ECE", reports.percent(calibration["ece"]), "")
        for far, found in calibration["far"].items():
            table.add_row(f"FAR at the threshold for {far}", f"{100 * found:.3g} %", "")
            table.add_row("  and its TAR", reports.percent(calibration["tar"][far]), "")
    if "rank1" in result:
        table.add_section()
        table.add_row("rank-1 identification", reports.percent(result["rank1"]))
    return table
