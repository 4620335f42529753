"""Files that commands write."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from e5v_search.errors import E5VError

Write = Callable[[IO[bytes]], object]


@contextmanager
def reserved(path: Path) -> Iterator[Callable[[Write], None]]:
    """A function that saves a file at `path`, whole or not at all, given what writes into it.

    A place that cannot be written fails here already, before the work that the file is to hold.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        file = temporary.open("xb")
    except OSError as error:
        raise _unwritable(path, error) from error

    def save(write: Write) -> None:
        try:
            write(file)
            file.flush()
            os.fsync(file.fileno())
            file.close()
            temporary.replace(path)
        except OSError as error:
            raise _unwritable(path, error) from error

    try:
        yield save
    finally:
        with suppress(OSError):
            file.close()
        temporary.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> E5VError:
    return E5VError(f"{path} cannot be written: {error.strerror or error}; choose another place with --out")
