"""Milvus as an index: rows and facts on a server, or in a file of milvus-lite, for which the catalog stays the truth."""

from e5v_search.index.milvus.held import MilvusIndex, Source, check
from e5v_search.index.milvus.place import Place

__all__ = ["MilvusIndex", "Place", "Source", "check"]
