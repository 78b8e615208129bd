"""``sphereface2 data cluster``: who is who among faces without labels."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from sphereface2 import console
from sphereface2.align import Aligner
from sphereface2.data.convert import Conversion, Encoding, check_target, is_unsafe, write_source
from sphereface2.data.embedding_table import unit
from sphereface2.data.locate import about
from sphereface2.data.source import Source, Subset
from sphereface2.errors import UserError, check_number, counted
from sphereface2.evaluation.calibration import Calibration
from sphereface2.evaluation.clustering import cluster as cluster_rows
from sphereface2.evaluation.clustering import compare
from sphereface2.evaluation.label_errors import weighted_sums
from sphereface2.files import (
    MOST_BYTES,
    atomic_write,
    digest,
    one_name,
    read_lines,
    read_text,
    visible,
    writing,
)
from sphereface2.images import encode_image
from sphereface2.recognition.audit.faces import Faces, examined
from sphereface2.recognition.audit.findings import show
from sphereface2.recognition.audit.report import QUALITY, grid
from sphereface2.recognition.feature_parts import open_images
from sphereface2.signals import STOPPED, Stopper

PEOPLE, SUMMARY, PAGE = "people.txt", "people.json", "people.html"
STRANGERS = 2.0
"""Similar strangers of an image at the default threshold; `benchmarks/clustering.py` says why."""
MOST_FALSE = 0.01
"""Greatest FAR of the default threshold, for sets of few images."""
_SHOWN = 48  # images on a sheet
_CHUNK = 256  # sheets
_HEAD, _NOBODY = "==", "-"
_EXPLAINED = f"""\
# Each block below is a person: a line "{_HEAD} NAME", then a line for each image, its number and
# its name, those that look most like the person first. The sheets show the same images.
#   name    write another NAME
#   merge   give two blocks one NAME, or delete the line "{_HEAD} NAME" of the lower one
#   split   write a new line "{_HEAD} NAME" where the second person begins
#   move    put an image's line into another block
#   leave out an image: delete its line, or put it below "{_HEAD} {_NOBODY}"
"""


def cluster(
    source: Path,
    /,
    *,
    out: Path | None = None,
    model: str | None = None,
    write: Path | None = None,
    to: str = "folder",
    apply: Path | None = None,
    align: bool = False,
    threshold: float | None = None,
    least: int = 2,
    batch_size: int = 64,
    device: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Sort a set of faces without labels into people.

    OUT gets `people.txt`, which says who is who and can be edited, `people.html` with a contact
    sheet of each person, `people.json` and the embeddings, which the next call on the same set
    with the same model reads back; one that was stopped goes on. SOURCE is not changed: `--write`
    makes a set of the people found, or of those that an edited `people.txt` names with `--apply`.

    Args:
        source: Folder of images, in it and below it; a RecordIO file, list or WebDataset, whose
            labels are not used, but compared with at the end.
        out: Folder of the result.
        model: A run, a model folder, an exported .onnx file, or the id of a model on the hub;
            default: the model that comes with the package.
        write: New folder for the set of people.
        to: Its format: folder (of people's folders), list, recordio or webdataset.
        apply: The people are those of this edited people.txt.
        align: The images are photographs, whose main face is cropped first.
        threshold: Mean similarity from which two groups of images are one person; default: from
            the model's calibration and the number of images.
        least: Images that make a person; smaller groups are nobody's.
        batch_size: Number of images in one forward pass.
        device: Where to compute: cpu, cuda, mps; by default the best there is.
        as_json: Print the summary as JSON.

    Raises:
        UserError: a wrong option, no such model or set, OUT holds work on others, or its
            people.txt was edited.
    """
    check_number("--least", least, least=1)
    if threshold is not None:
        check_number("--threshold", threshold, above=-1, below=1)
    if write is not None:
        check_target(write, to)
    if apply is not None:
        if write is None:
            raise UserError("--apply goes with --write, the folder for the set of people")
        named = read_people(apply, open_images(source))
        return show({}, [], as_json, _write(named, write, to, align, about(source)))
    if out is None:
        raise UserError("give --out, the folder of the result")
    start = time.perf_counter()
    _check_unedited(out)
    embedding: Any = {"model": model, "device": device, "batch_size": batch_size, "align": align}
    with examined(source, out, write, **embedding) as (embedder, faces):
        limit = threshold
        if limit is None:
            limit = threshold_for(embedder.calibration, len(faces.rows))
        with Stopper(STOPPED), console.bars() as bars:
            progress = console.advance(bars, "pairs of images", 1)
            found = cluster_rows(faces.rows, limit, progress=progress)
            people = _people(faces, found, least)
            _sheets(out, faces.source, people)
        text = people_text(faces.source, people)
        summary = _summary(source, faces, found, people) | {
            "threshold": round(limit, 4),
            "model": embedder.fingerprint,
            "seconds": round(time.perf_counter() - start, 1),
            "people.txt": digest(text),
        }
        with writing(out):
            atomic_write(out / SUMMARY, f"{json.dumps(summary, indent=2)}\n".encode())
            atomic_write(out / PEOPLE, text.encode())
    done = None
    if write is not None:
        done = _write(read_people(out / PEOPLE, faces.source), write, to, align, about(source))
    return show(summary, _lines(summary, out), as_json, done)


