"""Inputs through a model in batches as large as a device takes."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch

from e5v_search.errors import OutOfMemory
from e5v_search.parallel import ahead, windows

T = TypeVar("T")
R = TypeVar("R")

_TOKENS = {"cuda": 32768, "mps": 8192, "cpu": 2048}
_LEAST = 512  # tokens, for which it is worth while to have a batch more
_ABREAST = 8  # batches under way at a time, at most
_ENOUGH = 8  # one in so many of the tokens of a full batch is work enough for a device
_ALIKE = 0.9  # of the longest row's length

WINDOW = 256  # inputs sorted by length at a time: bounds memory
TEXTS = 4096  # the same, of inputs that take next to none


def unit(x: np.ndarray) -> np.ndarray:
    """Rows (n, dim) of length 1."""
    out: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return out


class Batches:
    """`tokens` is the most that a batch may hold; unless rows are `packed`, the padding to the longest of them is
    counted too. When memory runs out, `relieve` is asked to give up what it can (-> bytes); when that is nothing, `tokens`
    is halved, and kept so. `abreast` batches at a time keep a device that is no processor busy."""

    def __init__(self, device: torch.device, relieve: Callable[[], int], *, packed: bool = False, abreast: int = 1) -> None:
        self.device, self.relieve, self.packed, self.abreast = device, relieve, packed, abreast
        self.tokens = _TOKENS[device.type]

    def cut(self, rows: Sequence[T], length: Callable[[T], int], into: int = 1) -> Iterator[list[T]]:
        """`rows` from the longest to the shortest, in lists within the budget. A row beyond it stands alone.

        The lists are as many as can be dealt out evenly among `into`, where there is that much to do.
        """
        order = sorted(rows, key=length, reverse=True)
        budget = self.tokens
        if into > 1 and (total := sum(map(length, rows))) >= into * _LEAST:
            lists = into * -(-total // (into * budget))
            budget = min(budget, total // lists + length(order[0]) - 1)
        together = self._packed if self.packed else self._padded
        lengths = [length(row) for row in order]
        start = 0
        while start < len(order):
            end = start + max(1, together(lengths[start:], budget))
            yield order[start:end]
            start = end

    def _packed(self, lengths: list[int], budget: int) -> int:
        """How many of these, the longest first, go into a batch."""
        return bisect_right(list(accumulate(lengths)), budget)

    def _padded(self, lengths: list[int], budget: int) -> int:
        longest = lengths[0]
        n = budget // longest
        # the first is what the others are padded to: where there is enough without them, they need not be
        enough = -(-self.tokens // (_ENOUGH * longest))
        return next((i for i in range(enough, min(n, len(lengths))) if lengths[i] < _ALIKE * longest), n)

    def run(self, rows: Sequence[T], length: Callable[[T], int], forward: Callable[[list[T]], Iterable[R]]) -> list[R]:
        """`forward` of all rows, which gives one result for each, in their order. Raises OutOfMemory for a single row.

        On a processor several batches are under way at a time, each with its share of torch's threads: two cores do two
        batches sooner than they do one after the other together (benchmarks/LOG.md).
        """

        def through(batch: list[int]) -> tuple[list[int], list[R]]:
            return batch, self._halving([rows[i] for i in batch], length, forward)

        of_processor = min(torch.get_num_threads(), _ABREAST) if self.device.type == "cpu" else 1
        batches = list(self.cut(range(len(rows)), lambda i: length(rows[i]), of_processor))
        if of_processor > 1:
            done = self._abreast(through, batches, of_processor)
        elif self.abreast > 1 and len(batches) > 1:
            done = ahead(through, batches, self.abreast, depth=self.abreast)
        else:
            done = map(through, batches)
        out = {i: one for batch, found in done for i, one in zip(batch, found, strict=True)}
        return [out[i] for i in range(len(rows))]

    def _abreast(self, through: Callable[[T], R], batches: Sequence[T], most: int) -> Iterator[R]:
        """`through(batch)` of all, as many as there are, or `most`, at a time."""
        threads = torch.get_num_threads()
        workers = max(1, min(len(batches), most))

        def with_its_share(batch: T) -> R:
            torch.set_num_threads(threads // workers)
            return through(batch)

        if workers == 1:
            yield from map(through, batches)
            return
        try:
            yield from ahead(with_its_share, batches, workers, depth=2 * workers)
        finally:
            torch.set_num_threads(threads)  # some of it is the process's, not the thread's

    def embed(
        self,
        rows: Iterable[T],
        length: Callable[[T], int],
        forward: Callable[[list[T]], Iterable[np.ndarray]],
        dim: int,
        window: int = WINDOW,
    ) -> np.ndarray:
        """`forward` of all rows, taken a window at a time -> (n, dim) as it gives them, not normalised."""
        vectors = [vector for some in windows(rows, window) for vector in self.run(some, length, forward)]
        return np.stack(vectors) if vectors else np.empty((0, dim), np.float32)

    def _halving(self, batch: list[T], length: Callable[[T], int], forward: Callable[[list[T]], Iterable[R]]) -> list[R]:
        try:
            return list(forward(batch))
        except RuntimeError as error:
            if "out of memory" not in str(error).lower():
                raise
            freed = self.relieve()
            if len(batch) == 1 and not freed:
                raise OutOfMemory(
                    f"{self.device} has too little memory for one input of {length(batch[0])} tokens; "
                    "close other programs on it, use a smaller model, or load a language model with --quantize 4bit"
                ) from None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if freed:
            return self._halving(batch, length, forward)
        held = sum(map(length, batch)) if self.packed else len(batch) * length(batch[0])
        if held <= self.tokens:  # else it was cut before they became fewer
            self.tokens = max(1, self.tokens // 2)
        half = len(batch) // 2
        return self._halving(batch[:half], length, forward) + self._halving(batch[half:], length, forward)
