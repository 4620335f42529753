"""The link to a device: who may touch which memory when, on streams that are only told apart; then the whole model over it.

No GPU takes part. `Watched` stands for torch.cuda: what is asked of a stream is done at once, but noted, and each touch of
memory must come *after* all others of it by what streams and events promise (vector clocks), not by luck.
"""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, Self

import numpy as np
import pytest
import replica
import torch
from pictures import noise
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from e5v_search.backbones import Embedder, upload
from e5v_search.backbones.batches import Batches
from e5v_search.backbones.layout import Kernel
from e5v_search.backbones.llava_next import LlavaNextEmbedder
from e5v_search.backbones.upload import Link, Streams, carries, link

# a "device" whose allocations can be told from those of main memory
DEVICE = torch.device("cpu", 0)
LOOKS = {torch.Tensor.__getitem__, torch.Tensor.view, torch.Tensor.__len__}
HOST = "host"


class Race(AssertionError):
    pass


class Stream:
    def __init__(self, watched: "Watched", name: str) -> None:
        self.watched, self.name = watched, name

    def wait_event(self, event: "Event") -> None:
        self.watched.follow(self.name, event)


class Event:
    def __init__(self, watched: "Watched") -> None:
        self.watched, self.clock, self.number, self.records = watched, Counter[str](), next(watched.numbers), 0

    def record(self, stream: Stream) -> None:
        self.watched.enqueue(stream.name)
        self.records += 1
        if self.watched.omit != f"record {self.number}, {self.records}":
            self.clock = Counter(self.watched.clocks[stream.name])

    def synchronize(self) -> None:
        self.watched.follow(HOST, self)


class Watched(TorchFunctionMode):
    """`omit`: what is left out, as a faulty program would: "record E, N", the Nth time that an event is recorded, or
    "NAME waits for E", the host's or a stream's. Events are counted as they are made.
    """

    def __init__(self, omit: str | None = None) -> None:
        super().__init__()
        self.omit = omit
        self.clocks: dict[str, Counter[str]] = {HOST: Counter()}
        self.touches: dict[int, list[tuple[str, int, bool]]] = {}
        self.kept: list[torch.Tensor] = []  # so that no address is given out twice
        self.names, self.numbers = iter(["computing", "copying"]), count()
        self.current = self.Stream(DEVICE)

    # what torch.cuda has

    def Stream(self, device: torch.device) -> Stream:
        name = next(self.names)
        self.clocks[name] = Counter()
        return Stream(self, name)

    def Event(self, blocking: bool = False) -> Event:
        return Event(self)

    def current_stream(self, device: torch.device) -> Stream:
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    # what comes after what

    def follow(self, who: str, event: Event) -> None:
        if self.omit != f"{who} waits for {event.number}":
            self.clocks[who] |= event.clock

    def enqueue(self, name: str) -> None:
        self.clocks[name] |= self.clocks[HOST]

    def touch(self, tensor: torch.Tensor, who: str, write: bool) -> None:
        self.enqueue(who)
        self.clocks[who][who] += 1
        self.kept.append(tensor)
        address = tensor.untyped_storage().data_ptr()
        others = self.touches.setdefault(address, []) if address else []  # none: nothing in it
        for other, when, wrote in others:
            if (write or wrote) and self.clocks[who][other] < when:
                raise Race(f"{who} {'writes' if write else 'reads'} what {other} {'wrote' if wrote else 'reads'}")
        others.append((who, self.clocks[who][who], write))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.numpy:
            self.touch(args[0], HOST, write=True)
        if func is torch.Tensor.to and kwargs.get("non_blocking"):
            func, args, kwargs = torch.Tensor.clone, args[:1], {}  # which between two devices it is
        out = func(*args, **kwargs)
        if isinstance(out, torch.Tensor) and func not in LOOKS and "untyped_storage" not in str(func):
            who = HOST if func is torch.empty and kwargs.get("device") != DEVICE else self.current.name
            given = [x for x in args if isinstance(x, torch.Tensor)]
            for x in given[func is torch.Tensor.copy_ :]:
                self.touch(x, who, write=False)
            self.touch(out, who, write=True)
        return out


