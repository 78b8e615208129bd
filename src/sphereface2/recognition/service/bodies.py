"""A request's body as one of the models of ``schemas``: JSON, a form, or the bare picture.

Nothing touches the disk: pictures stay in memory until the answer is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeVar, get_origin

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from sphereface2.recognition.service.errors import Refusal
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
    try:
        body = await request.body()
    except ClientDisconnect:
        raise Refusal(400, "hung_up", "the connection ended before the request did") from None
    if request.query_params and kind in ("application/json", "multipart/form-data"):
        # Passed over in silence, a threshold asked for there would not be the one decided by.
        raise Refusal(
            422,
            "invalid",
            "put the options into the form or the JSON: the address may hold them only beside a "
            "picture that is the whole body",
        )
    try:
        if kind == "application/json":
            # One C call that can be long, and the loop has other clients to serve.
            return await asyncio.to_thread(model.model_validate_json, _bounded(body))
        if kind == "multipart/form-data":
            return model.model_validate(await _form(request, body, model))
        bare = _bare_field(model)
        if bare and (kind.startswith("image/") or kind == "application/octet-stream"):
            value = [body] if _is_list(model, bare) else body
            return model.model_validate({**request.query_params, bare: value})
    except ValidationError as error:
        told = error.errors(include_context=False, include_input=False, include_url=False)
        raise Refusal(422, "invalid", sentence(told)) from None
    raise Refusal(
        415,
        "content_type",
        "send multipart/form-data or application/json"
        + (", or a picture as image/jpeg, image/png or image/webp" if bare else ""),
    )


def documentation(model: type[BaseModel]) -> dict[str, Any]:
    """The request body of ``model`` for OpenAPI, in every form that `read` takes."""
    schema = model.model_json_schema()
    content = {
        "multipart/form-data": {"schema": _binary(schema)},
        "application/json": {"schema": schema},
    }
    if _bare_field(model):
        content["image/*"] = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": content}}


def sentence(errors: Any) -> str:
    """The first of pydantic's complaints."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"])[:100]
    text = first["msg"].removeprefix("Value error, ")
    return f"{place}: {text}" if place else text


def _bounded(body: bytes) -> bytes:
    """The body, if it is not made to keep the validator busy: pydantic reports on every part."""
    if body.count(b",") + body.count(b":") > _PARTS:
        raise Refusal(422, "invalid", "the JSON has more parts than any request needs")
    return body


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
        if name in model.model_fields and _is_list(model, name):
            values.setdefault(name, []).append(content)
        elif name in values:
            raise Refusal(422, "invalid", f"{name[:100]}: given twice")
        else:
            values[name] = content
    await form.close()
    return values


def _is_list(model: type[BaseModel], name: str) -> bool:
    return get_origin(model.model_fields[name].annotation) is list


def _bare_field(model: type[BaseModel]) -> str | None:
    """The field that a bare picture fills: there is one where nothing else is required."""
    required = [name for name, field in model.model_fields.items() if field.is_required()]
    if len(required) != 1:
        return None
    (name,) = required
    return name if _is_list(model, name) or model.model_fields[name].annotation is bytes else None


def _binary(schema: Any) -> Any:
    """The schema of a form: pictures as files, no example in base64."""
    if isinstance(schema, dict):
        plain = {key: _binary(value) for key, value in schema.items() if key != "example"}
        return {**plain, "format": "binary"} if plain.get("format") == "byte" else plain
    return [_binary(value) for value in schema] if isinstance(schema, list) else schema
