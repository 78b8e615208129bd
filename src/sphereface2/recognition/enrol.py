"""``sphereface2 gallery``: pictures into a gallery, pictures looked for in it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sphereface2.data.folder import FolderSource
from sphereface2.errors import UserError
from sphereface2.recognition.gallery import Enrolment, Gallery, Person, decide

if TYPE_CHECKING:
    from sphereface2.recognition.embedder import FaceEmbedder

_BATCH = 64
_LISTED = 20


class Picture(NamedTuple):
    """A file of a person's, and whether it is an aligned crop already."""

    person: str
    path: Path
    aligned: bool


def add(
    gallery: str,
    person: str | None,
    pictures: Sequence[Path],
    *,
    folder: Path | None = None,
    features: Path | None = None,
    model: str | None = None,
    aligned: bool = False,
    metadata: str | None = None,
    replace: bool = False,
    index: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Enrol one person's pictures, a folder of people, or a table of embeddings; print and return.

    Args:
        gallery: folder or Milvus address.
        person, pictures: who, and their files: all must be usable, or nobody is added.
        folder: ``folder/person/picture``: unusable pictures are told and left out.
        features: what ``sphereface2 embed`` wrote.
        model: a run, a model folder or a hub id; not needed for a table that names its model.
        aligned: the pictures are aligned crops already.
        metadata: JSON object to keep with the person.
        replace: the person's older pictures go.
        index: of a new gallery: flat, ivf or hnsw.
        device: where to compute.

    Returns:
        ``people`` and ``pictures`` added, and ``left_out``: what could not be used, and why.
    """
    ways = [bool(person), folder is not None, features is not None]
    if sum(ways) != 1 or bool(person) != bool(pictures):
        raise UserError("give a person and pictures, or --folder ROOT, or --features FILE")
    if not person and (metadata is not None or replace):
        raise UserError("--metadata and --replace go with one person and their pictures")
    left_out: list[str] = []
    count = 0
    embedder = _embedder(model, device) if model or features is None else None
    if features is not None:
        fingerprint, dim, people = _table(features, left_out)
        if embedder is not None:
            if fingerprint not in (None, embedder.fingerprint):
                raise UserError(f"{features} was embedded by another model than {model}")
            fingerprint = embedder.fingerprint
        if fingerprint is None:
            raise UserError(f"{features} does not say which model embedded it: give --model")
    else:
        assert embedder is not None
        fingerprint, dim = embedder.fingerprint, embedder.embedding_dim
        if folder is not None:
            source = FolderSource(folder)
            names = source.class_names or []
            found = [
                Picture(names[label], folder / source.name(i), aligned)
                for i, label in enumerate(source.labels)
            ]
            people = enrolments(embedder, _progress(found), left_out=left_out)
        else:
            assert person is not None
            found = [Picture(person, path, aligned) for path in pictures]
            people = iter(list(enrolments(embedder, found)))
    with Gallery.open(gallery, fingerprint=fingerprint, dim=dim, index=index) as opened:
        if person:
            (one,) = people
            about = None if metadata is None else _metadata(metadata)
            ids = opened.add(
                person, one.embeddings, metadata=about, sources=one.sources, replace=replace
            )
            names_added, count = {person}, len(ids)
        else:
            names_added = set()

            def counted() -> Iterator[Enrolment]:
                nonlocal count
                for one in people:
                    count += len(one.embeddings)
                    yield one

            for stored in opened.add_many(counted()):
                names_added |= {somebody.name for somebody in stored}
    report = {"people": len(names_added), "pictures": count, "left_out": left_out}
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    print(f"added {count:,} pictures of {len(names_added):,} people to {gallery}")
    return report


def set_metadata(gallery: str, person: str, metadata: str) -> Person:
    """Put other metadata, a JSON object, in the place of a person's."""
    about = _metadata(metadata)
    with _existing(gallery) as opened:
        changed = opened.set_metadata(person, about)
    if changed is None:
        raise _nobody(person, gallery)
    print(f"{changed.name}: {json.dumps(changed.metadata, ensure_ascii=False)}")
    return changed


def remove(gallery: str, person: str, *, keep_bytes: bool = False) -> int:
    """Remove a person and, unless ``keep_bytes``, rewrite the files without them."""
    with _existing(gallery) as opened:
        count = opened.remove(person)
        if not count:
            raise _nobody(person, gallery)
        if not keep_bytes:
            opened.compact()
    print(f"removed {person} and {count} pictures")
    return count


def compact(gallery: str) -> None:
    """Rewrite the gallery's files without what was removed."""
    with _existing(gallery) as opened:
        opened.compact()
    print(f"{gallery} holds nothing that was removed")


def search(
    gallery: str,
    pictures: Sequence[Path],
    *,
    model: str,
    k: int = 5,
    fusion: str = "max",
    far: float | None = None,
    threshold: float | None = None,
    exact: bool = False,
    aligned: bool = False,
    device: str | None = None,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """Look for the faces of pictures; print and return a report for each.

    Args:
        gallery, pictures, model, aligned, device: as in `add`.
        k, fusion, exact: of `Gallery.search`.
        far: decide at the model's calibrated threshold for this FAR; None: its default.
        threshold: decide at this cosine instead.
        as_json: print JSON instead of a table.

    Returns:
        For each picture ``picture``, ``person`` (None: unknown, or no threshold), ``threshold``
        (None: the model is not calibrated) and ``matches`` (``person``, ``score``, ``metadata``).
    """
    embedder = _embedder(model, device)
    if threshold is not None and far is not None:
        raise UserError("give --far or --threshold, not both")
    if threshold is None:
        if embedder.calibration is not None:
            threshold = embedder.calibration.threshold(far)
        elif far is not None:
            raise UserError(
                f"--far needs a calibration: run sphereface2 calibrate {model} first, or give "
                "--threshold"
            )
    with Gallery.open(
        gallery, fingerprint=embedder.fingerprint, dim=embedder.embedding_dim, create=False
    ) as opened:
        rows = embedder.embed(pictures, aligned=aligned)
        answers = opened.search(rows, k=k, fusion=fusion, exact=exact)
    reports: list[dict[str, Any]] = []
    for picture, matches in zip(pictures, answers, strict=True):
        best = None if threshold is None else decide(matches, threshold)
        reports.append(
            {
                "picture": str(picture),
                "person": best and best.person,
                "threshold": threshold,
                "matches": [
                    {"person": m.person, "score": m.score, "metadata": m.metadata} for m in matches
                ],
            }
        )
    if as_json:
        print(json.dumps(reports, indent=2))
        return reports
    console = Console(highlight=False, markup=False)
    for report in reports:
        verdict = "no threshold: the model is not calibrated"
        if threshold is not None:
            verdict = f"{report['person'] or 'unknown'} (threshold {threshold:.4f})"
        console.print(f"{report['picture']}: {verdict}", soft_wrap=True)
        table = Table("person", "similarity")
        for match in report["matches"]:
            table.add_row(match["person"], f"{match['score']:.4f}")
        console.print(table)
    return reports


def list_people(gallery: str, *, as_json: bool = False) -> list[Person]:
    """Print everybody."""
    with _existing(gallery) as opened:
        people = opened.people()
    if as_json:
        keys = ("name", "pictures", "metadata")
        print(json.dumps([{key: getattr(p, key) for key in keys} for p in people], indent=2))
        return people
    table = Table("person", "pictures", "metadata")
    for person in people:
        about = json.dumps(person.metadata, ensure_ascii=False) if person.metadata else ""
        table.add_row(person.name, str(person.pictures), about)
    Console(highlight=False, markup=False).print(table)
    return people


def stats(gallery: str, *, as_json: bool = False) -> dict[str, Any]:
    """Print how many people and pictures, of which model."""
    with _existing(gallery) as opened:
        numbers = opened.stats()
    if as_json:
        print(json.dumps(numbers, indent=2))
    else:
        for key, value in numbers.items():
            print(f"{key:16} {value}")
    return numbers


def reembed(
    gallery: str, *, model: str, drop_missing: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Embed everybody again by another model, from the files they were enrolled from.

    The gallery changes at once at the end; until then, and after a crash, it is the old one.

    Args:
        gallery, model, device: as in `add`.
        drop_missing: people and pictures whose files are gone are left out; without it they are
            an error and nothing changes.
    """
    embedder = _embedder(model, device)
    with _existing(gallery) as opened:
        known = {person.name: (person, found) for person, found in opened.sources()}
        lost = [name for name, (_, found) in known.items() for source in found if not _is(source)]
        if lost and not drop_missing:
            some = ", ".join(map(repr, list(dict.fromkeys(lost))[:_LISTED]))
            raise UserError(
                f"{len(lost)} pictures have no file to embed again, among them of {some}: put the "
                "files back, enrol these people anew, or leave the pictures out by --drop-missing"
            )
        todo = [
            Picture(name, Path(kept["path"]), kept["aligned"])
            for name, (_, found) in known.items()
            for kept in map(_source, found)
            if kept and _is(json.dumps(kept))
        ]
        left_out: list[str] = []
        count = 0

        def people() -> Iterator[Enrolment]:
            nonlocal count
            done = enrolments(embedder, _progress(todo), left_out=left_out)
            for name, parts in groupby(done, key=lambda one: one.person):
                some = list(parts)
                count += 1
                yield Enrolment(
                    name,
                    np.concatenate([one.embeddings for one in some]),
                    known[name][0].metadata,
                    [source for one in some for source in one.sources or []],
                )
            if left_out and not drop_missing:
                raise UserError(
                    f"{left_out[0]} ({len(left_out)} such): put it right, or leave such pictures "
                    "out by --drop-missing"
                )

        opened.reembed(people(), fingerprint=embedder.fingerprint, dim=embedder.embedding_dim)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    print(f"{gallery} now holds {count:,} people embedded by {model}")
    return {"people": count, "left_out": left_out}


def enrolments(
    embedder: FaceEmbedder, pictures: Iterable[Picture], *, left_out: list[str] | None = None
) -> Iterator[Enrolment]:
    """Embed pictures that come person by person; one person may come in several parts.

    Args:
        left_out: without it an unusable picture is a UserError; with it what is wrong is appended.
    """
    from sphereface2.align import read_photo

    waiting: list[tuple[Picture, np.ndarray]] = []

    def embedded() -> Iterator[Enrolment]:
        rows = embedder.embed([crop for _, crop in waiting], aligned=True)
        numbered = zip((picture for picture, _ in waiting), rows, strict=True)
        for person, group in groupby(numbered, key=lambda pair: pair[0].person):
            theirs = list(group)
            sources = [
                json.dumps({"path": str(picture.path.resolve()), "aligned": picture.aligned})
                for picture, _ in theirs
            ]
            yield Enrolment(person, np.stack([row for _, row in theirs]), None, sources)
        waiting.clear()

    for picture in pictures:
        try:
            crop = read_photo(picture.path) if picture.aligned else embedder.crop(picture.path)[0]
        except UserError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
            continue
        if len(waiting) >= _BATCH and waiting[-1][0].person != picture.person:
            yield from embedded()
        waiting.append((picture, crop))
    if waiting:
        yield from embedded()


def _table(path: Path, left_out: list[str]) -> tuple[str | None, int, Iterator[Enrolment]]:
    """A table of embeddings: the model's fingerprint if it says, dim, people."""
    import pyarrow
    import pyarrow.parquet as parquet

    from sphereface2.recognition.features import METADATA

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
    about = json.loads((file.schema_arrow.metadata or {}).get(METADATA, b"{}"))
    dim = next((len(row) for row in _embeddings(file) if row is not None), 0)
    if not dim:
        raise UserError(f"{path} holds no embedding")

    def people() -> Iterator[Enrolment]:
        columns = ["name", "label", "embedding"]
        if "person" in names:
            columns[1] = "person"
        for batch in file.iter_batches(1024, columns=columns):
            rows = zip(*(batch.column(c).to_pylist() for c in columns), strict=True)
            for person, group in groupby(rows, key=lambda row: row[1]):
                theirs = [row for row in group if row[2] is not None]
                if person is None or person == "":
                    left_out.extend(f"{name} of {path}: it names nobody" for name, _, _ in theirs)
                elif theirs:
                    yield Enrolment(str(person), np.array([row[2] for row in theirs], np.float32))

    return about.get("model"), dim, people()


def _embeddings(file: Any) -> Iterator[list[float] | None]:
    for batch in file.iter_batches(64, columns=["embedding"]):
        yield from batch.column("embedding").to_pylist()


def _embedder(model: str | None, device: str | None) -> FaceEmbedder:
    from sphereface2.recognition.embedder import FaceEmbedder

    if model is None:
        raise UserError("say by which model: --model RUN, a model folder or a hub id")
    return FaceEmbedder.from_pretrained(model, device=device)


def _existing(gallery: str) -> Gallery:
    return Gallery.open(gallery, fingerprint=None, dim=None, create=False)


def _nobody(person: str, gallery: str) -> UserError:
    return UserError(
        f"there is no {person!r} in {gallery}; `sphereface2 gallery list` names everybody"
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
    """What `enrolments` noted, or None: the service and other callers note what they like."""
    try:
        kept = json.loads(source or "null")
    except ValueError:
        return None
    return kept if isinstance(kept, dict) and {"path", "aligned"} <= kept.keys() else None


def _is(source: str | None) -> bool:
    kept = _source(source)
    return kept is not None and Path(kept["path"]).is_file()


def _progress(pictures: Sequence[Picture]) -> Iterable[Picture]:
    console = Console(stderr=True)
    return track(pictures, "embedding", console=console, transient=True)
