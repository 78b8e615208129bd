"""``sphereface2 gallery``: pictures into a gallery, pictures looked for in it."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from cyclopts import Parameter
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sphereface2.data.folder import FolderSource
from sphereface2.errors import UserError
from sphereface2.recognition.gallery import Enrolment, Gallery, NoGalleryError, Person, decide
from sphereface2.recognition.store import Store

if TYPE_CHECKING:
    from sphereface2.recognition.face_embedder import FaceEmbedder

_BATCH = 64
_LISTED = 20


class Picture(NamedTuple):
    """A file of a person's, and whether it is an aligned crop already."""

    person: str
    path: Path
    aligned: bool

    @property
    def source(self) -> str:
        """What the gallery keeps of where it came from."""
        return json.dumps({"path": str(self.path.resolve()), "aligned": self.aligned})


def add(
    gallery: str,
    person: str | None = None,
    /,
    *pictures: Path,
    folder: Path | None = None,
    features: Path | None = None,
    model: str | None = None,
    aligned: bool = False,
    metadata: str | None = None,
    replace: bool = False,
    index: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Enrol a person's images, a folder of people or a table of embeddings.

    Args:
        gallery: Folder of the gallery, or the URL of its database server.
        person: Name of the person whom the images show.
        pictures: Their images: all must be usable, or nobody is added.
        folder: Enrol everybody in this folder, PERSON/IMAGE. Files that are enrolled already are
            skipped; unusable images are listed and left out.
        features: Enrol everybody in this table of `sphereface2 embed`.
        model: A run, a model folder or the name of a model on the hub; not needed for a table that
            names its model.
        aligned: The images are aligned crops already.
        metadata: JSON object to keep with the person, such as '{"since": 2024}'.
        replace: Remove the person's older images.
        index: Index of a new gallery: "flat" (exact), "ivf" or "hnsw".
        device: "cpu", "cuda" or "mps"; default: the best there is.

    Returns:
        ``people`` and ``pictures`` added, ``there`` (pictures that were enrolled already), and
        ``left_out``: what could not be used, and why.

    Raises:
        UserError: wrong options, a model or gallery that cannot be used, or nobody to add; then a
            gallery that was not there is not made.
    """
    ways = [bool(person), folder is not None, features is not None]
    if sum(ways) != 1 or bool(person) != bool(pictures):
        raise UserError("give a person and pictures, or --folder ROOT, or --features FILE")
    if not person and (metadata is not None or replace):
        raise UserError("--metadata and --replace go with one person and their pictures")
    about = None if metadata is None else _metadata(metadata)
    left_out: list[str] = []
    found: list[Picture] = []
    if folder is not None:
        found = _folder(folder, aligned)
    elif person:
        found = [Picture(person, path, aligned) for path in pictures]
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
    count = there = 0
    names_added: set[str] = set()

    def refused(one: Enrolment, error: UserError) -> None:
        nonlocal count
        count -= len(one.embeddings)
        left_out.append(str(error))

    def counted(people: Iterable[Enrolment]) -> Iterator[Enrolment]:
        nonlocal count
        for one in people:
            count += len(one.embeddings)
            yield one

    def make(create: bool) -> Gallery:
        return stack.enter_context(
            _opened(gallery, fingerprint=fingerprint, dim=dim, index=index, create=create)
        )

    with ExitStack() as stack:
        stack.callback(_print_left_out, left_out)
        try:
            opened = make(create=False)
        except NoGalleryError:
            opened = None
        if folder is not None and opened is not None:
            known = {
                (one.name, source)
                for one, sources in opened.sources({picture.person for picture in found})
                for source in sources
            }
            new = [picture for picture in found if (picture.person, picture.source) not in known]
            there, found = len(found) - len(new), new
        if embedder is not None and features is None:
            people = (
                enrolments(embedder, found)
                if person
                else enrolments(embedder, _progress(found), left_out=left_out)
            )
        if person:
            (one,) = people
            one.check(dim)
            ids = (opened or make(create=True)).add(
                person, one.embeddings, metadata=about, sources=one.sources, replace=replace
            )
            names_added, count = {person}, len(ids)
        else:
            numbered = counted(people)
            # Nobody wants a gallery of nobody.
            if (first := _first(numbered, dim, refused)) is not None:
                some = chain([first], numbered)
                for stored in (opened or make(create=True)).add_many(some, refused=refused):
                    names_added |= {somebody.name for somebody in stored}
            if not count + there:
                raise UserError(
                    f"nobody was added to {gallery}: {folder or features} names nobody of whom "
                    "there is a picture to use"
                )
    report = {
        "people": len(names_added),
        "pictures": count,
        "there": there,
        "left_out": left_out,
    }
    already = f"; {there:,} pictures were there already" if there else ""
    print(f"added {count:,} pictures of {len(names_added):,} people to {gallery}{already}")
    return report


def _folder(folder: Path, aligned: bool) -> list[Picture]:
    """The pictures of ``folder/person/picture``, person by person."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder: give --folder one that holds a folder a person")
    source = FolderSource(folder)
    # As the gallery writes names: folders of some file systems write é as two characters.
    names = [unicodedata.normalize("NFC", name) for name in source.class_names or []]
    return [
        Picture(names[label], folder / source.name(i), aligned)
        for i, label in enumerate(source.labels)
    ]


