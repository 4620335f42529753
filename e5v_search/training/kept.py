"""What a teacher says of many items, made once and read from disk.

In the folder: `KEY.npy`, which is whole or not there, and while it is made `KEY.partial`, the distinct items' rows in
blocks. A block is begun only when the one before it is on the disk, so a run that was killed goes on from there.
"""

import os
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from filelock import FileLock

from e5v_search.errors import E5VError
from e5v_search.parallel import windows

DTYPE = np.dtype("<f2")  # cosines to 1e-4, far below what tells items apart

T = TypeVar("T", bound=Hashable)
Make = Callable[[Sequence[T]], np.ndarray]


def kept_rows(
    items: Sequence[T], load: Callable[[], Make[T]], key: str, folder: Path, block: int, unit: str, say: Callable[[str], None]
) -> np.ndarray:
    """(n, d) float16 in the order of `items`, memory-mapped and read-only; nothing is made twice.

    `load` readies the teacher, only when it is needed; what it returns makes the rows (m, d) of m items. `folder` is
    created. `key` names the file: the teacher and all items. Several processes may ask at once: one makes the file, the
    others wait for it. Raises E5VError when the folder cannot be written.
    """
    path = folder / f"{key}.npy"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            rows = _opened(path, len(items))
            if rows is None:
                partial, distinct = path.with_suffix(".partial"), list(dict.fromkeys(items))
                dim = _grow(distinct, load(), partial, block, unit, say)
                _write(items, distinct, partial, dim, block, path)
                partial.unlink()
                rows = _opened(path, len(items))
    except OSError as error:
        raise E5VError(
            f"the teacher's vectors cannot be kept in {folder} ({error.strerror or error}); what is on the disk stays: "
            "make room or give another folder, and run the same command again"
        ) from error
    assert rows is not None
    return rows


def _opened(path: Path, n: int) -> np.ndarray | None:
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r")
    except (FileNotFoundError, ValueError, EOFError):  # cut short by other hands: made anew
        return None
    return rows if rows.shape[:1] == (n,) else None


def _grow(items: list[T], make: Make[T], partial: Path, block: int, unit: str, say: Callable[[str], None]) -> int:
    """The rows of distinct items into `partial`, from where it ends -> d"""
    dim = int(make(items[:1]).shape[1])
    size = block * dim * DTYPE.itemsize
    with partial.open("ab") as file:
        # the last block may be torn, or not have reached the disk; those before it were synced
        done = first = max(0, (file.tell() - 1) // size) * block
        file.truncate(first * dim * DTYPE.itemsize)
        started = time.monotonic()
        for some in windows(items[first:], block):
            file.write(make(some).astype(DTYPE).tobytes())
            file.flush()
            os.fsync(file.fileno())
            done += len(some)
            rate = (done - first) / (time.monotonic() - started)
            say(f"{done:,} of {len(items):,} {unit}, {rate:.0f} a second, {(len(items) - done) / rate / 60:.0f} min left")
    return dim


def _write(items: Sequence[T], distinct: list[T], partial: Path, dim: int, block: int, path: Path) -> None:
    """A row for each item, duplicates too, as a whole .npy file."""
    rows = np.memmap(partial, DTYPE, "r", shape=(len(distinct), dim))
    at = {item: i for i, item in enumerate(distinct)}
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": DTYPE.str, "fortran_order": False, "shape": (len(items), dim)})
        for some in windows(items, block):
            file.write(rows[[at[item] for item in some]].tobytes())
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