def threshold_for(calibration: Calibration | None, images: int) -> float:
    """The mean similarity from which two groups among so many images are one person.

    That at which an image has `STRANGERS` similar strangers on average: the FAR is `STRANGERS` by
    the number of images, at most `MOST_FALSE`. Between the calibration's thresholds, and beyond
    them, it follows the logarithm of the FAR on straight lines; with one threshold, on the slope of
    its curve.

    Raises:
        UserError: there is no calibration, or one of whole photographs.
    """
    if calibration is None:
        raise UserError(
            "the model has no calibration that says which similarity makes one person: run "
            "sphereface2 calibrate on it, or give --threshold"
        )
    calibration.check_for_crops()
    wanted = np.log(min(STRANGERS / max(images, 1), MOST_FALSE))
    known = sorted((np.log(far), found.threshold) for far, found in calibration.thresholds.items())
    if len(known) == 1:
        far, at = known[0]
        slope = float(np.diff(calibration.llr(np.array([at - 0.01, at + 0.01])))[0]) / 0.02
        known.append((far + 1, at - 1 / max(slope, 1e-6)))
    place = int(np.clip(np.searchsorted([far for far, _ in known], wanted), 1, len(known) - 1))
    (f0, t0), (f1, t1) = known[place - 1 : place + 1]
    return float(np.clip(t0 + (wanted - f0) * (t1 - t0) / (f1 - f0), -0.99, 0.99))


def _check_unedited(out: Path) -> None:
    if not (out / PEOPLE).exists():
        return
    try:
        known = json.loads((out / SUMMARY).read_text(encoding="utf-8"))["people.txt"]
    except (OSError, ValueError, KeyError, TypeError):
        known = None
    if known != digest(read_text(out / PEOPLE)):
        raise UserError(
            f"{out / PEOPLE} was edited and would be written anew: apply it with --apply and "
            "--write, or rename it"
        )


def _people(faces: Faces, found: np.ndarray, least: int) -> list[tuple[str, list[int]]]:
    """Names and images in the set of all people, the largest first; at the end those of nobody."""
    fit = np.einsum(
        "nd,nd->n", unit(weighted_sums(faces.rows, found, np.ones(len(found))))[found], faces.rows
    )
    order = np.lexsort((-fit, found))
    groups = np.split(faces.index[order], np.cumsum(np.bincount(found))[:-1])
    people = [group.tolist() for group in groups if len(group) >= least]
    nobody = [i for group in groups if len(group) < least for i in group.tolist()]
    digits = len(str(len(people)))
    named = [(f"{number:0{digits}d}", group) for number, group in enumerate(people, 1)]
    return [*named, ("", nobody)] if nobody else named


def _sheets(out: Path, source: Source, people: Sequence[tuple[str, list[int]]]) -> None:
    """A contact sheet of each person, and a page of all."""
    page = [
        "<!doctype html><meta charset=utf-8><title>People</title>",
        "<style>body{font:15px system-ui;margin:2em}h2{font-size:1em}</style>",
        f"<p>Numbers under the images are those in {PEOPLE}.",
    ]
    with writing(out), ThreadPoolExecutor() as pool, console.bars(counted=True) as bars:
        (out / "people").mkdir(exist_ok=True)
        for old in (out / "people").glob("*.jpg"):
            old.unlink()
        named = [(name, images) for name, images in people if name]
        progress = console.advance(bars, "sheets", len(named))
        for start in range(0, len(named), _CHUNK):
            part = named[start : start + _CHUNK]
            sheets = pool.map(
                lambda one: encode_image(grid(source, one[1][:_SHOWN]), ".jpg", QUALITY), part
            )
            for (name, images), content in zip(part, sheets, strict=True):
                (out / "people" / f"{name}.jpg").write_bytes(content)
                more = f", the first {_SHOWN} shown" if len(images) > _SHOWN else ""
                page.append(f"<h2>{escape(name)}: {counted(len(images), 'image')}{more}</h2>")
                page.append(f"<img loading=lazy alt='' src='people/{name}.jpg'>")
                progress(1)
        atomic_write(out / PAGE, "\n".join(page).encode())


