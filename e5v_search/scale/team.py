"""Several workers that embed what one ingestion finds: an `Engine` of any number of processes.

    items ──> batches ──> one queue ──> whichever worker has room ──> outcomes, in the order of the items

A worker holds two batches, so that it prepares the second while its model is at the first. When one dies, what it held is
done again, by the others or by the one that takes its place, and a batch that was there when it happened travels alone from
then on; after a second death its inputs go one by one, so that an input that kills processes fails, and nothing else with it.
"""

import queue
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, Generic, Protocol, Self, TypeVar

from e5v_search.collection.engine import Pace
from e5v_search.collection.inputs import Input, Outcome
from e5v_search.config import ModelChoice
from e5v_search.errors import E5VError, ModelError

T = TypeVar("T")

_HELD = 2  # batches
_APART = 2  # deaths after which the inputs of a batch go one by one
_FATAL = 3  # deaths after which a single input is held to be their cause
_HOPELESS = 4  # deaths of one worker, with nothing done in between


@dataclass(frozen=True)
class Task:
    """Inputs of one kind, wanted in the views `of`."""

    kind: str
    inputs: list[Input]
    of: list[str]


@dataclass(frozen=True)
class Loaded:
    """A worker has its model; the fields are those of an `Embedder`."""

    fingerprint: str
    dim: int
    recalled_by: dict[str, Any]


@dataclass(frozen=True)
class Done:
    """The worker's oldest task, in so many seconds of the model's."""

    outcomes: list[Outcome]
    seconds: float


@dataclass(frozen=True)
class Gone:
    """A worker that does no more; an E5VError when it could not even begin."""

    reason: E5VError | str


Event = Loaded | Done | Gone
Tell = Callable[["Worker", Event], None]  # called from any thread


class Worker(Protocol):
    def send(self, task: Task) -> None:
        """Does not wait for what comes of it. One that is dead says nothing here; its `Gone` comes, or has come."""

    def close(self) -> None:
        """End it at once."""


Start = Callable[[str, ModelChoice, Tell], Worker]  # a worker in this place (a device, say)
Known = Callable[[Loaded, Input, Sequence[str]], Outcome | None]  # what need not be embedded by this model, in these views


@dataclass
class _Batch(Generic[T]):
    items: list[T]
    task: Task
    outcomes: dict[int, Outcome] = field(default_factory=dict)

    def is_done(self) -> bool:
        return len(self.outcomes) == len(self.items)

    def pairs(self) -> list[tuple[T, Outcome]]:
        return [(item, self.outcomes[i]) for i, item in enumerate(self.items)]


@dataclass
class _Piece:
    """Some inputs of a batch, and how many workers have died over them."""

    batch: _Batch[Any]
    at: list[int]
    deaths: int = 0

    def task(self) -> Task:
        return replace(self.batch.task, inputs=[self.batch.task.inputs[i] for i in self.at])

    def settle(self, outcomes: Sequence[Outcome]) -> None:
        self.batch.outcomes |= zip(self.at, outcomes, strict=True)


@dataclass
class _Seat:
    place: str
    pace: Pace
    worker: Worker | None = None
    loaded: bool = False
    pieces: deque[_Piece] = field(default_factory=deque)
    deaths: int = 0

    def has_room(self, piece: _Piece) -> bool:
        if piece.deaths or any(held.deaths for held in self.pieces):
            return self.loaded and not self.pieces
        return self.loaded and len(self.pieces) < _HELD


