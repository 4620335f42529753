"""Ingest, search, rebuild, verify: the only place where catalog meets index."""

from e5v_search.collection.core import Collection, check_first_run
from e5v_search.collection.report import Failure, Report
from e5v_search.collection.sources import canonical
from e5v_search.collection.space import Space
from e5v_search.collection.watch import Follower
from e5v_search.hits import Hit, Hits

__all__ = [
    "Collection",
    "Failure",
    "Follower",
    "Hit",
    "Hits",
    "Report",
    "Space",
    "canonical",
    "check_first_run",
]
