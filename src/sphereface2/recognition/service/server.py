"""A server that binds safely, and stops without cutting anybody off."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
from types import FrameType

import uvicorn

from sphereface2 import console
from sphereface2.align import Aligner
from sphereface2.errors import UserError, counted
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import Gallery
from sphereface2.recognition.gallery.faces import lasting
from sphereface2.recognition.service.app import check_far, create_app
from sphereface2.recognition.service.keys import KeyFile
from sphereface2.recognition.service.security import is_loopback
from sphereface2.recognition.service.settings import Settings
from sphereface2.recognition.service.state import Service

#: Requests and connections at once; beyond them uvicorn answers 503.
CONCURRENCY = 1_000


def check_binding(settings: Settings) -> None:
    """UserError for keys that cannot be read, or an address open to others and unprotected."""
    if settings.keys is not None:
        KeyFile(settings.keys)
    host, loopback = settings.host, is_loopback(settings.host)
    if loopback and not settings.behind_proxy:
        return
    if settings.keys is None:
        raise UserError(
            f"other machines can reach the service through {'a proxy' if loopback else host!r}, so "
            "it needs keys: make one with sphereface2 keys add NAME --file keys.json and give "
            "--keys keys.json"
        )
    if not (settings.behind_proxy or settings.insecure):
        raise UserError(
            f"--host {host} can be reached from other machines, and the service itself has no TLS "
            "and no defence against slow clients: put a proxy before it (deploy/proxy has one) and "
            "give --behind-proxy, or give --insecure to do without"
        )


def check_address(host: str, port: int) -> None:
    """UserError where the system does not let the service have its address and port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(address)
    except OSError as error:
        raise UserError(
            f"the service cannot be reached at {host} port {port}: {error.strerror or error}; give "
            "another --host or --port"
        ) from error


def run(checkpoint: str, gallery: str, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    On SIGTERM `/readyz` answers 503 at once while requests are still served for
    ``drain_seconds``, so that a load balancer can turn away; then no connection is accepted any
    more and what is in work is finished. SIGINT skips the wait.
    """
    check_binding(settings)
    check_address(settings.host, settings.port)
    embedder = FaceEmbedder.from_pretrained(checkpoint, device=settings.device)
    if settings.rotations:
        embedder.aligner = Aligner(rotations=True)
    if embedder.calibration is not None:
        embedder.calibration.check_for_crops()
    check_far(embedder, settings)
    with Gallery.open(gallery, embedder=embedder, model=lasting(checkpoint)) as people:
        sizes = people.stats()
        console.note(
            f"gallery {people.uri}: {counted(sizes['people'], 'person')}, "
            f"{counted(sizes['images'], 'image')}"
        )
        app = create_app(embedder, people, settings)
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            access_log=False,  # it would name people; the audit log and the metrics take its place
            server_header=False,
            # Without a proxy a client could choose the address it is limited by.
            proxy_headers=settings.behind_proxy,
            forwarded_allow_ips="*" if settings.behind_proxy else None,
            ws="none",
            limit_concurrency=CONCURRENCY,
            timeout_keep_alive=65 if settings.behind_proxy else 30,  # longer than the proxy's own
            timeout_graceful_shutdown=30,
        )
        server = DrainingServer(config, app.state.service, settings.drain_seconds)
        server.run()
    if not server.started:
        sys.exit(1)  # uvicorn has said why


class DrainingServer(uvicorn.Server):
    """Turns unready first and closes its door a while later."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_seconds = drain_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; what was loaded until then is left to no collection of garbage.

        It lasts as long as the process, and looking it through again and again took an eighth of
        the event loop's time, in pauses that all requests in work waited for.
        """
        await super().startup(sockets)
        gc.collect()
        gc.freeze()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first SIGTERM begins to drain; any other signal is uvicorn's to handle."""
        first, self._service.draining = not self._service.draining, True
        if sig == signal.SIGTERM and first and self.started:
            loop = asyncio.get_running_loop()
            loop.call_soon_threadsafe(loop.call_later, self._drain_seconds, self._close)
        else:
            super().handle_exit(sig, frame)

    def _close(self) -> None:
        self.should_exit = True
