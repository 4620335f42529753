"""Rows of bytes in a file that only ever grows: what was written stays as it is, under those who have mapped it.

How many of the rows count stands elsewhere, in a sealed file; what a killed process has written behind them does not, and
the next one overwrites it.
"""

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from e5v_search.errors import from_os_error
from e5v_search.index.sealed import CHUNK, IndexDamaged


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


def opened(path: Path) -> int:
    """A descriptor for reading, for the caller to close. Raises IndexDamaged."""
    with _reading(path):
        return os.open(path, os.O_RDONLY)


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