class Team:
    """A worker in each of `places`, started by `start` when there is something to embed. `note` is given a line when one dies.
    An outcome that is `known` is taken as it is.

    What the model is must be asked after the first outcomes only.
    """

    def __init__(
        self,
        choice: ModelChoice,
        places: Sequence[str],
        start: Start,
        note: Callable[[str], None],
        pace: Callable[[], Pace] = Pace,
        known: Known = lambda model, given, of: None,
    ) -> None:
        self._choice = choice
        self._start = start
        self._note = note
        self._known = known
        self._seats = [_Seat(place, pace()) for place in places]
        self._events: queue.SimpleQueue[tuple[Worker, Event]] = queue.SimpleQueue()
        self._queue: deque[_Piece] = deque()
        self._model: Loaded | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all workers. They start again if there is more to embed."""
        self._queue.clear()
        for seat in self._seats:
            self._vacate(seat)

    def _vacate(self, seat: _Seat) -> None:
        if seat.worker is not None:
            seat.worker.close()
        seat.worker, seat.loaded = None, False
        seat.pieces.clear()

    @property
    def model(self) -> Loaded:
        assert self._model is not None, "asked before anything was embedded"
        return self._model

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint

    @property
    def dim(self) -> int:
        return self.model.dim

    @property
    def recalled_by(self) -> dict[str, Any]:
        return self.model.recalled_by

    def embedded(
        self, kind: str, items: Iterator[T], input_of: Callable[[T], Input], of: Sequence[str]
    ) -> Generator[list[tuple[T, Outcome]], None, None]:
        """See `Engine`. Raises ModelError when no worker is left, and what keeps a worker from loading its model."""
        under_way: deque[_Batch[T]] = deque()

        def more(n: int) -> bool:
            some = list(islice(items, n))
            if some:
                inputs = [input_of(item) for item in some]
                batch = _Batch(some, Task(kind, inputs, list(of)))
                found = {i: self._known(self.model, given, of) for i, given in enumerate(inputs)}
                batch.outcomes |= {i: outcome for i, outcome in found.items() if outcome is not None}
                under_way.append(batch)
                if not batch.is_done():
                    self._queue.append(_Piece(batch, [i for i, outcome in found.items() if outcome is None]))
            return bool(some)

        first = next(items, None)
        if first is None:
            return  # with nothing to embed, nothing is started
        items = chain([first], items)
        try:
            while self._model is None:
                self._man_all()
                self._take(*self._events.get())
            while under_way or more(self._seats[0].pace.size):
                self._man_all()
                for seat in self._seats:
                    # the first may be late, as when a worker dies over it: the others do not go on without end
                    while self._queue or (len(under_way) < 2 * _HELD * len(self._seats) and more(seat.pace.size)):
                        if self._queue and not self._give(seat):
                            break
                if under_way[0].is_done():
                    yield under_way.popleft().pairs()
                else:
                    self._take(*self._events.get())
        except BaseException:
            self.close()  # else what they are at would come as the answer to the next task
            raise

    # how the work goes round

    def _man_all(self) -> None:
        # what model `auto` stands for is found out once
        for seat in self._seats if self._choice.name != "auto" else self._seats[:1]:
            if seat.worker is None:
                seat.worker = self._start(seat.place, self._choice, lambda worker, event: self._events.put((worker, event)))

    def _give(self, seat: _Seat) -> bool:
        """The next piece, if the worker has room for it."""
        if not seat.has_room(self._queue[0]):
            return False
        assert seat.worker is not None
        seat.pieces.append(self._queue.popleft())
        seat.worker.send(seat.pieces[-1].task())
        return True

    def _take(self, worker: Worker, event: Event) -> None:
        seat = next((seat for seat in self._seats if seat.worker is worker), None)
        if seat is None:
            return  # of one that was ended
        if isinstance(event, Done):
            piece = seat.pieces.popleft()
            piece.settle(event.outcomes)
            seat.deaths = 0
            seat.pace.note(len(event.outcomes), event.seconds)
        elif isinstance(event, Loaded):
            self._join(seat, event)
        elif not isinstance(event.reason, E5VError):
            self._replace(seat, event.reason)
        elif seat.deaths:
            self._replace(seat, f"could not begin again ({event.reason})")
        else:
            raise type(event.reason)(f"{seat.place}: {event.reason}")

    def _join(self, seat: _Seat, model: Loaded) -> None:
        if self._model is None:
            self._model = model
            self._choice = replace(self._choice, **model.recalled_by)
        elif model.fingerprint != self.fingerprint:
            raise ModelError(f"{seat.place} has loaded {model.fingerprint}, others {self.fingerprint}: one model for all")
        seat.loaded = True

    def _replace(self, seat: _Seat, reason: str) -> None:
        held = list(seat.pieces)
        self._vacate(seat)
        seat.deaths += 1
        for piece in reversed(held):
            piece.deaths += 1
            if piece.deaths >= _FATAL and len(piece.at) == 1:
                piece.settle([Outcome(problem=f"each worker that had it died; the last {reason}")])
                seat.deaths = 0  # no fault of the device's
            elif piece.deaths >= _APART and len(piece.at) > 1:
                self._queue.extendleft(_Piece(piece.batch, [i], deaths=1) for i in reversed(piece.at))
            else:
                self._queue.appendleft(piece)
        n = sum(len(piece.at) for piece in held)
        lost = f"; the {n:,} inputs that it held are done again" if n else ""
        if seat.deaths < _HOPELESS:
            self._note(f"a worker on {seat.place} {reason}{lost}")
            return
        self._seats.remove(seat)
        if not self._seats:
            raise ModelError(f"no worker is left: {_HOPELESS} in a row died on {seat.place}, the last {reason}")
        self._note(f"a worker on {seat.place} {reason}, the {_HOPELESS}th in a row: that place is given up{lost}")
