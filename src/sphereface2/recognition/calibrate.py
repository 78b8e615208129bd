"""``sphereface2 calibrate``: score pairs whose truth is known and fit a calibration on them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from sphereface2.backbones import bundle
from sphereface2.backbones.base import Backbone
from sphereface2.data.sources import Source, open_source, split_people
from sphereface2.data.verification import PairSet
from sphereface2.device import resolve
from sphereface2.errors import UserError
from sphereface2.evaluation import reports
from sphereface2.evaluation.embedding import embed, or_nothing
from sphereface2.evaluation.evaluate import load_sets
from sphereface2.evaluation.verification import far_key, pair_scores
from sphereface2.recognition.calibration import Calibration, check_fars
from sphereface2.recognition.fingerprint import fingerprint

#: Pairs of either kind that `all_pairs_of` gives at most: enough for a FAR of 1e-5.
MOST_PAIRS = 3_000_000


@dataclass(frozen=True)
class Scored:
    """Scored pairs: scores (P,), same (P,), people (P, 2) or None, and what they are."""

    scores: np.ndarray
    same: np.ndarray
    people: np.ndarray | None
    data: Mapping[str, Any]


def calibrate(
    checkpoint: Path,
    /,
    *,
    pairs: Sequence[Path] = (),
    images: Path | None = None,
    names: Path | None = None,
    all_pairs: Sequence[Path] = (),
    fars: Sequence[float] = (1e-2,),
    method: str = "logistic",
    batch_size: int = 128,
    seed: int = 0,
    device: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Map similarities to probabilities and thresholds; write calibration.json beside the model.

    Args:
        checkpoint: A run, a model folder or an exported `.onnx` file.
        pairs: Verification set: a `.bin` file, a `pairs.txt` or a pair list; repeatable.
        images: Image folder of a `pairs.txt`.
        names: A `pairs.txt` that names the people of a `.bin` file.
        all_pairs: Labelled set of which every pair is used, or a sample where there are too many;
            repeatable. Of the model's own training set, only the held-out people are used.
        fars: False accept rate to give a threshold for; repeatable, the first is the default of
            decisions.
        method: "logistic" or "isotonic".
        batch_size: Number of images in one forward pass.
        seed: Seed of the bootstrap and of the sample.
        device: "cpu", "cuda" or "mps"; default: the best there is.
        as_json: Print JSON instead of a table.

    Returns:
        ``checkpoint``, ``file``, ``calibration`` (the file's content) and ``shared_bias``: what
        the network's training bias would do as a threshold on these pairs, or None where it is
        not known.

    Raises:
        UserError: a bad set, a FAR that the pairs cannot tell, an unreadable checkpoint.
    """
    if not pairs and not all_pairs:
        raise UserError("nothing to calibrate on: give --pairs FILE or --all-pairs SET")
    folder = bundle.resolve(checkpoint).resolve()
    net = bundle.load(folder, device=(place := resolve(device)))
    sets = load_sets([Path(path) for path in pairs], images, names)
    labelled = [_chosen(path, net.metadata) for path in all_pairs]
    # Before minutes of embedding, what can be told without it.
    rng = np.random.default_rng(seed)
    drawn = [all_pairs_of(source.labels[chosen], rng) for source, chosen, _ in labelled]
    impostors = [int((~one.same).sum()) for one in sets]
    impostors += [int((~same).sum()) for _, same in drawn]
    check_fars(fars, sum(impostors))

    scored = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        options: dict[str, Any] = {"batch_size": batch_size, "device": place, "progress": progress}
        scored += [_score_set(net, one, **options) for one in sets]
        scored += [_score_labelled(net, *one, rng=rng, **options) for one in labelled]
    one = _joined(scored)
    calibration = Calibration.fit(
        one.scores,
        one.same,
        fingerprint=fingerprint(net),
        fars=fars,
        method=method,
        people=one.people,
        data=[each.data for each in scored],
        seed=seed,
    )
    report = {
        "checkpoint": str(checkpoint),
        "file": str(calibration.save(folder)),
        "calibration": calibration.to_dict(),
        "shared_bias": shared_bias(net.metadata, one.scores, one.same),
    }
    if as_json:
        reports.print_json(report)
    else:
        _print(report, calibration)
    return report


