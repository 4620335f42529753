"""A file that is written wholly or not at all, and of which any altered bit is known before it is used.

Behind its bytes follows a trailer

    JSON of facts, with "crc32" of the bytes | crc32 of the JSON | its length | magic

so that what reads the bytes, FAISS say, which may end the process over damaged ones, need not know of it.
"""

import json
import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from e5v_search.errors import from_os_error

MAGIC = b"e5vindex"
FOOTER = struct.Struct("<II8s")
CHUNK = 1 << 20  # bytes
ABANDONED = 3600.0  # seconds after which a temporary file is taken for one of a killed process


class IndexDamaged(Exception):
    """An index file is missing, cut short, altered or of another kind. A sign to rebuild it, which users never meet."""


class Summed:
    """A file being written, and the checksum of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.crc32 = 0

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return self._file.write(data)


@contextmanager
def sealing(path: Path, facts: Mapping[str, Any]) -> Iterator[Summed]:
    """What is written inside takes the place of `path`, sealed, at the end; what was there stays until it is on the disk.

    Raises DiskFull, CollectionReadOnly, CollectionError.
    """
    fresh = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    _sweep(path)
    try:
        try:
            with open(fresh, "xb") as file:
                summed = Summed(file)
                yield summed
                text = json.dumps({**facts, "crc32": summed.crc32}).encode()
                file.write(text + FOOTER.pack(zlib.crc32(text), len(text), MAGIC))
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
            _sync_folder(path.parent)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise from_os_error(error, path) from error


@contextmanager
def unsealed(path: Path) -> Iterator[tuple[dict[str, Any], IO[bytes]]]:
    """The facts of a sealed file, and the file, at its beginning, once its checksum is right. Raises IndexDamaged."""
    with _opened(path) as file:
        facts, size = _read_trailer(file)
        file.seek(0)
        crc32 = 0
        for start in range(0, size, CHUNK):
            crc32 = zlib.crc32(file.read(min(CHUNK, size - start)), crc32)
        if crc32 != facts["crc32"]:
            raise IndexDamaged("its checksum is wrong")
        file.seek(0)
        yield facts, file


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone, in no time; the rest of the file is not looked at. Raises IndexDamaged."""
    with _opened(path) as file:
        return _read_trailer(file)[0]


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise IndexDamaged("it is missing") from error
    except OSError as error:
        raise IndexDamaged(f"it cannot be read: {error.strerror or error}") from error


def _read_trailer(file: IO[bytes]) -> tuple[dict[str, Any], int]:
    """The facts, and how many bytes lie before them."""
    size = file.seek(0, os.SEEK_END) - FOOTER.size
    if size < 0:
        raise IndexDamaged("it is cut short")
    file.seek(size)
    crc32, length, magic = FOOTER.unpack(file.read(FOOTER.size))
    if magic != MAGIC or length > size:
        raise IndexDamaged("it is cut short, or no index")
    file.seek(size - length)
    text = file.read(length)
    if zlib.crc32(text) != crc32:
        raise IndexDamaged("the checksum of its trailer is wrong")
    facts: dict[str, Any] = json.loads(text)
    return facts, size - length


def _sweep(path: Path) -> None:
    """Remove what killed processes left of `path`."""
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > ABANDONED:
                left.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and a rename is durable by itself
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