# of the two buffers' events 0 and 2 are `sent`, 1 and 3 `free`, recorded first when the buffer is made
@pytest.mark.parametrize("omit", [
    "host waits for 0", "copying waits for 1", "computing waits for 2", "host waits for 4",
    "record 1, 1", "record 3, 4", "record 2, 1",
])  # fmt: skip
def test_nobody_touches_what_another_is_not_done_with(omit: str) -> None:
    with Watched() as watched:
        assert carries(Streams(DEVICE, watched))
    assert {name for touches in watched.touches.values() for name, *_ in touches} == {HOST, "computing", "copying"}
    with Watched(omit) as careless, pytest.raises(Race):  # were one thing left out, it would be seen
        carries(Streams(DEVICE, careless))


def test_one_waits_for_its_results_while_another_launches() -> None:
    launched, also_launched = threading.Event(), threading.Event()

    class Slow(Watched):
        def Event(self, blocking: bool = False) -> Event:
            made = Event(self)
            made.synchronize = lambda: also_launched.wait(60) or pytest.fail("nobody could launch")  # type: ignore[method-assign]
            return made

    made = Streams(DEVICE, Slow())
    found: list[np.ndarray] = []
    first = threading.Thread(target=lambda: found.append(made.fetch(lambda: launched.set() or torch.ones(2))))  # type: ignore[func-returns-value]
    first.start()
    assert launched.wait(60)
    made.fetch(lambda: also_launched.set() or torch.zeros(2))  # type: ignore[func-returns-value]
    first.join()
    np.testing.assert_array_equal(found, [[1, 1]])


