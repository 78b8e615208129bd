"""What the service refuses, as JSON: a code for programs and one sentence for people."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response


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
