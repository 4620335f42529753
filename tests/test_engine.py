"""The engine of one process: how many calls of the model are under way, and what is made of their times."""

import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
from literal import Literal

from e5v_search.collection.engine import Alone, Clock
from e5v_search.collection.inputs import Input


class Watched(Literal):
    """Notes how many calls are under way; with several each waits until there are two, unless nothing is left."""

    def __init__(self, abreast: int, n: int = 0) -> None:
        super().__init__()
        self.abreast, self.left = abreast, n
        self.most = self.inside = 0
        self.changed = threading.Condition()

    def embed_texts(self, texts: Sequence[str], prompts: str = "retrieval") -> np.ndarray:
        with self.changed:
            self.left -= len(texts)
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.changed.notify_all()
            if self.abreast > 1:
                assert self.changed.wait_for(lambda: self.most > 1 or not self.left, timeout=60)
        x = super().embed_texts(texts, prompts)
        with self.changed:
            self.inside -= 1
        return x


@pytest.mark.parametrize("abreast", [1, 2])
def test_as_many_calls_are_under_way_as_keep_a_device_busy(abreast: int) -> None:
    model, texts = Watched(abreast, 50), [f"{i} 1 1" for i in range(50)]
    engine = Alone(lambda: model)
    batches = list(engine.embedded("text", iter(texts), lambda text: Input("text", text, text=text), ["retrieval"]))
    found = [(text, outcome.vectors) for batch in batches for text, outcome in batch]
    assert [text for text, _ in found] == texts
    for text, vectors in found:
        assert vectors is not None
        np.testing.assert_array_equal(vectors["retrieval"], Literal().embed_texts([text])[0])
    assert len(batches) > 2
    assert model.most == abreast


def test_without_anything_to_embed_no_model_is_loaded() -> None:
    engine = Alone(lambda: pytest.fail("loaded"))
    assert not list(engine.embedded("text", iter(()), lambda text: Input("text", text, text=text), ["retrieval"]))


def test_times_of_work_that_overlaps_add_up_to_what_it_took() -> None:
    clock, began, seconds = Clock(), threading.Event(), []

    def first() -> None:
        began.set()
        time.sleep(0.05)

    start = time.monotonic()
    thread = threading.Thread(target=lambda: seconds.append(clock(first)[1]))
    thread.start()
    began.wait()
    seconds.append(clock(lambda: thread.join() or time.sleep(0.05))[1])  # type: ignore[func-returns-value]
    assert 0.099 < sum(seconds) <= time.monotonic() - start
