"""Who may ask: known hosts, no page of another site, a key, not too often; small enough bodies."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Collection, Sequence
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from limits import RateLimitItemPerSecond
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sphereface2.recognition.service.errors import Refusal
from sphereface2.recognition.service.keys import KeyFile

PROBES = frozenset({"/healthz", "/readyz"})
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_WINDOW_SECONDS = 10


_BEARER = HTTPBearer(auto_error=False, description="An API key.")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False, description="An API key.")


class Access:
    """Checks the key and the rate: `check` is a FastAPI dependency of every route of the API.

    Args:
        keys: the keys admitted, or None where none is needed.
        rate: requests a second of a key, or of an address where no keys are used, on average over
            ten seconds; 0 limits nothing.
    """

    def __init__(self, keys: KeyFile | None, rate: float) -> None:
        self.keys = keys
        self._limit = None
        if rate:
            seconds = max(_WINDOW_SECONDS, round(1 / rate))
            self._limit = RateLimitItemPerSecond(max(1, round(rate * seconds)), seconds)
        self._limiter = MovingWindowRateLimiter(MemoryStorage())

    async def check(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
        header: Annotated[str | None, Depends(_HEADER)],
    ) -> None:
        """Name the key in ``request.state.key``; a Refusal, 401 without one, 429 if too often."""
        client = request.state.client
        if self.keys is not None:
            key = self.keys.check(bearer.credentials.strip() if bearer else header or "")
            if key is None:
                self._check_rate(f"refused {client}")
                raise Refusal(
                    401,
                    "unauthorised",
                    "a valid key is needed: send it as Authorization: Bearer KEY",
                )
            request.state.key, client = key.id, f"key {key.id}"
        self._check_rate(client)

    def _check_rate(self, client: str) -> None:
        if self._limit is not None and not self._limiter.hit(self._limit, client):
            wait = self._limiter.get_window_stats(self._limit, client).reset_time - time.time()
            raise Refusal(429, "too_often", "too many requests: slow down", retry_after=wait)


class Hosts:
    """ASGI: refuses names that the Host header may not give; an orchestrator's probes may give any.

    A server without keys trusts what reaches it on the loopback interface. A web page elsewhere can
    reach it too, by letting its own name point to 127.0.0.1, and is given away by that name.
    """

    def __init__(self, app: ASGIApp, *, allowed: Sequence[str] | None) -> None:
        self.app = app
        self._judge = TrustedHostMiddleware(self._admit, allowed, www_redirect=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBES:
            await self._judge(scope, receive, self._refuse)
        await self.app(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What the judge passes on to."""

    async def _refuse(self, message: Message) -> None:
        """In the place of the judge's own answer, which is no JSON."""
        raise Refusal(
            400,
            "bad_host",
            "the Host header gives a name that is not this server's: start it with --allow-host "
            "to admit one",
        )


class SameOrigin:
    """ASGI: refuses what a page of another site made a browser send, except of ``origins``."""

    def __init__(self, app: ASGIApp, *, origins: Collection[str] = ()) -> None:
        self.app = app
        self.origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PROBES:
            self._check(Headers(scope=scope), scope)
        await self.app(scope, receive, send)

    def _check(self, headers: Headers, scope: Scope) -> None:
        origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
        if origin is not None and origin in self.origins:
            return
        own = headers.get("host", "").lower()
        foreign = origin is not None and origin.lower().partition("://")[2] != own
        navigation = scope["path"] in ("/", "/docs") and scope["method"] in ("GET", "HEAD")
        linked = navigation and headers.get("sec-fetch-mode") == "navigate"
        if foreign or (site not in ("same-origin", "none") and not linked):
            raise Refusal(
                403,
                "cross_origin",
                "requests from another site's pages are refused: start the server with "
                "--allow-origin to admit one",
            )


class BodyLimit:
    """ASGI: bodies of at most ``limit`` bytes, counted as they arrive."""

    def __init__(self, app: ASGIApp, *, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        received = 0
        too_large = Refusal(
            413,
            "body_too_large",
            f"the request is larger than {self.limit / 1e6:g} MB: send smaller or fewer images",
        )
        declared = Headers(scope=scope).get("content-length", "0")
        if not declared.isdigit() or int(declared[:19]) > self.limit:
            raise too_large

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.limit:
                raise too_large
            return message

        await self.app(scope, counted, send)


def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
