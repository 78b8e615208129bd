"""What an audit found, for people: Markdown with contact sheets, and one HTML file with all."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from sphereface2 import markdown
from sphereface2.data.source import Source
from sphereface2.errors import UserError
from sphereface2.files import atomic_write, writing
from sphereface2.images import decode, encode_image
from sphereface2.recognition.audit.findings import KINDS, Finding

QUALITY = 85  # of JPEG
_TILE, _GAP, _BESIDE = 96, 4, 4
_STYLE = (
    "body{font:15px system-ui;margin:2em;max-width:75em}td,th{text-align:left;padding:.2em .8em "
    ".2em 0;vertical-align:middle}td.n{text-align:right}img{display:block}"
)


def tile(source: Source, index: int) -> np.ndarray:
    """An image as a square of `_TILE` pixels, uint8 RGB; grey if it cannot be read."""
    grey = (224, 224, 224)
    try:
        image = Image.fromarray(decode(source.read(index)))
    except (OSError, UserError):
        image = Image.new("RGB", (_TILE, _TILE), grey)
    return np.asarray(ImageOps.pad(image, (_TILE, _TILE), color=grey))


def strip(source: Source, parts: Sequence[Sequence[int]]) -> np.ndarray:
    """Groups of images in a row, uint8 RGB, with a gap between the groups."""
    columns: list[np.ndarray] = []
    for part in parts:
        for place, index in enumerate(part):
            before = 0 if place or not columns else 5 * _GAP
            columns.append(_padded(tile(source, index), left=before, right=_GAP))
    return np.concatenate(columns, axis=1)


def grid(source: Source, images: Sequence[int], columns: int = 12) -> np.ndarray:
    """Images in rows, uint8 RGB, each with its number below."""
    cells = [_padded(tile(source, index), right=_GAP, below=20) for index in images]
    for cell, index in zip(cells, images, strict=True):
        _write(cell, str(index), (2, _TILE + 14))
    columns = min(columns, len(cells))
    cells += [np.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [np.concatenate(cells[i : i + columns], axis=1) for i in range(0, len(cells), columns)]
    return np.concatenate(rows)


def _padded(image: np.ndarray, left: int = 0, right: int = 0, below: int = 0) -> np.ndarray:
    return np.pad(image, ((0, below), (left, right), (0, 0)), constant_values=255)


def _write(image: np.ndarray, text: str, place: tuple[int, int]) -> np.ndarray:
    cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (60, 60, 60), 1, cv2.LINE_AA)
    return image


def stack(strips: Sequence[np.ndarray], first: int = 1) -> np.ndarray:
    """Numbered strips, one below the other."""
    width = max(one.shape[1] for one in strips)
    rows = []
    for number, one in enumerate(strips, first):
        row = _padded(one, left=48, right=width - one.shape[1], below=_GAP)
        rows.append(_write(row, str(number), (2, _TILE // 2)))
    return np.concatenate(rows)


def first(labels: np.ndarray, label: int) -> list[int]:
    """The first images of a label."""
    return np.flatnonzero(labels == label)[:_BESIDE].tolist()


def shown(finding: Finding, source: Source) -> np.ndarray:
    """The images that a finding is about."""
    labels = np.asarray(source.labels)
    if finding.kind == "same person":
        return strip(source, [first(labels, finding.index), first(labels, finding.other)])
    if finding.kind.startswith("duplicate"):
        return strip(source, [[finding.index], [finding.other]])
    if finding.kind != "wrong label":
        return strip(source, [[finding.index]])
    own = [i for i in first(labels, labels[finding.index]) if i != finding.index]
    others = first(labels, finding.other)  # none of label -1
    return strip(source, [part for part in ([finding.index], own, others) if part])


def write_report(
    out: Path, title: str, source: Source, findings: Sequence[Finding], facts: Any, limit: int
) -> None:
    """Write ``report.md`` with ``sheets/KIND.jpg``, and ``report.html``, which holds its images.

    ``facts`` are names and values for the head; ``limit`` findings of a kind are shown.
    """
    counts = Counter(finding.kind for finding in findings)
    rows = [*facts.items(), *((KINDS[kind], f"{counts[kind]:,}") for kind in KINDS)]
    page = [f"# {markdown.escape(title)}", "", markdown.table(["", ""], rows)]
    cells = "".join(f"<tr><td>{escape(k)}<td class=n>{escape(str(v))}" for k, v in rows)
    html = [
        f"<!doctype html><meta charset=utf-8><title>{escape(title)}</title>",
        f"<style>{_STYLE}</style><h1>{escape(title)}</h1><table>{cells}</table>",
    ]
    with writing(out):
        (out / "sheets").mkdir(exist_ok=True)
        for kind in filter(counts.__getitem__, KINDS):
            listed = [finding for finding in findings if finding.kind == kind][:limit]
            strips = [shown(finding, source) for finding in listed]
            sheet = f"sheets/{kind.replace(' ', '-')}.jpg"
            atomic_write(out / sheet, encode_image(stack(strips), ".jpg", QUALITY))
            note = f"The first {len(listed)} of {counts[kind]:,}" if limit < counts[kind] else "All"
            page += [f"## {kind.capitalize()}", "", f"{note}: {KINDS[kind]}.", ""]
            page += [f"![{kind}]({sheet})", ""]
            lines: list[list[str]] = []
            html += [f"<h2>{kind.capitalize()}</h2><p>{note}: {KINDS[kind]}.<table>"]
            for number, (f, image) in enumerate(zip(listed, strips, strict=True), 1):
                texts = [f.image, f.label, f.about, f"{f.score:.3f}", f.action]
                lines.append([str(number), *texts])
                data = base64.b64encode(encode_image(image, ".jpg", QUALITY)).decode()
                html.append(
                    f"<tr><td>{number}<td><img alt='' src='data:image/jpeg;base64,{data}'>"
                    + "".join(f"<td>{escape(text)}" for text in texts)
                )
            html.append("</table>")
            header = ["", "image", "label", "about", "score", "action"]
            page.append(markdown.table(header, lines, left=len(header)))
        atomic_write(out / "report.md", "\n".join(page).encode())
        atomic_write(out / "report.html", "\n".join(html).encode())
