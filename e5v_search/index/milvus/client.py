"""The one place where pymilvus is imported, and where what it raises becomes an error of ours."""

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import cache
from importlib import util
from typing import Any, TypeVar

from e5v_search.errors import MissingPackage, StoreError
from e5v_search.index.milvus.place import Place

TOKEN = "MILVUS_TOKEN"  # in the environment: USER:PASSWORD, or an API key
CONNECTING = 10.0  # seconds, for all that does not change anything
PATIENCE = 60.0  # seconds for which rows are sent again when the server is away, as while it starts anew
LOADING = 600.0  # seconds for which a server may bring a collection into its memory, and build its index
_NOT_LOADED = 101
_LONGEST_WAIT = 5.0  # seconds between two attempts
# else gRPC itself waits up to two minutes, for all connections of the process, after a server has been away
_CHANNEL = {"grpc.use_local_subchannel_pool": 1, "grpc.max_reconnect_backoff_ms": 1000}
T = TypeVar("T")


class Client:
    """A connection that is made anew when the server has been away."""

    def __init__(self, place: Place, collection: str) -> None:
        self._place, self._collection = place, collection
        self.milvus = library(local=not place.uri.startswith("http"))
        self._connecting = threading.Lock()
        self._client: Any = None

    def call(self, ask: Callable[[Any], T], patience: float | None = None) -> T:
        """What `ask` answers, given a client; it is asked again while the server is away.

        Raises StoreError with the place, and what to do.
        """
        import grpc

        until, wait = time.monotonic() + (CONNECTING if patience is None else patience), 0.1
        loaded = True
        while True:
            client = self._client
            try:
                if client is None:
                    client = self._connected()
                if not loaded:
                    client.load_collection(self._collection, timeout=LOADING)
                return ask(client)
            except (self.milvus.MilvusException, grpc.RpcError, ValueError) as error:
                closed = isinstance(error, ValueError)  # as another thread may have found the server away
                if closed and "closed channel" not in str(error):
                    raise
                code = error.code() if isinstance(error, grpc.RpcError) else getattr(error, "code", None)
                away = closed or code in (grpc.StatusCode.UNAVAILABLE, self.milvus.Status.CONNECT_FAILED)
                if not (away or code == _NOT_LOADED) or time.monotonic() + wait > until:
                    raise self._error(error) from error
                loaded = code != _NOT_LOADED  # a server that was started anew may have to be told
                if away and self._client is client:
                    self._client = None
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def _connected(self) -> Any:
        with self._connecting:
            if self._client is None:
                token = os.environ.get(TOKEN, "")
                # of its own: one that is shared and was closed is given to others as if it were open
                keywords: dict[str, Any] = {"token": token, "db_name": self._place.database, "dedicated": True}
                keywords["grpc_options"] = _CHANNEL
                self._client = self.milvus.MilvusClient(self._place.uri, timeout=CONNECTING, **keywords)
            return self._client

    def _error(self, error: Exception) -> StoreError:
        said = " ".join(str(getattr(error, "message", error)).split())[:300]
        if not self._place.uri.startswith("http") and "Open local milvus failed" in said:
            said = "it cannot be opened; milvus-lite lets one process in at a time, so start a server if several are to ask it"
        return StoreError(
            f"{self._place.text} does not serve ({said}); the collection itself is whole: see that Milvus runs there"
            " and run the same command again, or leave Milvus with: e5v-search rebuild --recipe auto"
        )


@cache
def library(local: bool) -> Any:
    """The module `pymilvus`. Raises MissingPackage."""
    needed = ["pymilvus", *(["milvus-lite"] if local else [])]
    missing = [name for name in needed if util.find_spec(name.replace("-", "_")) is None]
    if missing:
        raise MissingPackage(
            f"an index in Milvus needs packages that are not here; mend it with: pip install {' '.join(missing)}"
        )
    import pymilvus

    for name in ("pymilvus", "pymilvus.milvus_client", "milvus_lite"):
        # whatever they log about an error, with its traceback, is said by ours in a line
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    return pymilvus
