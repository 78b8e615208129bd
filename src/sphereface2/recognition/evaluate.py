"""``sphereface2 evaluate``: score a network on verification sets, all pairs and suites."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from rich.progress import Progress

from sphereface2 import console
from sphereface2.align import warp
from sphereface2.align.unaligned import check_readable, image_reader, warn_if_unaligned
from sphereface2.backbones import bundle
from sphereface2.data.folder import check_outside
from sphereface2.data.hardening import Hardening, hardenings
from sphereface2.data.opening import open_source
from sphereface2.data.overlap import images_of
from sphereface2.data.pairs import PairSet
from sphereface2.data.source import Source
from sphereface2.data.suites import SUITES, MegaFace, TemplateSet, open_pair_sets, open_suite
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError, check_count
from sphereface2.evaluation import tables
from sphereface2.evaluation.all_pairs import AllPairsResult, evaluate_all_pairs
from sphereface2.evaluation.bootstrap import Bootstrap
from sphereface2.evaluation.calibration import Calibration
from sphereface2.evaluation.distractors import DistractorResult, evaluate_distractors
from sphereface2.evaluation.one_threshold import OneThresholdResult, judge_thresholds
from sphereface2.evaluation.pairs import PairsResult, evaluate_pairs
from sphereface2.evaluation.results import Result
from sphereface2.evaluation.templates import TemplateAverager, TemplatesResult, evaluate_templates
from sphereface2.evaluation.tiles import count_pairs
from sphereface2.evaluation.verification import pair_scores
from sphereface2.extras import require
from sphereface2.files import check_folder, csv_fields, one_name, read_lines, takes_paths
from sphereface2.recognition import card
from sphereface2.recognition.box import chosen

Set = PairSet | Source | TemplateSet | MegaFace
R = TypeVar("R", bound=Result)
_CHUNK = 4096  # images embedded before they are folded into what is kept


@dataclass(frozen=True)
class Evaluation:
    """What ``sphereface2 evaluate`` found.

    Attributes:
        checkpoint: as it was given, or the run that ``latest`` stands for.
        flip: whether the mirror image's embedding was added.
        results: one for each set, in the order of the options.
    """

    checkpoint: str
    flip: bool
    results: list[Result]

    def of(self, kind: type[R]) -> list[R]:
        """The results of one kind."""
        return [result for result in self.results if isinstance(result, kind)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: the results by kind, ``sets`` always."""
        found: dict[str, Any] = {"checkpoint": self.checkpoint, "flip": self.flip}
        found["sets"] = [result.to_dict() for result in self.of(PairsResult)]
        for result in self.of(AllPairsResult):
            if result.condition is None:
                found["all_pairs"] = result.to_dict()
            else:
                found.setdefault("hardened", {})[result.condition] = result.to_dict()
        others: dict[str, type[Result]] = {
            "one_threshold": OneThresholdResult,
            "templates": TemplatesResult,
            "distractors": DistractorResult,
        }
        for key, kind in others.items():
            if results := self.of(kind):
                found[key] = [result.to_dict() for result in results]
        return found


