"""Faces of a user's images, and the model that embeds them, for the gallery's commands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from sphereface2.align import Face
from sphereface2.align.unaligned import warn_if_unaligned
from sphereface2.backbones.bundle import run_of
from sphereface2.data.folder import images_below
from sphereface2.errors import UserError
from sphereface2.images import read_image
from sphereface2.recognition.box import chosen
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery.gallery import Gallery

#: Which faces of an image are taken; ``one`` refuses an image of several.
Faces = Literal["one", "largest", "all"]
#: A face of an image: the crop, and where it was found if the image was no crop already.
Seen = tuple[np.ndarray, Face | None]


def look(embedder: FaceEmbedder, path: Path, aligned: bool, faces: Faces) -> Sequence[Seen]:
    """The faces of an image, the largest and most central first; UserError if it shows none."""
    if aligned:
        return [(read_image(path), None)]
    if faces == "all":
        return embedder.crops(path)
    crop, face = embedder.crop(path)
    if face.others and faces == "one":
        raise UserError(
            f"{path} shows {face.others + 1} faces: crop it to one, or give --faces largest or "
            "--faces all"
        )
    return [(crop, face)]


def files_of(given: Path) -> list[Path]:
    """An image, or all those in a folder and below it."""
    if not given.is_dir():
        return [given]
    if not (found := [given / name for name in images_below(given).images]):
        raise UserError(f"{given} holds no images")
    return found


def warn_of_photographs(files: Sequence[Path]) -> None:
    """Warn where images that are said to be crops look like whole photographs."""
    warn_if_unaligned(
        "the images given" if len(files) > 1 else str(files[0]),
        files.__getitem__,
        range(len(files)),
        remedy="leave out --aligned",
    )


def load_embedder(model: str | None, gallery: Gallery | None, device: str | None) -> FaceEmbedder:
    """The model named, the gallery's own or the package's; UserError if it is not the gallery's."""
    if model is None and gallery is not None:
        model = gallery.model
    embedder = FaceEmbedder.from_pretrained(chosen(model), device=device)
    if gallery is not None:
        gallery.check(embedder.fingerprint, embedder.embedding_dim)
    return embedder


def lasting(model: str) -> str:
    """A model as a gallery remembers it: a path from the root, or a hub id."""
    return str(path.resolve()) if (path := run_of(model)).exists() else model
