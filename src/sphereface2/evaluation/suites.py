"""The field's test suites by name: where their files are, and the figures each is known for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress
from rich.table import Table
from torch import nn

from sphereface2.data import ijb
from sphereface2.data.ijb import TemplateSet
from sphereface2.data.locate import TrainingData
from sphereface2.data.sources import open_source
from sphereface2.data.verification import PairSet, load_cfp, load_pairs, union
from sphereface2.errors import UserError, did_you_mean
from sphereface2.evaluation import identification, reports
from sphereface2.evaluation import verification as metrics
from sphereface2.evaluation.embedding import embed, or_nothing
from sphereface2.evaluation.templates import TemplateAverager, template_pair_scores
from sphereface2.images import SUFFIXES

_CHUNK = 4096  # images embedded before they are folded into what is kept
_BINS = {
    "lfw": ("lfw.bin",),
    "agedb30": ("agedb_30.bin", "agedb30.bin"),
    "calfw": ("calfw.bin",),
    "cplfw": ("cplfw.bin",),
    "cfp_ff": ("cfp_ff.bin",),
    "cfp_fp": ("cfp_fp.bin",),
}
#: The authors' lists and the image folders they go with, in either of two places.
_LISTS = {
    "lfw": (("lfw/pairs.txt", "lfw/lfw"), ("pairs.txt", "lfw"), ("lfw_pairs.txt", "lfw")),
    "calfw": (
        ("calfw/pairs_CALFW.txt", "calfw/aligned images"),
        ("pairs_CALFW.txt", "aligned images"),
    ),
    "cplfw": (
        ("cplfw/pairs_CPLFW.txt", "cplfw/aligned images"),
        ("pairs_CPLFW.txt", "aligned images"),
    ),
}
_CFP = ("cfp-dataset", "")
_COMBINED = ("lfw", "agedb30", "calfw", "cplfw")
_MEGAFACE = (("facescrub_images", "megaface_images"), ("probes", "distractors"))
SUITES = (*_BINS, "combined", "ijbb", "ijbc", "megaface")


@dataclass(frozen=True)
class MegaFace:
    """Probes, a labelled set, and images of other people: a folder at any depth, or a set."""

    probes: Path
    distractors: Path


def open_suite(name: str, root: str | Path) -> PairSet | TemplateSet | MegaFace:
    """Find a suite's files under ``root``.

    Args:
        name: one of `SUITES`.
        root: the folder that holds the suite, or several of them.

    Raises:
        UserError: unknown name; or files are missing, and all that were looked for are named.
    """
    root = Path(root)
    if name not in SUITES:
        raise UserError(
            f"there is no suite {name!r}{did_you_mean(name, SUITES)}: known are {', '.join(SUITES)}"
        )
    if not root.is_dir():
        raise UserError(f"there is no folder {root} to look for suite {name} in: give --root")
    if name in ("ijbb", "ijbc"):
        return ijb.load(name, root)
    if name == "megaface":
        places = [(root / probes, root / distractors) for probes, distractors in _MEGAFACE]
        for probes, distractors in places:
            if probes.exists() and distractors.exists():
                return MegaFace(probes, distractors)
        raise UserError(_missing(name, root, [list(both) for both in places]))
    if name == "combined":
        absent = [
            _missing(part, root, looked) for part in _COMBINED if (looked := _absent(part, root))
        ]
        if absent:
            raise UserError("suite combined needs four sets, and " + "; ".join(absent))
        return union(name, [_open_pairs(part, root) for part in _COMBINED])
    return _open_pairs(name, root)


def _forms(name: str, root: Path) -> list[tuple[list[Path], Callable[[], PairSet]]]:
    """Each form that a set of pairs may have: the files it needs, and what reads them."""

    def packed(path: Path) -> tuple[list[Path], Callable[[], PairSet]]:
        return [path], lambda: load_pairs(path, names=TrainingData.names_for(path))

    def listed(path: Path, images: Path) -> tuple[list[Path], Callable[[], PairSet]]:
        return [path, images], lambda: load_pairs(path, images=images)

    def cfp(folder: Path) -> tuple[list[Path], Callable[[], PairSet]]:
        protocol = name[-2:].upper()
        needed = [folder / "Protocol" / "Pair_list_F.txt", folder / "Protocol" / "Split" / protocol]
        if protocol == "FP":
            needed.append(folder / "Protocol" / "Pair_list_P.txt")
        return needed, lambda: load_cfp(folder, protocol)

    forms = [packed(root / file) for file in _BINS[name]]
    forms += [listed(root / path, root / images) for path, images in _LISTS.get(name, ())]
    if name.startswith("cfp"):
        forms += [cfp(root / folder) for folder in _CFP]
    return forms


def _absent(name: str, root: Path) -> list[list[Path]]:
    """The files of every form, or nothing if one form is whole."""
    forms = [needed for needed, _ in _forms(name, root)]
    return [] if any(all(p.exists() for p in needed) for needed in forms) else forms


def _open_pairs(name: str, root: Path) -> PairSet:
    for needed, read in _forms(name, root):
        if all(path.exists() for path in needed):
            return replace(read(), name=name)
    raise UserError(_missing(name, root, _absent(name, root)))


def _missing(name: str, root: Path, forms: list[list[Path]]) -> str:
    told = (
        " with ".join(f"{p} (found)" if p.exists() else str(p) for p in needed) for needed in forms
    )
    return f"suite {name} is not under {root}: looked for {', or '.join(told)}"


# --- IJB -----------------------------------------------------------------------------------------


def evaluate_templates(
    net: nn.Module,
    templates: TemplateSet,
    *,
    detector_weights: bool = False,
    flip: bool = True,
    batch_size: int = 128,
    device: Any = None,
    replicates: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """IJB-B's or IJB-C's figures, JSON-able.

    Images are cropped, embedded and folded into their templates a few thousand at a time.

    Args:
        net: a backbone with its ``preprocessing``.
        templates: from `sphereface2.data.ijb.load`.
        detector_weights: weight each image by its detector score.
        flip, batch_size, device, replicates, seed, progress: as in `evaluate_pairs`.

    Returns:
        The counts, ``verification`` (1:1) and ``identification`` (1:N), see `score_templates`.
    """
    averager = TemplateAverager(
        templates.template, templates.media, templates.scores if detector_weights else None
    )
    advance = reports.advance(progress, f"{templates.name}: images", len(templates))
    for start in range(0, len(templates), _CHUNK):
        part = range(start, min(start + _CHUNK, len(templates)))
        averager.add(
            embed(
                net,
                part,
                read=templates.crop,
                batch_size=batch_size,
                flip=flip,
                device=device,
                progress=advance,
            )
        )
    report = {
        "name": templates.name,
        "images": len(templates),
        "templates": len(templates.template_ids),
        "detector_weights": detector_weights,
    }
    return report | score_templates(
        averager.features(), templates, replicates=replicates, seed=seed, progress=progress
    )


def score_templates(
    features: np.ndarray,
    templates: TemplateSet,
    *,
    replicates: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """IJB's figures from the features (T, d) of its templates, rows of length 1.

    ``verification`` holds the counts, ``tar`` and ``tar_threshold`` by FAR. ``identification``
    holds ``rank1``, ``rank5``, ``rank10`` and ``tpir`` by FPIR, means over the two galleries, and
    ``galleries`` with the same of each, the counts and ``tpir_threshold``. A task whose files are
    absent is None. With ``replicates``, ``tar_ci``, ``rank1_ci`` and so on are intervals from a
    bootstrap over people (over pairs, for 1:1, where the 1:N lists do not tell who is who) with the
    thresholds held fixed.
    """
    report: dict[str, Any] = {"verification": None, "identification": None}
    known = [*templates.galleries, *([templates.probes] if templates.probes else [])]
    if templates.pairs is not None and templates.same is not None:
        person = np.full(len(features), -1, np.int64)
        for who in known:
            person[who.templates] = who.people
        report["verification"] = _verification(
            features, templates.pairs, templates.same, person, replicates, seed, progress
        )
    if templates.probes is not None:
        report["identification"] = _identification(features, templates, replicates, seed)
    return report | {"notes": templates.notes}


def _verification(
    features: np.ndarray,
    pairs: np.ndarray,
    same: np.ndarray,
    person: np.ndarray,
    replicates: int,
    seed: int,
    progress: Progress | None,
) -> dict[str, Any]:
    scores = template_pair_scores(features, pairs, progress=reports.advance(progress, "pairs", 1))
    tars = metrics.tar_at_far(scores, same)
    impostors = int(np.count_nonzero(~same))
    report: dict[str, Any] = {
        "pairs": len(pairs),
        "matched": len(pairs) - impostors,
        "mismatched": impostors,
        "tar": {metrics.far_key(t.far): t.tar for t in tars},
        "tar_threshold": {metrics.far_key(t.far): t.threshold for t in tars},
        "notes": reports.untold(
            "TAR at FAR", [t.far for t in tars if t.tar is None], impostors, "mismatched pairs"
        ),
    }
    if replicates:
        who = person[pairs[same, 0]]
        over = "pairs" if (who < 0).any() else "people"
        unit = np.arange(len(who)) if over == "pairs" else np.unique(who, return_inverse=True)[1]
        genuine = scores[same]
        # Where no score qualifies none is accepted.
        bounds = [np.inf if t.threshold is None else t.threshold for t in tars]
        hits = np.stack([np.bincount(unit, weights=genuine >= bound) for bound in bounds])
        rng = np.random.default_rng(seed)
        cis = metrics.ratio_intervals(hits, np.bincount(unit), replicates, rng)
        report["tar_ci"] = {
            metrics.far_key(t.far): None if t.tar is None else list(ci)
            for t, ci in zip(tars, cis, strict=True)
        }
        report["intervals"] = reports.how_fixed(over, replicates, seed)
    return report


def _identification(
    features: np.ndarray, templates: TemplateSet, replicates: int, seed: int
) -> dict[str, Any]:
    probes = templates.probes
    assert probes is not None
    galleries = []
    for gallery in templates.galleries:
        found = identification.search(
            features[probes.templates], probes.people, features[gallery.templates], gallery.people
        )
        options: dict[str, Any] = {"people": probes.people, "replicates": replicates, "seed": seed}
        ranks = identification.rank_k(found, **options)
        tpirs = identification.tpir_at_fpir(found, **options)
        strangers = int(np.count_nonzero(~found.mated))
        one: dict[str, Any] = {
            "name": gallery.name,
            "templates": len(gallery.templates),
            "people": len(np.unique(gallery.people)),
            "probes": len(probes.templates),
            "mated": len(probes.templates) - strangers,
            **{f"rank{rate.at:g}": rate.value for rate in ranks},
            "tpir": {metrics.far_key(rate.at): rate.value for rate in tpirs},
            "tpir_threshold": {metrics.far_key(rate.at): rate.threshold for rate in tpirs},
            "notes": reports.untold(
                "TPIR at FPIR",
                [r.at for r in tpirs if r.value is None],
                strangers,
                f"probes of people outside {gallery.name}",
            ),
        }
        if replicates:
            one |= {f"rank{rate.at:g}_ci": reports.pair(rate.ci) for rate in ranks}
            one["tpir_ci"] = {metrics.far_key(rate.at): reports.pair(rate.ci) for rate in tpirs}
            one["intervals"] = reports.how_fixed("people", replicates, seed)
        galleries.append(one)

    def mean(values: list[float | None]) -> float | None:
        return None if None in values else float(np.mean(np.array(values, float)))

    return {
        **{f"rank{k}": mean([one[f"rank{k}"] for one in galleries]) for k in identification.RANKS},
        "tpir": {
            key: mean([one["tpir"][key] for one in galleries]) for key in galleries[0]["tpir"]
        },
        "galleries": galleries,
    }


# --- distractors ---------------------------------------------------------------------------------


def evaluate_megaface(
    net: nn.Module,
    suite: MegaFace,
    *,
    flip: bool = True,
    batch_size: int = 128,
    device: Any = None,
    replicates: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Rank-1 identification among 10, 100, … and all distractors, JSON-able.

    The distractors are shuffled by ``seed``, so that the first N are a random sample of them.
    Unreadable images are left out and counted. Other arguments as in `evaluate_pairs`.
    """
    options: dict[str, Any] = {"flip": flip, "batch_size": batch_size, "device": device}
    source = open_source(suite.probes)
    lost: list[int] = []
    probes = embed(
        net,
        (or_nothing(source.read, i) for i in range(len(source))),
        unreadable=lost,
        progress=reports.advance(progress, "megaface: probes", len(source)),
        **options,
    )
    people = np.delete(np.asarray(source.labels), lost)
    count, read = _images(suite.distractors)
    order = np.random.default_rng(seed).permutation(count)
    advance = reports.advance(progress, "megaface: distractors", count)
    left_out: list[int] = []

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, count, _CHUNK):
            unreadable: list[int] = []
            chosen = order[start : start + _CHUNK]
            yield embed(
                net,
                (or_nothing(read, int(i)) for i in chosen),
                unreadable=unreadable,
                progress=advance,
                **options,
            )
            left_out.extend(unreadable)

    found = identification.distractor_rank1(
        probes, people, blocks(), [10**k for k in range(1, 10)], replicates=replicates, seed=seed
    )
    report: dict[str, Any] = {
        "name": "megaface",
        "images": len(probes),
        "people": len(np.unique(people)),
        "distractors": found.sizes[-1],
        "searches": found.searches,
        "rank1": {
            str(size): rate.value for size, rate in zip(found.sizes, found.rank1, strict=True)
        },
        "unreadable": len(lost) + len(left_out),
        "seed": seed,
        "notes": [],
    }
    if replicates:
        report["rank1_ci"] = {
            str(size): reports.pair(rate.ci)
            for size, rate in zip(found.sizes, found.rank1, strict=True)
        }
        report["intervals"] = reports.how_fixed("people", replicates, seed)
    return report


