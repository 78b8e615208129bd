"""People to search among: enrolled once, found by any later image of theirs, strangers told."""

from sphereface2.recognition.gallery.gallery import Gallery
from sphereface2.recognition.gallery.types import (
    Enrolment,
    GalleryUnavailableError,
    Image,
    Match,
    NoGalleryError,
    Person,
    PersonExistsError,
    UnknownPersonError,
    checked_json,
    decide,
    person_name,
)

__all__ = [
    "Enrolment",
    "Gallery",
    "GalleryUnavailableError",
    "Image",
    "Match",
    "NoGalleryError",
    "Person",
    "PersonExistsError",
    "UnknownPersonError",
    "checked_json",
    "decide",
    "person_name",
]
