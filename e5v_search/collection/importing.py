"""A folder of vectors, ours or another program's, as a new collection, with nothing embedded.

Everything is read and checked before the first item is written, and then written as one commit.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from e5v_search.catalog import KINDS, VIEW, Put
from e5v_search.collection.core import UNKNOWN_MODEL, Collection
from e5v_search.collection.exporting import DESCRIPTION, FORMAT, vectors_file
from e5v_search.collection.rows import JSONL, PARQUET, count_rows, read, read_metadata, to_put
from e5v_search.collection.views import is_view
from e5v_search.embedder import Embedder
from e5v_search.errors import CollectionError, UsageError

_BLOCK = 4096
_DESCRIBED: dict[str, type] = {"fingerprint": str, "model": dict, "dim": int, "files": dict, "roots": list}
_UNIT_TOLERANCE = 0.01  # a float16 row of 4,096 numbers has length 1 to about 1e-3


@dataclass
class Imported:
    """What `import_folder` has done."""

    path: str
    fingerprint: str
    items: int
    dim: int
    views: list[str]
    normalised: int  # vectors that had to be brought to length 1

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "path"} | {"collection": self.path}


def import_folder(folder: str | os.PathLike[str], place: str | os.PathLike[str], embedder: Embedder | None = None) -> Imported:
    """Make the collection `place` of vectors.npy in `folder`, with items.parquet or items.jsonl where there is one.

    Vectors of an export come back bit by bit, with their ids. `embedder` is the model that made vectors which do not say
    so themselves; without it they can be compared with each other alone. Raises UsageError or CollectionError with the
    file and row of what does not fit, and CollectionError where the collection holds items already.
    """
    source = _Source(Path(os.path.realpath(Path(folder).expanduser())), embedder)
    for _ in source.puts():
        pass
    normalised = source.normalised
    with Collection.open(place) as collection:
        collection.load(source.puts(), source.fingerprint, source.dim, source.model, source.views, source.roots)
        return Imported(str(collection.path), source.fingerprint, source.n, source.dim, source.views, normalised)


class _Source:
    """The folder, and what it says of itself: opened, but not read yet."""

    def __init__(self, folder: Path, embedder: Embedder | None) -> None:
        if not (folder / vectors_file(VIEW)).is_file():
            raise UsageError(f"{folder / vectors_file(VIEW)} is not there; give the folder of an export, or one with that file")
        self.folder = folder
        self.items = next((folder / name for name in (PARQUET, JSONL) if (folder / name).is_file()), None)
        description = _description(folder, self.items)
        self.views = list(description.get("files", {}).get("vectors", {})) or [VIEW]
        self._x = {view: open_vectors(folder / vectors_file(view)) for view in self.views}
        self.n: int = self._x[VIEW].shape[0]
        self.dim: int = self._x[VIEW].shape[1]
        self.fingerprint: str = description.get("fingerprint", UNKNOWN_MODEL)
        self.model: dict[str, Any] = description.get("model", {"name": UNKNOWN_MODEL, "quantize": None})
        if embedder is not None and self.fingerprint == UNKNOWN_MODEL:
            self.fingerprint = embedder.fingerprint
            self.model = embedder.recalled_by
            self._check_dim(embedder.dim, f"the vectors of {embedder.fingerprint}")
        if "dim" in description:
            self._check_dim(description["dim"], f"the description of {folder}")
        for view, x in self._x.items():
            if x.shape != (self.n, self.dim):
                raise CollectionError(
                    f"{folder / vectors_file(view)} is {_shape(x)}, but vectors.npy is {_shape(self._x[VIEW])}"
                )
        self.roots = [(root["path"], root["kind"]) for root in description.get("roots", ())]
        self.normalised = 0
        if self.items is not None and (rows := count_rows(self.items)) != self.n:
            raise CollectionError(f"{self.items} has {rows:,} rows, but vectors.npy has {self.n:,}: each vector needs its row")

    def _check_dim(self, dim: int, whose: str) -> None:
        if self.dim != dim:
            raise CollectionError(f"{self.folder / vectors_file(VIEW)} has {self.dim} numbers a row, but {whose} has {dim}")

    def puts(self) -> Iterator[Put]:
        """The items with their vectors; raises CollectionError, with file and row, for the first that does not fit."""
        self.normalised = 0
        rows = self._rows()
        distinct = _Distinct()
        for start in range(0, self.n, _BLOCK):
            vectors = {view: self._unit(view, start) for view in self.views}
            for i in range(min(_BLOCK, self.n - start)):
                put = next(rows)
                put.vectors = {view: x[i] for view, x in vectors.items() if view == VIEW or x[i].any()}
                distinct.add(put)
                yield put
        distinct.check(self.items)

    def _rows(self) -> Iterator[Put]:
        if self.items is None:
            for number in range(self.n):
                yield to_put({}, f"row {number}", number, self.folder)
            return
        for number, (place, row) in enumerate(read(self.items)):
            yield to_put(row, place, number, self.folder)

    def _unit(self, view: str, start: int) -> np.ndarray:
        """Rows (n, d) float16 of length 1, those that have it as they are; in other views than VIEW a row may be all zeros."""
        x = np.asarray(self._x[view][start : start + _BLOCK])
        exact = x.astype(np.float64) if x.dtype.itemsize > 4 else x.astype(np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            norms = np.linalg.norm(exact, axis=1)
        wrong = ~np.isfinite(norms) | ((norms == 0) & (view == VIEW))
        if wrong.any():
            row = int(wrong.argmax())
            what = "is all zeros" if norms[row] == 0 else "holds a number that is not finite"
            raise CollectionError(f"{self.folder / vectors_file(view)}, row {start + row} (from 0): the vector {what}")
        long = (np.abs(norms - 1) > _UNIT_TOLERANCE) & (norms > 0)
        self.normalised += int(long.sum())
        exact[long] /= norms[long, None]
        half: np.ndarray = exact.astype("<f2")
        return half


class _Distinct:
    """Whether all items have ids, and places in files, of their own. 24 bytes an item."""

    def __init__(self) -> None:
        self._ids, self._first, self._second = array("q"), array("Q"), array("Q")

    def add(self, put: Put) -> None:
        place = f"no file {put.item_id}" if put.path is None else "\0".join((put.path, put.kind, put.part))
        digest = hashlib.blake2b(place.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self._ids.append(put.item_id or 0)
        self._first.append(int.from_bytes(digest[:8]))
        self._second.append(int.from_bytes(digest[8:]))

    def check(self, items: Path | None) -> None:
        for what, *columns in (("id", self._ids), ("path, kind and part", self._first, self._second)):
            keys = [np.frombuffer(column, dtype=column.typecode) for column in columns]
            order = np.lexsort([np.arange(len(keys[0])), *keys])
            same = np.logical_and.reduce([key[order][1:] == key[order][:-1] for key in keys])
            if same.any():
                first, second = order[same.argmax()], order[same.argmax() + 1]
                raise CollectionError(f"{items}, row {second} (from 0): it has the {what} of row {first}; each needs its own")


def _description(folder: Path, items: Path | None) -> dict[str, Any]:
    path = folder / DESCRIPTION
    if not path.is_file():
        described = read_metadata(items) if items is not None and items.name == PARQUET else None
        return {} if described is None else _checked(described, items)
    try:
        return _checked(json.loads(path.read_bytes()), path)
    except (OSError, ValueError) as error:
        raise CollectionError(f"{path} is damaged ({error}); without it the vectors are taken as of no known model") from error


def _checked(description: Any, path: Path | None) -> dict[str, Any]:
    if not isinstance(description, dict) or (description.get("format"), description.get("version")) != (FORMAT, 1):
        raise CollectionError(f"{path} is no description of an export, or one of a newer e5v-search: upgrade, or remove it")
    try:
        wrong = [name for name, type_ in _DESCRIBED.items() if not isinstance(description[name], type_)]
        wrong += [f"view {view}" for view in description["files"]["vectors"] if not is_view(view)]
        wrong += [
            f"root {root}" for root in description["roots"] if root["kind"] not in KINDS or not os.path.isabs(root["path"])
        ]
    except (KeyError, TypeError) as error:
        wrong = [str(error)]
    if wrong:
        raise CollectionError(
            f"{path}: missing or wrong: {', '.join(wrong)}; without it the vectors are taken as of no known model"
        )
    return description


def open_vectors(path: Path) -> np.ndarray:
    """The array (n, d) in `path`, on the disk. Raises CollectionError."""
    try:
        x: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError as error:
        raise CollectionError(f"{path} is not there") from error
    except (OSError, ValueError, EOFError) as error:
        raise CollectionError(f"{path} is cut short, or no .npy file of numbers ({error})") from error
    if x.ndim != 2 or not x.size or x.dtype.kind != "f":
        raise CollectionError(f"{path} is {_shape(x)}; rows of floating-point numbers are needed, one for each vector")
    return x


def _shape(x: np.ndarray) -> str:
    return f"{' x '.join(f'{n:,}' for n in x.shape) or 'one number'} {x.dtype}"
