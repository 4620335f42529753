"""A collection in two dimensions, as a page to look at, and how far its kinds of items lie apart."""

from e5v_search.map.draw import Map, draw_map
from e5v_search.map.project import METHODS

__all__ = ["METHODS", "Map", "draw_map"]
