"""Who embeds what an ingestion finds: this process, or others that it gives the work to."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any, Protocol, TypeVar

from e5v_search.collection.inputs import Input, Outcome, Prepared, embed, prepare
from e5v_search.embedder import Embedder
from e5v_search.parallel import ahead

MAX_BATCH = 1024

T = TypeVar("T")


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


class Alone:
    """This process: threads that prepare, and one that has the model to itself. `embedder` loads it when it is needed."""

    def __init__(self, embedder: Callable[[], Embedder]) -> None:
        self.embedder = embedder
        self._pace = Pace()

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
            start = time.monotonic()
            outcomes = embed(self.embedder(), kind, prepared, of)
            self._pace.note(len(batch), time.monotonic() - start)
            return [(item, outcome) for (item, _), outcome in zip(batch, outcomes, strict=True)]

        # while the caller deals with a batch, and gathers another, the model is at the next
        with (
            closing(ahead(ready, items)) as prepared,
            closing(ahead(work, self._batches(prepared), workers=1, depth=2)) as done,
        ):
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