def _first(
    people: Iterator[Enrolment], dim: int, refused: Callable[[Enrolment, UserError], None]
) -> Enrolment | None:
    """The first whom a gallery takes; those before are refused."""
    for one in people:
        try:
            one.check(dim)
            return one
        except UserError as error:
            refused(one, error)
    return None


def set_metadata(gallery: str, person: str, /, *, metadata: str) -> Person:
    """Change a person's metadata; their images stay.

    Args:
        gallery: Folder of the gallery, or the URL of its database server.
        person: Name of an enrolled person.
        metadata: JSON object that replaces the old one, such as '{"since": 2024}'.
    """
    about = _metadata(metadata)
    with _opened(gallery) as opened:
        changed = opened.set_metadata(person, about)
    if changed is None:
        raise _nobody(person, gallery)
    print(f"{changed.name}: {json.dumps(changed.metadata, ensure_ascii=False)}")
    return changed


def remove(gallery: str, person: str, /, *, keep_bytes: bool = False) -> int:
    """Remove a person and every trace of their embeddings from the files.

    Args:
        gallery: Folder of the gallery, or the URL of its database server.
        person: Name of an enrolled person.
        keep_bytes: Leave the rewriting of the files for later.
    """
    with _opened(gallery) as opened:
        count = opened.remove(person)
        if not count:
            raise _nobody(person, gallery)
        if not keep_bytes:
            opened.compact()
    print(f"removed {person} and {count} pictures")
    return count


def compact(gallery: str, /) -> None:
    """Rewrite a gallery's files without what was removed or replaced.

    Args:
        gallery: Folder of the gallery, or the URL of its database server.
    """
    with _opened(gallery) as opened:
        opened.compact()
        local = opened.local
    print(
        f"{gallery} holds nothing that was removed"
        if local
        else f"{gallery}: Milvus deletes what was removed from its files in its own time"
    )


