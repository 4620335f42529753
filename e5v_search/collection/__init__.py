"""Ingest, search, rebuild, verify: the only place where catalog meets index."""

from e5v_search.collection.core import Collection, ModelChoice
from e5v_search.collection.report import Failure, Hit, Hits, Report
from e5v_search.collection.space import Space
from e5v_search.collection.watch import Follower

__all__ = ["Collection", "Failure", "Follower", "Hit", "Hits", "ModelChoice", "Report", "Space"]
