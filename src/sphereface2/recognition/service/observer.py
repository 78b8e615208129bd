"""The outermost layer: every request gets an answer, headers, a metric and its line of audit."""

from __future__ import annotations

import logging
import re
import secrets
import time

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sphereface2.recognition.service.audit import Audit
from sphereface2.recognition.service.errors import Refusal, refusal
from sphereface2.recognition.service.metrics import Metrics

log = logging.getLogger("sphereface2.service")

_CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _CSP,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_PAGES = frozenset({"/", "/docs", "/favicon.ico"})  # and what is below /static/
#: Not audited: they say nothing about people.
_UNAUDITED = _PAGES | {"/healthz", "/readyz", "/metrics", "/openapi.json"}
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9-]{1,64}", re.ASCII)


class Observer:
    """ASGI: wraps all the rest."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, audit: Audit) -> None:
        self.app = app
        self.metrics = metrics
        self.audit = audit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # what begins and ends the application; no route is another
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        state = scope.setdefault("state", {})
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        state["client"] = scope["client"][0] if scope.get("client") else "unknown"
        state["request"] = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        page = scope["path"] in _PAGES or scope["path"].startswith("/static/")
        # HEAD works wherever GET does; the server leaves out the body.
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope

        async def decorated(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers["X-Request-Id"] = state["request"]
                headers["Cache-Control"] = "no-cache" if page else "no-store"
            await send(message)

        try:
            await self.app(inner, receive, decorated)
        except Exception as error:
            answer = refusal(error)
            if answer is None:
                log.exception("request %s failed", state["request"])
                answer = Refusal(
                    500, "internal", f"the server failed: see its log for {state['request']}"
                )
            state["code"] = answer.code
            if status:  # the answer has begun: the connection has to be cut
                raise
            await answer.response()(scope, receive, decorated)
        finally:
            self._record(inner, scope["method"], status, time.monotonic() - started)

    def _record(self, scope: Scope, method: str, status: int, seconds: float) -> None:
        state, path = scope["state"], scope["path"]
        route = getattr(scope.get("route"), "path_format", "other")
        known = method if method in _METHODS else "other"
        self.metrics.requests.labels(route, known, str(status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        if code := state.get("code"):
            self.metrics.refused.labels(code).inc()
        if path in _UNAUDITED or path.startswith("/static/"):
            return
        done = 0 < status < 400  # 0: the client went, or the server, before there was an answer
        self.audit.write(
            request=state["request"],
            client=state["client"],
            key=state.get("key"),
            action=state.get("action", "redirect" if done else "refused"),
            person=state.get("person"),
            images=state.get("images"),
            status=status,
            outcome=state.get("code") or (state.get("outcome", "ok") if done else "failed"),
        )
