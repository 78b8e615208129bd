"""What the service refuses, as JSON: a code for programs and one sentence for people."""

from __future__ import annotations

from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from sphereface2.errors import UserError
from sphereface2.recognition.gallery import (
    GalleryUnavailableError,
    PersonExistsError,
    UnknownPersonError,
)

_USER_ERRORS = (
    (GalleryUnavailableError, 503, "gallery_unavailable"),
    (UnknownPersonError, 404, "no_such_person"),
    (PersonExistsError, 409, "exists"),
    (UserError, 422, "invalid"),
)
_STATUSES = {
    404: ("not_found", "no route has this address: see /openapi.json"),
    405: ("method_not_allowed", "this address does not take this method: see /openapi.json"),
}


class Refusal(HTTPException):
    """A request that is not served: status, code, sentence.

    An ``HTTPException``, because those are what FastAPI lets through from the reading of a body.
    """

    def __init__(
        self, status: int, code: str, sentence: str, *, retry_after: float | None = None
    ) -> None:
        headers = None if retry_after is None else {"Retry-After": str(max(1, round(retry_after)))}
        super().__init__(status, sentence, headers)
        self.code = code

    def response(self) -> Response:
        """The JSON answer; what the sentence quotes may be no text that can be sent."""
        sentence = str(self.detail).encode("utf-8", "replace").decode()
        content = {"code": self.code, "error": sentence}
        return JSONResponse(content, status_code=self.status_code, headers=self.headers)


def refusal(error: Exception) -> Refusal | None:
    """What is answered to an error; None where it is the server's own failure."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, HTTPException):
        status = error.status_code
        found = Refusal(status, *_STATUSES.get(status, ("bad", str(error.detail))))
        found.headers = error.headers
        return found
    if isinstance(error, RequestValidationError):
        return Refusal(422, "invalid", sentence(error.errors()))
    for kind, status, code in _USER_ERRORS:
        if isinstance(error, kind):
            return Refusal(status, code, str(error), retry_after=1 if status == 503 else None)
    return None


def sentence(errors: Any) -> str:
    """The first of pydantic's complaints."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"])[:100]
    text = first["msg"].removeprefix("Value error, ")
    return f"{place}: {text}" if place else text
