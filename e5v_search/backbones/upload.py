"""To a device and back while it computes: it never waits for what comes next, nor that for it."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

_log = logging.getLogger(__name__)


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    """(n,) int64 on `device`, which is not waited for: what it was given before may still be under way."""
    # a copy from other memory than pinned would wait
    return torch.tensor(values, dtype=torch.long, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class Link:
    """Between main memory and a device. `abreast` is how many threads keep the device busy: where it has streams, one waits
    for its results while the other launches what comes next; elsewhere it is waited for at once.
    """

    abreast = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.launching: AbstractContextManager[Any] = nullcontext()

    def floats(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """uint8 (n_i, ...) -> (n, ...) float32 on the device. They go over as bytes. For who is `launching`."""
        return torch.from_numpy(np.concatenate(pixels)).to(self.device).float()

    def fetch(self, launch: Callable[[], Tensor]) -> np.ndarray:
        """What `launch` gives, once it is computed."""
        found: np.ndarray = launch().cpu().numpy()
        return found


class Streams(Link):
    """A link to a CUDA device. `runtime` is torch.cuda, or what behaves like it."""

    abreast = 2

    def __init__(self, device: torch.device, runtime: Any = torch.cuda) -> None:
        super().__init__(device)
        self.launching = threading.Lock()
        self._runtime = runtime
        self._copying = runtime.Stream(device)
        self._buffers = deque(_Buffer(device, runtime) for _ in range(2))

    def floats(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """The copy is under way while the device is at what was launched before."""
        computing = self._runtime.current_stream(self.device)
        buffer = self._buffers[0]
        self._buffers.rotate()
        n = sum(some.nbytes for some in pixels)
        buffer.sent.synchronize()
        if n > len(buffer.pinned):
            buffer.grow(n, computing)
        np.concatenate([some.reshape(-1) for some in pixels], out=buffer.pinned[:n].numpy())
        with self._runtime.stream(self._copying):
            self._copying.wait_event(buffer.free)
            buffer.there[:n].copy_(buffer.pinned[:n], non_blocking=True)
            buffer.sent.record(self._copying)
        computing.wait_event(buffer.sent)
        floats = buffer.there[:n].float()
        buffer.free.record(computing)
        return floats.view(-1, *pixels[0].shape[1:])

    def fetch(self, launch: Callable[[], Tensor]) -> np.ndarray:
        """No two launch at a time, or there would be two batches in memory."""
        with self.launching:
            # asked for at once: later it would stand behind what others have launched meanwhile
            found = launch().to("cpu", non_blocking=True)
            done = self._runtime.Event(blocking=True)
            done.record(self._runtime.current_stream(self.device))
        done.synchronize()
        array: np.ndarray = found.numpy()
        return array


class _Buffer:
    """Bytes here and there. `sent`: here may be written anew; `free`: there may."""

    def __init__(self, device: torch.device, runtime: Any) -> None:
        self._device = device
        self.pinned, self.there = torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8, device=device)
        self.sent, self.free = runtime.Event(blocking=True), runtime.Event()

    def grow(self, n: int, computing: Any) -> None:
        n = 1 << (n - 1).bit_length()
        # both or neither: what is pinned says how much there is of both
        self.pinned, self.there = (
            torch.empty(n, dtype=torch.uint8, pin_memory=torch.cuda.is_available()),
            torch.empty(n, dtype=torch.uint8, device=self._device),
        )
        # it may have been something else's, which the computing stream is still to be done with
        self.free.record(computing)


def link(device: torch.device) -> Link:
    """The best that is seen to work with `device`."""
    if device.type != "cuda":
        return Link(device)
    try:
        made = Streams(device)
        works = carries(made)
    except RuntimeError as error:
        works, why = False, str(error).partition("\n")[0]
    else:
        why = "what came back is not what was sent"
    if works:
        return made
    _log.warning("%s is waited for after each batch: %s", device, why)
    return Link(device)


@torch.inference_mode()
def carries(link: Link) -> bool:
    """Whether pixels come over unharmed: more than there are buffers, of several sizes, on the heels of each other."""
    rng = np.random.default_rng(0)
    sent = [rng.integers(0, 256, (n, 3, 64, 64), np.uint8) for n in (1, 40, 3, 80, 1, 2, 80)]
    came = [link.floats([some, some[:1]]) for some in sent]
    back = [link.fetch(partial(torch.add, x, 1)) for x in came]
    return all(np.array_equal(x - 1, np.concatenate((some, some[:1]))) for x, some in zip(back, sent, strict=True))
