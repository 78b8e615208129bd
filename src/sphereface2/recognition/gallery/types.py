"""What a gallery takes and gives: people, images, matches; the checks every engine shares."""

from __future__ import annotations

import hashlib
import json
import math
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sphereface2.errors import UserError, counted
from sphereface2.files import one_name

NAME_LENGTH = 200
METADATA_BYTES = 16_384
SOURCE_BYTES = 8_192
IMAGES_PER_PERSON = 1_000
MOST_K = 1_000
FUSIONS = ("max", "mean")


class NoGalleryError(UserError):
    """The gallery does not exist and ``create`` is False."""


class GalleryUnavailableError(UserError):
    """The database does not answer or cannot do what was asked; later it may."""


class PersonExistsError(UserError):
    """Somebody of the name is in the gallery already."""


class UnknownPersonError(UserError):
    """Nobody of the name is in the gallery."""


@dataclass(frozen=True)
class Person:
    """Somebody in a gallery: name, number of images, metadata, whether a crop is kept."""

    name: str
    images: int
    metadata: dict[str, Any]
    has_crop: bool = False


@dataclass(frozen=True)
class Match:
    """One candidate of a search: who, at which cosine (-1 to 1), with metadata."""

    person: str
    score: float
    metadata: dict[str, Any]
    has_crop: bool = False


@dataclass(frozen=True)
class Image:
    """An enrolled image: its id and where it came from, if that was said."""

    id: int
    source: str | None


@dataclass(frozen=True)
class Enrolment:
    """What `Gallery.add_many` takes.

    Attributes:
        person: the name.
        embeddings: (k, d) or (d,), brought to length 1.
        metadata: JSON-able; replaces what the person had. None leaves it.
        sources: where each image came from, for re-embedding.
        crops: an encoded crop of each image, to show; None for an image without.
    """

    person: str
    embeddings: np.ndarray
    metadata: dict[str, Any] | None = None
    sources: Sequence[str | None] | None = None
    crops: Sequence[bytes | None] | None = None

    def check(self, dim: int) -> Enrolment:
        """The same with a clean name, unit vectors (k, d) and lists of k sources and crops.

        Raises:
            UserError: a gallery of embeddings of ``dim`` numbers refuses it.
        """
        name = person_name(self.person)
        vectors = unit(self.embeddings, dim)
        if not len(vectors):
            raise UserError(f"{name!r} has no image; give at least one")
        check_count(name, len(vectors))
        none: list[Any] = [None] * len(vectors)
        listed: list[list[Any]] = []
        for what, given, kind in (("sources", self.sources, str), ("crops", self.crops, bytes)):
            if isinstance(given, str | bytes):  # which would be a list of its letters
                raise UserError(f"{what} of {name!r} must be a list, got {given!r:.80}")
            listed.append(none if given is None else list(given))
            for one in listed[-1]:
                if not isinstance(one, kind | None):
                    raise UserError(
                        f"{what} of {name!r} must be {kind.__name__} or None, got {one!r:.80}"
                    )
            if len(listed[-1]) != len(vectors):
                raise UserError(
                    f"{name!r} has {counted(len(vectors), 'image')} and {len(listed[-1])} {what}"
                )
        sources, crops = listed
        for source in filter(None, sources):
            if (size := _bytes(source, f"a source of {name!r}")) > SOURCE_BYTES:
                raise UserError(
                    f"a source of {name!r} has {size} bytes; {SOURCE_BYTES} is the maximum"
                )
        metadata = self.metadata  # as it is now, whatever its owner makes of it later
        metadata = None if metadata is None else json.loads(metadata_json(name, metadata))
        return Enrolment(name, vectors, metadata, sources, crops)

    def part(self, rows: Sequence[int]) -> Enrolment:
        """The same with these images alone, of what `check` gave."""
        sources = self.sources and [self.sources[i] for i in rows]
        crops = self.crops and [self.crops[i] for i in rows]
        return replace(self, embeddings=self.embeddings[list(rows)], sources=sources, crops=crops)

    @property
    def key(self) -> int:
        """The person's key, of a clean name."""
        return person_key(self.person)


def check_count(name: str, images: int) -> None:
    """UserError if a person would have too many images."""
    if images > IMAGES_PER_PERSON:
        raise UserError(
            f"{name!r} would have {images} images; {IMAGES_PER_PERSON} is the maximum: leave "
            "some out"
        )