def _summary(
    source: Path, faces: Faces, found: np.ndarray, people: Sequence[tuple[str, list[int]]]
) -> dict[str, Any]:
    named = [images for name, images in people if name]
    summary: dict[str, Any] = {
        "set": str(source),
        "images": len(faces.source),
        "left_out": len(faces.left_out),
        "people": len(named),
        "images_of_people": sum(map(len, named)),
    }
    if len(np.unique(faces.labels)) > 1:
        summary["against_labels"] = asdict(compare(found, faces.labels))
    return summary


def _lines(summary: dict[str, Any], out: Path) -> list[str]:
    lines = [
        f"{counted(summary['people'], 'person')} with {summary['images_of_people']:,} of "
        f"{counted(summary['images'], 'image')}, from a mean similarity of "
        f"{summary['threshold']:.3f}",
        f"look at {out / PAGE}, edit {out / PEOPLE}, then --apply it",
    ]
    if (scores := summary.get("against_labels")) is not None:
        lines.append(
            f"against the set's labels: pairwise F {console.percent(scores['f'])}, "
            f"BCubed F {console.percent(scores['bcubed_f'])}"
        )
    return lines


class _Crops(Subset):
    """The main faces of a set's photographs, cropped and encoded as they are read."""

    @cached_property
    def aligner(self) -> Aligner:
        """Finds the faces."""
        return Aligner()

    def read(self, index: int) -> bytes:
        """The bytes of a crop."""
        return Encoding("jpg", 95)(self.aligner.align(super().read(index))[0])


def _write(people: Subset, target: Path, to: str, align: bool, told: str) -> Conversion:
    if align:
        people = _Crops(people.source, people.index, people.labels, people.class_names)
    return write_source(people, target, to, told=told)


# -- the file of who is who ---------------------------------------------------------------------


def people_text(source: Source, people: Sequence[tuple[str, Sequence[int]]]) -> str:
    """The text of people's names and images; an empty name is of images that are nobody's."""
    lines = [_EXPLAINED]
    for name, images in people:
        lines.append(f"\n{_HEAD} {name or _NOBODY}\n")
        lines += [f"{i}\t{_on_a_line(source.name(i))}\n" for i in images]
    return "".join(lines)


def _on_a_line(name: str) -> str:
    return visible(" ".join(name.split()))


def read_people(path: Path, source: Source) -> Subset:
    """The images of a set under the people that a text gives them to, sorted by name.

    Raises:
        UserError: a line says something else, names an image twice or one that the set has not, a
            name can be no folder's, or nobody is left.
    """
    name, person_of = None, {}
    for number, line in read_lines(path, f"the {PEOPLE} that data cluster wrote"):
        where = f"{path} line {number}"
        if line.startswith(_HEAD):
            name = one_name(line.removeprefix(_HEAD))
            if is_unsafe(name):
                length = len(os.fsencode(name))
                long = f", as it has {length} bytes" if length > MOST_BYTES else ""
                raise UserError(
                    f"{where}: {name[:60]!r} can name no folder{long}; write another name"
                )
            continue
        index, *words = line.split()
        if name is None or not index.isdecimal():
            raise UserError(f'{where}: neither "{_HEAD} NAME" nor an image\'s number and name')
        one, image = int(index), " ".join(words)
        if one >= len(source) or _on_a_line(source.name(one)) != image:
            raise UserError(f"{where}: the set has no image {index} {image!r}; give the same set")
        if one in person_of:
            raise UserError(f"{where}: image {index} stands in the file twice; delete one line")
        person_of[one] = name
    kept = sorted(one for one, name in person_of.items() if name != _NOBODY)
    if not kept:
        raise UserError(f"{path} gives no image to a person")
    names, labels = np.unique([person_of[one] for one in kept], return_inverse=True)
    return Subset(source, np.array(kept), labels.astype(np.int64), names.tolist())
