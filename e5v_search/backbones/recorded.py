"""A short text's way through the model, recorded for each of a few lengths and played back.

Alone, it is at its kernels for less time than it takes to launch them: on a GPU hundreds of them are then launched as one.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from e5v_search.backbones.upload import indices

_log = logging.getLogger(__name__)

LENGTHS = (16, 32, 48, 64)  # tokens; beyond, computing takes longer than launching
_ALIKE = 0.999
_WARM = 3

Read = Callable[[Tensor, Tensor], Tensor]
"""ids (1, t), of which n (1,) are real -> (1, dim). Made of the device's tensors alone, into which it does not look."""

Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Runs a function, and gives one that does again, in the same memory, what its kernels did."""


def cuda_graphs(device: torch.device, runtime: Any = torch.cuda) -> Record:
    """Recordings that share their memory: no two may be played at a time, nor what one gave be read after another was."""
    pool, aside = runtime.graph_pool_handle(), runtime.Stream(device)

    def record(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = runtime.CUDAGraph()
        aside.wait_stream(runtime.current_stream(device))
        # a recording that fails would leave its stream the current one: this takes it back
        with runtime.stream(aside):
            for _ in range(_WARM):  # what libraries do at their first call cannot be recorded
                run()
            with runtime.graph(graph, pool, aside, capture_error_mode="thread_local"):
                found = run()
        runtime.current_stream(device).wait_stream(aside)

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay

    return record


class Recorded:
    """`read` for one text at a time, from any thread. A length is recorded when it is asked for a second time.

    What is recorded must give at once what `read` gives: else that is said in the log, and nothing is recorded any more.
    """

    def __init__(self, read: Read, record: Record, device: torch.device) -> None:
        self._read, self._record, self._device = read, record, device
        self._lock = threading.Lock()
        self._asked: set[int] = set()
        self._tapes: dict[int, _Tape] = {}
        self._works = True

    def __call__(self, ids: Sequence[int]) -> Tensor:
        """(1, dim)"""
        length = next((n for n in LENGTHS if n >= len(ids)), None)
        with self._lock:
            if length in self._tapes:
                return self._tapes[length].play(ids)
            found = self._read(indices(ids, self._device)[None], indices([len(ids)], self._device))
            if length in self._asked and self._works:
                self._begin(length, ids, found)
            elif length is not None:
                self._asked.add(length)
            return found

    def _begin(self, length: int, ids: Sequence[int], expected: Tensor) -> None:
        try:
            tape = _Tape(self._read, self._record, length, self._device)
            cosine = torch.cosine_similarity(tape.play(ids), expected).item()
            problem = None if cosine > _ALIKE else f"what was recorded is not the same (cosine {cosine:.4f})"
        except RuntimeError as error:
            problem = str(error).partition("\n")[0]
        if problem is None:
            self._tapes[length] = tape
            return
        self._works = False
        self._tapes.clear()
        _log.warning("single texts are read without a recording on %s: %s", self._device, problem)


class _Tape:
    def __init__(self, read: Read, record: Record, length: int, device: torch.device) -> None:
        # ids, and behind them how many of them are real
        self._given = torch.ones(length + 1, dtype=torch.long, device=device)
        ids, n = self._given[None, :-1], self._given[-1:]
        self._replay = record(lambda: read(ids, n))

    def play(self, ids: Sequence[int]) -> Tensor:
        padding = [0] * (len(self._given) - 1 - len(ids))
        self._given.copy_(indices([*ids, *padding, len(ids)], self._given.device))
        return self._replay().clone()
