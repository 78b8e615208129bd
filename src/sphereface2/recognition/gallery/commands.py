"""``sphereface2 gallery``: faces looked for in a gallery, and people kept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from cyclopts import Parameter
from rich.table import Table

from sphereface2 import console
from sphereface2.align.detector import Face
from sphereface2.errors import UserError, check_count, check_number, counted
from sphereface2.evaluation.calibration import named_by_mistake
from sphereface2.evaluation.results import far_key
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery.annotate import places, write
from sphereface2.recognition.gallery.faces import (
    Seen,
    files_of,
    load_embedder,
    look,
    warn_of_photographs,
)
from sphereface2.recognition.gallery.gallery import Gallery
from sphereface2.recognition.gallery.types import (
    Match,
    Person,
    UnknownPersonError,
    decide,
    metadata_of,
    person_name,
)

Fusion = Literal["max", "mean"]
Result = TypeVar("Result")
_BATCH = 64


def search(
    gallery: str,
    /,
    *probes: Path,
    model: str | None = None,
    k: Annotated[int, Parameter(alias="-k")] = 5,
    fusion: Fusion = "max",
    far: float | None = None,
    fpir: float | None = None,
    threshold: float | None = None,
    exact: bool = False,
    aligned: bool = False,
    faces: Literal["largest", "all"] = "largest",
    annotate: Path | None = None,
    device: str | None = None,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """Tell whom images show, or that they show nobody enrolled: one line an image.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        probes: Images to look for, or folders of them.
        model: A run, a model folder or a hub id; by default the gallery's own.
        k: People to name an image.
        fusion: A person's score: that of the best image (max) or of the mean of all (mean).
        far: Unknown below the model's calibrated threshold for this false accept rate of one
            comparison.
        fpir: Unknown below the threshold at which, in a gallery of this size, no more than this
            share of strangers would be named by mistake: 0.01 is about one stranger in 100.
        threshold: Unknown below this similarity, instead.
        exact: Compare with every image even where the gallery has an approximate index.
        aligned: The images are aligned crops already.
        faces: Look for the largest and most central face of an image, or for all.
        annotate: JPEG or PNG to write: the photograph with boxes and names. For several images, a
            folder.
        device: "cpu", "cuda" or "mps"; default: the best there is.
        as_json: Print JSON instead of lines.

    Returns:
        For each face ``image``, ``box`` (left, top, right, bottom in pixels; None for a crop),
        ``person`` (None: unknown, or no threshold), ``threshold`` (None: the model is not
        calibrated), ``far``, ``fpir`` (about this share of strangers would be named by mistake)
        and ``matches`` (``person``, ``score``, ``metadata``); or ``image`` and ``error``.

    Raises:
        UserError: as elsewhere; or images could not be used, after the others were answered and
            printed.
    """
    if not (files := [file for probe in probes for file in files_of(probe)]):
        raise UserError("give images to search for, or folders of images")
    if annotate is not None and aligned:
        raise UserError("--annotate draws boxes on photographs, and --aligned images are crops")
    copies = {} if annotate is None else places(annotate, probes, files)
    if aligned:
        warn_of_photographs(files)
    with Gallery.open(gallery, create=False) as opened:
        embedder = load_embedder(model, opened, device)
        stats = opened.stats()
        comparisons = stats["people" if fusion == "mean" else "images"]
        line = _line(embedder, far, fpir, threshold, comparisons, model or stats["model"])
        if not as_json:
            console.note(line.sentence)
        placed: list[tuple[int, dict[str, Any]]] = []
        errors: list[UserError] = []
        for start in range(0, len(files), _BATCH):
            seen: list[tuple[int, Seen]] = []
            for place, file in enumerate(files[start : start + _BATCH], start):
                try:
                    seen += [(place, face) for face in look(embedder, file, aligned, faces)]
                except UserError as error:
                    if len(files) == 1:
                        raise
                    errors.append(error)
                    placed.append((place, {"image": str(file), "error": str(error)}))
            crops = [crop for _, (crop, _) in seen]
            rows = embedder.embed(crops, aligned=True)
            answers = opened.search(rows, k=k, fusion=fusion, exact=exact)
            for (place, (_, face)), matches in zip(seen, answers, strict=True):
                report = _report(files[place], face, matches, line)
                placed.append((place, report))
                if not as_json:
                    console.show(_answer(report))
    reports = [report for _, report in sorted(placed, key=itemgetter(0))]
    written = write(reports, copies) if copies else []
    told = [f"{len(written):,} annotated: {annotate}"] if written else []
    console.tell(as_json, reports, *told)
    if errors:
        raise UserError(
            f"{len(errors)} of {len(files)} images could not be searched for: "
            + "; ".join(map(str, errors))
        )
    return reports


def verify(
    gallery: str,
    person: str,
    /,
    *images: Path,
    model: str | None = None,
    fusion: Fusion = "max",
    far: float | None = None,
    threshold: float | None = None,
    aligned: bool = False,
    device: str | None = None,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """Tell whether images show an enrolled person: one comparison, not a search.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        person: Whom the images are said to show.
        images: The images, of one face each.
        model: A run, a model folder or a hub id; by default the gallery's own.
        fusion: The person's score: that of the best image (max) or of the mean of all (mean).
        far: Accept at the model's calibrated threshold for this false accept rate.
        threshold: Accept from this similarity on, instead.
        aligned: The images are aligned crops already.
        device: "cpu", "cuda" or "mps"; default: the best there is.
        as_json: Print JSON instead of lines.

    Returns:
        For each image ``image``, ``person``, ``similarity``, ``threshold``, ``far`` and ``same``
        (None: the model is not calibrated).
    """
    if not images:
        raise UserError("give images that are said to show the person")
    with Gallery.open(gallery, create=False) as opened:
        embedder = load_embedder(model, opened, device)
        line = _line(embedder, far, None, threshold, 1, model or opened.model)
        if aligned:
            warn_of_photographs(images)
        crops = [look(embedder, image, aligned, "one")[0][0] for image in images]
        embeddings = embedder.embed(crops, aligned=True)
        try:
            scores = opened.verify(person, embeddings, fusion=fusion)
        except UnknownPersonError:
            raise _nobody(opened, person) from None
    reports: list[dict[str, Any]] = [
        {
            "image": str(image),
            "person": person_name(person),
            "similarity": score,
            "threshold": line.threshold,
            "far": line.far,
            "same": None if line.threshold is None else score >= line.threshold,
        }
        for image, score in zip(images, scores, strict=True)
    ]
    said = {True: "same person", False: "another person", None: "no threshold"}
    at = "" if line.threshold is None else f", threshold {line.threshold:.4f}"
    lines = [
        f"{r['image']}: {said[r['same']]} (similarity {r['similarity']:.4f}{at})" for r in reports
    ]
    console.tell(as_json, reports, *lines)
    return reports


def set_metadata(gallery: str, person: str, /, *, metadata: str) -> Person:
    """Change a person's metadata; the images stay.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        person: Who is there.
        metadata: A JSON object to keep with them instead, for example {"since": 2024}.
    """
    about = metadata_of(metadata)
    changed, _ = _changed(gallery, person, lambda opened: opened.set_metadata(person, about))
    console.show(f"{changed.name}: {json.dumps(changed.metadata, ensure_ascii=False)}")
    return changed


def rename(gallery: str, person: str, new_name: str, /) -> Person:
    """Give a person another name.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        person: Who is there.
        new_name: What they are called from now on.
    """
    changed, _ = _changed(gallery, person, lambda opened: opened.rename(person, new_name))
    console.show(f"{person} is now {changed.name}")
    return changed


def remove(gallery: str, person: str, /) -> int:
    """Remove a person and every trace of their embeddings.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        person: Whom to remove.
    """
    count, rest = _changed(gallery, person, lambda opened: opened.remove(person))
    console.show(f"removed {person} and {counted(count, 'image')}{rest}")
    return count


def compact(gallery: str, /) -> None:
    """Give back the space of what was removed.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
    """
    with Gallery.open(gallery, create=False) as opened:
        opened.compact()
        rest = _rest(opened) if opened.is_file else ""
    console.show(f"compacted {opened.uri}{rest}")


def _changed(
    address: str, person: str, change: Callable[[Gallery], Result | None]
) -> tuple[Result, str]:
    """What a change of somebody gives, and what is left to do; UserError if nobody is there."""
    with Gallery.open(address, create=False) as gallery:
        if not (result := change(gallery)):
            raise _nobody(gallery, person)
        return result, _rest(gallery)


def _nobody(gallery: Gallery, person: str) -> UserError:
    return UserError(
        f"there is no person named {person!r} in {gallery.uri}; `sphereface2 gallery list` names "
        "everybody"
    )


def _rest(gallery: Gallery) -> str:
    """What is left to do so that the bytes of removed embeddings are nowhere."""
    if not gallery.is_file:
        return "; the server's files hold the rows until VACUUM: run sphereface2 gallery compact"
    if gallery.unerased:
        return (
            "; another process still reads what was there before, so that the bytes stay in "
            f"{gallery.uri}-wal: run sphereface2 gallery compact when it has ended"
        )
    return ""


def index(gallery: str, /, *, index_from: int | None = None, exact: bool = False) -> None:
    """Choose whether searches are approximate, and build the index.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        index_from: Search approximately from so many images on. A server does so always.
        exact: Compare with every image in every search.
    """
    if exact == (index_from is not None):
        raise UserError("give --index-from IMAGES or --exact")
    if index_from is not None:
        check_count("--index-from", index_from, 0)
    with Gallery.open(gallery, create=False) as opened:
        opened.set_index(index_from)
    how = "exact" if exact else f"approximate from {counted(index_from or 0, 'image')} on"
    console.show(f"{opened.uri}: {how}")


def list_people(gallery: str, /, *, as_json: bool = False) -> list[Person]:
    """Name everybody in a gallery.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        as_json: Print JSON instead of a table.
    """
    with Gallery.open(gallery, create=False) as opened:
        people = opened.people()
    keys = ("name", "images", "metadata")
    table = Table("person", "images", "metadata")
    for person in people:
        about = json.dumps(person.metadata, ensure_ascii=False) if person.metadata else ""
        table.add_row(console.cell(person.name), str(person.images), console.cell(about))
    console.tell(as_json, [{key: getattr(p, key) for key in keys} for p in people], table)
    return people


def stats(gallery: str, /, *, as_json: bool = False) -> dict[str, Any]:
    """Count people and images; name the model.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        as_json: Print JSON instead of lines.
    """
    with Gallery.open(gallery, create=False) as opened:
        numbers = opened.stats()
    lines = (f"{key:16} {'–' if value is None else value}" for key, value in numbers.items())
    console.tell(as_json, numbers, *lines)
    return numbers


# -- decisions -------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """Where "known" begins, and what is known of it."""

    threshold: float | None
    far: float | None
    fpir: float | None
    sentence: str


def _line(
    embedder: FaceEmbedder,
    far: float | None,
    fpir: float | None,
    threshold: float | None,
    comparisons: int,
    model: str | None,
) -> _Line:
    """The threshold to decide by among so many comparisons a probe."""
    options = {"--far": far, "--fpir": fpir, "--threshold": threshold}
    given = [option for option, value in options.items() if value is not None]
    if len(given) > 1:
        raise UserError("give one of --far, --fpir and --threshold")
    if threshold is not None:
        check_number("--threshold", threshold, least=-1, most=1)
        return _Line(threshold, None, None, f"threshold {threshold:.4f}")
    calibration = embedder.calibration
    if calibration is None:
        if given:
            raise UserError(
                f"{given[0]} needs a calibration: run sphereface2 calibrate {model} first, or give "
                "--threshold"
            )
        return _Line(None, None, None, "no threshold: the model is not calibrated")
    calibration.check_for_crops()
    if fpir is not None:
        far = _far_for(fpir, max(1, comparisons), calibration.thresholds)
    far = calibration.far_default if far is None else far
    limit = calibration.threshold(far)
    named = named_by_mistake(far, comparisons)
    sentence = f"threshold {limit:.4f} (FAR {far_key(far)}"
    if comparisons > 1:
        share = f"about one stranger in {1 / named:,.0f}" if named <= 0.5 else "most strangers"
        sentence += f", {comparisons:,} comparisons a search: {share} would be named by mistake"
    return _Line(limit, far, named, f"{sentence})")


def _far_for(fpir: float, comparisons: int, known: Iterable[float]) -> float:
    """The largest calibrated FAR at which at most ``fpir`` of strangers are named by mistake."""
    if not 0 < fpir < 1:
        raise UserError(f"--fpir must lie between 0 and 1, got {fpir:g}")
    wanted = -math.expm1(math.log1p(-fpir) / comparisons)
    low = [far for far in known if far <= wanted * (1 + 1e-9)]
    if not low:
        needed, least = far_key(float(f"{wanted:.1g}")), far_key(min(known))
        raise UserError(
            f"--fpir {fpir:g} among {comparisons:,} comparisons needs a threshold for a FAR of "
            f"{needed}, and the calibration's smallest is {least}: repeat sphereface2 calibrate "
            f"with --far {needed}, which takes more pairs, or give --threshold"
        )
    return max(low)


def _report(file: Path, face: Face | None, matches: Sequence[Match], line: _Line) -> dict[str, Any]:
    """What `search` returns of a face: who it is by the line, and who is nearest."""
    best = None if line.threshold is None else decide(matches, line.threshold)
    return {
        "image": str(file),
        "box": None if face is None else face.box.tolist(),
        "person": best and best.person,
        "threshold": line.threshold,
        "far": line.far,
        "fpir": line.fpir,
        "matches": [
            {"person": m.person, "score": m.score, "metadata": m.metadata} for m in matches
        ],
    }


def _answer(report: dict[str, Any]) -> str:
    """A report of `search` in one line."""
    where = report["image"]
    if report["box"] is not None:
        where += " [" + ", ".join(f"{edge:.0f}" for edge in report["box"]) + "]"
    matches = [f"{match['person']} {match['score']:.4f}" for match in report["matches"]]
    if not matches:
        return f"{where}: unknown (the gallery is empty)"
    if report["person"] is not None:
        rest = f" (then {', '.join(matches[1:])})" if len(matches) > 1 else ""
        return f"{where}: {matches[0]}{rest}"
    verdict = "no threshold" if report["threshold"] is None else "unknown"
    return f"{where}: {verdict} (nearest {', '.join(matches)})"
