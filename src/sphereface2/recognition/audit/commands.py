"""``sphereface2 data audit``: find what is wrong with a set of faces, and write a cleaned one."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sphereface2 import console
from sphereface2.data.locate import about
from sphereface2.errors import UserError, check_number, counted
from sphereface2.files import atomic_write, writing
from sphereface2.recognition.audit.faces import examined
from sphereface2.recognition.audit.findings import (
    KINDS,
    cleaned,
    read_findings,
    show,
    write_findings,
    write_set,
)
from sphereface2.recognition.audit.judge import judge
from sphereface2.recognition.audit.report import write_report
from sphereface2.recognition.feature_parts import open_images
from sphereface2.signals import STOPPED, Stopper

FINDINGS, SUMMARY = "findings.csv", "summary.json"


def audit(
    source: Path,
    /,
    *,
    out: Path,
    model: str | None = None,
    write: Path | None = None,
    apply: Path | None = None,
    align: bool = False,
    wrong: float = 0.5,
    move: float | None = None,
    false_pairs: float = 0.1,
    shown: int = 60,
    batch_size: int = 64,
    device: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Find mislabelled, duplicate, split and poor images in a set of faces.

    OUT gets `report.html` and `report.md` with contact sheets, `findings.csv`, `summary.json` and
    the embeddings, which the next audit of the same set by the same model reads back; one that was
    stopped goes on. SOURCE is not changed: `--write` makes a cleaned set. To decide otherwise, edit
    the column `action` of a copy of `findings.csv` (keep, remove, move, merge) and give it as
    `--apply`.

    Args:
        source: Folder, list, RecordIO file or WebDataset.
        out: Folder of the report.
        model: A run, a model folder, an exported .onnx file, or the id of a model on the hub;
            default: the model that comes with the package.
        write: New folder for the cleaned set: a list of the files, or a packed set packed anew.
        apply: Write what this file of findings says instead of what is found.
        align: The images are photographs, whose main face is cropped first.
        wrong: Probability from which an image does not belong to its label.
        move: Probability from which such an image is moved to the label that it looks like;
            default: none is moved, all are removed.
        false_pairs: Share of false ones accepted among the pairs of labels that are one person.
        shown: Findings of each kind in the report.
        batch_size: Number of images in one forward pass.
        device: Where to compute: cpu, cuda, mps; by default the best there is.
        as_json: Print the summary as JSON.

    Raises:
        UserError: a wrong option, no such model or set, or OUT holds an audit of others.
    """
    check_number("--wrong", wrong, above=0, most=1)
    check_number("--false-pairs", false_pairs, least=0, below=1)
    if move is not None:
        check_number("--move", move, least=0)
    check_number("--shown", shown, least=1)
    if write is not None and write.exists():
        raise UserError(f"{write} exists already; give --write a new folder")
    if apply is not None:
        if write is None:
            raise UserError("--apply goes with --write, the folder for the cleaned set")
        opened = open_images(source)
        edited = cleaned(opened, read_findings(apply, opened))
        return show({}, [], as_json, write_set(edited, write, about(source)))
    start = time.perf_counter()
    embedding: Any = {"model": model, "device": device, "batch_size": batch_size, "align": align}
    with examined(source, out, write, **embedding) as (embedder, faces):
        with Stopper(STOPPED), console.bars() as bars:
            limits: Any = {"wrong": wrong, "move": move, "false_pairs": false_pairs}
            found, share = judge(
                faces, **limits, steps=lambda title: console.advance(bars, title, 1)
            )
        summary: dict[str, Any] = {
            "set": str(source),
            "model": embedder.fingerprint,
            "images": len(faces.source),
            "people": len(np.unique(faces.source.labels)),
            "wrong_share": share,
            "findings": {kind: sum(one.kind == kind for one in found) for kind in KINDS},
        }
        summary["seconds"] = round(time.perf_counter() - start, 1)
        write_findings(out / FINDINGS, found)
        facts = {
            "images": f"{summary['images']:,}",
            "people": f"{summary['people']:,}",
            "wrong labels, estimated": console.percent(summary["wrong_share"]),
        }
        write_report(out, f"Audit of {source}", faces.source, found, facts, shown)
        with writing(out):
            atomic_write(out / SUMMARY, f"{json.dumps(summary, indent=2)}\n".encode())
    files = f"report: {out / 'report.html'}, to edit: {out / FINDINGS}"
    done = None if write is None else write_set(cleaned(faces.source, found), write, about(source))
    return show(summary, [_table(summary), files], as_json, done)


def _table(summary: dict[str, Any]) -> Table:
    images, people = counted(summary["images"], "image"), counted(summary["people"], "person")
    table = console.table(f"{images} of {people}", ["", ""])
    table.show_header = False
    for kind, count in summary["findings"].items():
        table.add_row(KINDS[kind], f"{count:,}")
    table.add_row("wrong labels, estimated", console.percent(summary["wrong_share"]))
    return table
