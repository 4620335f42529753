"""Connections as uvicorn reads them, of which one address gets no more than its share, and none may dawdle."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from e5v_search.web.safety import error_body

CONNECTIONS = 400  # in all: each may hold two files open
SHARE = 200  # of one address
HEAD_SECONDS = 10.0  # until the head of a request is whole


class BoundedConnection(H11Protocol):
    """What comes too slowly is hung up on; what is too much is answered 429 at once, whatever it asks."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        theirs = [each for each in self.connections if isinstance(each, BoundedConnection) and each.address == self.address]
        if len(theirs) > SHARE:
            body = error_body("too many connections from this address", "ServiceBusy")
            head = f"HTTP/1.1 429 Too Many Requests\r\nContent-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n"
            transport.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
            transport.close()
            return
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.trailing_data[0]:  # the next request came along with this one
            self._watch()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._late is None:  # another request has begun
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    @property
    def address(self) -> str | None:
        return self.client[0] if self.client is not None else None

    def _await_head(self) -> None:
        self._late = asyncio.get_running_loop().call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
