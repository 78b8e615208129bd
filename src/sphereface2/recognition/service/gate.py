"""Who may come in: the right host, no foreign web page, a key, not too often."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sphereface2.recognition.service.errors import Refusal
from sphereface2.recognition.service.keys import KeyFile
from sphereface2.recognition.service.limits import Buckets

#: Answered without a key: they tell nothing about people or use.
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/openapi.json", "/favicon.ico"})
OPEN_PREFIX = "/static/"
_PROBES = frozenset({"/healthz", "/readyz"})
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Caller:
    """Who asks: the network address and, where keys are used, the key's id."""

    address: str
    key: str | None = None


class Gate:
    """ASGI: lets a request through, or raises a ``Refusal``.

    Args:
        hosts: names that the Host header may give, or None for any. A server without keys trusts
            what reaches it on the loopback interface; a web page elsewhere can reach it too, by
            letting its own name point to 127.0.0.1, and is given away by that name.
        keys: the keys admitted, or None where none is needed.
        buckets: the rates of the API.
        page: the rates of what is answered without a key: a page is a dozen files at once.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str] | None,
        keys: KeyFile | None,
        buckets: Buckets,
        page: Buckets,
    ) -> None:
        self.app = app
        self.hosts = None if hosts is None else {name.lower() for name in hosts}
        self.keys = keys
        self.buckets = buckets
        self.page = page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope)
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers, path = Headers(scope=scope), scope["path"]
        address = scope["client"][0] if scope.get("client") else "unknown"
        scope["state"]["caller"] = Caller(address)
        if path in _PROBES:  # an orchestrator asks by whatever address it knows
            return
        self._check_host(headers)
        _check_origin(headers, navigation=path == "/" and scope["method"] in ("GET", "HEAD"))
        if path in OPEN_PATHS or path.startswith(OPEN_PREFIX):
            _check_rate(self.page, address)
            return
        if self.keys is None:
            _check_rate(self.buckets, address)
            return
        key = self.keys.check(_token(headers))
        if key is None:
            _check_rate(self.buckets, f"refused {address}")
            raise Refusal(
                401, "unauthorised", "a valid key is needed: send it as Authorization: Bearer KEY"
            )
        scope["state"]["caller"] = Caller(address, key.id)
        _check_rate(self.buckets, f"key {key.id}")

    def _check_host(self, headers: Headers) -> None:
        given = headers.getlist("host")
        if len(given) != 1 or not (name := _host(given[0])):
            raise Refusal(400, "bad_host", "the request needs one valid Host header")
        if self.hosts is not None and name not in self.hosts:
            raise Refusal(
                421,
                "unknown_host",
                "this server does not answer to that host name: start it with --allow-host NAME "
                "to add one",
            )


def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(value: str) -> str:
    """The name in a Host header, without its port; empty if it is not one."""
    try:
        parts = urlsplit(f"//{value}")
        _ = parts.port
    except ValueError:
        return ""
    return (parts.hostname or "") if parts.netloc == value and "@" not in value else ""


def _check_rate(buckets: Buckets, client: str) -> None:
    if wait := buckets.take(client):
        raise Refusal(429, "too_often", "too many requests: slow down", retry_after=wait)


def _check_origin(headers: Headers, *, navigation: bool) -> None:
    """Refuse what a page of another site made a browser send; programs send none of these."""
    origin, site = headers.get("origin"), headers.get("sec-fetch-site", "none")
    foreign = origin is not None and _netloc(origin) != headers["host"].lower()
    linked = navigation and headers.get("sec-fetch-mode") == "navigate"
    if foreign or (site not in ("same-origin", "none") and not linked):
        raise Refusal(403, "cross_origin", "requests from another site's pages are refused")


def _netloc(origin: str) -> str:
    """HOST[:PORT] of an origin; empty for ``null`` and for what is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _token(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")