@takes_paths
def evaluate(
    checkpoint: Path | None = None,
    /,
    *,
    pairs: Sequence[Path] = (),
    images: Path | None = None,
    names: Path | None = None,
    all_pairs: Path | None = None,
    groups: Path | None = None,
    suites: Sequence[str] = (),
    root: Path | None = None,
    detector_weights: bool = False,
    conditions: str | None = None,
    align: bool = False,
    flip: bool = True,
    batch_size: int = 128,
    seed: int = 0,
    plots: Path | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> Evaluation:
    """Measure a model's accuracy on verification pairs, all pairs of a set, or standard suites.

    Args:
        checkpoint: A run, a checkpoint folder, its weights, or an `.onnx` file; default: the model
            that comes with the package.
        pairs: Verification set: a `.bin` file, a `pairs.txt` or a pair list; repeatable.
        images: Image folder of a `pairs.txt`.
        names: A `pairs.txt` that names the people of a `.bin` file; default: `X_pairs.txt` beside
            `X.bin`.
        all_pairs: Score every pair of this folder, list or RecordIO file.
        groups: CSV of a person or an image and its group: rates of each group of `--all-pairs` at
            one threshold.
        suites: lfw, agedb30, calfw, cplfw, cfp_ff, cfp_fp, combined, ijbb, ijbc or megaface;
            repeatable.
        root: Folder that holds the suites.
        detector_weights: IJB: weight images by the detector's score.
        conditions: Score `--pairs` and `--all-pairs` again with all images made harder: `all`, or
            names separated by commas of yaw, low_resolution, light, occlusion, age and misaligned.
        align: The images are photographs: find and crop their faces.
        flip: Add the embedding of the mirror image; without it a calibration is not judged.
        batch_size: Number of images in one forward pass.
        seed: Seed of the bootstrap, the distractors' order and the conditions.
        plots: Folder for PNG files of ROC curves and score histograms.
        device: "cpu", "cuda" or "mps"; default: the best there is.
        as_json: Print JSON instead of tables.
    """
    check_count("--seed", seed, 0)
    _check_options(pairs, all_pairs, suites, root, detector_weights, conditions)
    checkpoint = bundle.run_of(chosen(checkpoint))
    bundle.resolve(checkpoint)  # before sets of many files are opened
    if groups is not None and all_pairs is None:
        raise UserError("--groups belongs to --all-pairs, the set whose groups it names")
    harder = hardenings(
        (one.strip() for one in conditions.split(",")) if conditions is not None else (), seed
    )
    sets: list[tuple[Path, Set]] = [*zip(pairs, open_pair_sets(pairs, images, names), strict=True)]
    if all_pairs is not None:
        sets.append((all_pairs, open_source(all_pairs)))
    if plots is not None:
        require("plots", "matplotlib")  # before the work, as the place of plots
        check_folder(plots)
        for _, one in sets:
            check_outside(plots, one)
    sets += [(root, open_suite(name, root)) for name in suites if root is not None]
    if plots is not None:
        _check_names([one.name for _, one in sets if isinstance(one, PairSet)])
    group_of = None
    if groups is not None:
        group_of = _read_groups(groups, next(one for _, one in sets if isinstance(one, Source)))
    _look_at(sets, align)
    with (
        Embedder.load(
            checkpoint, device=device, flip=flip, batch_size=batch_size, read=image_reader(align)
        ) as embedder,
        console.bars() as bars,
    ):
        judge = _Judge(embedder, bars, Bootstrap(seed=seed), plots, detector_weights, group_of)
        if flip:
            folder = bundle.resolve(checkpoint).resolve()
            judge.calibration = Calibration.load(folder, fingerprint=embedder.fingerprint)
        results = [r for path, one in sets for r in judge.all(path, one, harder)]
        found = Evaluation(str(checkpoint), flip, results)
    parts = (part for one in found.results for part in (*tables.render(one), ""))
    console.tell(as_json, found.to_dict(), *parts)
    return found


def _check_names(names: Sequence[str]) -> None:
    """Refuse two sets of one name, which that of their plots follows from."""
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"two verification sets are called {twice[0]!r}, and the plots of one would replace "
            "the other's: rename a file, or plot them one by one"
        )


def _look_at(sets: Sequence[tuple[Path, Set]], align: bool) -> None:
    """Refuse sets of images that cannot be read, and warn of photographs, before the work."""
    for path, one in sets:
        if isinstance(one, PairSet | Source):
            name = one.name if isinstance(one, PairSet) else str(path)
            check_readable(name, *images_of(one))
            if not align:
                warn_if_unaligned(name, *images_of(one))


