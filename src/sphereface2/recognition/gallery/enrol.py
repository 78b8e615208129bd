"""``sphereface2 gallery add`` and ``reembed``: a user's images into a gallery."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

from sphereface2 import console
from sphereface2.data.embedding_table import METADATA
from sphereface2.data.folder import FolderSource
from sphereface2.errors import UserError, counted
from sphereface2.images import encode_image, read_image
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery.faces import (
    Faces,
    files_of,
    lasting,
    load_embedder,
    look,
    warn_of_photographs,
)
from sphereface2.recognition.gallery.gallery import Gallery
from sphereface2.recognition.gallery.rows import Refused, Stored
from sphereface2.recognition.gallery.types import (
    Enrolment,
    Image,
    NoGalleryError,
    metadata_of,
    person_name,
)
from sphereface2.recognition.quality import Action, check, measure

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

    @classmethod
    def of(cls, person: str, source: str | None) -> _File | None:
        """What `source` noted, if the file is there: other callers note what they like."""
        try:
            kept = json.loads(source or "null")
            file = cls(person, Path(kept["path"]), kept["aligned"])
        except (ValueError, KeyError, TypeError):
            return None
        return file if file.path.is_file() else None


@dataclass
class _Tally:
    """What became of those to enrol: images added, and there already; who; what was unusable."""

    images: int = 0
    there: int = 0
    names: set[str] = field(default_factory=set)
    left_out: list[str] = field(default_factory=list)

    def taken(
        self, people: Iterable[Enrolment], dim: int, refused: Refused | None
    ) -> Iterator[Enrolment]:
        """Count people, and give on whom a gallery of embeddings of ``dim`` numbers may take."""
        for one in people:
            self.images += len(one.embeddings)
            try:
                one.check(dim)
            except UserError as error:
                if refused is None:
                    raise
                refused(one, error)
            else:
                yield one

    def refused(self, one: Enrolment, error: UserError) -> None:
        """Count no longer whom the gallery does not take."""
        self.images -= len(one.embeddings)
        self.left_out.append(str(error))

    def passed(self, _: Enrolment, images: int) -> None:
        """Count images as there already that were to be added."""
        self.images, self.there = self.images - images, self.there + images

    def report(self) -> dict[str, Any]:
        """What `add` returns."""
        counts = {"people": len(self.names), "images": self.images, "there": self.there}
        return {**counts, "left_out": self.left_out}

    def __str__(self) -> str:
        return f"{counted(self.images, 'image')} of {counted(len(self.names), 'person')}"


def add(
    gallery: str,
    person: str | None = None,
    /,
    *images: Path,
    model: str | None = None,
    folder: Path | None = None,
    features: Path | None = None,
    aligned: bool = False,
    faces: Faces = "one",
    quality: Action = "warn",
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
        images: Their images, or folders of them. All must be usable, or nobody is added.
        model: A run, a model folder or a hub id. By default the model the gallery was created
            with, or the one that a table names.
        folder: Enrol everybody in this folder, person/image. Files that are enrolled already are
            passed over; unusable images are named and left out.
        features: Enrol everybody in this table, written by `sphereface2 embed`. Images of a
            person's that are enrolled already, by their name and embedding, are passed over.
        aligned: The images are aligned crops already.
        faces: What to do with an image of several faces: refuse it (one), take the largest and
            most central, or take all.
        quality: What to do with a face that is small, blurred or turned away: refuse, warn or
            take it (off).
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
    if sum([bool(person), folder is not None, features is not None]) != 1 or (
        bool(person) != bool(images)
    ):
        raise UserError("give a person and images, or --folder ROOT, or --features FILE")
    if not person and (metadata is not None or replace):
        raise UserError("--metadata and --replace go with one person and their images")
    about = None if metadata is None else metadata_of(metadata)
    files = _files(person, images, folder, aligned)
    tally = _Tally()
    refused, passed = (None, None) if person else (tally.refused, tally.passed)
    with ExitStack() as stack:
        stack.callback(_tell, tally.left_out)
        opened = embedder = None
        with suppress(NoGalleryError):
            opened = stack.enter_context(Gallery.open(gallery, create=False))
        if features is None or model is not None:
            embedder = load_embedder(model, opened, device)
        if folder is not None and opened is not None:
            new = _unknown(opened, files)
            tally.there, files = len(files) - len(new), new
        if features is not None:
            fingerprint, dim, people = _table(features, tally.left_out)
            if embedder is not None and fingerprint not in (None, embedder.fingerprint):
                raise UserError(
                    f"{features} was embedded by a different model, not by {model}: give that "
                    "model, or embed the images again with this one"
                )
        elif embedder is not None:
            tolerant = None if person else tally.left_out
            people = _embed(embedder, files, faces, quality, keep_crops, about, left_out=tolerant)
        if embedder is not None:
            fingerprint, dim = embedder.fingerprint, embedder.embedding_dim
        if fingerprint is None:
            raise UserError(f"{features} does not say which model embedded it: give --model")
        facts: dict[str, Any] = {"fingerprint": fingerprint, "dim": dim, "storage": storage}
        if opened is not None:
            opened.check(**facts)
        fit = tally.taken(people, dim, refused)
        if (first := next(fit, None)) is not None:  # nobody wants a gallery of nobody
            if opened is None:
                remembered = None if model is None else lasting(model)
                opened = stack.enter_context(Gallery.open(gallery, model=remembered, **facts))
            everybody = chain([first], fit)
            for some in opened.add_many(everybody, replace=replace, refused=refused, passed=passed):
                tally.names |= {one.name for one in some}
        if opened is None or not tally.images + tally.there:
            raise UserError(f"no person was added: {folder or features} has no usable image")
    already = f"; {counted(tally.there, 'image')} there already" if tally.there else ""
    console.show(f"added {tally} to {opened.uri}{already}")
    return tally.report()


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
    embedder = load_embedder(model, None, device)

    def origin(person: str, image: Image) -> _File | bytes | None:
        """The file that an image came from, else the crop that is kept of it."""
        return _File.of(person, image.source) or opened.crop(person, image.id)

    def again(stored: list[Stored]) -> Iterable[tuple[int, np.ndarray]]:
        todo = [(person.name, image) for person, theirs in stored for image in theirs]
        gone = [name for name, image in todo if origin(name, image) is None]
        if gone and not drop_missing:
            some = ", ".join(map(repr, list(dict.fromkeys(gone))[:_LISTED]))
            raise UserError(
                f"{counted(len(gone), 'image')} cannot be embedded again for want of a file and a "
                f"crop, among them of {some}: put the files back, enrol these people again, or "
                "leave out the images with --drop-missing"
            )
        reasons: dict[int, str] = {}

        def read(one: tuple[str, Image]) -> np.ndarray:
            name, image = one
            try:
                if (found := origin(name, image)) is None:
                    raise UserError(f"an image of {name!r} has no file and no crop to embed again")
                if isinstance(found, _File) and not found.aligned:
                    return embedder.crop(found.path)[0]
                return read_image(found if isinstance(found, bytes) else found.path)
            except UserError as error:
                reasons[image.id] = str(error)
                if drop_missing:
                    raise
                raise UserError(
                    f"{error}; repair it, or leave out such images with --drop-missing"
                ) from error

        lost: list[int] | None = [] if drop_missing else None
        with console.bars(counted=True) as bars:
            done = console.advance(bars, "embedding", len(todo))
            rows = embedder.embedder.embed(todo, read=read, unreadable=lost, progress=done)
        if not len(rows) and len(stored) == opened.count():
            raise UserError(
                f"no person would remain in {opened.uri}, which was not changed: put the files "
                "back, or enrol the people in a new gallery"
            )
        left_out.extend(reasons[image.id] for _, image in todo if image.id in reasons)
        return zip([image.id for _, image in todo if image.id not in reasons], rows, strict=True)

    facts: dict[str, Any] = {"fingerprint": embedder.fingerprint, "dim": embedder.embedding_dim}
    with Gallery.open(gallery, create=False) as opened:
        before = {person.name for person in opened.people()}
        opened.reembed(again, **facts, model=lasting(model))
        after = {person.name for person in opened.people()}
    _tell(left_out)
    gone = sorted(before - after)
    went = f"; {len(gone):,} went: {', '.join(gone)}" if gone else ""
    people = counted(len(after), "person")
    console.show(f"{opened.uri} now holds {people} embedded by {model}{went}")
    return {"people": len(after), "gone": gone, "left_out": left_out}


def _tell(left_out: Sequence[str]) -> None:
    for line in left_out:
        console.note(f"left out: {line}")


def _embed(
    embedder: FaceEmbedder,
    files: Sequence[_File],
    faces: Faces,
    quality: Action,
    keep_crops: bool,
    metadata: dict[str, Any] | None,
    *,
    left_out: list[str] | None,
) -> Iterator[Enrolment]:
    """Embed files that come person by person; one person may come in several parts.

    Without ``left_out`` an unusable image is a UserError; with it what is wrong is appended.
    """
    waiting: list[tuple[_File, np.ndarray]] = []

    def embedded() -> Iterator[Enrolment]:
        rows = embedder.embed([crop for _, crop in waiting], aligned=True)
        for person, group in groupby(
            zip(waiting, rows, strict=True), key=lambda pair: pair[0][0].person
        ):
            theirs = list(group)
            crops = [encode_image(crop, ".jpg") for (_, crop), _ in theirs] if keep_crops else None
            sources = [file.source for (file, _), _ in theirs]
            yield Enrolment(person, np.stack([row for _, row in theirs]), metadata, sources, crops)
        waiting.clear()

    with console.bars(counted=True) as bars:
        done = console.advance(bars, "embedding", len(files))
        for file in files:
            done(1)
            try:
                seen = look(embedder, file.path, file.aligned, faces)
                for crop, face in seen:
                    for warning in check(measure(crop, face), quality, str(file.path)):
                        console.note(f"warning: {warning}")
            except UserError as error:
                if left_out is None:
                    raise
                left_out.append(str(error))
                continue
            if len(waiting) >= _BATCH and waiting[-1][0].person != file.person:
                yield from embedded()
            waiting += [(file, crop) for crop, _ in seen]
        if waiting:
            yield from embedded()


def _files(
    person: str | None, images: Sequence[Path], folder: Path | None, aligned: bool
) -> list[_File]:
    """The files to embed, person by person: one person's or a folder's."""
    files = []
    if person:
        paths = [path for given in images for path in files_of(given)]
        files = [_File(person_name(person), path, aligned) for path in paths]
    if folder is not None:
        files = _folder(folder, aligned)
    if aligned and files:
        warn_of_photographs([file.path for file in files])
    return files


def _unknown(gallery: Gallery, files: Sequence[_File]) -> list[_File]:
    """The files that are not enrolled."""
    known = {
        (one.name, image.source)
        for one, theirs in gallery.stored({file.person for file in files})
        for image in theirs
    }
    return [file for file in files if (file.person, file.source) not in known]


def _folder(folder: Path, aligned: bool) -> list[_File]:
    """The images of ``folder/person/image``, person by person."""
    if not folder.is_dir():
        raise UserError(
            f"{folder} is not a folder: give --folder a folder that holds one folder for each "
            "person"
        )
    source = FolderSource(folder)
    files = []
    for i, label in enumerate(source.labels):
        name = (source.class_names or [])[label]
        with suppress(UserError):  # it is told when the person is enrolled
            name = person_name(name)
        files.append(_File(name, folder / source.name(i), aligned))
    return files


def _table(path: Path, left_out: list[str]) -> tuple[str | None, int, Iterator[Enrolment]]:
    """A table of embeddings: the model's fingerprint if it says, dim, people."""
    try:
        file = parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is missing or not a Parquet file: {error}") from error
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
        raise UserError(f"{path} does not name the model that embedded it; embed the images again")
    if about.get("flip") is False:
        raise UserError(
            f"{path} was embedded with --no-flip and a search adds the mirror image: embed the "
            "images again without --no-flip"
        )
    parts = (part.column(0) for part in file.iter_batches(64, columns=["embedding"]))
    dim = next((len(row) for part in parts for row in part.to_pylist() if row is not None), 0)
    if not dim:
        raise UserError(f"{path} holds no embedding")

    def people() -> Iterator[Enrolment]:
        columns = [c for c in ("name", "label", "person", "embedding") if c in names]
        rows = (
            row for batch in file.iter_batches(1024, columns=columns) for row in batch.to_pylist()
        )
        # Where a set has no names, a person's is the label.
        for person, group in groupby(rows, key=lambda row: row.get("person") or row["label"]):
            theirs = [row for row in group if row["embedding"] is not None]
            if person is None:
                left_out.extend(f"{row['name']} of {path}: it has no name" for row in theirs)
                continue
            # By an image's name it is known whether it is enrolled already.
            named = [row for row in theirs if row["name"] is not None]
            if nameless := len(theirs) - len(named):
                left_out.append(f"{counted(nameless, 'row')} of {person} in {path}: no image name")
            if named:
                vectors = np.array([row["embedding"] for row in named], np.float32)
                yield Enrolment(str(person), vectors, sources=[str(row["name"]) for row in named])

    return about.get("model"), dim, people()
