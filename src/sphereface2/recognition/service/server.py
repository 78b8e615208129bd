"""A server that binds safely, and stops without cutting anybody off."""

from __future__ import annotations

import asyncio
import signal
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
from sphereface2.recognition.service.keys import KeyFile
from sphereface2.recognition.service.security import LOOPBACK_NAMES, is_loopback
from sphereface2.recognition.service.state import Service

#: Requests and connections at once; beyond them uvicorn answers 503.
CONCURRENCY = 1_000


def check_binding(host: str, *, keys: bool, behind_proxy: bool, insecure: bool) -> None:
    """Refuse an address that others can reach and nothing protects.

    Raises:
        UserError: ``host`` is no loopback address and there are no keys, or neither a proxy stands
            before the service nor is it told to do without.
    """
    if is_loopback(host) and not behind_proxy:
        return
    if not keys:
        reached = "a proxy" if is_loopback(host) else f"--host {host}"
        raise UserError(
            f"other machines can reach the service through {reached}, so it needs keys: make one "
            "with sphereface2 keys add NAME --file keys.json and give --keys keys.json"
        )
    if not (behind_proxy or insecure):
        raise UserError(
            f"--host {host} can be reached from other machines, and the service itself has no TLS "
            "and no defence against slow clients: put a proxy before it (deploy/proxy has one) and "
            "give --behind-proxy, or give --insecure to do without"
        )


def serve(
    checkpoint: str,
    gallery: str,
    *,
    host: str,
    port: int,
    keys: Path | None,
    behind_proxy: bool,
    insecure: bool,
    allow_hosts: Sequence[str],
    allow_origins: Sequence[str],
    audit: Path | None,
    drain_seconds: float,
    device: str | None,
    settings: Settings,
) -> None:
    """Serve until SIGTERM or SIGINT; `commands.serve` describes the arguments and has defaults.

    On SIGTERM `/readyz` answers 503 at once while requests are still served for ``drain_seconds``,
    so that a load balancer can turn away; then no connection is accepted any more and what is in
    work is finished. SIGINT skips the wait.
    """
    check_binding(host, keys=keys is not None, behind_proxy=behind_proxy, insecure=insecure)
    key_file = KeyFile(keys) if keys is not None else None
    local = is_loopback(host) and not behind_proxy
    hosts = {*(LOOPBACK_NAMES if local else ()), *([host] if local else ()), *allow_hosts}
    embedder = FaceEmbedder.from_pretrained(checkpoint, device=device)
    if embedder.calibration is not None:
        embedder.calibration.check_for_crops()
    with Gallery.open(gallery, embedder=embedder, model=str(checkpoint)) as people:
        app = create_app(
            embedder,
            people,
            keys=key_file,
            hosts=hosts or None,
            origins=allow_origins,
            audit=Audit(audit),
            settings=settings,
        )
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=False,  # it would name people; the audit log and the metrics take its place
            server_header=False,
            proxy_headers=behind_proxy,  # else a client could choose the address it is limited by
            forwarded_allow_ips="*" if behind_proxy else None,
            ws="none",
            limit_concurrency=CONCURRENCY,
            timeout_keep_alive=65 if behind_proxy else 30,  # longer than the proxy's own
            timeout_graceful_shutdown=30,
        )
        server = DrainingServer(config, app.state.service, drain_seconds)
        server.run()
    if not server.started:
        sys.exit(1)  # uvicorn has said why


class DrainingServer(uvicorn.Server):
    """Turns unready first and closes its door a while later."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self._service = service
        self._drain_seconds = drain_seconds
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, *args: Any, **kwargs: Any) -> None:
        """As uvicorn's; remembers the loop."""
        self._loop = asyncio.get_running_loop()
        await super().startup(*args, **kwargs)

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
