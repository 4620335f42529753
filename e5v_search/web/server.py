"""A service with its sockets, from start to stop."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from e5v_search.collection import Collection
from e5v_search.config import ModelChoice, collection_path
from e5v_search.errors import UsageError
from e5v_search.web.app import create_app
from e5v_search.web.connections import CONNECTIONS, BoundedConnection
from e5v_search.web.local import listening
from e5v_search.web.safety import LOCAL, Access, is_local
from e5v_search.web.service import Service

PORT = 8765
_TRIED = 10  # ports, when none is named
_LEAST_TOKEN = 16  # characters
_IDLE_SECONDS = 75  # longer than a person looks at a photo
_GRACE_SECONDS = 5  # for what is under way when the service is told to stop


class Server:
    """The service of one collection, with its address taken. `run` serves until it is told to stop."""

    def __init__(
        self,
        place: str | os.PathLike[str],
        choice: ModelChoice,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        token: str | None = None,
        names: Iterable[str] = (),
        allow_index: bool = False,
    ) -> None:
        """`names` are further ones by which it is reached; port 0 is any free one, None the usual or the next that is free.

        Raises CollectionNotFound, UsageError for an address that cannot be taken, or that others can reach without a token.
        """
        if token is not None and len(token) < _LEAST_TOKEN:
            raise UsageError(f"the token has {len(token)} characters; {_LEAST_TOKEN} are the least")
        if token is None and not is_local(host):
            raise UsageError(
                f"at {host} others can reach the collection: give a --token, or set E5V_TOKEN "
                '(python -c "import secrets; print(secrets.token_urlsafe())" makes one)'
            )
        with Collection.open(place, create=False):  # refused here rather than in a thread
            pass
        self._socket = _bound(host, port)
        address, number = self._socket.getsockname()[:2]
        self.address = f"http://{f'[{address}]' if ':' in address else address}:{number}/"
        self.service = Service(collection_path(place), choice, allow_index)
        access = Access(frozenset({*LOCAL, host.lower(), *map(str.lower, names), *_own_names(token)}), token)
        config = uvicorn.Config(
            create_app(self.service, access, lambda: self._uvicorn.should_exit),
            log_level="warning",
            access_log=False,
            server_header=False,
            http=BoundedConnection,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=_IDLE_SECONDS,
            timeout_graceful_shutdown=_GRACE_SECONDS,
            lifespan="off",
            ws="none",
        )
        self._uvicorn = _Uvicorn(config)

    def run(self, up: Callable[[], None] = lambda: None) -> bool:
        """Until `stop`, SIGTERM or Ctrl-C; `up` is called as soon as whoever comes is answered.

        False: a thread is still loading a model, which cannot be stopped; the process should then end by `os._exit`.
        """
        with _heeding(self._told):
            self.service.start()
            try:
                asyncio.run(self._run(up))
            finally:
                self._socket.close()
                ended = self.service.stop()
        return ended

    async def _run(self, up: Callable[[], None]) -> None:
        async with listening(self.service):
            up()
            await self._uvicorn.serve(sockets=[self._socket])

    def stop(self) -> None:
        """From any thread; what is under way is finished."""
        self._uvicorn.should_exit = True

    def _told(self, signum: int, frame: FrameType | None) -> None:
        self._uvicorn.force_exit = self._uvicorn.should_exit  # the second time: whatever is under way
        self.stop()


class _Uvicorn(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are heeded by `Server.run`, from its first moment to its last."""
        yield


@contextmanager
def _heeding(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `handler`. An exception raised by them instead might leave the lock of a module held that the
    main thread is importing just then, for which the engine's thread would wait for ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, previous in before.items():
            signal.signal(signum, previous)


def _bound(host: str, port: int | None) -> socket.socket:
    wanted = [port] if port is not None else range(PORT, PORT + _TRIED)
    problem: OSError | None = None
    for number in wanted:
        try:
            family, kind, proto, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
            found = socket.socket(family, kind, proto)
        except OSError as error:
            raise UsageError(f"{host} is no address of this machine: {error.strerror or error}") from error
        try:
            if os.name == "posix":
                found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(2048)
            return found
        except OSError as error:
            found.close()
            problem = error
    assert problem is not None
    raise UsageError(
        f"{host}, port {', '.join(map(str, wanted))}: {problem.strerror or problem}; choose another with --port"
    ) from problem


def _own_names(token: str | None) -> set[str]:
    """How others call this machine; only with a token may they."""
    if token is None:
        return set()
    name = socket.gethostname().lower()
    return {name, f"{name.partition('.')[0]}.local"}
