"""A collection as a folder for other programs, and for `import`: vectors.npy, items.parquet, export.json."""

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from e5v_search.catalog import VIEW, Put
from e5v_search.collection.core import Collection
from e5v_search.collection.rows import JSONL, PARQUET, json_lines, parquet, row
from e5v_search.collection.views import file_name
from e5v_search.errors import CollectionError, CollectionNotFound, UsageError, disk_full

DESCRIPTION = "export.json"
FORMAT = "e5v-search export"
DTYPE = "<f2"  # as the catalog has them: nothing is lost
_ABANDONED = 3600.0  # seconds after which an unfinished folder is taken for one of a killed process


def vectors_file(view: str) -> str:
    return file_name("vectors", view, ".npy")


def export(
    collection: Collection, out: str | os.PathLike[str], items: str = "parquet", overwrite: bool = False
) -> dict[str, Any]:
    """Write vectors (n, d) float16 of every view, and a row for each item in the same order, into the new folder `out`.

    The rows are those of one moment, whatever is written meanwhile. The folder appears when all is there. With `overwrite`
    it may take the place of an earlier export. Returns what export.json says. Raises UsageError for a place that holds
    anything else, CollectionNotFound for a collection without items, MissingPackage, DiskFull.
    """
    out = Path(os.path.realpath(Path(out).expanduser()))
    _check_place(out, overwrite)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}-{secrets.token_hex(4)}.unfinished")
    with _disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        _sweep(out)
        try:
            unfinished.mkdir()
            with collection.catalog.snapshot():
                described = _describe(collection, items)
                write_folder(unfinished, described, collection.catalog.dump())
            _put_in_place(unfinished, out)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return described


def _describe(collection: Collection, items: str) -> dict[str, Any]:
    catalog = collection.catalog
    n, dim = catalog.size(), catalog.dim
    if not n or dim is None:
        raise CollectionNotFound(f"collection {collection.path} is empty; there is nothing to export")
    return description(n, catalog.views, catalog.fingerprint, catalog.model, dim, catalog.roots(), items)


def description(
    n: int,
    views: Iterable[str],
    fingerprint: str | None,
    model: dict[str, Any] | None,
    dim: int,
    roots: Iterable[tuple[str, str]] = (),
    items: str = "parquet",
) -> dict[str, Any]:
    """What export.json says of a folder of `n` items; `fingerprint`, `model` and `dim` are of what made their vectors."""
    return {
        "format": FORMAT,
        "version": 1,
        "fingerprint": fingerprint,
        "model": model,
        "prompts": VIEW,
        "items": n,
        "dim": dim,
        "dtype": "float16",
        "files": {
            "items": PARQUET if items == "parquet" else JSONL,
            "vectors": {view: vectors_file(view) for view in views},
        },
        "roots": [{"path": path, "kind": kind} for path, kind in roots],
        "exported_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def write_folder(folder: Path, description: dict[str, Any], blocks: Iterable[Sequence[Put]]) -> None:
    """All files of an export, synced to the disk, into the empty `folder`: so many items as `description` says, in blocks."""
    dim, files = description["dim"], description["files"]
    with ExitStack() as stack:

        def new(name: str) -> IO[bytes]:
            return stack.enter_context(_synced(folder / name))

        vectors = {view: new(name) for view, name in files["vectors"].items()}
        for file in vectors.values():
            header = {"descr": DTYPE, "fortran_order": False, "shape": (description["items"], dim)}
            np.lib.format.write_array_header_1_0(file, header)
        rows = parquet if files["items"] == PARQUET else json_lines
        write = stack.enter_context(rows(new(files["items"]), description))
        nothing = np.zeros(dim, DTYPE)  # stands for a vector that an item does not have in a view yet
        for puts in blocks:
            write(map(row, puts))
            for view, file in vectors.items():
                file.write(b"".join(_vector(put, view, nothing).tobytes() for put in puts))
        new(DESCRIPTION).write(json.dumps(description, indent=1).encode("ascii") + b"\n")


def _vector(put: Put, view: str, nothing: np.ndarray) -> np.ndarray:
    if view == VIEW and view not in put.vectors:
        raise CollectionError(f"item {put.item_id} has no vector; see: e5v-search verify")
    vector: np.ndarray = put.vectors.get(view, nothing).astype(DTYPE, copy=False)
    return vector


@contextmanager
def _synced(path: Path) -> Iterator[IO[bytes]]:
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _check_place(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise UsageError(f"{out} is a file; give a folder that does not exist yet with --out")
    names = set(os.listdir(out))
    if not names:
        return
    if not is_export(out) or any(name not in (DESCRIPTION, PARQUET, JSONL) and not _is_vectors(name) for name in names):
        raise UsageError(f"{out} is not empty and no export of e5v-search; give a folder that does not exist yet with --out")
    if not overwrite:
        raise UsageError(f"{out} holds an export already; give another folder, or replace it with --overwrite")


def is_export(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / DESCRIPTION).read_bytes())["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _is_vectors(name: str) -> bool:
    return name.startswith("vectors") and name.endswith(".npy")


def _put_in_place(unfinished: Path, out: Path) -> None:
    before = None
    if out.is_dir():
        before = unfinished.with_name(f"{unfinished.name}.old")
        os.rename(out, before)
    try:
        os.rename(unfinished, out)
    except OSError:
        if before is not None:
            os.rename(before, out)
        raise
    if before is not None:
        shutil.rmtree(before, ignore_errors=True)


def _sweep(out: Path) -> None:
    """Remove what killed exports to the same place have left."""
    for left in out.parent.glob(f".{out.name}.*.unfinished"):
        if time.time() - left.stat().st_mtime > _ABANDONED:
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise disk_full(out) from error
        raise CollectionError(f"{out} cannot be written: {error.strerror or error}") from error
