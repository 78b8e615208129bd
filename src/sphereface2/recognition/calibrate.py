"""``sphereface2 calibrate``: score pairs whose truth is known and fit a calibration on them."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from rich.table import Table

from sphereface2 import console
from sphereface2.align.unaligned import check_readable, image_reader, warn_if_unaligned
from sphereface2.backbones import bundle
from sphereface2.data.opening import open_source
from sphereface2.data.overlap import comparable, comparable_names, image_digests, images_of
from sphereface2.data.pairs import PairSet
from sphereface2.data.source import Source, Subset
from sphereface2.data.split import split_people
from sphereface2.data.suites import open_pair_sets
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError, check_count, counted
from sphereface2.evaluation import tables
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.calibration import Calibration, CalibrationSet, Images, Method, file_of
from sphereface2.evaluation.one_threshold import CheckedSet, all_pairs_at, boundary
from sphereface2.evaluation.pairs import MOST_PAIRS, sample_pairs
from sphereface2.evaluation.results import far_key, to_dict
from sphereface2.evaluation.thresholds import check_fars
from sphereface2.evaluation.tiles import count_pairs
from sphereface2.evaluation.verification import pair_scores
from sphereface2.files import check_folder, takes_paths
from sphereface2.recognition import card


@dataclass(frozen=True)
class SharedBias:
    """What the bias b that the classes of a SphereFace2 head share would do as a threshold.

    A face is the head's person i when r·g(cos) + b > 0, which is g(cos) > -b/r.

    Attributes:
        bias, r, t: of the head; r times the scale that it has learned, if it has.
        g: -b/r.
        similarity: the cosine there; None where no cosine reaches it.
        far, tar: shares of impostor and of genuine pairs with at least that similarity.
    """

    bias: float
    r: float
    t: float
    g: float
    similarity: float | None
    far: float
    tar: float


@dataclass(frozen=True)
class CalibrationReport:
    """What ``sphereface2 calibrate`` did.

    Attributes:
        checkpoint: as it was given.
        file: where the calibration was written.
        replaced: whether there was one before.
        calibration: that was fitted, with the sets that it was checked on.
        shared_bias: None where the network does not come from a SphereFace2 head.
    """

    checkpoint: str
    file: str
    replaced: bool
    calibration: Calibration
    shared_bias: SharedBias | None


Named = tuple[str, PairSet | Source]
"""A set and what to call it."""


@takes_paths
def calibrate(
    checkpoint: Path,
    /,
    *,
    pairs: Sequence[Path] = (),
    images: Path | None = None,
    names: Path | None = None,
    all_pairs: Sequence[Path] = (),
    check: Sequence[Path] = (),
    fars: Sequence[float] = (1e-2,),
    method: Method = "logistic",
    align: bool = False,
    batch_size: int = 128,
    seed: int = 0,
    device: str | None = None,
    as_json: bool = False,
) -> CalibrationReport:
    """Map similarities to probabilities and thresholds; write calibration.json beside the model.

    Args:
        checkpoint: A run, a model folder or an exported `.onnx` file.
        pairs: Verification set: a `.bin` file, a `pairs.txt` or a pair list; repeatable.
        images: Image folder of a `pairs.txt`.
        names: A `pairs.txt` that names the people of a `.bin` file; default: `X_pairs.txt` beside
            `X.bin`.
        all_pairs: Labelled set of which every pair is used, or a sample where there are too many;
            repeatable. Of the model's own training set, only the held-out people are used.
        check: Labelled set of others, such as those of another camera, to check the thresholds on:
            the false accept rate that they reach there is reported and kept; repeatable.
        fars: False accept rate to give a threshold for; repeatable, the first is the default of
            decisions.
        method: "logistic", a straight line, or "isotonic", any rising curve.
        align: The images are photographs: find and crop their faces.
        batch_size: Number of images in one forward pass.
        seed: Seed of the bootstrap and of the sample.
        device: "cpu", "cuda" or "mps"; default: the best there is.
        as_json: Print JSON instead of a table.
    """
    if not pairs and not all_pairs:
        raise UserError("nothing to calibrate on: give --pairs FILE or --all-pairs SET")
    check_count("--seed", seed, 0)
    for option, given_sets in (("--pairs", pairs), ("--all-pairs", all_pairs), ("--check", check)):
        if twice := [p for p, n in Counter(map(Path.resolve, given_sets)).items() if n > 1]:
            raise UserError(f"{option} {twice[0]} is given twice: each set counts once")
    rng, folder = np.random.default_rng(seed), bundle.resolve(checkpoint).resolve()
    check_folder(file_of(folder).parent)
    sets: list[Named] = [(one.name, one) for one in open_pair_sets(pairs, images, names)]
    with (
        Embedder.load(
            checkpoint, device=device, batch_size=batch_size, read=image_reader(align)
        ) as embedder,
        console.bars() as bars,
    ):
        sets += [_choose(path, embedder.metadata) for path in all_pairs]
        others = [_choose(path, embedder.metadata) for path in check]
        for name, one in (*sets, *others):
            check_readable(name, *images_of(one))
        check_fars(fars, sum(_impostors(one) for _, one in sets))  # before minutes of embedding
        others = _apart(sets, others, bars)
        given: Images = "aligned"
        if not align:
            looks = [warn_if_unaligned(name, *images_of(one)) for name, one in (*sets, *others)]
            given = "photographs" if any(looks[: len(sets)]) else "crops"
        scores, same, people, data = _score(embedder, sets, rng, bars)
        options: dict[str, Any] = {"fars": fars, "method": method, "people": people}
        options["bootstrap"] = Bootstrap(seed=seed)
        options |= {"data": data, "images": given}
        calibration = Calibration.fit(scores, same, fingerprint=embedder.fingerprint, **options)
        judged = tuple(_check_on(calibration, embedder, *one, bars) for one in others)
        calibration, metadata = replace(calibration, checked=judged), embedder.metadata
    bias, replaced = shared_bias(metadata, scores, same), file_of(folder).exists()
    file = str(calibration.save(folder))
    report = CalibrationReport(str(checkpoint), file, replaced, calibration, bias)
    console.tell(as_json, to_dict(report), *_parts(report))
    return report


def shared_bias(
    metadata: Mapping[str, Any], scores: np.ndarray, same: np.ndarray
) -> SharedBias | None:
    """The bias of a SphereFace2 head as a threshold on pairs; None where the head is another.

    Args:
        metadata: of the network; ``head`` holds ``bias``, ``r`` and ``t``.
        scores: (P,) cosines.
        same: bool (P,), True for genuine pairs.
    """
    if (found := boundary(metadata)) is None:
        return None
    far, tar = (float(np.mean(scores[kind] >= found.reached)) for kind in (~same, same))
    similarity = found.reached if math.isfinite(found.reached) else None
    return SharedBias(found.bias, found.r, found.t, found.g, similarity, far, tar)


def _choose(path: Path, metadata: Mapping[str, Any]) -> tuple[str, Source]:
    """Open a labelled set; of the network's own training set only the people held out of it."""
    source, name = open_source(path), path.resolve().stem
    if (trained_on := card.training_set(metadata, source)) is None:
        return name, source
    people, seed = trained_on.get("validation_people", 0), trained_on.get("split_seed", 0)
    most = trained_on.get("held_out_max_images")
    for key, value, least in (
        ("validation_people", people, 0),
        ("split_seed", seed, 0),
        ("held_out_max_images", 1 if most is None else most, 1),
    ):
        check_count(f"{key} in the model's config.json", value, least)
    if not people:
        raise UserError(
            f"the network was trained on all people of {path}: calibrate it on other people"
        )
    held_out = split_people(source, people, seed, max_images=most).validation
    kept = _part(source, held_out)
    return f"{name}, {len(np.unique(kept.labels))} people held out of training", kept