def _read_groups(path: Path, source: Source) -> list[str | None]:
    """The group of each image of a source, from a CSV of people or images and their groups."""
    group_of: dict[str, str] = {}
    for number, line in read_lines(path, "a CSV of a person or an image and a group a line"):
        fields = [one_name(field) for field in csv_fields(line)]
        if len(fields) != 2 or not all(fields):
            raise UserError(f"{path}:{number} must hold a person or an image, a comma and a group")
        if group_of.setdefault(fields[0], fields[1]) != fields[1]:
            raise UserError(
                f"{path}:{number} puts {fields[0]!r} into {fields[1]!r}, an earlier line into "
                f"{group_of[fields[0]]!r}: give each person or image one group"
            )
    names = source.class_names
    keys = [
        (one_name(source.name(index)), one_name(names[label]) if names else str(label))
        for index, label in enumerate(source.labels.tolist())
    ]
    found = [group_of.get(image) or group_of.get(person) for image, person in keys]
    if not any(found):
        raise UserError(
            f"{path} names no person and no image of the set; its first image is called "
            f"{source.name(0)!r}, its person {names[source.labels[0]] if names else 0!r}"
        )
    # Before the minutes that embedding takes.
    for group in sorted({one for one in found if one is not None}):
        inside = source.labels[[one == group for one in found]]
        try:
            count_pairs(inside)
        except UserError as error:
            raise UserError(f"group {group!r} of {path} cannot be judged: {error}") from error
    known = {name for key in keys for name in key}
    strangers = [name for name in group_of if name not in known]
    if None in found or strangers:
        warnings.warn(
            f"{path} gives {len(found) - found.count(None):,} of the {len(found):,} images a "
            f"group; {len(strangers):,} of its {len(group_of):,} names are no person and no image "
            f"of the set{f', the first {strangers[0]!r}' if strangers else ''}",
            stacklevel=2,
        )
    return found


def _check_options(
    pairs: Sequence[Path],
    all_pairs: Path | None,
    suites: Sequence[str],
    root: Path | None,
    detector_weights: bool,
    conditions: str | None,
) -> None:
    if not pairs and all_pairs is None and not suites:
        raise UserError(
            "nothing to evaluate on: give --pairs FILE, --all-pairs SET or --suite NAME --root DIR"
        )
    if suites and root is None:
        raise UserError(f"--suite {suites[0]} needs --root, the folder that holds it")
    if root is not None and not suites:
        raise UserError(f"--root belongs to --suite, one of {', '.join(SUITES)}")
    if conditions is not None and (without := {"ijbb", "ijbc", "megaface"} & set(suites)):
        raise UserError(f"--conditions hardens pairs and all pairs, not suite {min(without)}")
    if detector_weights and not {"ijbb", "ijbc"} & set(suites):
        raise UserError("--detector-weights belongs to --suite ijbb or ijbc")


