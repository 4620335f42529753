"""Rows in lists around centres, each held in one bit a number: a search looks only into the lists near the query."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from e5v_search.index import column
from e5v_search.index.coded import Coded, over, parameters
from e5v_search.index.library import faiss_errors, library
from e5v_search.index.recipe import Recipe, lists_for
from e5v_search.index.rows import Rows
from e5v_search.index.scan import BLOCK, SEED, opened, serialised
from e5v_search.index.sealed import IndexDamaged

_SAMPLE = 40  # rows for each list that k-means sees
_ROUNDS = 10
GROWTH = 4  # times as many lists as there are: then the centres are found anew


class Ivf(Coded):
    """The file of codes holds list after list, first its codes, then the positions of its rows (int64)."""

    kind: ClassVar[str] = "ivf"

    def __init__(self, rows: Rows, recipe: Recipe, head: bytes, facts: dict[str, Any], folder: Path) -> None:
        super().__init__(rows, recipe, head, facts, folder)
        faiss = library()
        self._coarse = over(rows.ntotal, head)
        self._ivf = faiss.downcast_index(self._coarse.index)
        self._sizes = np.array(facts["lists"], np.int64)
        width = self._ivf.code_size + 8
        if self._sizes.sum() != rows.ntotal or len(self._sizes) != self._ivf.nlist:
            raise IndexDamaged("its lists do not hold its rows")
        self._offsets = np.concatenate([[0], np.cumsum(self._sizes)]) * width
        self._data = column.mapped(self.codes, int(self._offsets[-1]))
        # read before FAISS follows them out of the rows
        if any(len(ids) and not 0 <= ids.min() <= ids.max() < rows.ntotal for _, ids in self._lists()):
            raise IndexDamaged(f"{self.codes.name} has rows that are not there")
        self._mapped = self._as_lists()
        self._ivf.replace_invlists(self._mapped, False)
        self._ivf.ntotal = rows.ntotal

    def _lists(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Codes (m, code_size) and positions (m,) of each list."""
        for size, start, stop in zip(self._sizes, self._offsets, self._offsets[1:], strict=False):
            ids = stop - 8 * size
            yield self._data[start:ids].reshape(size, self._ivf.code_size), np.frombuffer(self._data[ids:stop], np.int64)

    def _as_lists(self) -> Any:
        faiss = library()
        lists = faiss.OnDiskInvertedLists()
        lists.nlist, lists.code_size, lists.filename = self._ivf.nlist, self._ivf.code_size, str(self.codes)
        lists.totsize, lists.read_only = int(self._offsets[-1]), True
        lists.prefetch_nthread = 0  # to start threads takes longer than to search
        for size, start in zip(self._sizes.tolist(), self._offsets.tolist(), strict=False):
            one = faiss.OnDiskOneList()
            one.size = one.capacity = size
            one.offset = start
            lists.lists.push_back(one)
        with faiss_errors():
            lists.do_mmap()
        return lists

    @classmethod
    def build(cls, rows: Rows, recipe: Recipe, path: Path) -> Self:
        faiss = library()
        rotation = faiss.HadamardRotation(rows.d, SEED)
        nlist, x = lists_and_sample(rows, recipe)
        ivf = faiss.IndexIVFRaBitQ(faiss.IndexFlatL2(rotation.d_out), rotation.d_out, nlist, faiss.METRIC_L2)
        same_centres(ivf)
        coarse = faiss.IndexPreTransform(rotation, ivf)
        with faiss_errors():
            coarse.train(x)
        head = serialised(coarse)
        return cls(rows, recipe, head, _written(coarse, rows, 0, path, None), path.parent)

    def extended(self, rows: Rows, path: Path) -> Self:
        facts = _written(opened(self.head), rows, self.rows.ntotal, path, self)
        return type(self)(rows, self.recipe, self.head, facts, path.parent)

    def _scanned(self, chosen: np.ndarray | None, effort: int) -> tuple[Any, Any]:
        probes = min(self.recipe.probes * effort, self._ivf.nlist)
        return self._coarse, parameters(library().IVFRaBitQSearchParameters, self.recipe, chosen, nprobe=probes)

    def outgrown(self, n: int) -> bool:
        return not self.recipe.lists and lists_for(n) >= GROWTH * self._ivf.nlist


def lists_and_sample(rows: Rows, recipe: Recipe) -> tuple[int, np.ndarray]:
    """Into how many lists the rows are divided, and those (m, d) float32 that k-means sees."""
    nlist = min(recipe.lists or lists_for(rows.ntotal), rows.ntotal)
    return nlist, rows.sample(_SAMPLE * nlist)


def same_centres(ivf: Any) -> None:
    """Have k-means find the same centres for the same rows, of however few of them."""
    ivf.cp.niter, ivf.cp.seed, ivf.cp.min_points_per_centroid = _ROUNDS, SEED, 1


def _written(coarse: Any, rows: Rows, start: int, path: Path, before: Ivf | None) -> dict[str, Any]:
    """Facts of a new file with the lists of `before` and, behind those of each, the rows from `start` on."""
    faiss = library()
    ivf = faiss.downcast_index(coarse.index)
    for at, x in rows.blocks(start, BLOCK):
        with faiss_errors():
            coarse.add_with_ids(x, np.arange(at, at + len(x)))
    lists = ivf.invlists
    sizes = [lists.list_size(n) for n in range(ivf.nlist)]

    def parts() -> Iterator[np.ndarray]:
        earlier = before._lists() if before is not None else iter(())
        for n, size in enumerate(sizes):
            codes, ids = next(earlier, (np.empty((0, ivf.code_size), np.uint8), np.empty(0, np.int64)))
            yield codes
            if size:
                yield faiss.rev_swig_ptr(lists.get_codes(n), size * ivf.code_size)
            yield ids
            if size:
                yield faiss.rev_swig_ptr(lists.get_ids(n), size)

    codes = path.with_name(f"{path.name}.codes")
    _, crc32 = column.append(codes, parts())
    total = [size + (before._sizes[n] if before is not None else 0) for n, size in enumerate(sizes)]
    return {"codes": codes.name, "codes_crc32": crc32, "lists": [int(size) for size in total]}
