"""Threads that read the catalog for whoever asks, each through a connection of its own."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from e5v_search.catalog import Catalog
from e5v_search.web.engine import identity
from e5v_search.web.turns import Turnstile

T = TypeVar("T")


class Catalogs:
    """The catalog in `folder`, for each thread its own connection; opened again when another takes its place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._local = threading.local()

    def here(self) -> Catalog:
        """Raises CollectionError."""
        now = identity(self.folder)
        mine: tuple[tuple[int, int], Catalog] | None = getattr(self._local, "opened", None)
        if mine is not None and mine[0] == now:
            return mine[1]
        self.leave()
        catalog = Catalog.open(self.folder, readonly=True)
        self._local.opened = now, catalog
        return catalog

    def leave(self) -> None:
        """Close what the present thread has opened."""
        mine: tuple[tuple[int, int], Catalog] | None = getattr(self._local, "opened", None)
        if mine is not None:
            del self._local.opened
            mine[1].close()

    def version(self) -> tuple[str, int]:
        """Changes whenever an item or a vector does."""
        catalog = self.here()
        return catalog.uid, catalog.state


class Readers:
    """`workers` threads; no more than `limit` requests wait for them, of one address `share`."""

    def __init__(self, catalogs: Catalogs, name: str, workers: int, limit: int, share: int) -> None:
        self._catalogs = catalogs
        self.turnstile = Turnstile(limit, share)
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix=name)

    async def run(self, work: Callable[[Catalog], T], who: str) -> T:
        """Raises ServiceBusy, CollectionError, and what `work` raises."""
        with self.turnstile.enter(who):
            return await asyncio.get_running_loop().run_in_executor(self._pool, lambda: work(self._catalogs.here()))

    def stop(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
