"""SQLite, the truth of a collection: what was found, its facts, its embeddings. The only package that knows sqlite_utils."""

from e5v_search.catalog.catalog import CATALOG, Catalog
from e5v_search.catalog.records import KINDS, VIEW, FileRow, Item, Put

__all__ = ["CATALOG", "KINDS", "VIEW", "Catalog", "FileRow", "Item", "Put"]
