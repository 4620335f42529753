"""FAISS: the nearest rows of a collection. Derived from the catalog, and always rebuildable from it.

An index file holds FAISS's own bytes, which a plain `faiss.read_index` reads too, and after them a trailer

    JSON {"uid", "state", "kind", "d", "ntotal", "crc32" of FAISS's bytes} | crc32 of the JSON | its length | magic

so that a file cut short or altered in any bit is known before FAISS, which may end the process over it, sees a byte.
"""

import json
import os
import secrets
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import IO, Any, ClassVar, Self

import numpy as np

from e5v_search.errors import CollectionError, MissingPackage, from_os_error

_WHEELS = ("faiss", "faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss-gpu-cuvs")
_MAGIC = b"e5vindex"
_FOOTER = struct.Struct("<II8s")
_CHUNK = 1 << 20  # bytes
_GATHERED = 1 << 26  # bytes of rows that a search of few of them may copy
_ABANDONED = 3600.0  # seconds after which a temporary file is taken for one of a killed process


@dataclass(frozen=True)
class Stamp:
    """What an index holds: everything that the catalog `uid` held when it had reached `state`."""

    uid: str
    state: int


class IndexDamaged(Exception):
    """The index file is missing, cut short, altered or of another kind. A sign to rebuild it, which users never meet."""


def faiss_problem() -> str | None:
    """What keeps FAISS from working here, with the line that mends it; None when it is installed as it should be."""
    present = [name for name in _WHEELS if _installed(name)]
    if len(present) > 1:
        return (
            f"{' and '.join(present)} are both installed and overwrite each other; mend it with: "
            f"pip uninstall -y {' '.join(present)} && pip install faiss-cpu   (or faiss-gpu in its place)"
        )
    if util.find_spec("faiss") is None:
        return "FAISS is not installed; mend it with: pip install faiss-cpu   (or faiss-gpu, for an NVIDIA GPU)"
    return None


def _installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


@cache
def _faiss() -> Any:
    problem = faiss_problem()
    if problem is not None:
        raise MissingPackage(problem)
    try:
        import faiss
    except ImportError as error:
        raise MissingPackage(
            f"FAISS cannot be loaded ({error}); mend it with: pip install --force-reinstall --no-deps faiss-cpu"
        ) from error
    return faiss


@contextmanager
def _faiss_errors() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        raise CollectionError(f"FAISS failed ({first}); make the index anew with: e5v-search rebuild") from error


