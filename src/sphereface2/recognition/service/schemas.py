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
MAX_IMAGES = 1_000  # whatever the server's own bound, whose message is plainer
# Shown as nothing, yet part of how Persian words, Indic letters and some emoji are written.
_JOINERS = dict.fromkeys((0x200C, 0x200D))


def _image(value: Any) -> Any:
    """Bytes as they are; text as base64: of either alphabet, with line breaks, padded or not."""
    if not isinstance(value, str):
        return value
    text = value.partition(",")[2] if value.startswith("data:") else value
    text = "".join(text.split()).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("it is not an image in base64") from error


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


_Bytes = Annotated[
    bytes, BeforeValidator(_image), WithJsonSchema({"type": "string", "format": "binary"})
]
Image = Annotated[_Bytes, Field(description="A JPEG, PNG or WebP file; base64 in JSON.")]
# Validation stops at the first bad one.
Images = Annotated[
    list[_Bytes],
    FailFast(),
    Field(
        min_length=1,
        max_length=MAX_IMAGES,
        description="JPEG, PNG or WebP files; base64 in JSON.",
    ),
]
Faces = Annotated[
    Literal["largest", "all"],
    Field(description="Take the largest face of an image, or every face."),
]
Fusion = Annotated[
    Literal["max", "mean"],
    Field(description="A person's score: of the nearest image, or of the template."),
]
Name = Annotated[str, StringConstraints(max_length=MAX_NAME), AfterValidator(_name)]
Value = str | bool | int | FiniteFloat | None
Metadata = Annotated[dict[str, Value], BeforeValidator(_metadata)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")
    aligned: bool = Field(False, description="The images are aligned crops: no face is looked for.")


class _Decided(_Request):
    far: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="The false accept rate to decide at: one that the model is calibrated for.",
    )
    faces: Faces = "largest"
    crops: bool = Field(False, description="Send the aligned faces back.")


class EmbedRequest(_Request):
    """Images to embed."""

    images: Images
    faces: Faces = "largest"


class VerifyRequest(_Decided):
    """Two images to compare."""

    a: Image
    b: Image


class VerifyPersonRequest(_Decided):
    """An image to compare with an enrolled person."""

    image: Image
    fusion: Fusion = "max"


class SearchRequest(_Decided):
    """An image to look for in the gallery."""

    image: Image
    k: int = Field(5, ge=1, le=100, description="People to return for each face.")
    fusion: Fusion = "max"


class ImagesRequest(_Request):
    """Images of a person."""

    images: Images
    faces: Literal["one", "largest"] = Field(
        "one", description="Refuse an image with several faces, or take the largest."
    )
    lookalikes: Literal["allow", "refuse"] = Field(
        "allow",
        description="Whether to refuse a face whose similarity with another enrolled person is at "
        "or above the threshold of the calibration's default FAR.",
    )


class ReplaceRequest(ImagesRequest):
    """What a person is to be from now on: everything before is replaced."""

    metadata: Metadata = Field(default_factory=dict, description="It replaces the one before.")


class EnrolRequest(ImagesRequest):
    """A person to enrol."""

    name: Name = Field(description="The person's name or number; unique.")
    metadata: Metadata = Field(default_factory=dict, description="Values to keep with the person.")


class ChangeRequest(BaseModel):
    """What is to change about a person; what is left out stays, and so do the images."""

    model_config = ConfigDict(extra="forbid")
    name: Name | None = Field(None, description="The person's new name.")
    metadata: Metadata | None = Field(None, description="It replaces the one before.")


class Face(BaseModel):
    """Where a face was found, in pixels of the upright image."""

    box: list[float] = Field(description="x0, y0, x1, y1")
    score: float
    landmarks: list[list[float]] = Field(description="five (x, y)")


class Embedding(BaseModel):
    """One face's embedding."""

    image: int = Field(description="Which image of the request, from 0.")
    face: Face | None = Field(description="Null for an aligned crop.")
    embedding: list[float] = Field(description="Of length 1.")


