"""Connections: how many may be open, how long one may take to ask and to take what was answered.

A client that sends its request's head a byte a minute, or never begins a TLS handshake, is not seen
by any layer above: no request of it exists yet.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, cast

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0  # for a TLS handshake, and for the line and headers of a request
ANSWER_SECONDS = 60.0  # for what was answered to be taken by the client
CONNECTIONS = 1_000
OF_ONE_ADDRESS = 250  # a proxy is one address for all of its clients
#: Connections that are taken from the system at once, and that wait there to be.
BACKLOG = 256
#: Files that the process has open for itself, and connections not yet counted or let go of.
_OTHER_FILES = 2 * BACKLOG + 256


class Connections:
    """Those that are open.

    When one too many comes, the oldest that has no request in work makes room: of the same address
    if that has its share, else of all. So whoever holds connections open in order to fill the
    server up keeps nobody out, and idle ones are what is lost.
    """

    def __init__(self, most: int = CONNECTIONS, of_one_address: int = OF_ONE_ADDRESS) -> None:
        self._most = most
        self._of_one_address = min(of_one_address, max(1, most // 2))
        self._open: dict[Connection, str] = {}  # with its address, in the order they came
        self._addresses: dict[str, dict[Connection, None]] = {}

    def enter(self, connection: Connection, address: str) -> bool:
        """Count one in; False if all there is room for are at work."""
        same = self._addresses.get(address, {})
        if len(same) >= self._of_one_address:
            idle = next((one for one in same if not one.working), None)
        elif len(self._open) >= self._most:
            idle = next((one for one in self._open if not one.working), None)
        else:
            idle = connection
        if idle is None:
            return False
        if idle is not connection:
            self.leave(idle)
            idle.cut()
        self._open[connection] = address
        self._addresses.setdefault(address, {})[connection] = None
        return True

    def leave(self, connection: Connection) -> None:
        """Count one out; may be told twice."""
        address = self._open.pop(connection, None)
        if address is not None:
            same = self._addresses[address]
            del same[connection]
            if not same:
                del self._addresses[address]


class Connection(H11Protocol):
    """One connection: uvicorn's, with deadlines, and counted before its TLS handshake."""

    open: Connections
    tls: ssl.SSLContext | None

    _line: asyncio.Transport  # what `transport` is too, unless there is TLS
    _deadline: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _handshake: asyncio.Task[None] | None = None
    _early = b""
    _lost = False

    @property
    def working(self) -> bool:
        """Whether a request is in work: its head has come and its answer has not all gone."""
        return self.cycle is not None and not self.cycle.response_complete

    def cut(self) -> None:
        """End it at once; what the client has not taken is lost."""
        self._line.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count it and begin, with TLS if there is any."""
        self._line = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        address = str(peer[0]) if isinstance(peer, tuple) and peer else "unknown"
        if not self.open.enter(self, address):
            self.cut()
        elif self.tls is None:
            self._begin(self._line)
        else:
            self._line.pause_reading()  # the handshake is not for the HTTP parser
            self._handshake = self.loop.create_task(self._secure(self.tls))

    async def _secure(self, tls: ssl.SSLContext) -> None:
        try:
            transport = await self.loop.start_tls(
                self._line, self, tls, server_side=True, ssl_handshake_timeout=HEAD_SECONDS
            )
        except OSError:  # no TLS, not in time, or gone: nobody is there to be told
            transport = None
        if transport is None or self._lost:
            self.open.leave(self)
        else:
            self._begin(cast(asyncio.Transport, transport))

    def _begin(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._expect_head()
        if self._early:
            self.data_received(self._early)
            self._early = b""

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it out."""
        self._lost = True
        self.open.leave(self)
        for timer in (self._deadline, self._stalled):
            if timer is not None:
                timer.cancel()
        if self.transport is not None:  # else it was refused
            super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A request's head has to be complete in time; uvicorn's own clock is for silence alone."""
        if self.transport is None:  # a request may come along with the end of the handshake
            self._early += data
            return
        super().data_received(data)
        if not self.working:
            self._expect_head()
        elif self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _expect_head(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_SECONDS, self._late)

    def _late(self) -> None:
        self._deadline = None
        if not self.working:
            self.cut()

    def pause_writing(self) -> None:
        """The client does not take the answer as fast as it is sent."""
        super().pause_writing()
        self._stalled = self.loop.call_later(ANSWER_SECONDS, self.cut)

    def resume_writing(self) -> None:
        """It has taken most of it."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None


def protocol(connections: Connections, tls: ssl.SSLContext | None) -> type[Connection]:
    """The class that uvicorn makes one of for each connection."""
    shared: dict[str, Any] = {"open": connections, "tls": tls}
    return type("SharedConnection", (Connection,), shared)


def room() -> int:
    """How many connections the files that the process may open leave room for.

    Raises the soft limit where the system lets it: a common default is 1,024.
    """
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return CONNECTIONS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + _OTHER_FILES
    unlimited = resource.RLIM_INFINITY
    if soft != unlimited and soft < wanted:
        raised = wanted if hard == unlimited else min(wanted, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
        except (OSError, ValueError):
            pass
    return CONNECTIONS if soft == unlimited else max(16, min(CONNECTIONS, soft - _OTHER_FILES))
