"""The parts put together: an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import fastapi_offline
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from sphereface2.errors import UserError
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import Gallery
from sphereface2.recognition.service import people, routes
from sphereface2.recognition.service.audit import Audit
from sphereface2.recognition.service.keys import KeyFile
from sphereface2.recognition.service.metrics import Metrics
from sphereface2.recognition.service.observer import Observer
from sphereface2.recognition.service.recogniser import Recogniser
from sphereface2.recognition.service.security import (
    LOOPBACK_NAMES,
    Access,
    BodyLimit,
    Hosts,
    SameOrigin,
    is_loopback,
)
from sphereface2.recognition.service.settings import Settings
from sphereface2.recognition.service.state import Service
from sphereface2.version import __version__

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
        exception_handlers={HTTPException: _pass_on, RequestValidationError: _pass_on},
    )
    app.state.service = Service(recogniser, gallery, metrics, settings)
    access = [Depends(Access(keys, settings.rate).check)]
    for router in (people.router, routes.api, routes.operation):
        app.include_router(router, dependencies=access)
    app.include_router(routes.probes)
    _add_page(app)
    # What a request passes on its way in; the last one added is the outermost.
    hosts = list(settings.allow_host)
    if is_loopback(settings.host) and not settings.behind_proxy:
        hosts += [*LOOPBACK_NAMES, settings.host]
    app.add_middleware(BodyLimit, limit=int(settings.max_body_mb * 1e6))
    app.add_middleware(SameOrigin, origins=settings.allow_origin)
    app.add_middleware(Hosts, allowed=hosts or None)
    app.add_middleware(Observer, metrics=metrics, audit=audit)
    if settings.allow_origin:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.allow_origin),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    return app


def _add_page(app: FastAPI) -> None:
    def add(path: str, file: str) -> None:
        async def answer() -> Response:
            return FileResponse(_STATIC / file)

        app.add_api_route(path, answer, include_in_schema=False)

    add("/", "index.html")
    add("/docs", "docs.html")
    add("/favicon.ico", "icon.svg")
    swagger = Path(fastapi_offline.__file__).parent / "static"
    app.mount("/static/swagger", StaticFiles(directory=swagger), name="swagger")
    app.mount("/static", StaticFiles(directory=_STATIC), name="static")


async def _pass_on(_: Request, error: Exception) -> NoReturn:
    """In the place of FastAPI's own answers, for the Observer to answer."""
    raise error