class Embedded(BaseModel):
    """Embeddings in the order of the images, the largest face of an image first."""

    model: str = Field(description="The model's fingerprint: compare only what it is equal for.")
    embeddings: list[Embedding]


class _Compared(BaseModel):
    similarity: float = Field(description="The cosine, -1 to 1.")
    same: bool | None = Field(
        description="Whether it is at or above the threshold; null if the model is not calibrated."
    )


class PairOut(_Compared):
    """A face of the first image and one of the second."""

    a: int = Field(description="Which of the faces of the first image, from 0.")
    b: int = Field(description="Which of the faces of the second image, from 0.")


class _Verdict(_Compared):
    threshold: float | None
    far: float | None
    probability: float | None = Field(description="With even odds beforehand.")
    warnings: list[str] = Field(description="What makes an image a poor one to decide by.")


class Verdict(_Verdict):
    """Whether two images show one person: the most similar pair of faces decides."""

    faces: list[list[Face | None]] = Field(description="The faces of each image.")
    pairs: list[PairOut] = Field(description="Every pair of faces, the most similar first.")
    crops: list[str] | None = Field(
        None, description="data: addresses of the most similar faces, as PNG."
    )
    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "similarity": 0.71,
                "same": True,
                "threshold": 0.42,
                "far": 0.001,
                "probability": 0.998,
                "faces": [[None], [None]],
                "pairs": [{"a": 0, "b": 0, "similarity": 0.71, "same": True}],
                "crops": None,
                "warnings": [],
            }
        }
    )


class PersonOut(BaseModel):
    """An enrolled person."""

    name: str
    images: int
    metadata: dict[str, Any]
    thumbnail: bool = Field(description="Whether a crop is kept.")


class PersonVerdict(_Verdict):
    """Whether an image shows an enrolled person: its most similar face decides."""

    person: PersonOut
    face: Face | None
    crop: str | None = Field(None, description="data: address of the face, as PNG.")


class Enrolled(PersonOut):
    """A person just changed."""

    added: list[str] = Field(description="Ids of the new images.")
    warnings: list[str] = Field(description="What makes an image a poor one to enrol.")


class ImageOut(BaseModel):
    """An enrolled image."""

    id: str = Field(description="Digits, more than a number of JavaScript holds.")
    source: str | None = Field(description="The file it was enrolled from, if that is known.")


class PersonImages(PersonOut):
    """An enrolled person with their images, oldest first."""

    enrolled: list[ImageOut]


class PeoplePage(BaseModel):
    """A page of the gallery, by name."""

    people: list[PersonOut]
    total: int
    next: int | None = Field(description="The offset of the next page.")


class MatchOut(_Compared):
    """A candidate."""

    name: str
    metadata: dict[str, Any]
    thumbnail: bool


class FaceSearch(BaseModel):
    """One face's candidates, the most similar first."""

    face: Face | None
    known: bool | None = Field(
        description="Whether the first is at or above the threshold; null without calibration."
    )
    matches: list[MatchOut]
    crop: str | None = Field(None, description="data: address of the face, as PNG.")


class Found(BaseModel):
    """Who the faces of an image may be, the largest face first."""

    threshold: float | None
    far: float | None
    people: int = Field(description="How many people the gallery holds.")
    fpir: float | None = Field(
        description="About this share of strangers would be named by mistake in a gallery of this "
        "size: 1 - (1 - far)^n with n comparisons, one with each image, or by fusion mean one with "
        "each person."
    )
    faces: list[FaceSearch]


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
    quality: Literal["refuse", "warn", "off"] = Field(
        description="What happens to a poor image at enrolment and verification."
    )


class ErrorOut(BaseModel):
    """What went wrong."""

    code: str
    error: str
    model_config = ConfigDict(
        json_schema_extra={
            "example": {"code": "no_face", "error": "no face was found in image 1: …"}
        }
    )
