"""Rows in the memory of GPUs, a part on each, scanned whole: as exact as on a processor, as quick as they read."""

import logging
import threading
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from e5v_search.index.base import Found
from e5v_search.index.library import faiss_errors, library
from e5v_search.index.recipe import Recipe
from e5v_search.index.rows import Rows, search
from e5v_search.index.scan import BLOCK, Scan

_MOST = 2048  # results of a search that FAISS gives on a GPU
_MARGIN = 16  # more than asked for: half precision may order equals in another way than the rows themselves

_log = logging.getLogger(__name__)


class OnGpu(Scan):
    """Nothing is in a file: the rows go to the GPUs when it is opened. Without one they are scanned where they are."""

    kind: ClassVar[str] = "gpu"
    filters: ClassVar[bool] = False  # FAISS takes none there

    def __init__(self, rows: Rows, recipe: Recipe, head: bytes, facts: dict[str, Any], folder: Path) -> None:
        super().__init__(rows, recipe, head, facts, folder)
        self._held = _on_gpus(rows)
        self._one = threading.Lock()  # a GPU's index is not made for two searches at a time

    @classmethod
    def build(cls, rows: Rows, recipe: Recipe, path: Path) -> Self:
        return cls(rows, recipe, b"", {}, path.parent)

    def extended(self, rows: Rows, path: Path) -> Self:
        return type(self)(rows, self.recipe, self.head, self.facts, path.parent)

    def search(self, xq: np.ndarray, width: int, chosen: np.ndarray | None, effort: int) -> Found:
        asked = min((width + _MARGIN) * effort, self.rows.ntotal)
        if self._held is None or asked > _MOST:
            return search(self.rows.index, xq, width, chosen)
        with self._one, faiss_errors():
            _, near = self._held.search(xq, asked)
        return self.rows.ranked(xq, near if chosen is None else np.where(chosen[near], near, -1), width)


def _on_gpus(rows: Rows) -> Any:
    """The rows in half precision, shared out among all GPUs; None, and a line in the log, where they do not go."""
    faiss = library()
    gpus = faiss.get_num_gpus()
    if not gpus:
        _log.warning("there is no GPU that FAISS can use: the rows of the index are scanned on the processor")
        return None
    ends = np.linspace(0, rows.ntotal, gpus + 1).astype(int).tolist()
    parts = faiss.IndexShards(rows.d, True, True)  # a thread each, and numbered on from one to the next
    try:
        for gpu in range(gpus):
            part = _flat(gpu, rows.d)
            for start in range(ends[gpu], ends[gpu + 1], BLOCK):
                part.add(rows.decoded(start, min(start + BLOCK, ends[gpu + 1])))
            parts.add_shard(part)
    except RuntimeError as error:
        first = str(error).partition("\n")[0]
        _log.warning("the rows of the index do not go onto the GPU (%s): they are scanned on the processor", first)
        return None
    return parts


def _flat(gpu: int, d: int) -> Any:
    """An empty exact index of half precision on one GPU, which keeps what it needs there."""
    faiss = library()
    config = faiss.GpuIndexFlatConfig()
    config.device, config.useFloat16 = gpu, True
    resources = faiss.StandardGpuResources()
    index = faiss.GpuIndexFlatIP(resources, d, config)
    index.resources = resources
    return index
