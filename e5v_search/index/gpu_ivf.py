"""Rows on GPUs in lists around centres: a search looks only into the lists near the query."""

import logging
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from e5v_search.index.base import Found
from e5v_search.index.gpu import MOST, Finder, OnGpus, refined, search_refined, shared_out
from e5v_search.index.ivf import GROWTH, lists_and_sample, same_centres
from e5v_search.index.library import faiss_errors, gpus_of_faiss, library, reason
from e5v_search.index.recipe import Recipe, lists_for
from e5v_search.index.rows import Rows
from e5v_search.index.scan import opened, serialised

_log = logging.getLogger(__name__)


class OnGpuIvf(OnGpus):
    """The centres are in the file, as FAISS's index for a processor that holds no rows yet; each GPU gives its rows their lists
    as they come. By L2, which serves rows of length 1 better than the inner product does."""

    kind: ClassVar[str] = "gpu-ivf"
    may_miss: ClassVar[float] = 0.5  # a wrong numbering misses nearly all, few probes of many lists far less

    def __init__(self, rows: Rows, recipe: Recipe, head: bytes, facts: dict[str, Any], folder: Path) -> None:
        super().__init__(rows, recipe, head, facts, folder)
        self._centres = opened(head)

    @classmethod
    def build(cls, rows: Rows, recipe: Recipe, path: Path) -> Self:
        faiss = library()
        nlist, x = lists_and_sample(rows, recipe)
        half = faiss.ScalarQuantizer.QT_fp16
        centres = faiss.IndexIVFScalarQuantizer(faiss.IndexFlatL2(rows.d), rows.d, nlist, half, faiss.METRIC_L2, False)
        same_centres(centres)
        _train(centres, x)
        return cls(rows, recipe, serialised(centres), {}, path.parent)

    def bring(self, gpus: int) -> Finder:
        nlist = self._centres.nlist
        refine = refined(shared_out(self.rows, gpus, lambda gpu: _ivf(gpu, self._centres)), self.rows)

        def find(xq: np.ndarray, width: int, effort: int, recipe: Recipe) -> Found:
            probes = min(recipe.probes * effort, nlist, MOST)
            return search_refined(refine, xq, width, library().SearchParametersIVF(nprobe=probes))

        return find

    def outgrown(self, n: int) -> bool:
        return not self.recipe.lists and lists_for(n) >= GROWTH * int(self._centres.nlist)


def _train(centres: Any, x: np.ndarray) -> None:
    """k-means, on GPUs where there are any."""
    if gpus_of_faiss():
        try:
            nearest = _nearest(centres.d)
            centres.clustering_index = nearest  # FAISS keeps no more than its address
            centres.train(x)
            return
        except Exception as error:
            _log.warning("k-means failed on the GPU (%s): the processor does it", reason(error))
            centres.quantizer.reset()
        finally:
            centres.clustering_index = None
    with faiss_errors():
        centres.train(x)


def _nearest(d: int) -> Any:
    """An index that gives rows their centres while these are sought, on all GPUs."""
    faiss = library()
    return faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(d))


def _ivf(gpu: int, centres: Any) -> Any:
    """The same index on one GPU."""
    faiss = library()
    config = faiss.GpuIndexIVFScalarQuantizerConfig()
    config.device = gpu
    return faiss.GpuIndexIVFScalarQuantizer(faiss.StandardGpuResources(), centres, config)