@dataclass
class _Judge:
    """Embeds sets and scores them."""

    embedder: Embedder
    bars: Progress
    bootstrap: Bootstrap
    plots: Path | None
    detector_weights: bool
    groups: list[str | None] | None = None
    calibration: Calibration | None = None

    def all(self, path: Path, opened: Set, harder: Sequence[Hardening]) -> Iterator[Result]:
        """The set as it is, then under each condition, of which templates have none."""
        results: list[Result]
        for harden in [None, *(harder if isinstance(opened, PairSet | Source) else ())]:
            if isinstance(opened, PairSet):
                results = self._pairs(opened, harden)
            elif isinstance(opened, TemplateSet):
                results = [self._templates(opened)]
            elif isinstance(opened, MegaFace):
                results = [self._distractors(opened)]
            else:
                results = self._all_pairs(path.resolve().stem, opened, harden)
            condition = harden.name if harden else None
            yield from (replace(one, path=str(path), condition=condition) for one in results)

    def _pairs(self, pair_set: PairSet, harden: Hardening | None) -> list[Result]:
        if harden is not None:
            pair_set = replace(pair_set, name=f"{pair_set.name}-{harden.name}")
        advance = console.advance(self.bars, pair_set.name, len(pair_set.images))
        embeddings = self.embedder.embed_pairs(pair_set, change=harden, progress=advance)
        result = evaluate_pairs(
            pair_scores(embeddings, pair_set.pairs),
            pair_set,
            bootstrap=self.bootstrap,
            calibration=self.calibration,
            plots=self.plots,
        )
        if self.calibration is None or pair_set.people is None:
            return [result]
        return [result, self._one_threshold(pair_set.name, embeddings, pair_set.people)]

    def _all_pairs(self, name: str, source: Source, harden: Hardening | None) -> list[Result]:
        if harden is not None:
            name = f"{name}-{harden.name}"
        lost: list[int] = []
        advance = console.advance(self.bars, f"{name}: images", len(source))
        embeddings = self.embedder.embed_source(
            source, unreadable=lost, change=harden, progress=advance
        )
        labels = np.delete(np.asarray(source.labels), lost)
        result = evaluate_all_pairs(
            embeddings,
            labels,
            name=name,
            unreadable=[source.name(index) for index in lost],
            bootstrap=self.bootstrap,
            plots=self.plots,
            progress=console.advance(self.bars, f"{name}: pairs", 1),
        )
        result = replace(result, notes=[*result.notes, *self._trained_on(source)])
        groups = self.groups and np.delete(np.array(self.groups, object), lost).tolist()
        own = {p.at: p.threshold for p in result.tar if p.threshold is not None and p.at <= 0.01}
        return [result, self._one_threshold(name, embeddings, labels, groups, own)]

    def _trained_on(self, source: Source) -> list[str]:
        """A note where the network has seen the set in its training."""
        if card.training_set(self.embedder.metadata, source) is None:
            return []
        return [
            "the network was trained on people of this set, so that these figures are too "
            "optimistic: give a set of others, or see those of the people held out in the run's "
            "results.json"
        ]

    def _one_threshold(
        self,
        name: str,
        embeddings: np.ndarray,
        labels: np.ndarray,
        groups: list[str | None] | None = None,
        own: dict[float, float] | None = None,
    ) -> Result:
        """At the calibration's thresholds; groups without one at the set's own."""
        thresholds = own if groups and own else {}
        if self.calibration is not None:
            thresholds = {far: t.threshold for far, t in self.calibration.thresholds.items()}
        if groups and not thresholds:
            raise UserError(
                f"--groups compares rates at one threshold, and {name} has too few pairs for one "
                "of its own: run sphereface2 calibrate on the model, or give a larger set"
            )
        about: dict[str, Any] = {"name": name, "groups": groups, "bootstrap": self.bootstrap}
        return judge_thresholds(embeddings, labels, thresholds, **about)

    def _templates(self, templates: TemplateSet) -> TemplatesResult:
        """Images are cropped, embedded and averaged into their templates a few thousand at once."""

        def crop(index: int) -> np.ndarray:
            try:
                return warp(templates.image(index), templates.landmarks[index])
            except UserError as error:
                raise UserError(f"{templates.names[index]} cannot be used: {error}") from error

        weights = templates.scores if self.detector_weights else None
        averager = TemplateAverager(templates.template, templates.media, weights)
        advance = console.advance(self.bars, f"{templates.name}: images", len(templates))
        for start in range(0, len(templates), _CHUNK):
            part = range(start, min(start + _CHUNK, len(templates)))
            averager.add(self.embedder.embed(part, read=crop, progress=advance))
        return evaluate_templates(
            averager.features(),
            templates,
            detector_weights=self.detector_weights,
            bootstrap=self.bootstrap,
            progress=console.advance(self.bars, "pairs", 1),
        )

    def _distractors(self, suite: MegaFace) -> DistractorResult:
        """Distractors are shuffled by the seed, so that the first N are a random sample of them."""
        lost: list[int] = []
        advance = console.advance(self.bars, "megaface: probes", len(suite.probes))
        probes = self.embedder.embed_source(suite.probes, unreadable=lost, progress=advance)
        people = np.delete(np.asarray(suite.probes.labels), lost)
        order = np.random.default_rng(self.bootstrap.seed).permutation(len(suite.distractors))
        advance = console.advance(self.bars, "megaface: distractors", len(order))
        blocks = (
            self.embedder.embed_source(
                suite.distractors, order[at : at + _CHUNK], unreadable=lost, progress=advance
            )
            for at in range(0, len(order), _CHUNK)
        )
        result = evaluate_distractors(
            probes, people, blocks, name="megaface", bootstrap=self.bootstrap
        )
        return replace(result, unreadable=len(lost))