def person_name(name: str) -> str:
    """A name as galleries know it, `one_name`.

    Raises:
        UserError: it is empty, longer than 200 characters, or no text that a database stores.
    """
    clean = one_name(name) if isinstance(name, str) else ""
    if not 1 <= len(clean) <= NAME_LENGTH:
        raise UserError(
            f"a person's name has 1 to {NAME_LENGTH} characters, not only spaces; got "
            f"{str(name)[:40]!r}"
        )
    _bytes(clean, f"the name {clean!r}")
    return clean


def person_key(name: str) -> int:
    """The primary key of a clean name: 63 bits of its sha256.

    A function of the name, so that a name is unique in a database that is distributed by key.
    """
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def image_ids(count: int) -> list[int]:
    """New image ids, rising with time: 41 bits of milliseconds, 22 bits that begin at random.

    No sequence hands them out, so any number of servers may.
    """
    start = ((time.time_ns() // 1_000_000 - 1_577_836_800_000) << 22) + secrets.randbits(22)
    return list(range(start, start + count))


def checked_json(value: object) -> str:
    """JSON in ASCII that any reader can take back.

    Raises:
        ValueError, TypeError, RecursionError: a NaN, an infinity, half of a surrogate pair (which
            JSON can escape and UTF-8 cannot hold), or what JSON does not know.
    """
    json.dumps(value, ensure_ascii=False).encode()
    return json.dumps(value, allow_nan=False)


def metadata_of(text: str) -> dict[str, Any]:
    """The metadata that a user gave as ``--metadata``; UserError if it is no JSON object."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"--metadata takes a JSON object, such as '{{\"since\": 2024}}', not {text[:40]!r}"
        )
    return value


def metadata_json(name: str, metadata: dict[str, Any]) -> str:
    """The JSON text of a person's metadata; UserError if it is not JSON or longer than 16 KB."""
    if not isinstance(metadata, dict):
        raise UserError(f"the metadata of {name!r} is not a JSON object; give names with values")
    try:
        text = checked_json(metadata)
    except UnicodeEncodeError as error:
        raise UserError(f"the metadata of {name!r} is not valid Unicode") from error
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"the metadata of {name!r} is not JSON: {error}") from error
    if len(text) > METADATA_BYTES:
        raise UserError(
            f"the metadata of {name!r} has {len(text):,} bytes; {METADATA_BYTES:,} is the maximum"
        )
    return text


def unit(embeddings: np.ndarray, dim: int) -> np.ndarray:
    """Embeddings (n, d) or (d,) brought to length 1: float32 (n, d); UserError if they cannot."""
    try:
        vectors = np.atleast_2d(np.asarray(embeddings, np.float64))
    except (RuntimeError, TypeError, ValueError) as error:  # the first two: a tensor's
        raise UserError(
            "the embeddings are no array of numbers that NumPy takes as it is; give an array, of a "
            f"PyTorch tensor tensor.detach().cpu(): {str(error).splitlines()[0]}"
        ) from error
    if vectors.ndim != 2 or (vectors.size and vectors.shape[1] != dim):
        raise UserError(
            f"the embeddings have the shape {np.shape(embeddings)}; the gallery takes (n, {dim})"
        )
    if not vectors.size:
        return np.zeros((0, dim), np.float32)
    squares = np.einsum("nd,nd->n", vectors, vectors)
    if not all(0 < square < math.inf for square in squares.tolist()):
        raise UserError("an embedding is zero, infinite or not a number; its image is unusable")
    return (vectors / np.sqrt(squares)[:, None]).astype(np.float32)


class Packed(bytes):
    """An embedding in pgvector's binary format; as text it would take a hundred times as long."""


def packed(vector: np.ndarray, storage: str) -> Packed:
    """A vector (d,) in pgvector's binary format."""
    from pgvector import HalfVector, Vector

    return Packed((HalfVector if storage == "float16" else Vector)(vector).to_binary())


def template(vectors: np.ndarray) -> np.ndarray:
    """The normalised mean of unit vectors (k, d); the first of them if they cancel out."""
    total = vectors.sum(0, dtype=np.float64)
    length = float(np.linalg.norm(total))
    return np.asarray(total / length if length > 1e-6 else vectors[0], np.float32)


def decide(matches: Sequence[Match], threshold: float) -> Match | None:
    """The best match if it reaches the threshold, else None: an unknown person."""
    return matches[0] if matches and matches[0].score >= threshold else None


def _bytes(text: str, what: str) -> int:
    """The length of a text in UTF-8; UserError if no database stores it."""
    if "\0" in text:
        raise UserError(f"{what} contains the character NUL; leave it out")
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise UserError(
            f"{what} is not valid Unicode: set the locale to UTF-8 (LC_ALL=C.UTF-8) if it was typed"
            " in another, or write it anew"
        ) from error
