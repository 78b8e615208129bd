"""A request's body as one of the models of ``schemas``: a form, or JSON.

Nothing touches the disk: images stay in memory until the answer is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from sphereface2.recognition.service.errors import Refusal, sentence
from sphereface2.recognition.service.schemas import MAX_METADATA

_FIELDS = 32
_TEXT = 64 * 1024
_PARTS = 2 * MAX_METADATA  # commas and colons of JSON: base64 has none, metadata few
Model = TypeVar("Model", bound=BaseModel)


async def read(request: Request, model: type[Model]) -> Model:
    """Read and check the body.

    Raises:
        Refusal: 415 for another content type, 400 for a broken body, 422 for wrong values.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if request.query_params:
        # Passed over in silence, a threshold asked for there would not be the one decided by.
        raise Refusal(422, "invalid", "options must be in the form or the JSON, not in the address")
    try:
        body = await request.body()
    except ClientDisconnect:
        raise Refusal(400, "hung_up", "the connection ended before the request did") from None
    try:
        if kind == "application/json":
            # Made to keep the validator busy: pydantic reports on every part.
            if body.count(b",") + body.count(b":") > _PARTS:
                raise Refusal(422, "invalid", "the JSON has more parts than any request needs")
            # One C call that can be long, and the loop has other clients to serve.
            return await asyncio.to_thread(model.model_validate_json, body)
        if kind == "multipart/form-data":
            return model.model_validate(await _form(request, body, model))
    except ValidationError as error:
        found = error.errors(include_context=False, include_input=False, include_url=False)
        raise Refusal(422, "invalid", sentence(found)) from None
    raise Refusal(415, "content_type", "send multipart/form-data, or application/json with base64")


def documentation(model: type[BaseModel]) -> dict[str, Any]:
    """The request body of ``model`` for OpenAPI: a form."""
    content = {"multipart/form-data": {"schema": model.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


class _InMemory(MultiPartParser):
    spool_max_size = 1 << 40


async def _form(request: Request, body: bytes, model: type[BaseModel]) -> dict[str, Any]:
    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    try:
        parser = _InMemory(
            request.headers, stream(), max_files=_FIELDS, max_fields=_FIELDS, max_part_size=_TEXT
        )
        form = await parser.parse()
    except MultiPartException as error:
        raise Refusal(400, "bad_form", f"the form cannot be read: {error.message}") from None
    values: dict[str, Any] = {}
    for name, value in form.multi_items():
        content = await value.read() if isinstance(value, UploadFile) else value
        if name in model.model_fields and get_origin(model.model_fields[name].annotation) is list:
            values.setdefault(name, []).append(content)
        elif name in values:
            raise Refusal(422, "invalid", f"{name[:100]}: given twice")
        else:
            values[name] = content
    await form.close()
    return values