def all_pairs_of(
    labels: np.ndarray, rng: np.random.Generator, most: int = MOST_PAIRS
) -> tuple[np.ndarray, np.ndarray]:
    """Every pair of N labelled images, or a sample: int64 (P, 2), and bool (P,), which match.

    At most ``most`` matched and ``most`` mismatched pairs, drawn without replacement.
    """
    labels = np.asarray(labels)
    count = len(labels)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    matched = [
        group[np.stack(np.triu_indices(len(group), 1), 1)]
        for group in np.split(order, starts[1:])
        if len(group) > 1
    ]
    genuine = np.concatenate(matched) if matched else np.zeros((0, 2), np.int64)
    everything = count * (count - 1) // 2
    impostors = everything - len(genuine)
    if len(genuine) > most:
        genuine = genuine[rng.choice(len(genuine), most, replace=False)]
    if impostors <= most:
        number = np.arange(everything)
    else:
        # A few more than are wanted, since some of them match.
        number = rng.choice(
            everything, min(everything, int(1.1 * most * everything / impostors)), replace=False
        )
    # Pair number n in the order (0, 1), (0, 2), (1, 2), (0, 3), …: n = j(j-1)/2 + i, i < j.
    j = ((1 + np.sqrt(1 + 8 * number.astype(np.float64))) / 2).astype(np.int64)
    j -= j * (j - 1) // 2 > number
    j += j * (j + 1) // 2 <= number
    mixed = np.stack([number - j * (j - 1) // 2, j], 1)
    mixed = mixed[labels[mixed[:, 0]] != labels[mixed[:, 1]]][:most]
    return np.concatenate([genuine, mixed]), np.arange(len(genuine) + len(mixed)) < len(genuine)


def shared_bias(
    metadata: Mapping[str, Any], scores: np.ndarray, same: np.ndarray
) -> dict[str, Any] | None:
    """What the bias b of a SphereFace2 head would do as a threshold; None where it is unknown.

    A face is the head's person i when r·g(cos) + b > 0, which is g(cos) > -b/r; keys: ``bias``,
    ``r``, ``t``, ``g`` (-b/r), ``similarity`` (the cosine there; None if there is none), ``far``
    and ``tar`` of that similarity on the pairs.
    """
    head = metadata.get("head")
    try:
        bias, r, t = (float(head[key]) for key in ("bias", "r", "t"))  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        return None
    if not (math.isfinite(bias) and r > 0 and t >= 1):
        return None
    g = -bias / r
    similarity = 2 * ((g + 1) / 2) ** (1 / t) - 1 if -1 <= g <= 1 else None
    reached = math.inf if g > 1 else -math.inf if g < -1 else similarity
    return {
        "bias": bias,
        "r": r,
        "t": t,
        "g": g,
        "similarity": similarity,
        "far": float(np.mean(scores[~same] >= reached)),
        "tar": float(np.mean(scores[same] >= reached)),
    }


def _chosen(path: str | Path, metadata: Mapping[str, Any]) -> tuple[Source, np.ndarray, str]:
    """A labelled set, the images of it to use, and its name."""
    source, name = open_source(path), Path(path).resolve().stem
    trained_on = metadata.get("data")
    if not isinstance(trained_on, dict) or trained_on.get("fingerprint") != source.fingerprint():
        return source, np.arange(len(source)), name
    people = int(trained_on.get("validation_people", 0))
    if not people:
        raise UserError(
            f"the network was trained on everybody in {path}: calibrate it on other people"
        )
    split = split_people(
        source,
        people,
        int(trained_on.get("split_seed", 0)),
        max_images=trained_on.get("held_out_max_images"),
    )
    held_out = len(np.unique(np.asarray(source.labels)[split.validation]))
    return source, split.validation, f"{name}, {held_out} people held out of training"


def _score_set(
    net: Backbone,
    pair_set: PairSet,
    *,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> Scored:
    embeddings = embed(
        net,
        (pair_set.images[i] for i in range(len(pair_set.images))),
        batch_size=batch_size,
        device=device,
        name=pair_set.image_name,
        progress=reports.advance(progress, pair_set.name, len(pair_set.images)),
    )
    people = None if pair_set.people is None else pair_set.people[pair_set.pairs]
    return Scored(
        pair_scores(embeddings, pair_set.pairs),
        pair_set.same,
        people,
        _described(pair_set.name, pair_set.same, people, pair_set.fingerprint()),
    )


def _score_labelled(
    net: Backbone,
    source: Source,
    chosen: np.ndarray,
    name: str,
    *,
    rng: np.random.Generator,
    batch_size: int,
    device: torch.device,
    progress: Progress,
) -> Scored:
    unreadable: list[int] = []
    embeddings = embed(
        net,
        (or_nothing(source.read, int(i)) for i in chosen),
        batch_size=batch_size,
        device=device,
        unreadable=unreadable,
        progress=reports.advance(progress, name, len(chosen)),
    )
    labels = np.delete(source.labels[chosen], unreadable)
    pairs, same = all_pairs_of(labels, rng)
    about = _described(name, same, labels[pairs], source.fingerprint())
    return Scored(
        pair_scores(embeddings, pairs), same, labels[pairs], about | {"unreadable": len(unreadable)}
    )


def _described(
    name: str, same: np.ndarray, people: np.ndarray | None, identity: str
) -> dict[str, Any]:
    return {
        "name": name,
        "pairs": len(same),
        "matched": int(same.sum()),
        "mismatched": int((~same).sum()),
        "people": None if people is None else len(np.unique(people)),
        "fingerprint": identity,
    }


def _joined(scored: Sequence[Scored]) -> Scored:
    """All pairs as one set, with the people of different sets taken for different people."""
    people, following = [], 0
    for one in scored:
        if one.people is not None:
            people.append(one.people + following)
            following = int(people[-1].max()) + 1
    return Scored(
        np.concatenate([one.scores for one in scored]),
        np.concatenate([one.same for one in scored]),
        np.concatenate(people) if len(people) == len(scored) else None,
        {},
    )


def _print(report: Mapping[str, Any], calibration: Calibration) -> None:
    console = Console()
    how = calibration.intervals
    table = Table(
        title=f"Thresholds, {how['level'] * 100:.0f} % intervals over {how['over']}",
        title_justify="left",
    )
    table.add_column("")
    for name in ("similarity", "interval", "FAR", "interval", "TAR"):
        style = "dim" if name == "interval" else None
        table.add_column(name, justify="right", no_wrap=True, style=style)
    for one in calibration.thresholds.values():
        low, high = one.far_ci
        table.add_row(
            f"FAR {far_key(one.far)}",
            f"{one.threshold:.4f}",
            f"{one.ci[0]:.3f}–{one.ci[1]:.3f}",
            f"{_percent(one.far)} %",
            f"{_percent(low)}–{_percent(high)} %",
            f"{100 * one.tar:.1f} %",
        )
    bias = report["shared_bias"]
    if bias is not None:
        table.add_section()
        similarity = "none" if bias["similarity"] is None else f"{bias['similarity']:.4f}"
        far, tar = f"{_percent(bias['far'])} %", f"{100 * bias['tar']:.1f} %"
        table.add_row("-b/r", similarity, "", far, "", tar)
    console.print(table)
    lines = [
        f"{one['name']}: {one['matched']:,} matched and {one['mismatched']:,} mismatched pairs"
        for one in calibration.data
    ]
    if bias is not None:
        lines.append(
            f"-b/r = {bias['g']:.3f}, from the bias that the head's classes share, parts a face "
            "from a class in training; as a threshold between two faces nobody chose its FAR"
        )
    lines.append(f"{calibration.method} calibration written to {report['file']}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _percent(share: float) -> str:
    """Two significant digits, without an exponent for 100."""
    return f"{float(f'{100 * share:.2g}'):g}"
