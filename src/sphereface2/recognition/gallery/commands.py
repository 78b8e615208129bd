"""``sphereface2 gallery``: images into a gallery, faces looked for in it."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from cyclopts import Parameter
from rich.markup import escape
from rich.table import Table

from sphereface2 import console
from sphereface2.align import Face, NoFaceError, warp
from sphereface2.errors import UserError
from sphereface2.images import read_image
from sphereface2.recognition.gallery.gallery import Gallery, Stored
from sphereface2.recognition.gallery.quality import Action, Gate, measure
from sphereface2.recognition.gallery.types import (
    Enrolment,
    NoGalleryError,
    Person,
    decide,
    person_name,
)

if TYPE_CHECKING:
    from sphereface2.recognition.face_embedder import FaceEmbedder

Fusion = Literal["max", "mean"]
_BATCH = 64
_LISTED = 20


class _File(NamedTuple):
    """A file of a person's, and whether it is an aligned crop already."""

    person: str
    path: Path
    aligned: bool

    @property
    def source(self) -> str:
        """What the gallery keeps of where it came from."""
        return json.dumps({"path": str(self.path.resolve()), "aligned": self.aligned})


class _Seen(NamedTuple):
    """A face of an image: the crop, and where it was found if the image was no crop already."""

    crop: np.ndarray
    face: Face | None


