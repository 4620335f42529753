"""Files and folders that are there whole or not at all, whatever is killed and whichever disk is full."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from e5v_search.errors import FULL, DiskFull, E5VError, ModelError, UsageError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` at the end, on the disk and not only on its way there.

    Raises DiskFull, or ModelError with the system's reason; `path` is then as it was.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _worded(error, path) from error
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `path` at the end. What a killed run left of one is cleared away.

    Raises UsageError when `path` holds something already, and what `replacing` does.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UsageError(f"{path} is there already: give a folder that is new or empty")
    partial = path.with_name(path.name + ".partial")
    try:
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir(parents=True)
        yield partial
        for file in partial.rglob("*"):
            if file.is_dir():
                continue
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        _sync(partial)
        partial.rename(path)
        _sync(path.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise _worded(error, path) from error
        raise


def write_json(path: Path, data: Mapping[str, Any] | Sequence[Any]) -> None:
    """See `replacing`."""
    with replacing(path) as file:
        file.write(json.dumps(data, indent=2).encode() + b"\n")


def _worded(error: OSError, path: Path) -> E5VError:
    if error.errno in FULL:
        what = f"no space left on the disk of {path}; what was saved before is whole"
        return DiskFull(f"{what}: free some space and run the same command again")
    return ModelError(f"{path} cannot be written: {error.strerror or error}")


def _sync(folder: Path) -> None:
    """A new name in `folder` is on the disk when this returns."""
    if os.name == "posix":  # elsewhere a folder cannot be opened, and a rename is durable by itself
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