def _part(source: Source, index: np.ndarray) -> Source:
    return Subset(source, index, np.asarray(source.labels)[index], source.class_names)


def _apart(
    sets: Sequence[Named], others: Sequence[tuple[str, Source]], bars: Progress
) -> list[tuple[str, Source]]:
    """The sets to check the thresholds on, without the images that they are found on.

    People who are in both are told of, and the set's name says so wherever it stands.

    Raises:
        UserError: what is left of a set would tell nothing.
    """
    if not others:
        return []
    found, names = set[str](), set[str]()
    for name, one in sets:
        found.update(_digests(name, one, bars))
        of_people = one.class_names or []
        if of_people and not isinstance(one, PairSet):  # of a part of a set, whose others are not
            of_people = [of_people[label] for label in np.unique(one.labels)]
        names |= comparable_names(of_people)
    apart = []
    for name, other in others:
        labels = np.asarray(other.labels)
        images = np.isin(_digests(name, other, bars), list(found - {""}))
        called = dict(enumerate(other.class_names or ()))
        both = set(labels[images].tolist()) | {
            label
            for label in np.unique(labels[~images]).tolist()
            if comparable(called.get(label, "")) in names
        }
        left = labels[~images]
        if images.all():
            raise UserError(
                f"--check {name} has no image but those that the thresholds are found on, where "
                "they hold: name a set of other people or images"
            )
        if copies := int(images.sum()):
            name += f", without {counted(copies, 'image')} of the calibration"
        if known := len(both.intersection(left.tolist())):
            name += f", {known:,} of its {len(np.unique(left)):,} people in the calibration"
        try:
            count_pairs(left)
        except UserError as error:
            raise UserError(f"--check {name}: {error}") from error
        if known:
            warnings.warn(f"--check {name}: it says little about other people", stacklevel=3)
        elif copies:
            warnings.warn(f"--check {name}", stacklevel=3)
        apart.append((name, _part(other, np.flatnonzero(~images))))
    return apart


def _digests(name: str, one: PairSet | Source, bars: Progress) -> list[str]:
    advance = console.advance(bars, f"{name}: compared", len(images_of(one)[1]))
    return image_digests(one, progress=advance)