def search(
    gallery: str,
    /,
    *pictures: Path,
    model: str,
    k: Annotated[int, Parameter(alias="-k")] = 5,
    fusion: str = "max",
    far: float | None = None,
    threshold: float | None = None,
    exact: bool = False,
    aligned: bool = False,
    device: str | None = None,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """Tell whom images show, or that they show nobody enrolled.

    Args:
        gallery: Folder of the gallery, or the URL of its database server.
        pictures: Images of the faces to search for.
        model: A run, a model folder or the name of a model on the hub.
        k: Number of people to list for an image.
        fusion: A person's score is that of their best image ("max") or of the mean of their
            images ("mean").
        far: Answer "unknown" below the calibrated threshold for this false accept rate; default:
            the calibration's first.
        threshold: Answer "unknown" below this similarity, instead of `--far`.
        exact: Compare with every embedding instead of asking an approximate index.
        aligned: The images are aligned crops already.
        device: "cpu", "cuda" or "mps"; default: the best there is.
        as_json: Print JSON instead of a table.

    Returns:
        For each picture ``picture``, ``person`` (None: unknown, or no threshold), ``threshold``
        (None: the model is not calibrated) and ``matches`` (``person``, ``score``, ``metadata``).

    Raises:
        UserError: as elsewhere; or pictures could not be used, after the others were answered and
            printed, in JSON along with ``picture`` and ``error`` of these.
    """
    if not pictures:
        raise UserError("no images to search for: name at least one after the gallery")
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
    crops: list[np.ndarray] = []
    errors: dict[int, UserError] = {}
    with _opened(gallery, fingerprint=embedder.fingerprint, dim=embedder.embedding_dim) as opened:
        for number, picture in enumerate(pictures):
            try:
                crops.append(_crop(embedder, picture, aligned))
            except UserError as error:
                if len(pictures) == 1:
                    raise
                errors[number] = error
        rows = embedder.embed(crops, aligned=True)
        answers = iter(opened.search(rows, k=k, fusion=fusion, exact=exact))
    reports: list[dict[str, Any]] = []
    for number, picture in enumerate(pictures):
        if number in errors:
            reports.append({"picture": str(picture), "error": str(errors[number])})
            continue
        matches = next(answers)
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
    else:
        _print_matches(reports, threshold)
    if errors:
        raise UserError(
            f"{len(errors)} of {len(pictures)} pictures could not be looked for: "
            + "; ".join(map(str, errors.values()))
        )
    return reports


def _print_matches(reports: list[dict[str, Any]], threshold: float | None) -> None:
    console = Console(highlight=False, markup=False)
    for report in reports:
        if "error" in report:
            continue
        verdict = "no threshold: the model is not calibrated"
        if threshold is not None:
            verdict = f"{report['person'] or 'unknown'} (threshold {threshold:.4f})"
        console.print(f"{report['picture']}: {verdict}", soft_wrap=True)
        table = Table("person", "similarity")
        for match in report["matches"]:
            table.add_row(match["person"], f"{match['score']:.4f}")
        console.print(table)


def list_people(gallery: str, /, *, as_json: bool = False) -> list[Person]:
    """List the people in a gallery.

    Args:
        gallery: Folder of the gallery, or the URL of its database server.
        as_json: Print JSON instead of a table.
    """
    with _opened(gallery) as opened:
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


def stats(gallery: str, /, *, as_json: bool = False) -> dict[str, Any]:
    """Count the people and images of a gallery, and name its model.

    Args:
        gallery: Folder of the gallery, or the URL of its database server.
        as_json: Print JSON instead of lines.
    """
    with _opened(gallery) as opened:
        numbers = opened.stats()
    if as_json:
        print(json.dumps(numbers, indent=2))
    else:
        for key, value in numbers.items():
            print(f"{key:16} {value}")
    return numbers


def reembed(
    gallery: str, /, *, model: str, drop_missing: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Move a gallery to another model, from the files that people were enrolled from.

    The gallery changes at once at the end; until then, and after a crash, it is the old one.

    Args:
        gallery: Folder of the gallery, or the URL of its database server.
        model: The new model: a run, a model folder or the name of a model on the hub.
        drop_missing: Leave out images whose files are gone; without it they are an error and
            nothing changes.
        device: "cpu", "cuda" or "mps"; default: the best there is.

    Returns:
        ``people``: how many there are now; ``gone``: the names of those who were left out whole;
        ``left_out``: pictures that could not be used, and why.

    Raises:
        UserError: as elsewhere; or pictures are missing, or nobody would remain.
    """
    embedder = _embedder(model, device)
    left_out: list[str] = []
    gone: dict[str, None] = {}  # in order
    count = 0

    def again(there: list[tuple[Person, list[str | None]]]) -> Iterator[Enrolment]:
        nonlocal count
        known = {person.name: person for person, _ in there}
        gone.update(dict.fromkeys(known))
        lost = [person.name for person, found in there for source in found if not _is(source)]
        if lost and not drop_missing:
            some = ", ".join(map(repr, list(dict.fromkeys(lost))[:_LISTED]))
            raise UserError(
                f"{len(lost)} pictures have no file to embed again, among them of {some}: put the "
                "files back, enrol these people anew, or leave the pictures out by --drop-missing"
            )
        todo = [
            Picture(person.name, Path(kept["path"]), kept["aligned"])
            for person, found in there
            for kept in map(_source, filter(_is, found))
            if kept
        ]
        if none_left := gone.keys() - {picture.person for picture in todo}:
            print(
                f"without a file, so that they go: {', '.join(sorted(none_left))}", file=sys.stderr
            )
        done = enrolments(embedder, _progress(todo), left_out=left_out)
        for name, parts in groupby(done, key=lambda one: one.person):
            some_parts = list(parts)
            count += 1
            del gone[name]
            yield Enrolment(
                name,
                np.concatenate([one.embeddings for one in some_parts]),
                known[name].metadata,
                [source for one in some_parts for source in one.sources or []],
            )
        if left_out and not drop_missing:
            raise UserError(
                f"{left_out[0]} ({len(left_out)} such): put it right, or leave such pictures "
                "out by --drop-missing"
            )
        if gone and not count:
            raise UserError(
                f"nobody would remain in {gallery}, which is as it was: put the files back, or "
                "enrol the people in a new gallery"
            )

    with _opened(gallery) as opened:
        opened.reembed(again, fingerprint=embedder.fingerprint, dim=embedder.embedding_dim)
    _print_left_out(left_out)
    went = f"; {len(gone):,} went: {', '.join(gone)}" if gone else ""
    print(f"{gallery} now holds {count:,} people embedded by {model}{went}")
    return {"people": count, "gone": list(gone), "left_out": left_out}


def enrolments(
    embedder: FaceEmbedder, pictures: Iterable[Picture], *, left_out: list[str] | None = None
) -> Iterator[Enrolment]:
    """Embed pictures that come person by person; one person may come in several parts.

    Args:
        left_out: without it an unusable picture is a UserError; with it what is wrong is appended.
    """
    waiting: list[tuple[Picture, np.ndarray]] = []

    def embedded() -> Iterator[Enrolment]:
        rows = embedder.embed([crop for _, crop in waiting], aligned=True)
        numbered = zip((picture for picture, _ in waiting), rows, strict=True)
        for person, group in groupby(numbered, key=lambda pair: pair[0].person):
            theirs = list(group)
            sources = [picture.source for picture, _ in theirs]
            yield Enrolment(person, np.stack([row for _, row in theirs]), None, sources)
        waiting.clear()

    for picture in pictures:
        try:
            crop = _crop(embedder, picture.path, picture.aligned)
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


def _crop(embedder: FaceEmbedder, path: Path, aligned: bool) -> np.ndarray:
    from sphereface2.images import read_image

    return read_image(path) if aligned else embedder.crop(path)[0]


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
    try:
        about = json.loads((file.schema_arrow.metadata or {}).get(METADATA, b"{}"))
    except ValueError:
        about = None
    if not isinstance(about, dict):
        raise UserError(f"{path} says nothing of use about its model; embed the pictures anew")
    if about.get("flip") is False:
        raise UserError(
            f"{path} was embedded with --no-flip and a search adds the mirror image: embed the "
            "pictures anew, without that"
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


def _embedder(model: str | None, device: str | None) -> FaceEmbedder:
    from sphereface2.recognition.face_embedder import FaceEmbedder

    if model is None:
        raise UserError("say by which model: --model RUN, a model folder or a hub id")
    return FaceEmbedder.from_pretrained(model, device=device)


@contextmanager
def _opened(
    gallery: str,
    *,
    fingerprint: str | None = None,
    dim: int | None = None,
    index: str | None = None,
    create: bool = False,
) -> Iterator[Gallery]:
    """`Gallery.open`, with what its database cannot do as a UserError."""
    try:
        with Gallery.open(
            gallery, fingerprint=fingerprint, dim=dim, index=index, create=create
        ) as opened:
            yield opened
    except UserError:
        raise
    except Exception as error:
        if not Store.refused(error):
            raise
        raise UserError(f"the gallery {gallery} failed: {error}") from error


def _print_left_out(lines: list[str]) -> None:
    for line in lines:
        print(f"left out: {line}", file=sys.stderr)


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
