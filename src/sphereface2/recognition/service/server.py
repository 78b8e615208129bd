"""A server that binds safely, and stops without cutting anybody off."""

from __future__ import annotations

import asyncio
import signal
import ssl
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from sphereface2.errors import UserError
from sphereface2.recognition.face_embedder import FaceEmbedder
from sphereface2.recognition.gallery import Gallery
from sphereface2.recognition.service.app import Settings, create_app
from sphereface2.recognition.service.audit import Audit
from sphereface2.recognition.service.connections import (
    BACKLOG,
    Connections,
    protocol,
    room,
)
from sphereface2.recognition.service.gate import LOOPBACK_NAMES, is_loopback
from sphereface2.recognition.service.keys import KeyFile
from sphereface2.recognition.service.routes import Service


def serve(
    checkpoint: str,
    gallery: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    keys: Path | None = None,
    allow_hosts: Sequence[str] = (),
    keep_crops: bool = False,
    audit: Path | None = None,
    tls_cert: Path | None = None,
    tls_key: Path | None = None,
    drain_seconds: float = 5.0,
    device: str | None = None,
    settings: Settings | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT.

    On SIGTERM `/readyz` answers 503 at once while requests are still served for ``drain_seconds``,
    so that a load balancer can turn away; then no connection is accepted any more and what is in
    work is finished. SIGINT skips the wait.

    Args:
        checkpoint: a model folder, a run or a name on the hub.
        gallery: a file, created if it does not exist, or the address of a PostgreSQL server.
        host: the address to bind.
        port: the port; 0 takes a free one, which the log names.
        keys: file of the keys that are admitted; needed unless ``host`` is a loopback address.
        allow_hosts: further names that the Host header may give. Bound to loopback, its names
            are always among them; otherwise without any, every name is taken.
        keep_crops: keep the crops of enrolled people in the gallery.
        audit: file of the audit log; by default it goes to standard output.
        tls_cert: certificate chain to serve HTTPS with.
        tls_key: its key.
        drain_seconds: see above.
        device: cpu, cuda, mps; by default the best there is.
        settings: the limits.

    Raises:
        UserError: no key file where one is needed, a foreign gallery, a bad path.
    """
    local = is_loopback(host)
    if keys is None and not local:
        raise UserError(
            f"{host} can be reached from other machines, so the service needs keys: make one with "
            "sphereface2 keys add NAME --file keys.json and give --keys keys.json, or bind to "
            "127.0.0.1"
        )
    if (tls_cert is None) != (tls_key is None):
        raise UserError("HTTPS needs both --tls-cert and --tls-key")
    tls = None if tls_cert is None or tls_key is None else _tls(tls_cert, tls_key)
    key_file = KeyFile(keys) if keys is not None else None
    hosts = {*(LOOPBACK_NAMES if local else ()), *([host] if local else ()), *allow_hosts}
    embedder = FaceEmbedder.from_pretrained(checkpoint, device=device)
    people = Gallery.open(gallery, embedder=embedder, model=checkpoint)
    with people:  # let go of, whatever the start stumbles over
        app = create_app(
            embedder,
            people,
            keys=key_file,
            hosts=hosts or None,
            audit=Audit(audit),
            keep_crops=keep_crops,
            settings=settings,
        )
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=False,  # it would name people; the audit log and the metrics take its place
            server_header=False,
            proxy_headers=False,  # an address that a client may choose is none to limit by
            ws="none",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=30,
            http=protocol(Connections(room()), tls),
            backlog=BACKLOG,
        )
        server = DrainingServer(config, app.state.service, drain_seconds, tls)
        server.run()
    if not server.started:
        sys.exit(1)  # uvicorn has said why


def _tls(cert: Path, key: Path) -> ssl.SSLContext:
    for file in (cert, key):
        if not file.is_file():
            raise UserError(f"{file} is no file")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(cert, key)
    except OSError as error:  # ssl.SSLError is one
        raise UserError(
            f"{cert} and {key} are no certificate chain and its key, in PEM: {error}"
        ) from error
    return context


class DrainingServer(uvicorn.Server):
    """Turns unready first and closes its door a while later."""

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        drain_seconds: float,
        tls: ssl.SSLContext | None,
    ) -> None:
        super().__init__(config)
        self._tls = tls
        self._service = service
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, *args: Any, **kwargs: Any) -> None:
        """As uvicorn's; remembers the loop."""
        self._loop = asyncio.get_running_loop()
        await super().startup(*args, **kwargs)

    def _log_started_message(self, *args: Any) -> None:
        # The protocol does TLS itself, behind uvicorn's back, and the address says https all the
        # same. What listens does so already and does not look at the setting any more.
        self.config.ssl = self._tls
        super()._log_started_message(*args)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first SIGTERM begins to drain; any other signal is uvicorn's to handle."""
        if sig != signal.SIGTERM or self._service.draining or self._loop is None:
            self._service.draining = True
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        self._loop.call_soon_threadsafe(
            lambda: asyncio.get_running_loop().call_later(self._drain_seconds, self._close)
        )

    def _close(self) -> None:
        self.should_exit = True
