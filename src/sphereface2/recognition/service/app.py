"""The parts put together: an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import fastapi_offline
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from sphereface2.errors import UserError
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import (
    Gallery,
    GalleryUnavailableError,
    PersonExistsError,
    UnknownPersonError,
)
from sphereface2.recognition.service import people, routes
from sphereface2.recognition.service.audit import Audit
from sphereface2.recognition.service.bodies import sentence
from sphereface2.recognition.service.errors import Refusal
from sphereface2.recognition.service.keys import KeyFile
from sphereface2.recognition.service.metrics import Metrics
from sphereface2.recognition.service.observer import Observer
from sphereface2.recognition.service.recogniser import Recogniser
from sphereface2.recognition.service.security import (
    LOOPBACK_NAMES,
    Access,
    BodyLimit,
    HeadAsGet,
    Hosts,
    SameOrigin,
    is_loopback,
)
from sphereface2.recognition.service.settings import Settings
from sphereface2.recognition.service.state import Service
from sphereface2.version import __version__

_GALLERY_ERRORS = (
    (GalleryUnavailableError, 503, "gallery_unavailable"),
    (UnknownPersonError, 404, "no_such_person"),
    (PersonExistsError, 409, "exists"),
)
_STATUSES = {
    404: ("not_found", "no route has this address: see /openapi.json"),
    405: ("method_not_allowed", "this address does not take this method: see /openapi.json"),
}
_STATIC = Path(__file__).parent / "static"


def check_far(embedder: FaceEmbedder, settings: Settings) -> None:
    """UserError unless the model has a threshold for the FAR that the settings name."""
    if settings.far is not None:
        if embedder.calibration is None:
            raise UserError("--far needs a calibrated model: run sphereface2 calibrate on it first")
        embedder.calibration.threshold(settings.far)


def create_app(
    embedder: FaceEmbedder, gallery: Gallery, settings: Settings | None = None
) -> FastAPI:
    """The service as an ASGI application; its ``state.service`` can be told to drain.

    Args:
        embedder: the model.
        gallery: of that model; closed with the application.
        settings: all but ``port``, ``insecure``, ``drain_seconds`` and ``device``, which are the
            server's.

    Raises:
        UserError: the calibration has no threshold for ``settings.far``, or the file of keys or
            the audit log cannot be used.
    """
    settings = settings or Settings()
    check_far(embedder, settings)
    keys = None if settings.keys is None else KeyFile(settings.keys)
    audit, metrics = Audit(settings.audit), Metrics()
    recogniser = Recogniser(embedder, metrics, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        recogniser.warm_up()
        gallery.warm_up()
        yield
        recogniser.close()
        gallery.close()
        audit.close()

    app = FastAPI(
        title="sphereface2",
        version=__version__,
        description="Face verification and search.",
        docs_url=None,  # FastAPI's pages load scripts from another host; see _add_page
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = Service(recogniser, gallery, metrics, settings)
    access = [Depends(Access(keys, settings.rate))]
    for router in (people.router, routes.api, routes.operation):
        app.include_router(router, dependencies=access)
    app.include_router(routes.probes)
    _add_page(app)
    _add_errors(app)
    _add_layers(app, settings, metrics, audit)
    return app


def _add_layers(app: FastAPI, settings: Settings, metrics: Metrics, audit: Audit) -> None:
    """What a request passes on its way in; the last one added is the outermost."""
    hosts = list(settings.allow_host)
    if is_loopback(settings.host) and not settings.behind_proxy:
        hosts += [*LOOPBACK_NAMES, settings.host]
    app.add_middleware(HeadAsGet)
    app.add_middleware(BodyLimit, limit=settings.max_body)
    app.add_middleware(SameOrigin, origins=settings.allow_origin)
    app.add_middleware(Hosts, allowed_hosts=hosts or None, www_redirect=False)
    app.add_middleware(Observer, metrics=metrics, audit=audit)
    if settings.allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origin),
            allow_methods=["*"],
            allow_headers=["*"],
        )


def _add_page(app: FastAPI) -> None:
    revalidate = {"Cache-Control": "no-cache"}

    def add(path: str, file: str) -> None:
        async def answer() -> Response:
            return FileResponse(_STATIC / file, headers=revalidate)

        app.add_api_route(path, answer, include_in_schema=False)

    add("/", "index.html")
    add("/docs", "docs.html")
    add("/favicon.ico", "icon.svg")

    class Static(StaticFiles):
        def file_response(self, *args: object, **kwargs: object) -> Response:
            response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
            response.headers.update(revalidate)
            return response

    swagger = Path(fastapi_offline.__file__).parent / "static"
    app.mount("/static/swagger", Static(directory=swagger), name="swagger")
    app.mount("/static", Static(directory=_STATIC), name="static")


def _add_errors(app: FastAPI) -> None:
    def answer(request: Request, refusal: Refusal) -> Response:
        request.state.code = refusal.code
        return refusal.response()

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        if isinstance(error, Refusal):
            return answer(request, error)
        status = error.status_code
        refusal = Refusal(status, *_STATUSES.get(status, ("bad", str(error.detail))))
        refusal.headers = error.headers
        return answer(request, refusal)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, Refusal(422, "invalid", sentence(error.errors())))

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        for kind, status, code in _GALLERY_ERRORS:
            if isinstance(error, kind):
                wait = 1 if status == 503 else None
                return answer(request, Refusal(status, code, str(error), retry_after=wait))
        return answer(request, Refusal(422, "invalid", str(error)))