def _impostors(one: PairSet | Source) -> int:
    """Number of impostor pairs of a set."""
    if isinstance(one, PairSet):
        return int(np.count_nonzero(~one.same))
    counts = np.unique(one.labels, return_counts=True)[1].astype(np.int64)
    return min(int(counts.sum() ** 2 - (counts**2).sum()) // 2, MOST_PAIRS)


def _score(
    embedder: Embedder, sets: Sequence[Named], rng: np.random.Generator, bars: Progress
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, list[CalibrationSet]]:
    """Scores (P,), same (P,) and people (P, 2) or None of the pairs of all sets, and the sets.

    The people of different sets are taken for different.
    """
    scores, verdicts, data = [], [], []
    people: list[np.ndarray] = []
    for name, one in sets:
        unreadable: int | None = None
        if isinstance(one, PairSet):
            advance = console.advance(bars, name, len(one.images))
            embeddings = embedder.embed_pairs(one, progress=advance)
            pairs, same = one.pairs, one.same
            whose = None if one.people is None else one.people[pairs]
        else:
            embeddings, labels, lost = _embed(embedder, name, one, bars)
            pairs, same = sample_pairs(labels, rng, MOST_PAIRS)
            whose, unreadable = labels[pairs], len(lost)
        data.append(CalibrationSet.of(name, same, whose, one.fingerprint(), unreadable))
        scores.append(pair_scores(embeddings, pairs))
        verdicts.append(same)
        if whose is not None:
            people.append(whose + (int(people[-1].max()) + 1 if people else 0))
    known = np.concatenate(people) if len(people) == len(sets) else None
    return np.concatenate(scores), np.concatenate(verdicts), known, data


def _embed(
    embedder: Embedder, name: str, one: Source, bars: Progress
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Embeddings and labels of a labelled set, and the places of the images that are unreadable."""
    lost: list[int] = []
    advance = console.advance(bars, name, len(one))
    rows = embedder.embed_source(one, unreadable=lost, progress=advance)
    return rows, np.delete(one.labels, lost), lost


def _check_on(
    calibration: Calibration, embedder: Embedder, name: str, other: Source, bars: Progress
) -> CheckedSet:
    rows, labels, lost = _embed(embedder, name, other, bars)
    found = all_pairs_at(
        rows,
        labels,
        {far: one.threshold for far, one in calibration.thresholds.items()},
        bootstrap=Bootstrap(calibration.intervals.replicates, calibration.intervals.seed),
        progress=console.advance(bars, f"{name}: pairs", 1),
    )
    fingerprint, people = other.fingerprint(), len(np.unique(labels))
    return CheckedSet(name, fingerprint, len(labels), people, len(lost), tuple(found))


def _parts(report: CalibrationReport) -> list[Table | str]:
    calibration, bias = report.calibration, report.shared_bias
    place = console.table(
        f"Thresholds, {tables.PERCENT} intervals over {calibration.intervals.over}",
        ["", "similarity", "interval", "FAR", "interval", "TAR"],
        dim=[2, 4],
    )
    for one in calibration.thresholds.values():
        low, high = one.far_ci
        place.add_row(
            f"FAR {far_key(one.far)}",
            f"{one.threshold:.4f}",
            f"{one.ci[0]:.3f}–{one.ci[1]:.3f}",
            f"{_percent(one.far)} %",
            f"{_percent(low)}–{_percent(high)} %",
            f"{100 * one.tar:.1f} %",
        )
    if bias is not None:
        place.add_section()
        similarity = "none" if bias.similarity is None else f"{bias.similarity:.4f}"
        far, tar = f"{_percent(bias.far)} %", f"{100 * bias.tar:.1f} %"
        place.add_row("-b/r", similarity, "", far, "", tar)
    lines = [
        f"{one.name}: {one.genuine:,} genuine and {one.impostor:,} impostor pairs"
        f"{_left_out(one.unreadable)}"
        for one in calibration.data
    ]
    if bias is not None:
        lines.append(
            f"-b/r = {bias.g:.3f}, from the bias that the head's classes share, separates an image "
            "from a class in training; as a threshold between two images it has the FAR above"
        )
    replaces = ", replacing the calibration that was there" if report.replaced else ""
    lines.append(f"{calibration.method} calibration written to {report.file}{replaces}")
    return [place, *lines, *map(_checked_table, calibration.checked)]


def _checked_table(checked: CheckedSet) -> Table:
    whom = f"{counted(checked.images, 'image')} of {counted(checked.people, 'other')}"
    title = f"{checked.name}: all pairs of {whom}{_left_out(checked.unreadable)}"
    return tables.at_thresholds(title, {"": checked.thresholds})


def _left_out(unreadable: int | None) -> str:
    return f"; {counted(unreadable, 'unreadable image')} left out" if unreadable else ""


def _percent(share: float) -> str:
    """Two significant digits, without an exponent for 100."""
    return f"{float(f'{100 * share:.2g}'):g}"
