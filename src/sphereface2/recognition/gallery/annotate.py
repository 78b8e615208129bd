"""Photographs with a box around each face and the name that a search gave it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from sphereface2.data.folder import check_outside
from sphereface2.errors import UserError
from sphereface2.extras import require
from sphereface2.files import atomic_write, check_folder, writing
from sphereface2.images import encode_image, read_image

_FILES = (".jpg", ".jpeg", ".png")
_KNOWN, _UNKNOWN = (40, 130, 60), (120, 120, 120)


def places(out: Path, probes: Sequence[Path], images: Sequence[Path]) -> dict[str, Path]:
    """Where the annotated copy of each image goes: ``out`` itself, or a file of that folder.

    Args:
        out: file or folder that is to be written.
        probes: images and folders that were given.
        images: those of them all.

    Raises:
        UserError: one file for several images; a place that cannot be written, is a photograph, or
            where the copies would be found among the photographs; or a missing package.
    """
    require("annotated images", "matplotlib")  # whose font has more scripts than Pillow's
    if out.suffix.lower() in _FILES and not out.is_dir():
        if len(images) > 1:
            raise UserError(f"--annotate {out} is one file for {len(images)} images: give a folder")
        if out.exists() and images[0].exists() and out.samefile(images[0]):
            raise UserError(f"--annotate would replace the photograph {out}: give another place")
        check_folder(out.parent)
        found = {str(images[0]): out}
    else:
        check_folder(out)
        seen: Counter[str] = Counter()
        found = {}
        for image in images:
            seen[key := image.stem.casefold()] += 1  # one name to many file systems
            end = "" if seen[key] == 1 else f"_{seen[key]}"
            found[str(image)] = out / f"{image.stem}{end}.jpg"
    for folder in {probe if probe.is_dir() else probe.parent for probe in probes}:
        if folder in probes or folder.resolve() == out.resolve():
            check_outside(out, folder)
    return found


def write(reports: Sequence[dict[str, Any]], where: dict[str, Path]) -> list[Path]:
    """Write the copies of the images that were answered; UserError if one cannot be written."""
    answered = [report for report in reports if "error" not in report]
    written = []
    for image, found in groupby(answered, lambda report: report["image"]):
        pixels = annotated(read_image(Path(image)), [(one["box"], *_text(one)) for one in found])
        path = where[image]
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, encode_image(pixels, path.suffix.lower(), 92))
        written.append(path)
    return written


def _text(report: dict[str, Any]) -> tuple[str, bool]:
    """What is written beside a face, and whether the person is known."""
    best = report["matches"][0] if report["matches"] else None
    if best is None or (report["person"] is None and report["threshold"] is not None):
        return "unknown", False
    sure = report["person"] is not None
    return f"{best['person']} {best['score']:.2f}" + ("" if sure else "?"), sure


def annotated(pixels: np.ndarray, faces: Sequence[tuple[Sequence[float], str, bool]]) -> np.ndarray:
    """A copy, uint8 RGB (H, W, 3), with each face's box (left, top, right, bottom) and text.

    Args:
        pixels: uint8 RGB (H, W, 3).
        faces: box, text, and whether it is drawn as somebody known.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    height, width = pixels.shape[:2]
    line = max(2, round(max(height, width) / 500))
    font = ImageFont.truetype(
        Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", max(12, 7 * line)
    )
    for box, text, known in faces:
        colour = _KNOWN if known else _UNKNOWN
        draw.rectangle(tuple(box), outline=colour, width=line)
        left, top, right, bottom = font.getbbox(text)
        wide, high = right - left + 4 * line, bottom - top + 4 * line
        # Under the face, and within the image however near to its edge the face is.
        x = min(max(0, box[0]), max(0, width - wide))
        y = min(max(0, box[3]), max(0, height - high))
        draw.rectangle((x, y, x + wide, y + high), fill=colour)
        draw.text((x + 2 * line - left, y + 2 * line - top), text, fill="white", font=font)
    return np.asarray(image)