def _images(path: Path) -> tuple[int, Callable[[int], bytes]]:
    """Number of images at ``path`` and what reads one: a folder of any depth, or a packed set."""
    packed = path.is_file() or any(path.glob("*.rec")) or any(path.glob("*.tar"))
    if packed:
        source = open_source(path)
        return len(source), source.read
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
    return len(files), lambda i: files[i].read_bytes()


# --- tables --------------------------------------------------------------------------------------


def tables(report: dict[str, Any]) -> Iterator[Table | str]:
    """What to print of such a report: tables and lines."""
    if "rank1" in report:
        yield _megaface_table(report)
        yield (
            f"{report['searches']:,} searches of {report['images']:,} probes of "
            f"{report['people']:,} people; the mate must beat every distractor"
        )
        if report["unreadable"]:
            yield f"{report['unreadable']:,} unreadable images left out"
        return
    weighted = ", weighted by the detector's scores" if report["detector_weights"] else ""
    counts = f"{report['templates']:,} templates of {report['images']:,} images"
    yield f"{report['name']}: {counts}{weighted}"
    if (pairs := report["verification"]) is not None:
        table = Table(title="1:1 verification", title_justify="left")
        table.add_column("")
        table.add_column("value", justify="right")
        over = f" over {pairs['intervals']['over']}" if "intervals" in pairs else ""
        table.add_column(f"{metrics.LEVEL:.0%} interval{over}", justify="right", style="dim")
        for far, tar in pairs["tar"].items():
            ci = pairs.get("tar_ci", {}).get(far)
            table.add_row(f"TAR at FAR {far}", reports.percent(tar), reports.interval(ci))
        yield table
        yield f"{pairs['matched']:,} matched and {pairs['mismatched']:,} mismatched pairs"
        yield from pairs["notes"]
    if (found := report["identification"]) is not None:
        table = Table(title="1:N identification", title_justify="left")
        table.add_column("")
        table.add_column("mean", justify="right", style="bold")
        for gallery in found["galleries"]:
            table.add_column(gallery["name"], justify="right")
        for k in identification.RANKS:
            every = [found, *found["galleries"]]
            table.add_row(f"rank-{k}", *(reports.percent(one[f"rank{k}"]) for one in every))
        table.add_section()
        for fpir in found["tpir"]:
            told = [reports.percent(one["tpir"][fpir]) for one in [found, *found["galleries"]]]
            table.add_row(f"TPIR at FPIR {fpir}", *told)
        yield table
        for one in found["galleries"]:
            yield (
                f"{one['name']}: {one['people']:,} people, {one['probes']:,} probes, "
                f"{one['mated']:,} of them of people in it"
            )
            yield from one["notes"]
    yield from report["notes"]


def _megaface_table(report: dict[str, Any]) -> Table:
    table = Table(title=f"{report['name']}: rank-1 by number of distractors", title_justify="left")
    table.add_column("distractors", justify="right")
    table.add_column("rank-1", justify="right")
    table.add_column(f"{metrics.LEVEL:.0%} interval over people", justify="right", style="dim")
    for size, rate in report["rank1"].items():
        ci = report.get("rank1_ci", {}).get(size)
        table.add_row(f"{int(size):,}", reports.percent(rate), reports.interval(ci))
    return table
