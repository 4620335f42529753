"""The language of `--where`: which items a search may return. docs/filters.md is its description for users.

    parse(["kind=image", "taken>=2023-05 and not camera~canon"])  ->  one Filter, a tree of frozen dataclasses

What a filter means is written down once more in SQL by `catalog.where`; nothing here knows of a database.
"""

from e5v_search.filters.geo import box, distance
from e5v_search.filters.globs import quoted
from e5v_search.filters.grammar import parse
from e5v_search.filters.tree import CHOICES, EVERYTHING, And, Choice, Compare, Fact, Filter, Has, Match, Near, Not, Or

__all__ = [
    "CHOICES",
    "EVERYTHING",
    "And",
    "Choice",
    "Compare",
    "Fact",
    "Filter",
    "Has",
    "Match",
    "Near",
    "Not",
    "Or",
    "box",
    "distance",
    "parse",
    "quoted",
]
