"""Rows on GPUs that are linked to near ones (CAGRA): a search walks along the links, many of them at a time."""

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from e5v_search.index.base import Found, merged
from e5v_search.index.coded import threads
from e5v_search.index.gpu import Finder, OnGpus, flat
from e5v_search.index.library import gpus_of_faiss, library, reason
from e5v_search.index.recipe import Recipe
from e5v_search.index.rows import Rows
from e5v_search.index.scan import opened, serialised
from e5v_search.index.sealed import IndexDamaged

_LEAST = 10_000  # rows that are worth links; fewer are soon scanned
_NEWER = 4  # one in so many rows may be without links before all are linked anew
_STEP = 32  # rows kept in view come in so many at a time

_log = logging.getLogger(__name__)


class OnGpuCagra(OnGpus):
    """The links are in the file, those of each GPU's rows by themselves. CAGRA cannot be added to: rows that are newer than
    the links, and all where FAISS has no CAGRA, are scanned on the GPUs."""

    kind: ClassVar[str] = "gpu-cagra"
    most: ClassVar[int] = 512  # rows kept in view, of which a search can return
    may_miss: ClassVar[float] = 0.5

    def __init__(self, rows: Rows, recipe: Recipe, head: bytes, facts: dict[str, Any], folder: Path) -> None:
        super().__init__(rows, recipe, head, facts, folder)
        self._graphs: list[tuple[int, Any]] = []  # first row, and the links as FAISS has them for a processor
        start = at = 0
        for n, size in facts["graphs"]:
            links = opened(head[at : at + size], library().IO_FLAG_SKIP_STORAGE)
            if links.ntotal != n or start + n > rows.ntotal:
                raise IndexDamaged("its links do not belong to its rows")
            along = rows.part(slice(start, start + n)).index
            # FAISS itself keeps nothing but the address
            links.storage, links.own_fields, links.referenced_objects = along, False, [along]
            self._graphs.append((start, links))
            start, at = start + n, at + size
        self._linked = start

    @classmethod
    def build(cls, rows: Rows, recipe: Recipe, path: Path) -> Self:
        graphs = _graphs(rows, recipe)
        heads = [serialised(links, library().IO_FLAG_SKIP_STORAGE) for links in graphs]
        parts = [[links.ntotal, len(head)] for links, head in zip(graphs, heads, strict=True)]
        return cls(rows, recipe, b"".join(heads), {"graphs": parts, "built": rows.ntotal}, path.parent)

    def bring(self, gpus: int) -> Finder:
        rows, linked, most = self.rows, self._linked, self.most
        newer = rows.ntotal - linked
        scan = flat(rows.part(slice(linked, rows.ntotal)), gpus) if newer else None
        if scan is not None and not linked:
            return scan
        parts = [(start, _on_gpu(n % gpus, links)) for n, (start, links) in enumerate(self._graphs)]

        def find(xq: np.ndarray, width: int, effort: int, recipe: Recipe) -> Found:
            in_view = -(-min(max(recipe.ef * effort, width), most) // _STEP) * _STEP
            walk = partial(_walk, halves=xq.astype(np.float16), width=width, in_view=in_view)
            found = rows.ranked(xq, np.concatenate(list(threads(len(parts)).map(walk, parts)), axis=1), width)
            if scan is None:
                return found
            D, I = scan(xq, min(width, newer), effort, recipe)  # noqa: E741
            return merged(found, (D, np.where(I < 0, -1, I + linked)), width)

        return find

    def outgrown(self, n: int) -> bool:
        built = int(self.facts["built"])
        return n >= _LEAST and n > built + built // _NEWER


def _graphs(rows: Rows, recipe: Recipe) -> list[Any]:
    """Links among the rows of each GPU's share; none where they are few, or cannot be made."""
    gpus = gpus_of_faiss()
    if rows.ntotal < _LEAST * max(gpus, 1):
        return []
    if not gpus:
        _log.warning("there is no GPU that FAISS can use: the index has no links until it is rebuilt where there is one")
        return []
    ends = np.linspace(0, rows.ntotal, gpus + 1).astype(int).tolist()
    shares = [rows.part(slice(start, stop)) for start, stop in pairwise(ends)]
    try:
        with ThreadPoolExecutor(gpus) as builders:
            return list(builders.map(lambda gpu: _links(gpu, shares[gpu], recipe), range(gpus)))
    except Exception as error:  # FAISS without cuVS has no CAGRA
        _log.warning("rows cannot be linked on the GPU (%s): the index has no links", reason(error))
        return []


def _links(gpu: int, rows: Rows, recipe: Recipe) -> Any:
    """Links among rows, made on a GPU, as FAISS has them for a processor.

    By L2: FAISS's own test of the inner product of half precision is left out because it never ends.
    """
    faiss = library()
    config = faiss.GpuIndexCagraConfig()
    config.device, config.graph_degree, config.intermediate_graph_degree = gpu, 2 * recipe.links, 4 * recipe.links
    index = faiss.GpuIndexCagra(faiss.StandardGpuResources(), rows.d, faiss.METRIC_L2, config)
    index.train(rows.codes.view(np.float16), numeric_type=faiss.Float16)
    return faiss.index_gpu_to_cpu(index)


def _on_gpu(gpu: int, links: Any) -> Any:
    """The same links on a GPU, and the rows that they lead along."""
    faiss = library()
    config = faiss.GpuIndexCagraConfig()
    config.device = gpu
    index = faiss.GpuIndexCagra(faiss.StandardGpuResources(), links.d, faiss.METRIC_L2, config)
    index.copyFrom_ex(links, faiss.Float16)
    return index


def _walk(part: tuple[int, Any], halves: np.ndarray, width: int, in_view: int) -> np.ndarray:
    """Places (nq, width) of what is found along the links of a part, with so many rows in view."""
    start, index = part
    parameters = library().SearchParametersCagra(itopk_size=in_view)
    _, I = index.search(halves, width, params=parameters, numeric_type=library().Float16)  # noqa: E741
    return np.where(I < 0, -1, I + start)