class Index:
    """Rows of half precision, scanned whole; the score of a row is its inner product with the query.

    xb (n, d) are rows, xq (nq, d) queries, D (nq, k) scores, I (nq, k) ids. Searches may run in several threads at once;
    changes may not run beside anything else.
    """

    kind: ClassVar[str] = "flat-fp16"

    def __init__(self, index: Any, stamp: Stamp) -> None:
        self._index = index
        self._places: _Places | None = None
        self.stamp = stamp

    @property
    def d(self) -> int:
        return int(self._index.d)

    @property
    def ntotal(self) -> int:
        return int(self._index.ntotal)

    @classmethod
    def empty(cls, d: int) -> Self:
        faiss = _faiss()
        rows = faiss.IndexScalarQuantizer(d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        return cls(faiss.IndexIDMap(rows), Stamp("", 0))

    @classmethod
    def build(cls, d: int, blocks: Iterable[tuple[np.ndarray, np.ndarray]]) -> Self:
        """An index of all `blocks` of (ids (n,), x (n, d)); of an id that comes again the later row counts."""
        index = cls.empty(d)
        seen: set[int] = set()
        for ids, x in blocks:
            block = ids.tolist()
            index.put(ids, x, new=seen.isdisjoint(block))
            seen.update(block)
        return index

    def put(self, ids: np.ndarray, x: np.ndarray, *, new: bool = False) -> None:
        """Add rows x (n, d) under distinct ids (n,), in place of those they had. `new`: the caller knows that they had none."""
        x = self._matrix(x)
        ids = np.ascontiguousarray(ids, dtype=np.int64)
        if ids.shape != (len(x),) or len(np.unique(ids)) != len(ids):
            raise ValueError(f"{len(x)} rows need as many distinct ids, not {ids.shape}")
        if not new:
            self.remove(ids)
        self._places = None
        with _faiss_errors():
            self._index.add_with_ids(x, ids)

    def remove(self, ids: np.ndarray) -> None:
        """Remove the rows of these ids (n,); ids that are not there are passed over."""
        if len(ids) and self.ntotal:
            self._places = None
            with _faiss_errors():
                self._index.remove_ids(np.ascontiguousarray(ids, dtype=np.int64))

    def ids(self) -> np.ndarray:
        """(ntotal,) int64, in the order of storage; not to be written to."""
        return self._held().ids

    def vectors(self, ids: np.ndarray) -> np.ndarray:
        """The rows (n, d) float32 of ids (n,). Raises KeyError for one that is not there."""
        places = self._held().of(ids)
        if (places < 0).any():
            raise KeyError(int(np.asarray(ids)[places < 0][0]))
        with _faiss_errors():
            rows: np.ndarray = self._index.index.reconstruct_batch(places)
        return rows

    def _held(self) -> "_Places":
        if self._places is None:
            self._places = _Places(_faiss().vector_to_array(self._index.id_map))
        return self._places

    def search(self, xq: np.ndarray, k: int, ids: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The k best rows for each query, among `ids` only where given: D float32, I int64, both (nq, k).

        Best first, of equal scores the smaller id first. With fewer than k rows to choose from there are as many columns
        as rows; nothing is padded. A row scores the same whether or not there are `ids`.
        """
        xq = self._matrix(xq)
        if ids is None:
            return _best(self._index, xq, k, self.ntotal)
        places = np.unique(self._held().of(ids))
        places = places[places >= 0]
        faiss = _faiss()
        rows = faiss.downcast_index(self._index.index)
        # to copy few rows is cheaper than to ask of each of all whether it is meant
        if 16 * len(places) <= self.ntotal and len(places) * rows.code_size <= _GATHERED:
            codes = faiss.rev_swig_ptr(rows.codes.data(), self.ntotal * rows.code_size).reshape(self.ntotal, -1)
            few = faiss.IndexScalarQuantizer(self.d, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
            few.add_sa_codes(codes[places])
            return _best(few, xq, k, len(places), self._held().ids[places])
        chosen = np.zeros(self.ntotal, dtype=bool)
        chosen[places] = True
        selector = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(np.packbits(chosen, bitorder="little")))
        return _best(rows, xq, k, len(places), self._held().ids, selector)

    def _matrix(self, x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(x, dtype=np.float32)
        if x.ndim != 2 or x.shape[1] != self.d:
            raise ValueError(f"rows of {self.d} numbers are needed, not an array {x.shape}")
        if not np.isfinite(x).all():
            raise ValueError("a row holds a number that is not finite")
        return x

    def save(self, path: Path) -> None:
        """Write the index to `path`, wholly or not at all: what was there stays until the new file is on the disk.

        Raises DiskFull, CollectionReadOnly, CollectionError.
        """
        faiss = _faiss()
        fresh = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        _sweep(path)
        try:
            try:
                with open(fresh, "xb") as file:
                    summed = _Summed(file)
                    with _faiss_errors():
                        faiss.write_index(self._index, faiss.PyCallbackIOWriter(summed.write, _CHUNK))
                    facts = {"kind": self.kind, "d": self.d, "ntotal": self.ntotal, "crc32": summed.crc32}
                    text = json.dumps({"uid": self.stamp.uid, "state": self.stamp.state, **facts}).encode()
                    file.write(text + _FOOTER.pack(zlib.crc32(text), len(text), _MAGIC))
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(fresh, path)
                _sync_folder(path.parent)
            finally:
                fresh.unlink(missing_ok=True)
        except OSError as error:
            raise from_os_error(error, path) from error

    @classmethod
    def load(cls, path: Path) -> Self:
        """The index in `path`, all of it in memory. Raises IndexDamaged."""
        with _opened(path) as file:
            trailer, size = _read_trailer(file)
            if trailer["kind"] != cls.kind:
                raise IndexDamaged(f"it is of the kind {trailer['kind']!r}, which is unknown here")
            file.seek(0)
            crc32 = 0
            for start in range(0, size, _CHUNK):
                crc32 = zlib.crc32(file.read(min(_CHUNK, size - start)), crc32)
            if crc32 != trailer["crc32"]:
                raise IndexDamaged("its checksum is wrong")
            file.seek(0)
            faiss = _faiss()
            try:
                index = faiss.read_index(faiss.PyCallbackIOReader(file.read, _CHUNK))
            except RuntimeError as error:
                raise IndexDamaged(f"FAISS cannot read it: {str(error).partition(chr(10))[0]}") from error
        if (index.d, index.ntotal) != (trailer["d"], trailer["ntotal"]):
            raise IndexDamaged("it does not hold what its trailer says")
        return cls(index, Stamp(trailer["uid"], trailer["state"]))

    @staticmethod
    def read_stamp(path: Path) -> Stamp:
        """The stamp alone, in no time; the rest of the file is not looked at. Raises IndexDamaged."""
        with _opened(path) as file:
            trailer, _ = _read_trailer(file)
        return Stamp(trailer["uid"], trailer["state"])


class _Places:
    """Where each id's row is stored."""

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids
        ascending = bool((ids[1:] > ids[:-1]).all())
        # what was only ever added to, as most collections are, needs no sorting
        self._order = None if ascending else np.argsort(ids)
        self._sorted = ids if self._order is None else ids[self._order]

    def of(self, ids: np.ndarray) -> np.ndarray:
        """The place (n,) int64 of each of ids (n,), -1 for what is not there."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        at = np.minimum(np.searchsorted(self._sorted, ids), len(self.ids) - 1)
        return np.where(self._sorted[at] == ids, at if self._order is None else self._order[at], -1)


def _best(
    rows: Any, xq: np.ndarray, k: int, candidates: int, names: np.ndarray | None = None, chosen: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """`Index.search` in FAISS's `rows`, of which `candidates` are `chosen`; `names` are their ids, where FAISS has others."""
    k = min(k, candidates)
    if k < 1 or not len(xq):
        return np.empty((len(xq), 0), np.float32), np.empty((len(xq), 0), np.int64)
    width = k
    tied = True
    while tied:
        # copies of a photo score the same: look on until the last score that counts has no further equals
        width = min(4 * width if width > k else k + 1, candidates)
        with _faiss_errors():
            D, I = rows.search(xq, width, params=chosen)  # noqa: E741
        tied = width < candidates and bool((D[:, k - 1] == D[:, -1]).any())
    if names is not None:
        I = names[I]  # noqa: E741
    order = np.lexsort((I, -D), axis=-1)[:, :k]
    return np.take_along_axis(D, order, axis=1), np.take_along_axis(I, order, axis=1)


class _Summed:
    """A file being written, and the checksum of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.crc32 = 0

    def write(self, data: bytes) -> int:
        self.crc32 = zlib.crc32(data, self.crc32)
        return self._file.write(data)


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
    """The trailer, and how many bytes of FAISS lie before it."""
    size = file.seek(0, os.SEEK_END) - _FOOTER.size
    if size < 0:
        raise IndexDamaged("it is cut short")
    file.seek(size)
    crc32, length, magic = _FOOTER.unpack(file.read(_FOOTER.size))
    if magic != _MAGIC or length > size:
        raise IndexDamaged("it is cut short, or no index")
    file.seek(size - length)
    text = file.read(length)
    if zlib.crc32(text) != crc32:
        raise IndexDamaged("the checksum of its trailer is wrong")
    trailer: dict[str, Any] = json.loads(text)
    return trailer, size - length


def _sweep(path: Path) -> None:
    """Remove what killed processes left of `path`."""
    for left in path.parent.glob(f"{path.name}.*.tmp"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > _ABANDONED:
                left.unlink()


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":  # elsewhere a folder cannot be opened, and a rename is durable by itself
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
