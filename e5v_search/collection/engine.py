"""Who embeds what an ingestion finds: this process, or others that it gives the work to."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from itertools import chain
from typing import Any, Protocol, TypeVar

from e5v_search.collection.inputs import Input, Outcome, Prepared, embed, prepare
from e5v_search.embedder import Embedder
from e5v_search.parallel import ahead

MAX_BATCH = 1024

T = TypeVar("T")
R = TypeVar("R")


class Engine(Protocol):
    """A model at work. What it is may only be known once something had to be embedded, as for an `Embedder`."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def dim(self) -> int: ...

    @property
    def recalled_by(self) -> dict[str, Any]: ...

    def embedded(
        self, kind: str, items: Iterator[T], input_of: Callable[[T], Input], of: Sequence[str]
    ) -> Generator[list[tuple[T, Outcome]], None, None]:
        """`items`, whose inputs are all of one kind, with what came of them in the views `of`, some at a time.

        `items` is consumed in the caller's thread. Closed before its end, it drops what is under way.
        """


class Pace:
    """How many inputs make a batch: as many as take about `seconds`, so that even an 8B model on a laptop commits often."""

    def __init__(self, seconds: float = 1.0, size: int = 1) -> None:
        self._seconds = seconds
        self.size = size

    def note(self, inputs: int, seconds: float) -> None:
        # not less than two: two cores do them side by side
        self.size = min(max(int(inputs / max(seconds, 1e-6) * self._seconds), 2), 4 * self.size, MAX_BATCH)


class Clock:
    """Times work that overlaps on one device: each piece from when the one before it was done."""

    def __init__(self) -> None:
        self._free = 0.0

    def __call__(self, work: Callable[[], R]) -> tuple[R, float]:
        """-> (what `work` gives, seconds)"""
        start = time.monotonic()
        result = work()
        end = time.monotonic()
        before, self._free = self._free, end
        return result, end - max(start, before)


class Alone:
    """This process: threads that prepare, and one that has the model to itself, or as many as keep it busy. `embedder` loads
    it when it is needed."""

    def __init__(self, embedder: Callable[[], Embedder]) -> None:
        self.embedder = embedder
        self._pace, self._clock = Pace(), Clock()

    @property
    def fingerprint(self) -> str:
        return self.embedder().fingerprint

    @property
    def dim(self) -> int:
        return self.embedder().dim

    @property
    def recalled_by(self) -> dict[str, Any]:
        return self.embedder().recalled_by

    def embedded(
        self, kind: str, items: Iterator[T], input_of: Callable[[T], Input], of: Sequence[str]
    ) -> Generator[list[tuple[T, Outcome]], None, None]:
        def ready(item: T) -> tuple[T, Prepared]:
            return item, prepare(self.embedder(), input_of(item))

        def work(batch: list[tuple[T, Prepared]]) -> list[tuple[T, Outcome]]:
            prepared = [one for _, one in batch]
            outcomes, seconds = self._clock(lambda: embed(self.embedder(), kind, prepared, of))
            self._pace.note(len(batch), seconds)
            return [(item, outcome) for (item, _), outcome in zip(batch, outcomes, strict=True)]

        # while the caller deals with a batch, and gathers another, the model is at the next
        with closing(ahead(ready, items)) as prepared:
            batches = self._batches(prepared)
            if first := next(batches, None):
                with closing(ahead(work, chain([first], batches), self.embedder().abreast, depth=2)) as done:
                    yield from done

    def _batches(self, prepared: Iterator[T]) -> Iterator[list[T]]:
        some: list[T] = []
        for one in prepared:
            some.append(one)
            if len(some) >= self._pace.size:
                yield some
                some = []
        if some:
            yield some
