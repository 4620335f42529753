"""What inputs begin with, and a memory of it: the next change to a photo then costs the tokens of its text alone."""

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from e5v_search.backbones.tiles import Tiles

_CONTENTS = 4096  # files whose pixels are remembered by name, 200 bytes each


@dataclass(frozen=True)
class Key:
    """Two inputs begin alike when the same ids stand before the same pixels. `picture` is their digest, or any name."""

    picture: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Beginning:
    """Token ids up to a picture, and the picture: to be computed from `tiles`, or computed already, `prefix`.

    A prefix is a tensor (layers, 2, length, key heads, d_head) of keys and values.
    """

    key: Key
    length: int  # tokens, the picture's among them
    tiles: Tiles | None = None
    prefix: Tensor | None = None


def digest(tiles: Tiles) -> str:
    h = hashlib.sha256(repr((tiles.size, tiles.grid)).encode())
    h.update(tiles.pixels.tobytes())
    return h.hexdigest()


def default_limit(device: torch.device) -> int:
    """Bytes: a tenth of a CUDA device, elsewhere 1 GiB. A 4:3 photo takes 306 MB in an 8B model in 16 bit."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory // 10)
    return 2**30


class PrefixMemory:
    """The prefixes that were used last, `limit` bytes at most; one that is larger is not kept. Safe in many threads.

    `hits` counts prefixes that were found, `misses` those that had to be computed.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.bytes = self.hits = self.misses = 0
        self._kept: OrderedDict[Key, Tensor] = OrderedDict()
        self._pictures: OrderedDict[str, str] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> Tensor | None:
        with self._lock:
            prefix = self._kept.get(key)
            if prefix is not None:
                self._kept.move_to_end(key)
                self.hits += 1
            return prefix

    def put(self, key: Key, prefix: Tensor) -> None:
        with self._lock:
            self.misses += 1
            if prefix.nbytes > self.limit:
                return
            if key in self._kept:
                self.bytes -= self._kept.pop(key).nbytes
            self._kept[key] = prefix
            self.bytes += prefix.nbytes
            while self.bytes > self.limit:
                self.bytes -= self._kept.popitem(last=False)[1].nbytes

    def clear(self) -> int:
        """Forget all -> bytes that this gave up."""
        with self._lock:
            freed, self.bytes = self.bytes, 0
            self._kept.clear()
            return freed

    def picture(self, content: str) -> str | None:
        """The digest of the picture that a file of this content hash holds, where it is known."""
        with self._lock:
            return self._pictures.get(content)

    def name_picture(self, content: str, picture: str) -> None:
        with self._lock:
            self._pictures[content] = picture
            if len(self._pictures) > _CONTENTS:
                self._pictures.popitem(last=False)
