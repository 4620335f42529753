"""The thread that owns the collection and its model, and answers all who wait at once."""

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from e5v_search.catalog import CATALOG
from e5v_search.collection import Collection, Hits
from e5v_search.collection.asking import Ask
from e5v_search.config import ModelChoice
from e5v_search.embedder import Embedder
from e5v_search.errors import CollectionNotFound, E5VError
from e5v_search.web.metrics import Metrics
from e5v_search.web.turns import InTurn, Turns, Turnstile

BATCH = 32  # questions answered together
WAITING, SHARE = 128, 64  # questions in all, and of one address
_PATIENCE = 5.0  # seconds that a model which is just being loaded gets when the service stops
T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass
class _Job:
    work: Ask | Callable[[Collection], Any]
    future: "Future[Any]"


def identity(folder: Path) -> tuple[int, int]:
    """Tells a catalog's file from another that takes its place. Raises CollectionNotFound."""
    try:
        found = os.stat(folder / CATALOG)
    except OSError as error:
        raise CollectionNotFound(f"the collection {folder} is not there any more: {error.strerror or error}") from error
    return found.st_dev, found.st_ino


class Engine:
    """Answers questions about the collection in `folder`; whatever waits when the model is free goes to it together.

    The collection is opened again when another takes its place; what others write into it is in the next answer.
    """

    def __init__(self, folder: Path, choice: ModelChoice, metrics: Metrics) -> None:
        self.folder = folder
        self.turns = Turns()
        self.turnstile = Turnstile(WAITING, SHARE)
        self._choice, self._metrics = choice, metrics
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._embedder: Embedder | None = None
        self._collection: Collection | None = None
        self._opened = (0, 0)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        """The model is loaded meanwhile; what is asked before that waits."""
        self._thread.start()
        self._put(self._load)

    def stop(self) -> bool:
        """Whether all has ended: what is under way is waited for, but not for long; what still waits is dropped."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)
        return not self._thread.is_alive()

    # from the event loop

    async def ask(self, ask: Ask, who: str) -> Hits:
        """Raises ServiceBusy, and what `Collection.answer` raises."""
        with self.turnstile.enter(who):
            return cast(Hits, await asyncio.wrap_future(self._put(ask)))

    async def run(self, work: Callable[[Collection], T], who: str) -> T:
        """`work` done by the thread that owns the collection. Raises ServiceBusy, and what `work` raises."""
        with self.turnstile.enter(who):
            return cast(T, await asyncio.wrap_future(self._put(work)))

    def _put(self, work: Ask | Callable[[Collection], Any]) -> "Future[Any]":
        job = _Job(work, Future())
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return job.future

    # the thread

    def _work(self) -> None:
        while jobs := self._next():
            running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            try:
                self._do(running)
            except BaseException as error:  # the thread outlives whatever one question makes of it
                for job in running:
                    if not job.future.done():
                        job.future.set_exception(error)
        if self._collection is not None:
            self._collection.close()

    def _next(self) -> list[_Job]:
        """What to do next: all the questions that wait, up to BATCH, or one other piece of work; nothing at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._stopping)
            if self._stopping:
                for job in self._jobs:
                    job.future.cancel()
                return []
            first = self._jobs.popleft()
            if not isinstance(first.work, Ask):
                return [first]
            others = [job for job in self._jobs if isinstance(job.work, Ask)][: BATCH - 1]
            for job in others:
                self._jobs.remove(job)
            return [first, *others]

    def _do(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        collection = self._current()
        if not isinstance(jobs[0].work, Ask):
            jobs[0].future.set_result(jobs[0].work(collection))
            return
        self._metrics.batch(len(jobs))
        for job, found in zip(jobs, collection.answer_all([cast(Ask, job.work) for job in jobs]), strict=True):
            if isinstance(found, E5VError):
                job.future.set_exception(found)
            else:
                job.future.set_result(found)

    def _current(self) -> Collection:
        now = identity(self.folder)
        if self._collection is None or now != self._opened:
            if self._collection is not None:
                self._collection.close()
                self._collection = None
            self._collection = self._open()
            self._opened = now
        return self._collection

    def _open(self) -> Collection:
        mine = self._choice if self._embedder is None else InTurn(self._embedder, self.turns, urgent=True)
        try:
            return Collection.open(self.folder, mine, create=False)
        except E5VError:
            if self._embedder is None:
                raise
            self._embedder = None  # a collection of another model has taken the place of the first
            return Collection.open(self.folder, self._choice, create=False)

    def _load(self, collection: Collection) -> None:
        try:
            embedder = collection.embedder()
        except E5VError as error:
            _log.warning("%s", error)  # photos can be looked at, and searched by each other, all the same
            return
        self._embedder = embedder
        collection.close()
        self._collection = None
        self._current()

    def shared(self) -> Embedder | None:
        """The model for work that nobody waits for; None when there is none yet."""
        return None if self._embedder is None else InTurn(self._embedder, self.turns, urgent=False)
