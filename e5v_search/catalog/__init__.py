"""SQLite, the truth of a collection: what was found, its facts, its embeddings. The only package that knows sqlite_utils."""

from e5v_search.catalog.catalog import Catalog
from e5v_search.catalog.overview import Overview
from e5v_search.catalog.reading import Part, Reading
from e5v_search.catalog.records import KINDS, VIEW, Corpus, Failed, FileRow, Item, Put
from e5v_search.catalog.store import CATALOG

__all__ = ["CATALOG", "KINDS", "VIEW", "Catalog", "Corpus", "Failed", "FileRow", "Item", "Overview", "Part", "Put", "Reading"]
