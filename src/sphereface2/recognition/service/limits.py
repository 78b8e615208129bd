"""How much and how often: bodies, requests at once, requests a second."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sphereface2.recognition.service.errors import Refusal

_DISCARD_SECONDS = 2.0


class Buckets:
    """A token bucket for each client: ``rate`` requests a second, ``burst`` of them at once.

    Memory is bounded: the client seen longest ago is forgotten first, which never gives anybody
    less than is due.
    """

    def __init__(
        self,
        rate: float,
        burst: float,
        *,
        clients: int = 10_000,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``rate`` 0 limits nothing; ``burst`` is one at least."""
        self._rate, self._clients, self._clock = rate, clients, clock
        self._burst = max(1.0, burst)  # a bucket that never held one would let nobody in
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str) -> float:
        """Take one token: 0 if there was one, else the seconds until there is."""
        if not self._rate:
            return 0.0
        now = self._clock()
        tokens, then = self._buckets.pop(client, (self._burst, now))
        tokens = min(self._burst, tokens + (now - then) * self._rate)
        missing = max(0.0, 1.0 - tokens)
        self._buckets[client] = (tokens if missing else tokens - 1.0, now)
        if len(self._buckets) > self._clients:
            self._buckets.popitem(last=False)
        return missing / self._rate


class LimitRequests:
    """ASGI: at most ``max_requests`` in work, bodies of at most ``max_body`` bytes, in time.

    The bytes that arrive are counted, whatever the headers say.
    """

    def __init__(
        self, app: ASGIApp, *, max_body: int, max_requests: int, body_seconds: float
    ) -> None:
        self.app = app
        self.max_body = max_body
        self.max_requests = max_requests
        self.body_seconds = body_seconds
        self._requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            await self.app(scope, receive, send)
            return
        if self._requests >= self.max_requests:
            raise Refusal(
                503, "overloaded", "the server is busy: try again in a second", retry_after=1
            )
        self._requests += 1
        try:
            await self._limited(scope, receive, send)
        finally:
            self._requests -= 1

    async def _limited(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        too_large = Refusal(
            413,
            "body_too_large",
            f"the request is larger than {self.max_body / 1e6:g} MB: send smaller or fewer "
            "pictures",
        )
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:19]) > self.max_body:
            if b"expect" not in headers:
                await self._discard(receive)
            raise too_large
        received, deadline, finished = 0, time.monotonic() + self.body_seconds, False

        async def counted() -> Message:
            nonlocal received, finished
            if finished:
                return await receive()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    message = await receive()
            except TimeoutError:
                raise Refusal(
                    408,
                    "body_too_slow",
                    f"the request did not arrive within {self.body_seconds:g} seconds",
                ) from None
            received += len(message.get("body", b""))
            finished = not message.get("more_body", False)
            if received > self.max_body:
                if not finished:
                    await self._discard(receive)
                raise too_large
            return message

        await self.app(scope, counted, send)

    async def _discard(self, receive: Receive) -> None:
        """Read on for a moment: a client that is still sending would not see the answer."""
        left = self.max_body
        try:
            async with asyncio.timeout(_DISCARD_SECONDS):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        return
        except TimeoutError:
            return
