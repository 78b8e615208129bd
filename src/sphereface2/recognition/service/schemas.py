"""What the API takes and gives."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    FiniteFloat,
    StringConstraints,
    WithJsonSchema,
)

from sphereface2.recognition.gallery import checked_json

MAX_NAME = 200
MAX_METADATA = 4096  # bytes of JSON
MAX_PICTURES = 1_000  # whatever the server's own bound, which is told in plainer words
# Shown as nothing, yet part of how Persian words, Indic letters and some emoji are written.
_JOINERS = dict.fromkeys((0x200C, 0x200D))


def _picture(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    text = value.partition(",")[2] if value.startswith("data:") else value
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("not a picture in base64") from error


def _name(value: str) -> str:
    value = value.strip()
    seen = value.translate(_JOINERS)
    if not seen.isprintable() or "/" in seen or seen.strip() in ("", ".", ".."):
        raise ValueError("a name is printable text without a slash")
    return value


def _metadata(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError("metadata is a JSON object") from error
    if isinstance(value, dict):
        try:
            size = len(checked_json(value))
        except UnicodeEncodeError as error:
            raise ValueError("metadata is valid Unicode text") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError("metadata is a JSON object of plain values") from error
        if size > MAX_METADATA:
            raise ValueError(f"metadata is at most {MAX_METADATA} bytes of JSON")
    return value


Picture = Annotated[
    bytes, BeforeValidator(_picture), WithJsonSchema({"type": "string", "format": "byte"})
]
# The first bad one is told, so that the others need no looking at.
Pictures = Annotated[list[Picture], FailFast(), Field(min_length=1, max_length=MAX_PICTURES)]
Name = Annotated[str, StringConstraints(max_length=MAX_NAME), AfterValidator(_name)]
Value = str | bool | int | FiniteFloat | None
Metadata = Annotated[dict[str, Value], BeforeValidator(_metadata)]

_ALIGNED = "The pictures are aligned crops already: no face is looked for."
_FAR = "The false accept rate to decide at: one that the model is calibrated for."
_BASE64 = "/9j/4AAQSkZJRgABAQ…"


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _example(**values: Any) -> ConfigDict:
    return ConfigDict(extra="forbid", json_schema_extra={"example": values})


class EmbedRequest(_Request):
    """Pictures to embed."""

    model_config = _example(images=[_BASE64], aligned=False)
    images: Pictures = Field(description="JPEG, PNG or WebP; base64 in JSON.")
    aligned: bool = Field(False, description=_ALIGNED)


class VerifyRequest(_Request):
    """Two pictures to compare."""

    model_config = _example(a=_BASE64, b=_BASE64, far=0.001)
    a: Picture = Field(description="JPEG, PNG or WebP; base64 in JSON.")
    b: Picture = Field(description="The picture to compare it with.")
    aligned: bool = Field(False, description=_ALIGNED)
    far: float | None = Field(None, gt=0, lt=1, description=_FAR)
    crops: bool = Field(False, description="Send the aligned faces back.")


class SearchRequest(_Request):
    """A picture to look for in the gallery."""

    model_config = _example(image=_BASE64, k=5)
    image: Picture = Field(description="JPEG, PNG or WebP; base64 in JSON.")
    aligned: bool = Field(False, description=_ALIGNED)
    k: int = Field(5, ge=1, le=100, description="People to return.")
    fusion: Literal["max", "mean"] = Field(
        "max", description="A person's score: the best picture's, or the mean template's."
    )
    far: float | None = Field(None, gt=0, lt=1, description=_FAR)
    crops: bool = Field(False, description="Send the aligned face back.")


class EnrolRequest(_Request):
    """A person to add."""

    model_config = _example(name="Ada Lovelace", images=[_BASE64], metadata={"department": "R&D"})
    name: Name = Field(description="The person's name or number; unique.")
    images: Pictures = Field(description="JPEG, PNG or WebP; base64 in JSON.")
    metadata: Metadata = Field(default_factory=dict, description="Anything to keep with it.")
    aligned: bool = Field(False, description=_ALIGNED)


class PicturesRequest(EmbedRequest):
    """Further pictures of a person."""


class ReplaceRequest(_Request):
    """What a person is to be from now on."""

    model_config = _example(images=[_BASE64], metadata={"department": "R&D"})
    images: Pictures = Field(description="They take the place of all before.")
    metadata: Metadata = Field(default_factory=dict, description="It replaces the one before.")
    aligned: bool = Field(False, description=_ALIGNED)


class ChangeRequest(_Request):
    """What is to change about a person; the pictures stay."""

    model_config = _example(metadata={"department": "R&D"})
    metadata: Metadata = Field(description="It replaces the one before.")


class Face(BaseModel):
    """Where a face was found, in pixels of the upright picture."""

    box: list[float] = Field(description="x0, y0, x1, y1")
    score: float
    landmarks: list[list[float]] = Field(description="five (x, y)")


class Embedded(BaseModel):
    """Embeddings in the order of the pictures."""

    model: str = Field(description="The model's fingerprint: compare only what it is equal for.")
    embeddings: list[list[float]] = Field(description="Rows of length 1.")
    faces: list[Face | None]


class Verdict(BaseModel):
    """Whether two pictures show one person."""

    similarity: float = Field(description="The cosine, -1 to 1.")
    same: bool | None = Field(description="The decision; null if the model is not calibrated.")
    threshold: float | None
    far: float | None
    probability: float | None = Field(description="With even odds beforehand.")
    faces: list[Face | None]
    crops: list[str] | None = Field(None, description="data: addresses of PNG pictures.")
    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "similarity": 0.71,
                "same": True,
                "threshold": 0.42,
                "far": 0.001,
                "probability": 0.998,
                "faces": [None, None],
                "crops": None,
            }
        }
    )


class PersonOut(BaseModel):
    """Somebody in the gallery."""

    name: str
    pictures: int
    metadata: dict[str, Any]
    thumbnail: bool = Field(description="Whether a crop is kept.")


class Enrolled(PersonOut):
    """Somebody just changed, with the ids of the new pictures."""

    added: list[str]


class PeoplePage(BaseModel):
    """A page of the gallery, by name."""

    people: list[PersonOut]
    total: int
    next: int | None = Field(description="The offset of the next page.")


class MatchOut(BaseModel):
    """A candidate."""

    name: str
    similarity: float
    probability: float | None
    same: bool | None
    metadata: dict[str, Any]
    thumbnail: bool


class Found(BaseModel):
    """Candidates, the most similar first."""

    known: bool | None = Field(
        description="Whether the first is at or above the threshold; null without calibration."
    )
    threshold: float | None
    far: float | None
    matches: list[MatchOut]
    face: Face | None
    crop: str | None = None


class Operating(BaseModel):
    """A threshold."""

    far: float
    threshold: float


class Curve(BaseModel):
    """The calibrated probability of the same person at each similarity, with even odds."""

    similarity: list[float]
    probability: list[float]


class ModelOut(BaseModel):
    """What the server computes with."""

    model: str
    dim: int
    calibrated: bool
    far: float | None
    operating: list[Operating]
    curve: Curve | None
    people: int
    keeps_crops: bool


class ErrorOut(BaseModel):
    """What went wrong."""

    code: str
    error: str
    model_config = ConfigDict(
        json_schema_extra={
            "example": {"code": "no_face", "error": "picture 1: no face was found in it"}
        }
    )