def test_a_link_that_does_not_carry_is_not_taken(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert type(link(torch.device("cpu"))) is Link
    assert carries(link(torch.device("cpu")))
    cuda = torch.device("cuda")

    class Garbling(Streams):
        def __init__(self, device: torch.device) -> None:
            super().__init__(DEVICE, Watched())

        def fetch(self, launch: Callable[[], torch.Tensor]) -> np.ndarray:
            return super().fetch(launch).round(-1)

    class Broken(Streams):
        def __init__(self, device: torch.device) -> None:
            raise RuntimeError("CUDA error: no streams today\nand more")

    class Mute(Streams):
        def __init__(self, device: torch.device) -> None:
            raise RuntimeError

    reasons = {Garbling: "what came back is not what was sent", Broken: "CUDA error: no streams today", Mute: ""}
    for made, why in reasons.items():
        monkeypatch.setattr(upload, "Streams", made)
        assert type(link(cuda)) is Link
        assert caplog.messages == [f"cuda is waited for after each batch: {why}"]
        caplog.clear()


def test_a_buffer_for_which_there_was_no_memory_grows_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made, empty = Streams(DEVICE, Watched()), torch.empty
    large, small = (np.arange(n, dtype=np.uint8)[None] for n in (64, 48))

    def full(*size: int, device: Any = None, **options: Any) -> torch.Tensor:
        if device is not None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return empty(*size, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", full)
        for _ in range(2):  # buffers
            with pytest.raises(torch.OutOfMemoryError):
                made.floats([large])
    for _ in range(2):
        np.testing.assert_array_equal(made.floats([small]), small)


# the whole model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(replica.build(tmp_path_factory.mktemp("replica"))[0])


PICTURES = [noise(*size) for size in [(56, 56), (100, 100), (333, 500), (500, 333), (1, 1), (120, 40), (57, 113), (1, 5000)]]
PAIRS = [(picture, change) for picture in PICTURES[:4] for change in ("make it red", "two dogs, at night, in the snow")]


def load(folder: str) -> LlavaNextEmbedder:
    embedder = LlavaNextEmbedder.load(folder, device="cpu", dtype="float32")
    assert isinstance(embedder, LlavaNextEmbedder)
    return embedder


def everything(embedder: Embedder) -> np.ndarray:
    prepared = [embedder.prepare(picture) for picture in PICTURES]
    return np.concatenate([
        embedder.embed_images(PICTURES),
        embedder.embed_texts(replica.SENTENCES),
        embedder.embed_texts(replica.SENTENCES * 3),
        embedder.embed_composed(PAIRS),
        embedder.embed_composed(PAIRS[:1]),
        *embedder.embed_views(prepared, ["retrieval", "cirr"]),
    ])  # fmt: skip


def over_streams(embedder: LlavaNextEmbedder, runtime: Watched, tokens: int) -> LlavaNextEmbedder:
    """As on CUDA: two threads, of which one waits while the other launches."""
    embedder.link = Streams(DEVICE, runtime)
    embedder.batches = Batches(torch.device("cuda"), embedder.memory.clear, abreast=embedder.link.abreast)
    embedder.batches.tokens = tokens
    return embedder


@pytest.mark.parametrize("tokens", [32768, 300])
def test_the_model_over_streams_equals_itself_without(folder: str, tokens: int) -> None:
    expected = everything(load(folder))
    ours = over_streams(load(folder), Watched(), tokens)
    np.testing.assert_allclose(everything(ours), expected, atol=1e-5)
    if tokens > 300:  # one batch each, and so in this thread
        with Watched() as watched:
            np.testing.assert_allclose(everything(over_streams(ours, watched, tokens)), expected, atol=1e-5)


def test_memory_that_runs_out_while_waited_for_halves_the_batch(folder: str) -> None:
    class Full(Streams):
        def fetch(self, launch: Callable[[], torch.Tensor]) -> np.ndarray:
            found = super().fetch(launch)
            if len(found) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return found

    expected = load(folder).embed_images(PICTURES)
    ours = over_streams(load(folder), Watched(), 32768)
    ours.link = Full(DEVICE, Watched())
    np.testing.assert_allclose(ours.embed_images(PICTURES), expected, atol=1e-5)
    assert 300 < ours.batches.tokens < 32768


class FromLists(TorchFunctionMode):
    """Numbers of Python's that become a device's at once, of which the mode below hears nothing."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        assert func not in (torch.tensor, torch.as_tensor) or out.device.type == "cpu", f"{func} waits"
        return out


class NeverWaits(TorchDispatchMode):
    """The meta device stands for one with a queue: of what is on it nothing can be looked at. Refused besides is whatever
    copies from main memory without saying that it may take its time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []
        self._lists = FromLists()

    def __enter__(self) -> Self:
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = (
            {x.device.type for x in tree_leaves(some) if isinstance(x, torch.Tensor)} for some in ((args, kwargs), out)
        )
        if "cpu" in given and "meta" in given | made:
            options = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False)) | (kwargs or {})
            assert options.get("non_blocking"), f"{func} waits"
            self.copies.append(func.__name__)
        return out


class Blind(Streams):
    """What is computed on no device has no numbers."""

    def fetch(self, launch: Callable[[], torch.Tensor]) -> np.ndarray:
        with self.launching:
            return np.ones(launch().shape, np.float32)


@pytest.mark.parametrize("kernel", [None, lambda q, *_: torch.empty_like(q)], ids=["padded", "packed"])
def test_nothing_waits_on_the_way_through_the_model(folder: str, kernel: Kernel | None) -> None:
    ours, meta = load(folder), torch.device("meta")
    ours.model.to(meta)
    ours.model.kernel = kernel
    ours.device, ours.link = meta, Blind(meta, Watched())
    ours._mean, ours._std = (torch.empty(3, 1, 1, device=meta) for _ in range(2))
    ours.batches = Batches(torch.device("cuda"), ours.memory.clear)
    expected = everything(load(folder))
    with NeverWaits() as mode:
        assert everything(ours).shape == expected.shape
    assert len(mode.copies) > 20  # ids, lengths and pixels
    with torch.inference_mode(), NeverWaits():
        for slow in (lambda: torch.tensor([1], device=meta), lambda: torch.ones(2).to(meta)):
            with pytest.raises(AssertionError, match="waits"):
                slow()
        with pytest.raises(RuntimeError):
            ours._words([[1]])[0].sum().item()
