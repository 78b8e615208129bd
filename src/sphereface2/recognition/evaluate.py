"""``sphereface2 evaluate``: score a network on verification sets, all pairs and suites."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.progress import Progress

from sphereface2 import console
from sphereface2.align import warp
from sphereface2.backbones import bundle
from sphereface2.data.opening import open_source
from sphereface2.data.pairs import PairSet
from sphereface2.data.source import Source
from sphereface2.data.suites import (
    SUITES,
    MegaFace,
    TemplateSet,
    open_pair_sets,
    open_suite,
)
from sphereface2.embedder import Embedder
from sphereface2.errors import UserError, check_count
from sphereface2.evaluation import tables
from sphereface2.evaluation.all_pairs import AllPairsResult, evaluate_all_pairs
from sphereface2.evaluation.calibration import Calibration
from sphereface2.evaluation.distractors import DistractorResult, evaluate_distractors
from sphereface2.evaluation.pairs import REPLICATES, PairsResult, evaluate_pairs
from sphereface2.evaluation.results import Result, to_dict
from sphereface2.evaluation.templates import TemplateAverager, TemplatesResult, evaluate_templates
from sphereface2.evaluation.verification import pair_scores

_CHUNK = 4096  # images embedded before they are folded into what is kept


@dataclass(frozen=True)
class Evaluation:
    """What ``sphereface2 evaluate`` found.

    Attributes:
        checkpoint: as it was given.
        flip: whether the mirror image's embedding was added.
        sets: a result for each verification set, those of ``pairs`` first.
        all_pairs: of the labelled set, or None.
        templates: a result for each of IJB-B and IJB-C.
        distractors: MegaFace's.
    """

    checkpoint: str
    flip: bool
    sets: tuple[PairsResult, ...]
    all_pairs: AllPairsResult | None = None
    templates: tuple[TemplatesResult, ...] = ()
    distractors: tuple[DistractorResult, ...] = ()

    @property
    def results(self) -> list[Result]:
        """All of them, in the order they are printed."""
        middle = [self.all_pairs] if self.all_pairs is not None else []
        return [*self.sets, *middle, *self.templates, *self.distractors]


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
) -> Evaluation:
    """Measure a model's accuracy on verification pairs, all pairs of a set, or standard suites.

    Where a calibration.json lies beside the model, each verification set is judged by it too,
    unless the mirror image is left out: it was fitted on embeddings with it.

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
        seed: Seed of the bootstrap and of the distractors' order.
        plots: Folder for PNG files of ROC curves and score histograms.
        device: "cpu", "cuda" or "mps"; default: the best there is.
        as_json: Print JSON instead of tables.

    Raises:
        UserError: nothing to evaluate on, or an option, a set or the model cannot be used.
    """
    _check_options(pairs, all_pairs, suites, root, detector_weights)
    check_count("--seed", seed, 0)
    sets = list(zip(pairs, open_pair_sets(pairs, images, names), strict=True))
    opened = [open_suite(name, root) for name in suites if root is not None]
    sets += [(root, suite) for suite in opened if root and isinstance(suite, PairSet)]
    source = open_source(all_pairs) if all_pairs is not None else None
    with (
        Embedder.load(checkpoint, device=device, flip=flip, batch_size=batch_size) as embedder,
        console.bars() as bars,
    ):
        judge = _Judge(embedder, bars, seed, plots, root)
        if flip:
            judge.calibration = Calibration.load(
                bundle.resolve(checkpoint).resolve(), fingerprint=embedder.fingerprint
            )
        found = Evaluation(
            str(checkpoint),
            flip,
            tuple(judge.pairs(path, pair_set) for path, pair_set in sets),
            judge.all_pairs(all_pairs, source) if all_pairs and source else None,
            tuple(
                judge.templates(suite, detector_weights)
                for suite in opened
                if isinstance(suite, TemplateSet)
            ),
            tuple(judge.distractors(suite) for suite in opened if isinstance(suite, MegaFace)),
        )
    if as_json:
        console.print_json(to_dict(found))
    else:
        for result in found.results:
            console.show(*tables.render(result), "")
    return found


def _check_options(
    pairs: Sequence[Path],
    all_pairs: Path | None,
    suites: Sequence[str],
    root: Path | None,
    detector_weights: bool,
) -> None:
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


@dataclass
class _Judge:
    """Embeds sets and scores them."""

    embedder: Embedder
    bars: Progress
    seed: int
    plots: Path | None
    root: Path | None
    calibration: Calibration | None = None

    def pairs(self, path: Path, pair_set: PairSet) -> PairsResult:
        advance = console.advance(self.bars, pair_set.name, len(pair_set.images))
        embeddings = self.embedder.embed_pairs(pair_set, progress=advance)
        result = evaluate_pairs(
            pair_scores(embeddings, pair_set.pairs),
            pair_set,
            replicates=REPLICATES,
            seed=self.seed,
            calibration=self.calibration,
            plots=self.plots,
        )
        return replace(result, path=str(path))

    def all_pairs(self, path: Path, source: Source) -> AllPairsResult:
        name, lost = path.resolve().stem, list[int]()
        advance = console.advance(self.bars, f"{name}: images", len(source))
        embeddings = self.embedder.embed_source(source, unreadable=lost, progress=advance)
        result = evaluate_all_pairs(
            embeddings,
            np.delete(np.asarray(source.labels), lost),
            name=name,
            unreadable=[source.name(index) for index in lost],
            replicates=REPLICATES,
            seed=self.seed,
            plots=self.plots,
            progress=console.advance(self.bars, f"{name}: pairs", 1),
        )
        return replace(result, path=str(path))

    def templates(self, templates: TemplateSet, detector_weights: bool) -> TemplatesResult:
        """Images are cropped, embedded and averaged into their templates a few thousand at once."""

        def crop(index: int) -> np.ndarray:
            try:
                return warp(templates.image(index), templates.landmarks[index])
            except UserError as error:
                raise UserError(f"{templates.names[index]} cannot be used: {error}") from error

        averager = TemplateAverager(
            templates.template, templates.media, templates.scores if detector_weights else None
        )
        advance = console.advance(self.bars, f"{templates.name}: images", len(templates))
        for start in range(0, len(templates), _CHUNK):
            part = range(start, min(start + _CHUNK, len(templates)))
            averager.add(self.embedder.embed(part, read=crop, progress=advance))
        result = evaluate_templates(
            averager.features(),
            templates,
            detector_weights=detector_weights,
            replicates=REPLICATES,
            seed=self.seed,
            progress=console.advance(self.bars, "pairs", 1),
        )
        return replace(result, path=str(self.root))

    def distractors(self, suite: MegaFace) -> DistractorResult:
        """Distractors are shuffled by the seed, so that the first N are a random sample of them."""
        source, lost = suite.probes, list[int]()
        advance = console.advance(self.bars, "megaface: probes", len(source))
        probes = self.embedder.embed_source(source, unreadable=lost, progress=advance)
        people = np.delete(np.asarray(source.labels), lost)
        result = evaluate_distractors(
            probes,
            people,
            self._blocks(suite.distractors, lost),
            name="megaface",
            replicates=REPLICATES,
            seed=self.seed,
        )
        return replace(result, unreadable=len(lost), path=str(self.root))

    def _blocks(self, source: Source, lost: list[int]) -> Iterator[np.ndarray]:
        order = np.random.default_rng(self.seed).permutation(len(source))
        advance = console.advance(self.bars, "megaface: distractors", len(source))
        for start in range(0, len(source), _CHUNK):
            part = order[start : start + _CHUNK]
            yield self.embedder.embed_source(source, part, unreadable=lost, progress=advance)
