"""Recordings of a short text's way through the model: that what is recorded can be, and when one is made, played and given up.

No GPU takes part. A recording here calls the function again on the same memory, as a CUDA graph runs its kernels again on it.
"""

import gc
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import replica
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_upload import NeverWaits
from torch import Tensor

from e5v_search.backbones import registry
from e5v_search.backbones.llava_next import LlavaNextEmbedder, reading
from e5v_search.backbones.recorded import LENGTHS, Record, Recorded, cuda_graphs

CPU = torch.device("cpu")


def again(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return run


def embedder(folder: Path) -> LlavaNextEmbedder:
    return LlavaNextEmbedder.load(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> LlavaNextEmbedder:
    return embedder(replica.build(tmp_path_factory.mktemp("replica"))[0])


# what is recorded


def test_every_length_is_read_as_without(small: LlavaNextEmbedder) -> None:
    rng = np.random.default_rng(0)
    recorded = Recorded(reading(small.model.language_model, small.dim), again, CPU)
    rows = [rng.integers(0, 300, n).tolist() for n in [*range(1, 70), *rng.integers(1, 70, 30)]]
    with torch.inference_mode():
        for row in rows * 2:
            # padded by others: longer rows of the same batch
            expected = small._floats(small.model.last_hidden(small._words([row, [7] * 70])))[0]
            torch.testing.assert_close(recorded(row)[0], expected, atol=1e-5, rtol=1e-5)
    assert sorted(recorded._tapes) == list(LENGTHS)


def test_single_texts_of_the_bundled_model(caplog: pytest.LogCaptureFixture) -> None:
    ours = embedder(registry.BUNDLED / registry.TINY)
    texts = ["a dog", "two dogs that run over the grass", "a red car", *(f"{n} {'very ' * n}old bridges" for n in range(40))]
    expected = np.concatenate([ours.embed_texts([text]) for text in texts])
    ours._recorded = Recorded(reading(ours.model.language_model, ours.dim), again, CPU)
    for _ in range(2):
        np.testing.assert_allclose(np.concatenate([ours.embed_texts([text]) for text in texts]), expected, atol=1e-5)
    np.testing.assert_allclose(ours.embed_texts(texts), expected, atol=1e-5)  # many, and so not recorded
    assert len(ours._recorded._tapes) > 1
    assert not caplog.messages


@pytest.mark.parametrize("t", LENGTHS)
def test_nothing_is_looked_at_nor_sent_for(small: LlavaNextEmbedder, t: int) -> None:
    """What is recorded may not depend on numbers, and no memory but the device's may take part."""
    ours = embedder(small.folder)
    ours.model.to("meta")
    with torch.inference_mode(), NeverWaits() as mode:
        ids, n = (torch.empty(*shape, dtype=torch.long, device="meta") for shape in ((1, t), (1,)))
        assert reading(ours.model.language_model, ours.dim)(ids, n).shape == (1, ours.dim)
    assert mode.copies == []


class Graphs:
    """What torch.cuda has for recordings. Played back, one calls the function again. `why`: it cannot be recorded."""

    def __init__(self, why: str | None = None) -> None:
        self.why, self.current, self.log = why, "default", list[str]()

    def graph_pool_handle(self) -> str:
        return "pool"

    def Stream(self, device: torch.device) -> "Graphs":
        return self

    def current_stream(self, device: torch.device) -> "Graphs":
        return self

    def wait_stream(self, stream: "Graphs") -> None:
        self.log.append("wait")

    @contextmanager
    def stream(self, stream: "Graphs") -> Iterator[None]:
        before, self.current = self.current, "aside"
        try:
            yield
        finally:
            self.current = before

    def CUDAGraph(self) -> "Graphs":
        return self

    @contextmanager
    def graph(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        inspect.signature(torch.cuda.graph).bind(*args, **kwargs)
        self.current = "capturing"  # and as torch does it, for good when it fails
        yield
        if self.why:
            raise RuntimeError(self.why)
        self.current = "aside"
        self.log.append("recorded")

    def replay(self) -> None:
        self.log.append("replay")


@pytest.mark.parametrize("why", [None, "operation failed due to a previous error during capture"])
def test_a_recording_is_made_aside_after_some_calls(why: str | None, caplog: pytest.LogCaptureFixture) -> None:
    runtime, where = Graphs(why), []

    def read(ids: Tensor, n: Tensor) -> Tensor:
        where.append(runtime.current)
        return torch.ones(1, 4) * n

    recorded = Recorded(read, cuda_graphs(CPU, runtime), CPU)
    for _ in range(3):
        recorded([1, 2, 3])
    assert runtime.current == "default"
    made = ["default", "default", "aside", "aside", "aside", "capturing"]
    if why is None:
        assert (where, runtime.log, caplog.messages) == (made, ["wait", "recorded", "wait", "replay", "replay"], [])
    else:
        assert (where, runtime.log) == ([*made, "default"], ["wait"])
        assert why in caplog.messages[0]


def test_a_model_of_which_recordings_were_made_is_gone_at_once(small: LlavaNextEmbedder) -> None:
    ours = embedder(small.folder)
    ours._recorded = Recorded(reading(ours.model.language_model, ours.dim), again, CPU)
    for _ in range(2):
        ours.embed_texts(["a dog"])
    assert ours._recorded._tapes
    freed: list[str] = []
    weakref.finalize(ours.model, freed.append, "model")
    gc.collect()
    gc.disable()
    try:
        del ours
        assert freed == ["model"]
    finally:
        gc.enable()


# when


class Counted:
    """`read` that gives a text's sum and length, and a recorder that counts."""

    def __init__(self) -> None:
        self.recorded: list[int] = []
        self.played = 0

    def read(self, ids: Tensor, n: Tensor) -> Tensor:
        real = torch.arange(ids.shape[1]) < n
        return torch.stack(((ids * real).sum(), n[0]))[None].float()

    def record(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        found = run()  # always the same memory, as a graph's

        def replay() -> Tensor:
            self.played += 1
            return found.copy_(run())

        self.recorded.append(self.played)
        return replay


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=80), max_size=30))
def test_a_length_is_recorded_when_it_comes_again(rows: list[list[int]]) -> None:
    counted = Counted()
    recorded = Recorded(counted.read, counted.record, CPU)
    found = [recorded(row) for row in rows]  # all are kept: one must not become the next
    assert [x.tolist() for x in found] == [[[sum(row), len(row)]] for row in rows]
    times = [sum(len(row) <= n and all(len(row) > m for m in LENGTHS if m < n) for row in rows) for n in LENGTHS]
    assert len(counted.recorded) == sum(n > 1 for n in times)
    assert counted.played == sum(max(n - 1, 0) for n in times)  # the second is played too, to see that it is the same


def broken(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def mute(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    raise RuntimeError


def stale(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    found = run().clone()
    return lambda: found


def without_numbers(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return lambda: run() * torch.nan


@pytest.mark.parametrize(("record", "why"), [
    (broken, "operation not permitted when stream is capturing"),
    (mute, ""),
    (stale, "what was recorded is not the same (cosine 0.9"),
    (without_numbers, "what was recorded is not the same (cosine nan)"),
])  # fmt: skip
def test_what_cannot_be_recorded_is_read_plainly_ever_after(record: Record, why: str, caplog: pytest.LogCaptureFixture) -> None:
    counted, tries = Counted(), []

    def tried(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        tries.append(1)
        return record(run)

    recorded = Recorded(counted.read, tried, CPU)
    for row in ([1, 90], [2], [5, 5], [1] * 30, [2] * 30, [3]):
        assert recorded(row).tolist() == [[sum(row), len(row)]]
    assert len(tries) == 1
    [message] = caplog.messages
    assert message.startswith(f"single texts are read without a recording on cpu: {why}")


def test_threads_take_turns_at_a_recording() -> None:
    counted, inside = Counted(), threading.Lock()

    def alone(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        replay = counted.record(run)

        def played() -> Tensor:
            assert inside.acquire(blocking=False), "two at a time"
            found = replay()
            inside.release()
            return found

        return played

    recorded = Recorded(counted.read, alone, CPU)
    wrong: list[Sequence[int]] = []

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(100):
            row = rng.integers(1, 99, rng.integers(1, 64)).tolist()
            if recorded(row).tolist() != [[sum(row), len(row)]]:
                wrong.append(row)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert counted.played > 300
