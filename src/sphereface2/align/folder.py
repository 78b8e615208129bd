"""``sphereface2 align``: a tree of images in, the same tree of aligned crops out."""

from __future__ import annotations

import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import IO, Any

from sphereface2 import console
from sphereface2.align.crops import Cropper, Job, Settings, run_in_worker, start_worker
from sphereface2.align.landmarks import Landmarks, read_landmarks
from sphereface2.align.template import SIZE
from sphereface2.data.folder import check_outside, images_below
from sphereface2.errors import UserError, check_number, counted
from sphereface2.files import TEMPORARY, atomic_write, lock, takes_paths
from sphereface2.images import MAX_PIXELS, SUFFIXES
from sphereface2.machine import cores
from sphereface2.signals import STOPPED, Stopper, starting_workers

JOURNAL, REPORT = "faces.jsonl", "report.json"
_STATUSES = ("aligned", "no face", "unreadable", "bad landmarks", "not written")
_DETECTED_BY = {"detector": "mtcnn"}
_CHUNK = 8  # images that go to a worker at a time


@takes_paths
def align(
    source: Path,
    target: Path,
    /,
    *,
    all_faces: bool = False,
    landmarks: Path | None = None,
    workers: int | None = None,
    size: int = SIZE,
    png: bool = False,
    min_score: float = 0.9,
    rotations: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> dict[str, Any]:
    """Find faces in photographs and crop them for training and embedding.

    ``person/name.png`` becomes ``person/name.jpg`` (quality 95), with the image's own suffix
    kept in the name (``name.png.jpg``) where two images would share one. An image without a
    face or one that cannot be read is reported and does not stop the rest. ``target/faces.jsonl``
    says for each image what became of it, with boxes and landmarks; images that it holds are
    skipped when the job is run again, so that one which was cut goes on where it stopped. Those
    that were changed since, got other landmarks or could not be read are done anew.

    Args:
        source: Folder of photographs; hidden files and those with no image suffix are ignored.
        target: Folder for the crops, outside SOURCE: a new or empty one, or one that already holds
            such crops of SOURCE.
        all_faces: Crop every face (`NAME_face1.jpg`, …), not only the largest and most central.
        landmarks: File of `path x1 y1 … x5 y5` lines, with paths relative to SOURCE: only these
            images are cropped, by these points, and nothing is detected.
        workers: Number of processes; default: one per CPU core.
        size: Side of the crops in pixels.
        png: Write PNG instead of JPEG.
        min_score: Confidence of the detector, in [0, 1], from which a face counts.
        rotations: Where no face is found, turn the image by 90°, 180° and 270°.
        max_pixels: Refuse images with more pixels than this.

    Returns:
        The report, also in ``target/report.json``: ``images``, ``aligned``, ``crops``,
        ``no_face``, ``unreadable``, ``bad_landmarks`` and ``not_written`` (for the length of the
        crop's name) count all images of the folder, ``skipped`` those of them that were done
        before; ``images_without_face`` and ``reasons`` name the images that gave no crop;
        ``passed_over`` says what is no image or was not entered.

    Raises:
        UserError: ``source`` is no folder of images, ``target`` lies inside it, holds other
            files or crops of another folder or other settings, or has another process at work in
            it, the landmark file is unusable, or a file cannot be written.
    """
    known = read_landmarks(landmarks) if landmarks is not None else None
    settings = Settings(
        size=size,
        min_score=min_score,
        all_faces=all_faces,
        landmarks=landmarks is not None,
        suffix=".png" if png else ".jpg",
        max_pixels=max_pixels,
        rotations=rotations,
    )
    check_number("--max-pixels", max_pixels, least=1)
    if workers is not None:
        check_number("--workers", workers, least=1)
    Cropper(settings)  # a wrong setting or a missing package shows here, once
    names, passed_over = _names(source, target, known)
    try:
        with Stopper(STOPPED), _open(target, source, settings) as journal:
            report = _crop_all(journal, source, names, known, workers or cores())
            report["passed_over"] = passed_over
            atomic_write(target / REPORT, _json(report, indent=2))
    except OSError as error:
        raise UserError(
            f"cannot write below {target}: {error.strerror or error}; make room or name another "
            "folder and run again"
        ) from error
    _print(report, target)
    if not report["crops"]:
        raise UserError(f"no face could be cropped: {target / REPORT} tells why, image by image")
    return report


def _crop_all(
    journal: _Journal, source: Path, names: list[str], known: Landmarks | None, workers: int
) -> dict[str, Any]:
    """Do what the journal does not hold; the report on all."""
    bad = known.bad if known is not None else {}
    jobs = [job for job in _jobs(source, journal.target, names, known) if not journal.holds(job)]
    skipped = len(names) - len(jobs)
    for job in jobs:
        journal.remove_crops(job.name)
    for name, reason in bad.items():
        if known is not None and name not in known.points:  # it may be there twice
            journal.remove_crops(name)
        journal.done[name] = {"image": name, "status": "bad landmarks", "reason": reason}
    with console.bars(counted=True) as bar:
        task = bar.add_task("aligning", total=len(names), completed=skipped)
        for record in _run(jobs, journal.settings, workers):
            journal.add(record)
            bar.advance(task)
    return _report(journal.done, [*names, *bad], skipped)


def _names(source: Path, target: Path, known: Landmarks | None) -> tuple[list[str], list[str]]:
    """The images' paths relative to ``source``, sorted, and sentences on what is not read."""
    if not source.is_dir():
        raise UserError(
            f"{source} {'is a file' if source.is_file() else 'does not exist'}; give a folder of "
            "images (a packed set becomes one by sphereface2 data convert SET FOLDER --to folder)"
        )
    check_outside(target, source)
    if known is not None:
        return sorted(known.points), []
    found = images_below(source)
    if not found.images:
        raise UserError(
            f"{source} holds no images ({' '.join(sorted(SUFFIXES))})"
            + "".join(f"; {note}" for note in found.notes())
        )
    return found.images, found.notes()


def _jobs(source: Path, target: Path, names: list[str], known: Landmarks | None) -> Iterator[Job]:
    # Two images share a stem, or one's stem is another's name, as those of a.png.png and a.png.
    # Many file systems take names for one that differ in capitals only.
    taken = Counter(str(PurePosixPath(name).with_suffix("")).casefold() for name in names)
    taken.update(str(PurePosixPath(name)).casefold() for name in names)
    for name in names:
        stem = PurePosixPath(name).with_suffix("")
        place = stem if taken[str(stem).casefold()] == 1 else PurePosixPath(name)
        points = known.points[name] if known is not None else None
        yield Job(name, source / name, target / place, points)


def _run(jobs: list[Job], settings: Settings, workers: int) -> Iterator[dict[str, Any]]:
    """The jobs' records as they come in."""
    workers = min(workers, -(-len(jobs) // _CHUNK))
    if workers <= 1:
        cropper = Cropper(settings)
        for job in jobs:
            yield cropper.run(job)
        return
    remaining = iter(jobs)
    chunks = iter(lambda: list(islice(remaining, _CHUNK)), [])
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=start_worker,
        initargs=(settings,),
    )
    try:
        pending: set[Future[list[dict[str, Any]]]] = set()
        while True:
            with starting_workers():
                for chunk in islice(chunks, 2 * workers - len(pending)):
                    pending.add(pool.submit(run_in_worker, chunk))
            if not pending:
                return
            finished, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in finished:
                yield from future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps because memory ran out; run the same "
            "command again "
            "to go on, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _open(target: Path, source: Path, settings: Settings) -> Iterator[_Journal]:
    """The journal of ``target``, which is this process's alone meanwhile."""
    target.mkdir(parents=True, exist_ok=True)
    path = target / JOURNAL
    if not path.exists() and any(target.iterdir()):
        # Crops have the names of their images: among others' images they would replace them.
        raise UserError(
            f"{target} holds files and no {JOURNAL} of an earlier run; name a new or empty folder"
        )
    with path.open("a+b") as file:
        lock(file, f"another process is at work in {target}; wait for it or name another folder")
        yield _Journal(file, target, source, settings)


class _Journal:
    """What became of each image: a line of JSON each, what all have in common in the first."""

    def __init__(self, file: IO[bytes], target: Path, source: Path, settings: Settings) -> None:
        self.target, self.settings = target, settings
        self._file = file
        self.done: dict[str, dict[str, Any]] = {}
        header = {"source": str(source.resolve()), "settings": {**_DETECTED_BY, **asdict(settings)}}
        file.seek(0)
        data = file.read()
        if not data:
            self._append(header)
            return
        whole = data[: data.rfind(b"\n") + 1]  # without a line that was cut
        try:
            first, *records = [json.loads(line) for line in whole.splitlines()]
            # Journals of versions that tried no rotations do not name them.
            if {"rotations": False, **first["settings"]} != header["settings"]:
                raise UserError(
                    f"{target} holds crops made with other settings; name a new folder or remove it"
                )
            if first["source"] != header["source"]:
                raise UserError(
                    f"{target} holds crops of {first['source']}, not of {source}; name a new "
                    "folder or remove it"
                )
            self.done = {record["image"]: record for record in records}
        except UserError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{target / JOURNAL} is damaged or not of this command; name a new folder or "
                "remove it"
            ) from error
        # Only now that the folder is known to be ours: what a run that was killed left half.
        file.truncate(len(whole))
        for stale in target.rglob(TEMPORARY):
            stale.unlink(missing_ok=True)

    def holds(self, job: Job) -> bool:
        """Whether the job was done, with the same image and landmarks, and its crops are there.

        An image that could not be read is tried again: its permissions may be others now.
        """
        record = self.done.get(job.name)
        return (
            record is not None
            and record["status"] != "unreadable"
            and record["input"] == job.input()
            and all(crop.exists() for crop in self._crops(job.name))
        )

    def remove_crops(self, name: str) -> None:
        """Remove the crops that an image had, since it may get fewer now."""
        for crop in self._crops(name):
            crop.unlink(missing_ok=True)

    def _crops(self, name: str) -> list[Path]:
        faces = self.done.get(name, {}).get("faces", ())
        return [(self.target / name).with_name(face["crop"]) for face in faces]

    def add(self, record: dict[str, Any]) -> None:
        self.done[record["image"]] = record
        self._append(record)

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(_json(record) + b"\n")
        self._file.flush()


def _json(value: dict[str, Any], **options: Any) -> bytes:
    # A file's name may hold bytes that are not UTF-8: as escapes, which JSON reads back.
    return json.dumps(value, ensure_ascii=False, **options).encode("utf-8", "backslashreplace")


def _report(done: dict[str, dict[str, Any]], names: list[str], skipped: int) -> dict[str, Any]:
    records = [done[name] for name in dict.fromkeys(names)]
    counts = Counter(record["status"] for record in records)
    return {
        "images": len(records),
        "crops": sum(len(record.get("faces", ())) for record in records),
        **{status.replace(" ", "_"): counts[status] for status in _STATUSES},
        "skipped": skipped,
        "images_without_face": [r["image"] for r in records if r["status"] == "no face"],
        "reasons": {r["image"]: r["reason"] for r in records if "reason" in r},
    }


def _print(report: dict[str, Any], target: Path) -> None:
    before = f" ({report['skipped']:,} done before)" if report["skipped"] else ""
    where, reasons = f" in {REPORT}", list(report["reasons"].values())
    console.show(
        f"{counted(report['images'], 'image')}{before}: {report['aligned']:,} aligned, "
        f"{counted(report['crops'], 'crop')} in {target}",
        *report["passed_over"],
        *console.named("with no face found", report["images_without_face"], where),
        *console.named("unreadable, with bad landmarks or not written", reasons, where),
    )