def add(
    gallery: str,
    person: str | None = None,
    /,
    *images: Path,
    model: str | None = None,
    folder: Path | None = None,
    features: Path | None = None,
    aligned: bool = False,
    faces: Literal["one", "largest", "all"] = "one",
    quality: Action = "warn",
    min_size: float = Gate.min_size,
    min_sharpness: float = Gate.min_sharpness,
    max_yaw: float = Gate.max_yaw,
    metadata: str | None = None,
    replace: bool = False,
    keep_crops: bool = False,
    storage: Literal["float32", "float16"] | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Enrol one person's images, a folder of people or a table of embeddings.

    Args:
        gallery: A file, created if it does not exist, or postgresql+psycopg://user@host/database.
        person: Whom the images show.
        images: Their images. All must be usable, or nobody is added.
        model: A run, a model folder or a hub id. By default the model the gallery was created
            with, or the one that a table names.
        folder: Enrol everybody in this folder, person/image. Files that are enrolled already are
            passed over; unusable images are named and left out.
        features: Enrol everybody in this table, written by `sphereface2 embed`.
        aligned: The images are aligned crops already.
        faces: What to do with an image of several faces: refuse it (one), take the largest and
            most central, or take all.
        quality: What to do with a face that is small, blurred or turned away: refuse, warn or
            take it (off).
        min_size: Pixels between the eyes from which a face counts as large enough.
        min_sharpness: Sharpness of the crop from which a face does not count as blurred.
        max_yaw: How far the nose may lie from the middle between the eyes, in distances of the
            eyes.
        metadata: A JSON object to keep with the person, for example {"since": 2024}.
        replace: Remove the person's older images.
        keep_crops: Keep the crops in the gallery, to show them and to embed them again.
        storage: How a new gallery holds embeddings; float16 takes half the space.
        device: "cpu", "cuda" or "mps"; default: the best there is.

    Returns:
        ``people`` and ``images`` added, ``there`` (images that were enrolled already), and
        ``left_out``: what could not be used, and why.

    Raises:
        UserError: wrong options, a model or gallery that cannot be used, or nobody to add; then a
            gallery that did not exist is not created.
    """
    ways = [bool(person), folder is not None, features is not None]
    if sum(ways) != 1 or bool(person) != bool(images):
        raise UserError("give a person and images, or --folder ROOT, or --features FILE")
    if not person and (metadata is not None or replace):
        raise UserError("--metadata and --replace go with one person and their images")
    about = None if metadata is None else _metadata(metadata)
    left_out: list[str] = []
    found: list[_File] = []
    if folder is not None:
        found = _folder(folder, aligned)
    elif person:
        found = [_File(person_name(person), path, aligned) for path in images]
    gate = Gate(quality, min_size=min_size, min_sharpness=min_sharpness, max_yaw=max_yaw)
    with ExitStack() as stack:
        stack.callback(_print_left_out, left_out)
        try:
            opened: Gallery | None = stack.enter_context(Gallery.open(gallery, create=False))
        except NoGalleryError:
            opened = None
        embedder = None
        if features is None or model is not None:
            embedder = _embedder(model, opened, device)
        if features is not None:
            fingerprint, dim, people = _table(features, left_out)
            if embedder is not None and fingerprint not in (None, embedder.fingerprint):
                raise UserError(f"{features} was embedded by another model than {model}")
        if embedder is not None:
            fingerprint, dim = embedder.fingerprint, embedder.embedding_dim
        if fingerprint is None:
            raise UserError(f"{features} does not say which model embedded it: give --model")

        def created() -> Gallery:
            remembered = None if model is None else _lasting(model)
            made = Gallery.open(
                gallery, fingerprint=fingerprint, dim=dim, model=remembered, storage=storage
            )
            return stack.enter_context(made)

        if opened is not None:
            opened.check(fingerprint, dim, storage)
        there = 0
        if folder is not None and opened is not None:
            known = {
                (one.name, image.source)
                for one, theirs in opened.stored({file.person for file in found})
                for image in theirs
            }
            new = [file for file in found if (file.person, file.source) not in known]
            there, found = len(found) - len(new), new
        if features is None:
            assert embedder is not None
            people = _enrolments(
                embedder,
                found,
                faces,
                gate,
                keep_crops=keep_crops,
                left_out=None if person else left_out,
            )
        count, names = 0, set()
        if person:
            parts = list(people)
            one = _joined(parts[0].person, parts)
            one.check(dim)
            ids = (opened or created()).add(
                one.person,
                one.embeddings,
                metadata=about,
                sources=one.sources,
                crops=one.crops,
                replace=replace,
            )
            count, names = len(ids), {one.person}
        else:
            counted = _Counted(people, left_out)
            # Nobody wants a gallery of nobody.
            if (first := counted.first(dim)) is not None:
                some = chain([first], counted)
                target = opened or created()
                for stored in target.add_many(some, refused=counted.refused):
                    names |= {somebody.name for somebody in stored}
            count = counted.images
            if not count + there:
                raise UserError(
                    f"nobody was added to {gallery}: {folder or features} names nobody of whom "
                    "there is an image to use"
                )
    already = f"; {there:,} images were there already" if there else ""
    console.show(f"added {count:,} images of {len(names):,} people to {_shown(gallery)}{already}")
    return {"people": len(names), "images": count, "there": there, "left_out": left_out}


class _Counted:
    """People on their way into a gallery, with the number of images that were taken."""

    def __init__(self, people: Iterable[Enrolment], left_out: list[str]) -> None:
        self._people, self._left_out = iter(people), left_out
        self.images = 0

    def __iter__(self) -> Iterator[Enrolment]:
        return self

    def __next__(self) -> Enrolment:
        one = next(self._people)
        self.images += len(one.embeddings)
        return one

    def refused(self, one: Enrolment, error: UserError) -> None:
        """Somebody was not taken."""
        self.images -= len(one.embeddings)
        self._left_out.append(str(error))

    def first(self, dim: int) -> Enrolment | None:
        """The first whom a gallery takes; those before are refused."""
        for one in self:
            try:
                one.check(dim)
                return one
            except UserError as error:
                self.refused(one, error)
        return None


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
        fpir: Unknown below the threshold at which, among as many people as are enrolled, this
            share of strangers would be named.
        threshold: Unknown below this similarity, instead.
        exact: Compare with every image even where the gallery has an approximate index.
        aligned: The images are aligned crops already.
        faces: Look for the largest and most central face of an image, or for all.
        device: "cpu", "cuda" or "mps"; default: the best there is.
        as_json: Print JSON instead of lines.

    Returns:
        For each face ``image``, ``box`` (left, top, right, bottom in pixels; None for a crop),
        ``person`` (None: unknown, or no threshold), ``threshold`` (None: the model is not
        calibrated), ``far``, ``strangers`` (the share of strangers who would be named, if known)
        and ``matches`` (``person``, ``score``, ``metadata``); or ``image`` and ``error``.

    Raises:
        UserError: as elsewhere; or images could not be used, after the others were answered and
            printed.
    """
    if not (files := [file for probe in probes for file in _files(probe)]):
        raise UserError("give images to look for, or folders of them")
    with Gallery.open(gallery, create=False) as opened:
        embedder = _embedder(model, opened, device)
        opened.check(embedder.fingerprint, embedder.embedding_dim)
        stats = opened.stats()
        people = stats["people" if fusion == "mean" else "images"]
        line = _line(embedder, far, fpir, threshold, people, model or stats["model"])
        if not as_json:
            print(line.sentence, file=sys.stderr)
        reports: list[dict[str, Any]] = []
        errors: list[UserError] = []
        for start in range(0, len(files), _BATCH):
            seen: list[tuple[Path, _Seen | UserError]] = []
            for file in files[start : start + _BATCH]:
                try:
                    seen += [(file, face) for face in _look(embedder, file, aligned, faces)]
                except UserError as error:
                    if len(files) == 1:
                        raise
                    errors.append(error)
                    seen.append((file, error))
            crops = [one.crop for _, one in seen if isinstance(one, _Seen)]
            rows = embedder.embed(crops, aligned=True) if crops else np.zeros((0, opened.dim))
            answers = iter(opened.search(rows, k=k, fusion=fusion, exact=exact))
            for file, one in seen:
                if isinstance(one, UserError):
                    reports.append({"image": str(file), "error": str(one)})
                    continue
                matches = next(answers)
                best = None if line.threshold is None else decide(matches, line.threshold)
                reports.append(
                    {
                        "image": str(file),
                        "box": None if one.face is None else one.face.box.tolist(),
                        "person": best and best.person,
                        "threshold": line.threshold,
                        "far": line.far,
                        "strangers": line.strangers,
                        "matches": [
                            {"person": m.person, "score": m.score, "metadata": m.metadata}
                            for m in matches
                        ],
                    }
                )
                if not as_json:
                    console.show(_answer(reports[-1]))
    if as_json:
        print(json.dumps(reports, indent=2))
    if errors:
        raise UserError(
            f"{len(errors)} of {len(files)} images could not be looked for: "
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
    with Gallery.open(gallery, create=False) as opened:
        embedder = _embedder(model, opened, device)
        opened.check(embedder.fingerprint, embedder.embedding_dim)
        line = _line(embedder, far, None, threshold, 1, model or opened.model)
        crops = [_look(embedder, image, aligned, "one")[0].crop for image in images]
        scores = opened.verify(person, embedder.embed(crops, aligned=True), fusion=fusion)
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
    if as_json:
        print(json.dumps(reports, indent=2))
        return reports
    said = {True: "same person", False: "another person", None: "no threshold"}
    for report in reports:
        at = "" if line.threshold is None else f", threshold {line.threshold:.4f}"
        verdict = said[report["same"]]
        console.show(f"{report['image']}: {verdict} (similarity {report['similarity']:.4f}{at})")
    return reports


def set_metadata(gallery: str, person: str, /, *, metadata: str) -> Person:
    """Change a person's metadata; the images stay.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        person: Who is there.
        metadata: A JSON object to keep with them instead, for example {"since": 2024}.
    """
    about = _metadata(metadata)
    with Gallery.open(gallery, create=False) as opened:
        changed = opened.set_metadata(person, about)
    if changed is None:
        raise _nobody(person, gallery)
    console.show(f"{changed.name}: {json.dumps(changed.metadata, ensure_ascii=False)}")
    return changed


def rename(gallery: str, person: str, new_name: str, /) -> Person:
    """Give a person another name.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        person: Who is there.
        new_name: What they are called from now on.
    """
    with Gallery.open(gallery, create=False) as opened:
        changed = opened.rename(person, new_name)
    if changed is None:
        raise _nobody(person, gallery)
    console.show(f"{person} is now {changed.name}")
    return changed


def remove(gallery: str, person: str, /) -> int:
    """Remove a person and every trace of their embeddings.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        person: Whom to remove.
    """
    with Gallery.open(gallery, create=False) as opened:
        count = opened.remove(person)
        rest = _rest(opened)
    if not count:
        raise _nobody(person, gallery)
    console.show(f"removed {person} and {count} images{rest}")
    return count


def compact(gallery: str, /) -> None:
    """Give back the space of what was removed.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
    """
    with Gallery.open(gallery, create=False) as opened:
        opened.compact()
        rest = _rest(opened) if opened.is_file else ""
    console.show(f"compacted {_shown(gallery)}{rest}")


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


def index(gallery: str, /, *, hnsw_from: int | None = None, exact: bool = False) -> None:
    """Choose whether searches are approximate, and build the index.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        hnsw_from: Search approximately from so many images on. A server does so always.
        exact: Compare with every image in every search.
    """
    if exact == (hnsw_from is not None):
        raise UserError("give --hnsw-from IMAGES or --exact")
    with Gallery.open(gallery, create=False) as opened:
        opened.set_index(hnsw_from)
    console.show(f"{_shown(gallery)}: {'exact' if exact else f'HNSW from {hnsw_from:,} images on'}")


def list_people(
    gallery: str, /, *, offset: int = 0, limit: int | None = None, as_json: bool = False
) -> list[Person]:
    """Name everybody in a gallery.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        offset: People to pass over, by name.
        limit: People to name; by default all.
        as_json: Print JSON instead of a table.
    """
    with Gallery.open(gallery, create=False) as opened:
        people = opened.people(offset, limit)
    if as_json:
        keys = ("name", "images", "metadata")
        print(json.dumps([{key: getattr(p, key) for key in keys} for p in people], indent=2))
        return people
    table = Table("person", "images", "metadata")
    for person in people:
        about = json.dumps(person.metadata, ensure_ascii=False) if person.metadata else ""
        table.add_row(escape(person.name), str(person.images), escape(about))
    console.show(table)
    return people


def stats(gallery: str, /, *, as_json: bool = False) -> dict[str, Any]:
    """Count people and images; name the model.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        as_json: Print JSON instead of lines.
    """
    with Gallery.open(gallery, create=False) as opened:
        numbers = opened.stats()
    if as_json:
        print(json.dumps(numbers, indent=2))
    else:
        console.show(*(f"{key:16} {value}" for key, value in numbers.items()))
    return numbers


def reembed(
    gallery: str, /, *, model: str, drop_missing: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Move a gallery to another model, from the files people were enrolled from or kept crops.

    The gallery changes at once at the end; until then, and after a crash, it is the old one.

    Args:
        gallery: A file, or postgresql+psycopg://user@host/database.
        model: The new model: a run, a model folder or a hub id.
        drop_missing: Leave out people and images whose files are gone; without it they are an
            error and nothing changes.
        device: "cpu", "cuda" or "mps"; default: the best there is.

    Returns:
        ``people``: how many there are now; ``gone``: the names of those who were left out whole;
        ``left_out``: images that could not be used, and why.

    Raises:
        UserError: as elsewhere; or images are missing, or nobody would remain.
    """
    left_out: list[str] = []
    gone: set[str] = set()
    embedder = _embedder(model, None, device)

    def again(stored: list[Stored]) -> Iterator[tuple[int, np.ndarray]]:
        lost = [p.name for p, theirs in stored for image in theirs if not usable(p.name, image)]
        if lost and not drop_missing:
            some = ", ".join(map(repr, list(dict.fromkeys(lost))[:_LISTED]))
            raise UserError(
                f"{len(lost)} images have no file and no crop to embed again, among them of "
                f"{some}: put the files back, enrol these people anew, or leave the images out by "
                "--drop-missing"
            )
        waiting: list[tuple[int, np.ndarray]] = []
        with console.bars(counted=True) as bars:
            done = console.advance(bars, "embedding", sum(len(theirs) for _, theirs in stored))
            for person, theirs in stored:
                remaining = len(theirs)
                for image in theirs:
                    try:
                        waiting.append((image.id, crop(person.name, image)))
                    except UserError as error:
                        remaining -= 1
                        left_out.append(str(error))
                        if not drop_missing:
                            raise UserError(
                                f"{error}; put it right, or leave such images out by --drop-missing"
                            ) from error
                    done(1)
                if not remaining:
                    gone.add(person.name)
                if len(waiting) >= _BATCH:
                    yield from embedded(waiting)
            yield from embedded(waiting)
        if len(gone) == opened.count():
            raise UserError(
                f"nobody would remain in {gallery}, which is as it was: put the files back, or "
                "enrol the people in a new gallery"
            )

    def usable(person: str, image: Any) -> bool:
        kept = _source(image.source)
        if kept is not None and Path(kept["path"]).is_file():
            return True
        return opened.crop(person, image.id) is not None

    def crop(person: str, image: Any) -> np.ndarray:
        kept = _source(image.source)
        if kept is not None and Path(kept["path"]).is_file():
            return _look(embedder, Path(kept["path"]), kept["aligned"], "largest")[0].crop
        if (content := opened.crop(person, image.id)) is None:
            raise UserError(f"an image of {person!r} has no file and no crop any more")
        return read_image(content)

    def embedded(waiting: list[tuple[int, np.ndarray]]) -> Iterator[tuple[int, np.ndarray]]:
        if waiting:
            rows = embedder.embed([pixels for _, pixels in waiting], aligned=True)
            yield from zip([image for image, _ in waiting], rows, strict=True)
            waiting.clear()

    with Gallery.open(gallery, create=False) as opened:
        opened.reembed(
            again,
            fingerprint=embedder.fingerprint,
            dim=embedder.embedding_dim,
            model=_lasting(model),
        )
        count = opened.count()
    _print_left_out(left_out)
    went = f"; {len(gone):,} went: {', '.join(sorted(gone))}" if gone else ""
    console.show(f"{_shown(gallery)} now holds {count:,} people embedded by {model}{went}")
    return {"people": count, "gone": sorted(gone), "left_out": left_out}


# -- faces -----------------------------------------------------------------------------------------


def _look(
    embedder: FaceEmbedder,
    path: Path,
    aligned: bool,
    faces: Literal["one", "largest", "all"],
) -> list[_Seen]:
    """The faces of an image, the largest and most central first; UserError if it shows none."""
    pixels = read_image(path)
    if aligned:
        return [_Seen(pixels, None)]
    found = embedder.aligner.detect(pixels)
    if not found:
        raise NoFaceError(f"no face found in {path}; give an image that shows one")
    if len(found) > 1 and faces == "one":
        raise UserError(
            f"{path} shows {len(found)} faces: crop it to one, or say which to take, the largest "
            "or all"
        )
    size = embedder.aligner.size
    return [
        _Seen(warp(pixels, face.landmarks, size), face)
        for face in (found if faces == "all" else found[:1])
    ]


def _enrolments(
    embedder: FaceEmbedder,
    files: Sequence[_File],
    faces: Literal["one", "largest", "all"],
    gate: Gate,
    *,
    keep_crops: bool,
    left_out: list[str] | None,
) -> Iterator[Enrolment]:
    """Embed files that come person by person; one person may come in several parts.

    Args:
        embedder: the model.
        files: whose.
        faces, gate: see `add`.
        keep_crops: give the crops along.
        left_out: without it an unusable image is a UserError; with it what is wrong is appended.
    """
    waiting: list[tuple[_File, np.ndarray]] = []

    def embedded() -> Iterator[Enrolment]:
        rows = embedder.embed([crop for _, crop in waiting], aligned=True)
        numbered = list(zip(waiting, rows, strict=True))
        for person, group in groupby(numbered, key=lambda pair: pair[0][0].person):
            theirs = list(group)
            crops = [_jpeg(crop) for (_, crop), _ in theirs] if keep_crops else None
            sources = [file.source for (file, _), _ in theirs]
            yield Enrolment(person, np.stack([row for _, row in theirs]), None, sources, crops)
        waiting.clear()

    with console.bars(counted=True) as bars:
        done = console.advance(bars, "embedding", len(files))
        for file in files:
            done(1)
            try:
                seen = _look(embedder, file.path, file.aligned, faces)
                for one in seen:
                    quality = measure(one.crop, one.face)
                    for warning in gate.check(quality, str(file.path)):
                        print(f"warning: {warning}", file=sys.stderr)
            except UserError as error:
                if left_out is None:
                    raise
                left_out.append(str(error))
                continue
            if len(waiting) >= _BATCH and waiting[-1][0].person != file.person:
                yield from embedded()
            waiting += [(file, one.crop) for one in seen]
        if waiting:
            yield from embedded()


def _jpeg(crop: np.ndarray) -> bytes:
    import cv2

    return bytes(cv2.imencode(".jpg", cv2.cvtColor(crop, cv2.COLOR_RGB2BGR))[1])


def _joined(person: str, parts: list[Enrolment]) -> Enrolment:
    """One person's parts as one."""
    kept = [crop for part in parts for crop in part.crops or []]
    return Enrolment(
        person,
        np.concatenate([part.embeddings for part in parts]),
        None,
        [source for part in parts for source in part.sources or []],
        kept or None,
    )


# -- decisions -------------------------------------------------------------------------------------


class _Line(NamedTuple):
    """Where "known" begins, and what is known of it."""

    threshold: float | None
    far: float | None
    strangers: float | None
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
    if sum(value is not None for value in (far, fpir, threshold)) > 1:
        raise UserError("give one of --far, --fpir and --threshold")
    if threshold is not None:
        return _Line(threshold, None, None, f"threshold {threshold:.4f}")
    calibration = embedder.calibration
    if calibration is None:
        if far is not None or fpir is not None:
            option = "--far" if far is not None else "--fpir"
            raise UserError(
                f"{option} needs a calibration: run sphereface2 calibrate {model} first, or give "
                "--threshold"
            )
        return _Line(None, None, None, "no threshold: the model is not calibrated")
    if fpir is not None:
        far = _far_for(fpir, max(1, comparisons), calibration.thresholds)
    far = calibration.far_default if far is None else far
    limit = calibration.threshold(far)
    named = -math.expm1(comparisons * math.log1p(-far))
    sentence = f"threshold {limit:.4f} (FAR {far:g}"
    if comparisons > 1:
        share = f"about one stranger in {1 / named:,.0f}" if named < 0.5 else "most strangers"
        sentence += f", {comparisons:,} comparisons an image: {share} would be named"
    return _Line(limit, far, named, f"{sentence})")


def _far_for(fpir: float, comparisons: int, known: Iterable[float]) -> float:
    """The largest calibrated FAR at which at most ``fpir`` of strangers are named."""
    if not 0 < fpir < 1:
        raise UserError(f"--fpir must lie between 0 and 1, not at {fpir:g}")
    wanted = -math.expm1(math.log1p(-fpir) / comparisons)
    low = [far for far in known if far <= wanted * (1 + 1e-9)]
    if not low:
        raise UserError(
            f"--fpir {fpir:g} among {comparisons:,} comparisons needs a threshold for a FAR of "
            f"{wanted:.1g}, and the calibration's smallest is {min(known):g}: repeat sphereface2 "
            f"calibrate with --far {wanted:.1g}, which takes more pairs, or give --threshold"
        )
    return max(low)


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


# -- files -----------------------------------------------------------------------------------------


def _folder(folder: Path, aligned: bool) -> list[_File]:
    """The images of ``folder/person/image``, person by person."""
    from sphereface2.data.folder import FolderSource

    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give --folder one that holds a folder a person")
    source = FolderSource(folder)
    return [
        # Names that no gallery takes are told as what they are when they are enrolled.
        _File(_composed((source.class_names or [])[label]), folder / source.name(i), aligned)
        for i, label in enumerate(source.labels)
    ]


def _composed(name: str) -> str:
    try:
        return person_name(name)
    except UserError:
        return name


def _files(probe: Path) -> list[Path]:
    """An image, or all those in a folder and below it."""
    if not probe.is_dir():
        return [probe]
    from sphereface2.data.folder import images_below

    if not (found := [probe / name for name in images_below(probe).images]):
        raise UserError(f"{probe} holds no images")
    return found


def _table(path: Path, left_out: list[str]) -> tuple[str | None, int, Iterator[Enrolment]]:
    """A table of embeddings: the model's fingerprint if it says, dim, people."""
    import pyarrow
    import pyarrow.parquet as parquet

    from sphereface2.recognition.feature_parts import METADATA

    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is missing or no Parquet file: {error}") from error
    names = file.schema_arrow.names
    if not {"name", "label", "embedding"} <= set(names):
        raise UserError(
            f"{path} has the columns {', '.join(names)}; name, label and embedding are needed, "
            "as `sphereface2 embed` writes them"
        )
    try:
        about = json.loads((file.schema_arrow.metadata or {}).get(METADATA, b"{}"))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise UserError(f"{path} says nothing of use about its model; embed the images anew")
    if about.get("flip") is False:
        raise UserError(
            f"{path} was embedded with --no-flip and a search adds the mirror image: embed the "
            "images anew, without that"
        )
    dim = next((len(row) for row in _embeddings(file) if row is not None), 0)
    if not dim:
        raise UserError(f"{path} holds no embedding")

    def people() -> Iterator[Enrolment]:
        columns = [c for c in ("name", "label", "person", "embedding") if c in names]
        rows = (
            row for batch in file.iter_batches(1024, columns=columns) for row in batch.to_pylist()
        )
        for person, group in groupby(rows, key=_whose):
            theirs = [row for row in group if row["embedding"] is not None]
            if not person:
                left_out.extend(f"{row['name']} of {path}: it names nobody" for row in theirs)
            elif theirs:
                yield Enrolment(person, np.array([row["embedding"] for row in theirs], np.float32))

    return about.get("model"), dim, people()


def _whose(row: dict[str, Any]) -> str:
    """The name of a row's person; where a set has no names, the label."""
    person = row["label"] if row.get("person") is None else row["person"]
    return "" if person is None else str(person)


def _embeddings(file: Any) -> Iterator[list[float] | None]:
    for batch in file.iter_batches(64, columns=["embedding"]):
        yield from batch.column("embedding").to_pylist()


# -- the rest --------------------------------------------------------------------------------------


def _embedder(model: str | None, gallery: Gallery | None, device: str | None) -> FaceEmbedder:
    """The model named, or the one that the gallery remembers."""
    from sphereface2.recognition.face_embedder import FaceEmbedder

    if model is None and gallery is not None:
        model = gallery.model
    if model is None:
        raise UserError("say by which model: --model RUN, a model folder or a hub id")
    return FaceEmbedder.from_pretrained(model, device=device)


def _lasting(model: str) -> str:
    """A model as a gallery remembers it: a path from the root, or a hub id."""
    return str(Path(model).resolve()) if Path(model).exists() else model


def _shown(gallery: str) -> str:
    """The address without a password."""
    return re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", gallery)


def _print_left_out(lines: list[str]) -> None:
    for line in lines:
        print(f"left out: {line}", file=sys.stderr)


def _nobody(person: str, gallery: str) -> UserError:
    return UserError(
        f"there is no {person!r} in {_shown(gallery)}; `sphereface2 gallery list` names everybody"
    )


def _metadata(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"--metadata takes a JSON object, such as '{{\"since\": 2024}}', not {text[:40]!r}"
        )
    return value


def _source(source: str | None) -> dict[str, Any] | None:
    """What `add` noted, or None: the service and other callers note what they like."""
    try:
        kept = json.loads(source or "null")
    except ValueError:
        return None
    return kept if isinstance(kept, dict) and {"path", "aligned"} <= kept.keys() else None
