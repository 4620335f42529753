"""Vectors on disk, by what made them and of what: nothing is embedded twice, whatever ends a run.

One file for a fingerprint and a kind of input: a header, then records of one size, appended a block at a time and synced. A
kill leaves at most a torn last block, which the next run cuts off; a record whose checksum fails counts as absent.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from filelock import FileLock, Timeout

from e5v_search.errors import E5VError

_HEADER = 4096  # bytes, so that records begin at a page of memory
_FORMAT = "e5v-search vectors 1"
_KEY = 32  # bytes of SHA-256


class VectorFile:
    """Float32 vectors (dim,) by key of 32 bytes, for one writer at a time. A context manager."""

    def __init__(self, folder: Path, made_by: str, dim: int) -> None:
        """Opens or begins the file for `made_by` in `folder`. Raises E5VError when it cannot be written or is in use."""
        self.path = folder / f"{hashlib.sha256(made_by.encode()).hexdigest()[:24]}.vectors"
        self.dim = dim
        self._record = np.dtype([("key", f"V{_KEY}"), ("x", "<f4", (dim,)), ("check", "<u4")])
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(f"{self.path}.lock", timeout=0)
            self._lock.acquire()
        except Timeout:
            raise E5VError(f"another run is using the cache {folder}: wait for it, or give another with --cache") from None
        except OSError as error:
            raise self._unusable(error) from error
        try:
            self._file = self._opened(made_by)
            self._rows = self._read_keys()
        except BaseException as error:
            self._lock.release()
            if isinstance(error, OSError):
                raise self._unusable(error) from error
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._file.close()
        self._lock.release()

    def get(self, keys: Sequence[bytes]) -> dict[bytes, np.ndarray]:
        """The vectors that are there, by key."""
        rows = {key: self._rows[key] for key in keys if key in self._rows}
        if not rows:
            return {}
        records = np.memmap(self.path, self._record, "r", _HEADER, shape=(self._count,))
        found = {}
        for key, row in rows.items():
            record = records[row]
            if record["check"] == _check(key, record["x"].tobytes()):
                found[key] = np.array(record["x"])
        return found

    def put(self, keys: Sequence[bytes], x: np.ndarray) -> None:
        """Append vectors x (n, dim); they are on the disk when this returns."""
        block = np.zeros(len(keys), self._record)
        for record, key, row in zip(block, keys, np.asarray(x, "<f4"), strict=True):
            record["key"], record["x"], record["check"] = key, row, _check(key, row.tobytes())
        try:
            self._file.write(block.tobytes())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unusable(error) from error
        self._rows |= {key: self._count + i for i, key in enumerate(keys)}
        self._count += len(keys)

    def _opened(self, made_by: str) -> BinaryIO:
        header = {"format": _FORMAT, "made_by": made_by, "dim": self.dim}
        if not self._is_ours(header):
            temporary = self.path.with_suffix(".tmp")
            temporary.write_bytes(json.dumps(header).encode().ljust(_HEADER))
            temporary.replace(self.path)
        size = self.path.stat().st_size - _HEADER
        self._count = size // self._record.itemsize
        file = self.path.open("r+b")
        file.truncate(_HEADER + self._count * self._record.itemsize)
        file.seek(0, os.SEEK_END)
        return file

    def _is_ours(self, header: dict[str, Any]) -> bool:
        try:
            with self.path.open("rb") as file:
                found = json.loads(file.read(_HEADER))
        except (FileNotFoundError, ValueError):
            return False
        return bool(found == header)

    def _read_keys(self) -> dict[bytes, int]:
        if not self._count:
            return {}
        keys = np.memmap(self.path, self._record, "r", _HEADER, shape=(self._count,))["key"]
        return {key.tobytes(): row for row, key in enumerate(keys)}

    def _unusable(self, error: OSError) -> E5VError:
        return E5VError(f"the cache {self.path.parent} cannot be used ({error.strerror or error}); give another with --cache")


def _check(key: bytes, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(key))
