"""The parts put together: an ASGI application."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException

from sphereface2.errors import UserError
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import Gallery
from sphereface2.recognition.service import routes
from sphereface2.recognition.service.audit import Audit
from sphereface2.recognition.service.bodies import sentence
from sphereface2.recognition.service.errors import Refusal
from sphereface2.recognition.service.gate import Gate
from sphereface2.recognition.service.keys import KeyFile
from sphereface2.recognition.service.limits import Buckets, LimitRequests
from sphereface2.recognition.service.metrics import Metrics
from sphereface2.recognition.service.observer import Observer
from sphereface2.recognition.service.people import People
from sphereface2.recognition.service.recogniser import Recogniser
from sphereface2.version import __version__

_STATIC = Path(__file__).parent / "static"
# Files of the page, a second and at once, of one address: some dozen people who open it together.
_PAGE_RATE, _PAGE_BURST = 50.0, 200.0


@dataclass(frozen=True)
class Settings:
    """The service's limits.

    Attributes:
        max_body: bytes of a request.
        max_pixels: of a picture, told from its header before it is decoded.
        max_pictures: in a request.
        max_batch: faces in one forward pass.
        max_wait: seconds a face waits for others to share its forward pass.
        max_queue: pictures in work; requests beyond are refused with 503.
        max_requests: requests in work, the reading of their bodies included.
        body_seconds: for the whole body to arrive.
        rate: requests a second of one key, or of one address where no keys are used; 0: any.
        burst: requests of one client at once. The page's own files are counted apart.
        threads: that decode pictures and find faces.
        far: false accept rate to decide at; None: the calibration's default.
    """

    max_body: int = 20_000_000
    max_pixels: int = 50_000_000
    max_pictures: int = 16
    max_batch: int = 32
    max_wait: float = 0.005
    max_queue: int = 128
    max_requests: int = 256
    body_seconds: float = 30.0
    rate: float = 50.0
    burst: float = 100.0
    threads: int = os.cpu_count() or 1
    far: float | None = None

    def __post_init__(self) -> None:
        if self.max_queue < self.max_pictures:
            raise UserError(
                f"--max-queue {self.max_queue} is less than the {self.max_pictures} pictures that "
                "one request may bring"
            )


def create_app(
    embedder: FaceEmbedder,
    gallery: Gallery,
    *,
    keys: KeyFile | None = None,
    hosts: Collection[str] | None = None,
    audit: Audit | None = None,
    keep_crops: bool = False,
    settings: Settings | None = None,
) -> FastAPI:
    """The service as an ASGI application; its ``state.service`` can be told to drain.

    Args:
        embedder: the model.
        gallery: of that model; closed with the application.
        keys: who is admitted; None: anybody who reaches it.
        hosts: names that the Host header may give; None: any.
        audit: where the audit log goes; by default to standard output.
        keep_crops: whether the crops of enrolled people are kept in the gallery.
        settings: the limits.

    Raises:
        UserError: the calibration has no threshold for ``settings.far``.
    """
    settings = settings or Settings()
    audit = audit or Audit()
    metrics = Metrics()
    if settings.far is not None:
        if embedder.calibration is None:
            raise UserError("--far needs a calibrated model: run sphereface2 calibrate on it first")
        embedder.calibration.threshold(settings.far)
    recogniser = Recogniser(
        embedder,
        metrics,
        max_batch=settings.max_batch,
        max_wait=settings.max_wait,
        max_queue=settings.max_queue,
        max_pixels=settings.max_pixels,
        threads=settings.threads,
    )
    people = People(gallery, keep_crops)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        recogniser.warm_up()
        people.start()
        yield
        recogniser.close()
        people.close()
        audit.close()

    app = FastAPI(
        title="sphereface2",
        version=__version__,
        description="Face verification and search.",
        docs_url=None,  # FastAPI's pages load scripts from another host
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = routes.Service(
        recogniser, people, metrics, max_pictures=settings.max_pictures, far=settings.far
    )
    routes.include(app)
    _add_page(app)
    _add_errors(app)
    # The last one added is the outermost.
    app.add_middleware(
        LimitRequests,
        max_body=settings.max_body,
        max_requests=settings.max_requests,
        body_seconds=settings.body_seconds,
    )
    app.add_middleware(
        Gate,
        hosts=hosts,
        keys=keys,
        buckets=Buckets(settings.rate, settings.burst),
        page=Buckets(_PAGE_RATE if settings.rate else 0.0, _PAGE_BURST),
    )
    app.add_middleware(Observer, metrics=metrics, audit=audit)
    return app


def _add_page(app: FastAPI) -> None:
    revalidate = {"Cache-Control": "no-cache"}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(_STATIC / "index.html", headers=revalidate)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return FileResponse(_STATIC / "icon.svg", headers=revalidate)

    class Static(StaticFiles):
        def file_response(self, *args: object, **kwargs: object) -> Response:
            response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
            response.headers.update(revalidate)
            return response

    app.mount("/static", Static(directory=_STATIC), name="static")


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, Refusal):
            code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "bad")
            known = {404: "there is nothing at this address", 405: "this method has no use here"}
            headers = error.headers
            error = Refusal(
                error.status_code, code, known.get(error.status_code, str(error.detail))
            )
            error.headers = headers
        request.state.code = error.code
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        request.state.code = "invalid"
        return Refusal(422, "invalid", sentence(error.errors())).response()
