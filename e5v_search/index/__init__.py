"""FAISS, or Milvus: the nearest rows of a collection. Derived from the catalog, and always rebuildable from it.

Three indexes behind one interface (`base.Index`): `FlatIndex` holds half-precision rows in memory and scans them all;
`MappedIndex` leaves them on the disk, finds candidates in something smaller (`onebit`, `ivf`, `hnsw`), and takes their
scores from the rows; `MilvusIndex` asks a server for candidates. A `Recipe` says which, and `by_size` chooses one where
nobody does.
"""

from e5v_search.index.base import Index, IndexDamaged, Stamp
from e5v_search.index.flat import FlatIndex
from e5v_search.index.library import faiss_problem, gpus_of_faiss
from e5v_search.index.mapped import MappedIndex
from e5v_search.index.milvus import MilvusIndex, Place, check
from e5v_search.index.recipe import KINDS, Recipe, by_size, read_recipe
from e5v_search.index.sealed import read_facts
from e5v_search.index.storage import build, load, read_stamp

__all__ = [
    "KINDS",
    "FlatIndex",
    "Index",
    "IndexDamaged",
    "MappedIndex",
    "MilvusIndex",
    "Place",
    "Recipe",
    "Stamp",
    "build",
    "by_size",
    "check",
    "faiss_problem",
    "gpus_of_faiss",
    "load",
    "read_facts",
    "read_recipe",
    "read_stamp",
]
