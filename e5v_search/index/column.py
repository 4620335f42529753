"""Rows of bytes in a file that only ever grows: what was written stays as it is, under those who have mapped it.

How many of the rows count stands elsewhere, in a sealed file; what a killed process has written behind them does not, and
the next one overwrites it.
"""

import os
import time
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from e5v_search.errors import CollectionError, from_os_error
from e5v_search.index.sealed import CHUNK, IndexDamaged

_AT_HAND = 1e-5  # seconds in which a row is had that need not be waited for


def append(path: Path, blocks: Iterable[np.ndarray], at: int = 0, crc32: int = 0) -> tuple[int, int]:
    """Write blocks of rows behind the first `at` bytes, of which `crc32` is the checksum. Returns both for all of it, synced.

    Raises DiskFull, CollectionReadOnly, CollectionError.
    """
    try:
        with open(path, "r+b" if at else "wb") as file:
            file.truncate(at)
            file.seek(at)
            for block in blocks:
                data = np.ascontiguousarray(block).view(np.uint8).reshape(-1).data
                crc32 = zlib.crc32(data, crc32)
                at += file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise from_os_error(error, path) from error
    return at, crc32


def mapped(path: Path, size: int) -> np.ndarray:
    """The first `size` bytes, mapped. Raises IndexDamaged if there are fewer."""
    with _reading(path):
        if path.stat().st_size < size:
            raise IndexDamaged(f"{path.name} is cut short")
        data: np.ndarray = np.asarray(np.memmap(path, np.uint8, "r", shape=(size,)))
    return data


class Reader:
    """Few rows of `size` bytes at a time, from anywhere in a file, which stays open as long as this. Raises IndexDamaged."""

    def __init__(self, path: Path, size: int) -> None:
        self._path = path
        self._size = size
        with _reading(path):
            self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)
        self._waited = True

    def read(self, places: np.ndarray, into: np.ndarray) -> None:
        """Put those at places (n,) into (n, size) uint8. Raises CollectionError."""
        began = time.perf_counter()
        starts = (places * self._size).tolist()
        if self._waited and hasattr(os, "posix_fadvise"):
            # told of all of them, a disk has them soon; else it is asked for one after the other, with much around each
            for at in starts:
                os.posix_fadvise(self._file, at, self._size, os.POSIX_FADV_WILLNEED)
        try:
            memory = into.reshape(-1).data
            ends = range(self._size, len(memory) + 1, self._size)
            had = sum(os.preadv(self._file, (memory[e - self._size : e],), at) for e, at in zip(ends, starts, strict=True))
        except OSError as error:
            raise CollectionError(f"{self._path} cannot be read: {error.strerror or error}") from error
        self._waited = time.perf_counter() - began > _AT_HAND * len(places)
        if had != len(memory):
            raise CollectionError(f"{self._path.name} was cut short; make the index anew with: e5v-search rebuild")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise IndexDamaged(f"{path.name} is missing") from error
    except OSError as error:
        raise IndexDamaged(f"{path.name} cannot be read: {error.strerror or error}") from error


def checksum(data: np.ndarray) -> int:
    """Of bytes (n,); reads all of them."""
    crc32 = 0
    for start in range(0, len(data), CHUNK):
        crc32 = zlib.crc32(data[start : start + CHUNK].data, crc32)
    return crc32


def remove_files(path: Path, keep: Iterable[str | None] = ()) -> None:
    """Remove the files of rows and codes beside `path`, but for those to `keep`. The caller holds the write lock."""
    kept = set(keep)
    for suffix in ("rows", "codes"):
        for left in path.parent.glob(f"{path.name}.*.{suffix}"):
            if left.name not in kept:
                with suppress(OSError):  # where a mapped file cannot be removed, the next writer does it
                    left.unlink()
